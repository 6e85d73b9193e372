"""Atomic writing, with real full disks (a file size limit), signals and competitors."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from warm_process import script

from bnsurgery.errors import CheckpointError
from bnsurgery.files.writing import atomic_write, check_writable


def on_a_full_disk(target, write):
    """Runs `write` on the temporary file in a process whose files may not grow beyond 1000 bytes; its message.

    A process of its own, because the limit would hold for the file that pytest's report may be going to as well.
    """
    code = (
        "import resource, sys; from bnsurgery.errors import CheckpointError; "
        "from bnsurgery.files.writing import atomic_write\n"
        "import torch; from safetensors.torch import save_file\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    with atomic_write(sys.argv[1], overwrite=True) as temporary:\n"
        f"        {write}\n"
        "except CheckpointError as error:\n"
        "    print(error)\n"
        "else:\n"
        "    sys.exit('written')\n"
    )
    exit_code, message, errors = script(target.parent, code, target)
    assert exit_code == 0, errors
    return message


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_write_puts_the_file_there_at_the_end_only(tmp_path):
    target = tmp_path / "a.bin"
    with atomic_write(target, overwrite=False) as temporary:
        temporary.write_bytes(b"new")
        assert temporary.parent.parent == tmp_path
        assert temporary.parent.name.startswith(".")
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


def test_write_survives_a_writer_that_renames(tmp_path):
    """The library puts a new file over the temporary one, readable by its owner only: the umask shall decide."""
    target = tmp_path / "a.safetensors"
    with atomic_write(target, overwrite=False) as temporary:
        save_file({"w": torch.arange(4.0)}, temporary)
    assert torch.equal(load_file(target)["w"], torch.arange(4.0))
    by_open = tmp_path / "plain"
    by_open.touch()
    assert target.stat().st_mode == by_open.stat().st_mode


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path, exception):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with pytest.raises(exception), atomic_write(target, overwrite=True) as temporary:
        temporary.write_bytes(b"half")
        raise exception
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_overwrite_replaces(tmp_path):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with atomic_write(target, overwrite=True) as temporary:
        temporary.write_bytes(b"new")
    assert target.read_bytes() == b"new"


def test_a_file_that_is_replaced_keeps_who_may_read_it(tmp_path):
    target = tmp_path / "a.safetensors"
    target.touch(mode=0o600)
    with atomic_write(target, overwrite=True) as temporary:
        save_file({"w": torch.arange(4.0)}, temporary)
    assert target.stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_what_a_killed_writer_of_tensors_leaves_is_removed(tmp_path):
    """Safetensors writes to a name of its own, beside the one it is given."""
    code = (
        "import os, sys, torch; from safetensors.torch import save_file; "
        "from bnsurgery.files.writing import atomic_write\n"
        "with atomic_write(sys.argv[1], overwrite=True) as temporary:\n"
        "    (temporary.parent / '.tmpAbCdEf').write_bytes(bytes(1000)); os.kill(os.getpid(), 9)\n"
    )
    target = tmp_path / "a.safetensors"
    assert script(tmp_path, code, target)[0] == -signal.SIGKILL
    assert names(tmp_path) != []
    with atomic_write(target, overwrite=True) as temporary:
        temporary.write_bytes(b"new")
    assert names(tmp_path) == ["a.safetensors"]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path):
    target = tmp_path / "a.bin"
    with (
        pytest.raises(CheckpointError, match=r"a\.bin.*existing file.*`overwrite=True`"),
        atomic_write(target, overwrite=False) as temporary,
    ):
        temporary.write_bytes(b"ours")
        target.write_bytes(b"theirs")
    assert target.read_bytes() == b"theirs"
    assert names(tmp_path) == ["a.bin"]


def test_of_two_writers_one_wins(tmp_path):
    target = tmp_path / "a.bin"
    with pytest.raises(CheckpointError, match="existing file"), atomic_write(target, overwrite=False) as outer:
        outer.write_bytes(b"second")
        with atomic_write(target, overwrite=False) as inner:
            assert inner != outer
            inner.write_bytes(b"first")
    assert target.read_bytes() == b"first"
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "write", ["temporary.write_bytes(bytes(2000))", "save_file({'w': torch.zeros(1000)}, temporary)"]
)
def test_a_full_disk(tmp_path, write):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    message = on_a_full_disk(target, write)
    assert re.search(r"a\.bin.*File too large", message)
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_interrupted_by_a_signal(tmp_path):
    """Ctrl-C in another process, in the middle of writing."""
    script = (
        "import signal, sys, time; from bnsurgery.files.writing import atomic_write\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "with atomic_write(sys.argv[1], overwrite=True) as temporary:\n"
        "    temporary.write_bytes(b'half'); print('ready', flush=True); time.sleep(60)\n"
    )
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    command = [sys.executable, "-c", script, target]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
    assert b"KeyboardInterrupt" in error
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "a.bin"
    link.symlink_to(tmp_path / "disk" / "b.bin")
    for overwrite in (False, True):
        with atomic_write(link, overwrite=overwrite) as temporary:
            temporary.write_bytes(b"new")
        assert link.is_symlink()
        assert (tmp_path / "disk" / "b.bin").read_bytes() == b"new"
    with pytest.raises(CheckpointError, match="existing file"), atomic_write(link, overwrite=False):
        pass


def test_check_leaves_no_trace(tmp_path):
    check_writable(tmp_path / "a.bin", overwrite=False)
    assert names(tmp_path) == []
    (tmp_path / "a.bin").write_bytes(b"old")
    check_writable(tmp_path / "a.bin", overwrite=True)
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_a_bare_file_name_is_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_writable("a.bin", overwrite=False)
    with atomic_write("a.bin", overwrite=False) as temporary:
        temporary.write_bytes(b"new")
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("file", r"file': got an existing file.*`overwrite=True`"),
        ("folder", "folder': got a directory"),
        ("missing/a.bin", r"missing/a\.bin': got no directory '.*missing'.*Create it"),
        ("file/a.bin", r"file/a\.bin': Not a directory"),
        ("x" * 300, "File name too long"),
        ("pipe", "pipe': got a device or pipe"),
    ],
)
def test_refusals(tmp_path, path, message):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = names(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        check_writable(tmp_path / path, overwrite=False)
    with pytest.raises(CheckpointError, match=message), atomic_write(tmp_path / path, overwrite=False):
        pytest.fail("the block ran")
    assert names(tmp_path) == before
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize("path", ["folder", "pipe"])
def test_overwriting_replaces_files_only(tmp_path, path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match=path):
        check_writable(tmp_path / path, overwrite=True)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs Linux's /proc")
def test_a_directory_that_takes_no_file_even_from_root():
    with pytest.raises(CheckpointError, match=r"write: '/proc/a\.bin'"):
        check_writable("/proc/a.bin", overwrite=False)


def test_files_does_not_import_torch():
    script = "import sys, bnsurgery.files.writing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
