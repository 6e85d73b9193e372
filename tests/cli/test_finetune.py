"""Fine-tuning from the command line, killed and stopped as a user's machine would."""

import contextlib
import csv
import json
import os
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from warm_process import command

import bnsurgery
from bnsurgery.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("undrawn")]

ROOT = Path(__file__).resolve().parents[2]
NETWORK = "from tiny_task import tiny\n"
TASK = ["--model", "net.py:tiny", "--data", "images", "--image-size", "8", "--normalize", "none", "--augment", "crop"]
FAST = [*TASK, "--epochs", "3", "--batch-size", "8", "--num-workers", "0", "--lr", "0.1", "--device", "cpu"]


def filled(folder):
    """Write a network and grey images of two classes, bright and dark."""
    (folder / "net.py").write_text(NETWORK)
    generator = torch.Generator().manual_seed(0)
    for label, name in enumerate(("bright", "dark")):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(30):
            pixels = torch.randint(0, 100, (8, 8), generator=generator) + 120 * (1 - label)
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / "images" / name / f"{i}.png")
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a network and images; the working directory."""
    monkeypatch.chdir(filled(tmp_path))
    return tmp_path


@pytest.fixture
def cli(folder, capfd):
    """Run a command in that folder; returns (exit code, stdout, stderr)."""

    def run(*args):
        with pytest.raises(SystemExit) as exit_:
            main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return exit_.value.code, out, err

    return run


def start(folder, *args, launcher=(), **environment):
    """The command in a process of its own, as a user's shell would start it."""
    command = [sys.executable, *launcher, "-m", "cli", *args]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_finetune_predict_and_resume(cli, folder, monkeypatch):
    with monkeypatch.context() as terminal:
        terminal.setattr(sys.stderr, "isatty", lambda: True)
        code, out, err = cli("finetune", *FAST)
    assert code == 0, err
    best = "runs/net-images/best.safetensors"
    assert f"Next: bnsurgery predict {best} --model net.py:tiny IMAGE..." in out
    assert "statistics   " in out and "48 training and 12 validation images, 2 classes" in out
    assert "epoch 3/3" in err  # the bar
    code, out, _ = cli("predict", best, "--model", "net.py:tiny", "--json", "images/dark/3.png", "images/bright/3.png")
    found = json.loads(out)["predictions"]
    assert [p["classes"][0] for p in found] == ["dark", "bright"]
    assert all(sum(p["probabilities"]) == pytest.approx(1) for p in found)
    code, out, err = cli("predict", best, "--model", "net.py:tiny", "images", "--top", 1, "-o", "found.csv")
    assert code == 0, err
    assert "Wrote found.csv." in out and out.count("%") == 60
    rows = list(csv.DictReader(Path("found.csv").read_text().splitlines()))
    assert list(rows[0]) == ["image", "class_1", "probability_1"]
    assert [row["image"] for row in rows] == sorted(str(path) for path in Path("images").rglob("*.png"))
    assert sum(row["class_1"] == Path(row["image"]).parent.name for row in rows) > 50
    assert all(0.5 <= float(row["probability_1"]) <= 1 for row in rows)
    code, out, err = cli("predict", best, "--model", "net.py:tiny", "images", "-o", "found.csv")
    assert code == 1 and "--force" in err
    Path("images/notes.txt").touch()
    Path("images/dark/bad.png").write_bytes(b"no picture")
    code, out, err = cli("predict", best, "--model", "net.py:tiny", "images/dark", "images", "--top", 1)
    assert code == 1 and out.count("%") == 90 and "1 file passed over, no images by name: notes.txt." in out
    assert "images/dark/bad.png" in err
    Path("empty").mkdir()
    code, out, err = cli("predict", best, "--model", "net.py:tiny", "empty")
    assert code == 1 and "got no image" in err
    Path("images/dark/bad.png").unlink()
    Path("images/notes.txt").unlink()
    for suffix, words in {"folded.safetensors": ["fold"], "onnx.onnx": ["export", "--to", "onnx"]}.items():
        code, out, err = cli(*words, best, "--model", "net.py:tiny")
        assert code == 0 and f"Wrote net-images-{suffix}" in out, err
    with monkeypatch.context() as inside:
        inside.chdir("runs/net-images")
        code, out, err = cli("fold", "best.safetensors", "--model", f"{folder}/net.py:tiny")
        assert code == 0 and "Wrote net-images-folded.safetensors" in out, err
    code, _, err = cli("finetune", "--resume", "runs/net-images")
    assert code == 1 and "made by running 'net.py:tiny'" in err  # a file must not decide what code is run
    code, out, err = cli("finetune", "--resume", "runs/net-images", "--model", "net.py:tiny")
    assert code == 0 and "after 18 steps" in out
    assert "epoch" not in err  # no bar elsewhere
    code, _, err = cli("finetune", "--resume", "runs/net-images", "--model", "net.py:tiny", "--epochs", 5)
    assert code == 2 and "epochs 3, not 5" in err
    code, _, err = cli("finetune", *FAST)
    assert code == 1 and "--resume runs/net-images" in err


def test_an_architecture_is_inserted_calibrated_and_folds(cli, folder):
    options = ["--image-size", "32", "--epochs", "1", "--batch-size", "16", "--num-workers", "0", "--device", "cpu"]
    code, out, err = cli("finetune", "squeezenet1_1", "--weights", "random", "--data", "images", *options, "--quiet")
    assert (code, out) == (0, ""), err
    best = folder / "runs" / "squeezenet1_1-images" / "best.safetensors"
    model = bnsurgery.load(best)
    assert bnsurgery.record(model).architecture.num_classes == 2
    assert bnsurgery.record(model).task.classes == ("bright", "dark")
    code, out, _ = cli("fold", best, "-o", "plain.safetensors")
    assert code == 0
    assert load_file(folder / "plain.safetensors")["classifier.1.weight"].shape[0] == 2
    code, out, _ = cli("predict", best, "images/dark/0.png", "--top", 2)
    assert code == 0 and "%" in out


def test_a_network_inserted_before_tells_what_its_classes_are(cli, folder):
    code, out, err = cli("predict", "missing.safetensors", "images/dark/0.png")
    assert code == 1 and "no such file" in err
    code, _, err = cli("insert", "squeezenet1_1", "--weights", "random", "--image-size", 64, "--num-images", 4, "-q")
    assert code == 0, err
    code, out, _ = cli("predict", "squeezenet1_1-bn.safetensors", "images/dark/0.png", "--top", 1)
    assert code == 0 and out.count("%") == 1
    code, out, err = cli("predict", "squeezenet1_1-bn.safetensors", "images/none.png", "images/dark/0.png")
    assert "images/dark/0.png" in out  # the others are told all the same
    assert code == 1 and "images/none.png" in err


def test_compare_says_what_it_found_and_goes_on(cli, folder):
    args = ["compare", *FAST[:-4], "--device", "cpu", "--arms", "plain,bn", "--rates", "0.03,0.3", "--jobs", "1"]
    code, out, err = cli(*args)
    assert code == 0, err
    assert "bn is " in out and "validation" in out and "raced out" not in out
    code, out, _ = cli(*args, "--json")
    result = json.loads(out)
    assert [arm["arm"] for arm in result["arms"]] == ["plain", "bn"]
    assert Path(result["output"], "comparison.png").is_file()


ARMS = ["plain", "bn", "bn-half", "bn-naive"]
ALL_ARMS = ["compare", *FAST[:-4], "--device", "cpu", "--arms", ",".join(ARMS), "--rates", "0.1", "--jobs", "1"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A folder with a network, images and their finished comparison, which tests copy."""
    place = filled(tmp_path_factory.mktemp("compared"))
    with contextlib.chdir(place), pytest.raises(SystemExit) as exit_:
        main(ALL_ARMS)
    assert exit_.value.code == 0
    return place


@pytest.mark.parametrize("winner", ARMS)
def test_compare_recommends_the_winner_and_finetune_makes_it(winner, compared, cli, folder):
    """Finished trials are taken from the study as they are, so this says who wins."""
    shutil.copytree(compared, folder, dirs_exist_ok=True)
    with sqlite3.connect("runs/compare-net-images/study.db") as study:
        found = study.execute(
            "SELECT trial_user_attribute_id, value_json FROM trial_user_attributes WHERE key = 'result'"
        )
        for index, text in found.fetchall():
            trial = json.loads(json.loads(text))
            trial["rows"][-1]["val_accuracy"] = 0.9 if trial["arm"] == winner else 0.5
            changed = json.dumps(json.dumps(trial)), index
            study.execute("UPDATE trial_user_attributes SET value_json = ? WHERE trial_user_attribute_id = ?", changed)
    study.close()
    code, out, err = cli(*ALL_ARMS)
    next_step = shlex.split(out.rpartition("Next: bnsurgery ")[2])
    comparison = ["--from", "runs/compare-net-images"]
    assert next_step == ["finetune", *comparison, "--model", "net.py:tiny", "--num-workers", "0"]
    wanted = {"plain": "plain", "bn-naive": "bn-naive"}.get(winner)
    for wrong, text in (
        (["finetune", *comparison], "its model is made by running 'net.py:tiny': pass --model net.py:tiny again"),
        (
            [*next_step, "--batch-size", "9"],
            "the comparison was made with batch_size 8, not 9. Leave these options out",
        ),
        ([*next_step, "--lr", "0.2"], "the comparison was made with lr 0.1, not 0.2. Leave these options out"),
        ([*next_step, "--resume", "runs/x"], "leave one of them out"),
        (["finetune", "--from", "images", *next_step[3:]], "no comparison has finished there"),
    ):
        code, out, err = cli(*wrong)
        assert code in (1, 2) and text in err and not Path("runs/net-images").exists(), err
    code, out, err = cli(*next_step)
    assert code == 0, err
    best = f"runs/net-images{'-' + wanted if wanted else ''}/best.safetensors"
    assert f"Wrote {best}" in out
    config = json.loads(Path(best).with_name("config.json").read_text())["config"]
    expected = {"arm": wanted or "bn", "lr": 0.1, "epochs": 2 if winner == "bn-half" else 3, "augment": "crop"}
    assert {name: config[name] for name in expected} == expected
    Path("images/dark/1.png").unlink()
    code, out, err = cli(*next_step, "-o", "runs/other")
    assert code == 1 and "the data has changed since the comparison" in err
    code, out, err = cli("predict", best, "--model", "net.py:tiny", "images/dark/0.png")
    assert code == 0 and "dark" in out, err
    code, out, err = cli("report", best, "--model", "net.py:tiny", "--num-images", "4")
    assert (code, "nothing was inserted" in err) == ((1, True) if winner == "plain" else (0, False)), err


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["finetune", "vgg11"], 2, "--data"),
        (["finetune", *FAST[2:]], 1, "name an architecture or a file, or pass --model"),
        (["finetune", "vgg99", *FAST[2:]], 1, "vgg99"),
        (["finetune", *FAST, "--lr", "fast"], 2, "neither a number nor auto"),
        (["finetune", *FAST, "--lr", "-1"], 1, "lr: got -1.0, expected above 0 and below 1000, or auto"),
        (["finetune", *FAST, "--model", "net.py:missing"], 1, "'net.py' has no 'missing'"),
        (["finetune", *FAST, "--model", "missing.py:net"], 1, "'missing.py': no such file"),
        (["finetune", *FAST, "--model", "net"], 1, "expected package.module:factory"),
        (["finetune", *FAST, "--batch-size", "500"], 1, "pass --batch-size 48 or less"),
        (["finetune", "--resume", "nowhere"], 1, "there is no run to resume"),
        (["compare", *FAST[:-4], "--arms", "plain,best"], 1, "--arms: got 'best', expected some of plain, bn,"),
        (["compare", *FAST[:-4], "--rates", "0.1,-1"], 1, "--rates: got -1, expected numbers above 0"),
        (["compare", *FAST[:-4], "--rates", "0.1,x"], 2, "expected numbers, separated by commas"),
    ],
)
def test_wrong_use_is_explained(cli, folder, args, code, text):
    got, _, err = cli(*args)
    assert (got, text in err) == (code, True), err
    assert not (folder / "runs" / "net-images" / "best.safetensors").exists()


def test_a_damaged_image_is_named_or_left_out(cli, folder):
    (folder / "images" / "dark" / "5.png").write_bytes(b"\x89PNG broken")
    code, _, err = cli("finetune", *FAST)
    assert code == 1 and "images/dark/5.png" in err and "--skip-bad" in err
    code, out, _ = cli("finetune", *FAST, "--skip-bad", "-o", "run2")
    assert code == 0 and "left out     1 damaged image, the first: images/dark/5.png" in out


def test_other_formats_are_trained_on_and_files_passed_over_are_named(cli, folder):
    for path in (folder / "images" / "dark").iterdir():
        Image.open(path).save(path.with_suffix(".tif"))
        path.unlink()
    (folder / "images" / "dark" / "about.txt").touch()
    (folder / "images" / "stray.png").touch()
    code, out, err = cli("finetune", *FAST)
    assert code == 0, err
    assert "left out     2 files passed over, no images by name or in no class folder: stray.png, about.txt\n" in out


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def test_killed_at_any_moment_it_ends_with_the_same_bits(folder):
    """Twice, within an epoch, somewhere between two writes; in the end every tensor is the unkilled run's."""
    args = [*FAST, "--save-every", "0", "--dropout", "0.3", "--epochs", "8"]
    whole = command(folder, "finetune", *args, "-o", "whole")
    killed = command(folder, "finetune", *args, "-o", "killed")
    state = folder / "killed" / "last" / "state.pt"
    wait_for(state.exists, killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    first = torch.load(state, weights_only=True)["step"]
    again = command(folder, "finetune", "--resume", "killed", "--model", "net.py:tiny", "-q")
    wait_for(lambda: torch.load(state, weights_only=True)["step"] > first + 2, again)
    again.send_signal(signal.SIGKILL)
    again.communicate()
    assert torch.load(state, weights_only=True)["step"] < 48
    # Not a forked one: with a hash seed and addresses of its own it must come to the same bits.
    out, err = (last := start(folder, "finetune", "--resume", "killed", "--model", "net.py:tiny", "-q")).communicate()
    assert (last.returncode, out) == (0, ""), err
    assert whole.communicate() and whole.returncode == 0
    assert (folder / "killed/best.safetensors").read_bytes() == (folder / "whole/best.safetensors").read_bytes()
    states = [torch.load(folder / run / "last" / "state.pt", weights_only=True) for run in ("whole", "killed")]
    assert all(torch.equal(value, states[1]["network"][name]) for name, value in states[0]["network"].items())
    assert not list((folder / "killed").rglob("*.tmp"))


@pytest.mark.parametrize(("signum", "code", "begin"), [(signal.SIGTERM, 143, start), (signal.SIGINT, 130, command)])
def test_a_signal_saves_and_ends_it(folder, signum, code, begin):
    """To the whole process group, as a terminal and job schedulers send it: the reading process gets it, too."""
    run = begin(folder, "finetune", *FAST, "--epochs", "2000", "--num-workers", "1")
    wait_for((folder / "runs/net-images/metrics.csv").exists, run)
    os.killpg(run.pid, signum)
    _, err = run.communicate(timeout=60)
    assert run.returncode == code, err
    assert f"stopped by {signum.name}" in err and "--resume runs/net-images" in err
    assert "Traceback" not in err
    state = torch.load(folder / "runs/net-images/last/state.pt", weights_only=True)
    assert f"at step {state['step']} of" in err


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return str(server.getsockname()[1])


def test_several_processes_give_what_one_gives(folder):
    """Same global batches, synchronized statistics: the loss agrees to 1e-5 over 12 steps."""
    args = [*FAST[:-6], "--num-workers", "0", "--lr", "0.05", "--epochs", "2", "--batch-size", "8"]
    args += ["--dropout", "0", "--evaluations", "6"]
    port, other = free_port(), free_port()
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, "--no-python"]
    report = ("--report", "two.html")
    two = start(folder, "finetune", *args, "-o", "two", *report, launcher=[*launcher, sys.executable])
    one = command(folder, "finetune", *args, "-o", "one")
    for process in (one, two):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    rows = [_rows(folder / run) for run in ("one", "two")]
    assert len(rows[0]) == 12
    for alone, together in zip(*rows, strict=True):
        assert together["train_loss"] == pytest.approx(alone["train_loss"], abs=1e-5)
        assert together["step"] == alone["step"]
    assert "<svg" in (folder / "two.html").read_text()
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": other}
    ranks = [
        command(folder, "finetune", *args, "-o", "two", RANK=str(rank), LOCAL_RANK=str(rank), **group)
        for rank in range(2)
    ]
    for process in ranks:  # what process 0 refuses, all are told
        _, err = process.communicate(timeout=120)
        assert "a run is there already" in err and "Traceback" not in err, err
        assert process.returncode == 1, err


def _rows(run):
    import csv

    with (run / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_a_run_belongs_to_one_process_and_to_the_next_as_soon_as_it_is_killed(folder, cli):
    """A process that reads images outlives its killed parent by seconds, but does not keep the run."""
    endless = [
        *FAST[:-6],
        "--num-workers",
        "1",
        "--lr",
        "0.1",
        "--device",
        "cpu",
        "--epochs",
        "20000",
        "--save-every",
        "0",
    ]
    first = command(folder, "finetune", *endless)
    run = folder / "runs" / "net-images"
    wait_for((run / "last" / "state.pt").exists, first)
    resume = ("finetune", "--resume", "runs/net-images", "--model", "net.py:tiny")
    for args in (resume, ("finetune", *endless)):
        code, _, err = cli(*args)
        assert code == 1
        assert f"process {first.pid} on" in err
    readers = psutil.Process(first.pid).children()
    assert readers
    first.send_signal(signal.SIGKILL)
    first.communicate()
    step = torch.load(run / "last" / "state.pt", weights_only=True)["step"]
    second = command(folder, *resume)
    wait_for(lambda: torch.load(run / "last" / "state.pt", weights_only=True)["step"] > step, second)
    second.send_signal(signal.SIGTERM)
    _, err = second.communicate()
    assert second.returncode == 143, err


def test_when_a_process_that_reads_images_dies_nothing_is_lost(folder):
    args = [*FAST[:-6], "--num-workers", "1", "--lr", "0.1", "--device", "cpu", "--epochs", "20000"]
    run = command(folder, "finetune", *args)
    wait_for((folder / "runs/net-images/metrics.csv").exists, run)
    readers = psutil.Process(run.pid).children()
    assert readers
    for reader in readers:
        reader.kill()
    try:
        _, err = run.communicate(timeout=100)
    finally:
        run.kill()
    assert run.returncode == 1, err
    assert "a process that reads them died" in err and "Traceback" not in err, err
    step = torch.load(folder / "runs/net-images/last/state.pt", weights_only=True)["step"]
    assert f"Saved at step {step} of" in err
    assert "Continue with --resume runs/net-images --model net.py:tiny" in err
