"""What runs where parts of POSIX are missing, as on Windows and macOS; neither can be run here."""

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_task import patterns

from bnsurgery import finetune
from bnsurgery.finetune.loading import Prepared, _leave_signals_to_the_parent
from bnsurgery.images.preprocessing import Preprocessing
from bnsurgery.machine import system
from bnsurgery.records.record import Task

ROOT = Path(__file__).resolve().parents[2]
POSIX_ONLY = "fcntl grp posix pty pwd resource syslog termios tty"
# Imported before all is hidden: psutil needs `resource` on Linux, torch `register_at_fork`, filelock 3.30 `link`. All
# else that we use, and all of ours, is imported with everything below gone. os.name stays "posix", for the standard
# library's sake.
WITHOUT = f"""
import os, signal, sys
import psutil
for name in "{POSIX_ONLY}".split():
    if name != "posix":  # which is `os` itself here
        sys.modules[name] = None
import filelock, torch
for module, names in (
    (os, "chown fchmod fchown fork forkpty getegid geteuid getgid getpgid getuid killpg link mkfifo nice O_CLOEXEC "
         "O_DIRECTORY O_NOFOLLOW O_NONBLOCK pread register_at_fork sched_getaffinity setpgid setsid statvfs"),
    (signal, "alarm pthread_sigmask setitimer SIGALRM SIGCHLD SIGHUP SIGQUIT SIGUSR1"),
):
    for name in names.split():
        delattr(module, name)
"""
WORK = """
import warnings
sys.path.insert(0, sys.argv[1])
from tiny_task import patterns, tiny
import bnsurgery
from bnsurgery import finetune
from bnsurgery.cli import main
from bnsurgery.finetune.loading import default_workers
from bnsurgery.files.writing import only_process_in
from bnsurgery.machine.system import processors
from pathlib import Path

net, images = tiny(), patterns(8, 1)[0] / 255
bn = bnsurgery.insert(net, [images])
bnsurgery.save(bn, "net.safetensors")
back = bnsurgery.load("net.safetensors", model=tiny())
with torch.no_grad():
    assert torch.equal(back(images), net(images))
    assert torch.equal(bnsurgery.fold(back)(images), net(images))
with only_process_in(Path(), "folder", ()):
    pass
config = finetune.Config(
    data="digits", output="run", image_size=8, normalize="none", limit=64, epochs=1, batch_size=16, num_workers=0
)
result = finetune.run(config, model=tiny())
assert result.rows[-1].step == 4, result
assert processors() == os.cpu_count() and default_workers() >= 0
try:
    main(["verify", "net.safetensors", "--device", "mps"])
except SystemExit as error:
    assert error.code == 1
print(*sorted(path.name for path in Path().iterdir()))
"""


@pytest.mark.slow
def test_all_of_it_runs_without_what_only_posix_has(tmp_path):
    """Insert, save, load, fold, fine-tune an epoch."""
    command = [sys.executable, "-c", WITHOUT + WORK, str(ROOT / "tests")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "net.safetensors run\n"  # no lock, no temporary file
    assert "Use one that it finds: cpu" in done.stderr


def module_level(tree):
    """The nodes that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield node
            yield from module_level(node)


def wrong_imports(tree):
    """What is imported at module level and missing somewhere: of POSIX, and of torch built without distributed."""
    for node in module_level(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] in POSIX_ONLY.split() or (
                name.startswith("torch.distributed.") and name != "torch.distributed.ProcessGroup"
            ):
                yield name


def test_no_module_imports_what_some_systems_lack():
    files = [*(ROOT / "bnsurgery").rglob("*.py"), *(ROOT / "cli").glob("*.py")]
    found = {path.name: list(wrong_imports(ast.parse(path.read_text(encoding="utf-8")))) for path in files}
    assert len(files) > 90
    assert not {name: imports for name, imports in found.items() if imports}
    for line in ("import fcntl", "if x:\n import resource", "from torch.distributed.distributed_c10d import _f"):
        assert list(wrong_imports(ast.parse(line)))  # the test sees what it looks for


def test_text_is_read_and_written_in_utf8_with_the_same_line_ends_everywhere():
    """Else Windows writes its own encoding, and carriage returns."""
    for path in [*(ROOT / "bnsurgery").rglob("*.py"), *(ROOT / "cli").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
            given = {keyword.arg for keyword in node.keywords} if called else set()
            wanted = {"write_text": {"encoding", "newline"}, "read_text": {"encoding"}}.get(called, set())
            assert wanted <= given, f"{path.name}:{node.lineno}: {called} without {wanted - given}"


def test_what_processes_that_read_images_are_handed_can_be_spawned():
    """On macOS and Windows they are, and get everything pickled; on Linux they are forked."""
    data = finetune.from_tensors(patterns(8, 1), patterns(8, 2), ["nw", "ne", "sw", "se"])
    task = Task(data.classes, None, Preprocessing(8, 8, 8, (0.5,), (0.25,), channels="grey"))
    prepared = Prepared(data.limited(4, 0).train, task, "crop", 0)
    image, label = pickle.loads(pickle.dumps(prepared))[2, 1]
    assert torch.equal(image, prepared[2, 1][0]) and label == prepared[2, 1][1]
    assert pickle.loads(pickle.dumps(_leave_signals_to_the_parent)) is _leave_signals_to_the_parent


def test_words_are_quoted_for_the_shell_at_hand(monkeypatch):
    assert system.quote("a b") == "'a b'"
    monkeypatch.setattr(system, "WINDOWS", True)  # neither cmd.exe nor PowerShell needs quotes for a backslash
    words = [r"runs\a", "a b", "net.py:f&calc", "$(calc)", ""]
    assert list(map(system.quote, words)) == [r"runs\a", '"a b"', '"net.py:f&calc"', '"?(calc)"', '""']
