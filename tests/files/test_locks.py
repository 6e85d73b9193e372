"""One writer at a time, with real processes that hold, die and fork."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from bnsurgery.cli import main
from bnsurgery.errors import CheckpointError
from bnsurgery.files.locks import locked
from bnsurgery.files.writing import atomic_write, claimed, only_process_in

pytestmark = pytest.mark.slow

HOLDING = (
    "import sys, time; "
    "from bnsurgery.files.writing import atomic_write, claimed, only_process_in; from pathlib import Path\n"
    "with {}:\n"
    "    print('ready', flush=True); time.sleep(120)\n"
)


@contextmanager
def another_process(block, *args):
    """A process that is inside of the `with` block, until the test is done with it."""
    command = [sys.executable, "-c", HOLDING.format(block), *map(str, args)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


@pytest.mark.parametrize("block", ["claimed(sys.argv[1], overwrite=True)", "atomic_write(sys.argv[1], overwrite=True)"])
def test_the_second_to_write_a_file_is_told_who_writes_it(tmp_path, block):
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"old")
    with another_process(block, target) as process:
        message = rf"out\.safetensors': process {process.pid} on \S+ is writing it\. Wait"
        with pytest.raises(CheckpointError, match=message), claimed(target, overwrite=True):
            pytest.fail("both claimed it")
        with pytest.raises(CheckpointError, match=message), atomic_write(target, overwrite=True):
            pytest.fail("both write it")
        with atomic_write(tmp_path / "other", overwrite=False) as temporary:  # the folder is free
            temporary.write_bytes(b"new")
    assert target.read_bytes() == b"old"


def test_a_killed_writer_is_no_obstacle_and_what_it_left_is_removed(tmp_path):
    target = tmp_path / "out.safetensors"
    with another_process("atomic_write(sys.argv[1], overwrite=True) as t, t.open('w') as f", target) as process:
        pass
    assert process.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 3  # its lock, and its temporary file in a folder
    with atomic_write(tmp_path / "other", overwrite=False):
        pass
    assert len(names(tmp_path)) == 4  # what belongs to another file is left alone
    with atomic_write(target, overwrite=False) as temporary:
        temporary.write_bytes(b"new")
    assert names(tmp_path) == ["other", "out.safetensors"]


def test_a_file_that_only_looks_like_a_lock_is_none(tmp_path):
    """Of a process id that another process has got meanwhile."""
    (tmp_path / "lock").write_text(f"process {os.getppid()} on here\n")
    with locked(tmp_path / "lock"):
        assert (tmp_path / "lock").read_text().strip().startswith(f"process {os.getpid()} on ")
    assert names(tmp_path) == []


def test_a_folder_belongs_to_one_process(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with (
        another_process("only_process_in(Path(sys.argv[1]), 'run', ())", run) as process,
        pytest.raises(CheckpointError, match=rf"run '.*run': process {process.pid} on \S+ is at work in it"),
        only_process_in(run, "run", ()),
    ):
        pytest.fail("both are in it")
    with only_process_in(run, "run", ()):
        pass
    assert names(run) == []


def test_tidying_a_folder_spares_what_another_process_is_writing(tmp_path):
    """Such as an export of a run that goes on."""
    (tmp_path / "last").mkdir()
    with another_process("atomic_write(sys.argv[1], overwrite=True)", tmp_path / "last" / "dead"):
        pass
    with another_process("atomic_write(sys.argv[1], overwrite=True)", tmp_path / "last" / "alive"):
        assert len(names(tmp_path)) == 7
        with only_process_in(tmp_path, "run", ()):
            assert len(names(tmp_path)) == 5  # the folder, its lock, and the live lock and temporary file


def test_tidying_a_folder_spares_what_another_thread_is_writing(tmp_path):
    with atomic_write(tmp_path / "export", overwrite=False) as temporary, only_process_in(tmp_path, "run", ()):
        temporary.write_bytes(b"new")
    assert (tmp_path / "export").read_bytes() == b"new"


def test_a_folder_from_a_stranger_cannot_have_files_elsewhere_written(tmp_path):
    """Links in the place of locks and files, and names of locks that would match too much."""
    precious, run = tmp_path / "precious", tmp_path / "run"
    precious.write_bytes(b"mine")
    run.mkdir()
    for name in (".bnsurgery-folder.lock", "config.json"):
        (run / name).symlink_to(precious)
        with pytest.raises(CheckpointError, match="run'"), only_process_in(run, "run", ("*.json",)):
            pytest.fail("a link was followed")
        (run / name).unlink()
    for name in (".bnsurgery-**.lock", ".bnsurgery-[0-9a-f]*.lock", ".bnsurgery-0123456789ab.lock"):
        (run / name).symlink_to(precious)
    with only_process_in(run, "run", ("*.json",)):
        assert precious.read_bytes() == b"mine"
    os.link(precious, run / ".bnsurgery-0123456789ab.lock.hard")
    with pytest.raises(OSError, match="no lock"), locked(run / ".bnsurgery-0123456789ab.lock.hard"):
        pytest.fail("a file of value was taken for a lock")
    assert precious.read_bytes() == b"mine"


@pytest.mark.skipif(os.getuid() != 0, reason="needs to be root, to be two users")
def test_another_users_lock():
    """In a shared folder: a stale one is taken over, a live one names its holder."""
    script = (
        "import os, sys; from pathlib import Path; from bnsurgery.files.locks import locked\n"
        "os.setgroups([]); os.setgid(12345); os.setuid(12345)\n"
        "with locked(Path(sys.argv[1])): print('held')\n"
    )
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        Path(folder).chmod(0o777)
        lock = Path(folder).resolve() / "lock"
        command = [sys.executable, "-c", script, lock]
        with locked(lock):
            found = subprocess.run(command, capture_output=True, text=True, check=False)
            assert f"process {os.getpid()} on" in found.stderr
        lock.write_text("process 1 on here\n")
        lock.chmod(0o644)
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        assert found.stdout == "held\n", found.stderr


def test_within_a_process_it_can_be_held_as_often_as_wanted(tmp_path):
    cleaned = []
    lock = tmp_path / "lock"
    with locked(lock, cleaned.append), locked(lock, lambda path: cleaned.append("again")):
        assert cleaned == [lock]
    assert names(tmp_path) == []


def test_a_forked_child_does_not_hold_what_its_parent_holds(tmp_path):
    """It is refused, its end frees nothing, and it keeps nothing when its parent is gone."""
    script = (
        "import os, sys, time; from pathlib import Path; from bnsurgery.files.locks import LockedError, locked\n"
        "path = Path(sys.argv[1])\n"
        "with locked(path):\n"
        "    for seconds in (0, 120):\n"
        "        if os.fork() == 0:\n"
        "            try:\n"
        "                with locked(path): print('held', flush=True)\n"
        "            except LockedError as error: print(error, flush=True)\n"
        "            time.sleep(seconds); os._exit(0)\n"
        "        if not seconds: os.wait()\n"
        "    sys.stdin.readline(); os._exit(9)\n"  # as if killed: the second child lives on
    )
    command = [sys.executable, "-c", script, tmp_path / "lock"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as parent:
        try:
            assert [parent.stdout.readline().split(" on ")[0] for _ in range(2)] == [f"process {parent.pid}"] * 2
            parent.stdin.close()
            assert parent.wait() == 9
            with locked(tmp_path / "lock"):
                pass
        finally:
            os.killpg(parent.pid, signal.SIGKILL)


def test_threads_share_it_until_the_last_is_done(tmp_path):
    inside, leave = threading.Barrier(3), threading.Event()

    def hold():
        with locked(tmp_path / "lock"):
            inside.wait()
            leave.wait()

    threads = [threading.Thread(target=hold) for _ in range(2)]
    for thread in threads:
        thread.start()
    inside.wait()
    assert names(tmp_path) == ["lock"]
    leave.set()
    for thread in threads:
        thread.join()
    assert names(tmp_path) == []


def test_a_command_is_refused_before_it_works(tmp_path, capfd):
    """Not after an hour of calibration."""
    target = tmp_path / "out.safetensors"
    with another_process("claimed(sys.argv[1], overwrite=True)", target) as process:
        with pytest.raises(SystemExit, match="1"):
            main(["insert", "squeezenet1_1", "--weights", "random", "-o", str(target)])
        assert f"process {process.pid} on" in capfd.readouterr().err
    assert not target.exists()
