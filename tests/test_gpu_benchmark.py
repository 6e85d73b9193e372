"""`make gpu` must work the first time, on a machine that nobody can look into: its driver, and its steps on the CPU.

In CI a quick run takes the cheap steps; the op's tests, a training step, calibration and fine-tuning run in the suite
by themselves.
"""

import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import norm, timing
from benchmarks.gpu import driver, photographs, report
from benchmarks.gpu.job import Job, NotPossible
from benchmarks.gpu.steps import BUDGET, STEPS, Step
from bnsurgery.finetune import Config, Row, Trial
from bnsurgery.ops.library import has_triton
from tests import gpu_steps

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def a_step(function: str, limit: float = 60) -> Step:
    return Step(function, f"the step that is {function}", limit, f"tests.gpu_steps:{function}")


def load(folder: Path) -> dict:
    def no_number(text: str) -> None:
        raise ValueError(f"{text} is no JSON")

    return json.loads((folder / "results.json").read_text(encoding="utf-8"), parse_constant=no_number)


def gone(pid: int, seconds: float = 20) -> bool:
    """Whether a process ends; one that waits to be buried has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_one_step_stops_no_other_and_everything_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(driver, "ON_CPU", 1)
    steps = [a_step("failing"), a_step("hanging", 3), a_step("dying"), a_step("refused"), a_step("good")]
    results = driver.run(steps, tmp_path / "out", "cpu", True, None)
    assert not results.good
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.txt", "results.json"]
    data = load(tmp_path / "out")
    found = {step["name"]: step for step in data["steps"]}
    assert {name: step["verdict"] for name, step in found.items()} == {
        "failing": "failed", "hanging": "timed out", "dying": "failed", "refused": "refused", "good": "passed",
    }  # fmt: skip
    assert [failure["what"] for failure in found["failing"]["failures"]] == ["a part", "the step"]
    assert "not as it should be" in found["failing"]["failures"][0]["why"]
    assert found["failing"]["rows"] == [{"table": "numbers", "value": 2}]
    assert found["dying"]["rows"] and "exit code 7" in found["dying"]["reason"]
    assert "limit of 3 s" in found["hanging"]["reason"] and found["hanging"]["seconds"] < 20
    (processes,) = found["hanging"]["rows"]
    assert gone(processes["own"]) and gone(processes["child"])
    assert found["good"]["rows"] == [
        {"table": "numbers", "device": "cpu", "quick": True, "value": 1.5, "nothing": "nan"}
    ]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert all(f" {step.name} " in log for step in steps) and "in the middle" in log
    printed = capsys.readouterr().out
    assert report.short(data) in printed and "1.5 of everything" in printed
    assert len(printed.splitlines()) < 40
    page = report.markdown(data)
    assert "not as it should be" in page and "| cpu | True | 1.50 | nan |" in page


def test_a_run_of_good_and_refused_steps_is_good(tmp_path):
    assert driver.run([a_step("good"), a_step("refused")], tmp_path, "cpu", True, None).good


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_leaves_what_it_has_and_no_process(tmp_path, signum):
    code = (
        "import sys, pathlib; sys.path[:0] = ['.', 'tests']; import test_gpu_benchmark as t; "
        "t.driver.run([t.a_step('good'), t.a_step('hanging')], pathlib.Path(sys.argv[1]), 'cpu', True, None)"
    )
    run = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    rows: list = []
    while not rows and time.monotonic() < end:
        time.sleep(0.05)
        if (tmp_path / "results.json").exists():
            rows = load(tmp_path)["steps"][1]["rows"]
    run.send_signal(signum)
    run.wait()
    data = load(tmp_path)
    assert [step["verdict"] for step in data["steps"]] == [
        "passed", "running" if signum == signal.SIGKILL else "interrupted",
    ]  # fmt: skip
    assert gone(rows[0]["own"]) and gone(rows[0]["child"])


def test_the_steps_fit_into_the_budget_and_exist():
    assert sum(step.limit for step in STEPS) <= BUDGET == 685
    assert len({step.name for step in STEPS}) == len(STEPS)
    for step in STEPS:
        module, _, name = step.function.partition(":")
        assert step.name.isidentifier() and step.description
        assert callable(getattr(importlib.import_module(module), name))


def test_the_driver_leaves_torch_and_the_gpu_alone():
    code = "import sys, benchmarks.gpu.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_quick_run_on_the_cpu(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--device",
        "cpu",
        "--quick",
        "--steps",
        "norm,launches,sanitizer",
    ]
    command += ["--output", str(tmp_path), "--data", str(tmp_path / "none")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + (tmp_path / "log.txt").read_text()[-4000:]
    norm, launches, sanitizer = load(tmp_path)["steps"]
    assert {row["direction"] for row in norm["rows"]} == {"forward", "backward", "both"}
    assert all(row["ours, ms"] > 0 and row["eager, ms"] > 0 for row in norm["rows"])
    compiled = [row["value"] for row in launches["rows"] if row["table"] == "compiled"]
    assert compiled == ["25 of 25"]
    assert (sanitizer["verdict"], sanitizer["reason"]) == ("skipped", "needs a GPU")
    page = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--markdown", str(tmp_path / "results.json")],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "## norm" in page and "| skipped |" in page


def test_fine_tuning_on_photographs(real, tmp_path):
    """A quick run of both steps: three arms on real photographs, in processes of their own."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick", "--steps", "squeezenet,vgg16"]
    command += ["--output", str(tmp_path), "--data", str(Path(real.__file__).parent)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + (tmp_path / "log.txt").read_text()[-4000:]
    for step in load(tmp_path)["steps"]:
        assert step["verdict"] == "passed"
        trials = [row for row in step["rows"] if "seed" in row]
        assert sorted(row["arm"] for row in trials) == ["bn", "bn-naive", "plain"]
        (summary,) = {row["table"] for row in step["rows"] if row["table"].endswith("best rate, 1 seed")}
        ends = {row["arm"]: row["test, %"] for row in step["rows"] if row["table"] == summary}
        assert ends == {row["arm"]: row["test, %"] for row in trials}
        (verdict,) = [row["text"] for row in step["rows"] if row["table"] == "verdict"]
        assert "The task is " in verdict
    (pretrained,) = [row for row in step["rows"] if "folded, %" in row]
    assert pretrained["with BatchNorm, %"] == pytest.approx(pretrained["folded, %"], abs=100 / 32)


def a_job(folder: Path, seconds: float = 120) -> Job:
    return Job("cpu", True, folder, seconds, folder / "rows.jsonl")


def rows_of(job: Job) -> dict:
    record: dict = {}
    driver.read(job.file, record)
    return record


def test_trials_that_have_no_time_left_are_counted_and_leave_no_process(tmp_path):
    job, before = a_job(tmp_path, 9), set(multiprocessing.active_children())
    wanted = [(arm, 0.1, 0) for arm in photographs.ARMS]
    photographs.compare(job, "endless", gpu_steps.endless, Config(output="none"), wanted, 1)
    assert rows_of(job)["rows"] == [
        {"table": "left out", "what": "3 of 3 trials", "reason": "no time left"},
        {"table": "left out", "what": "the summary", "reason": "no rate has finished in all arms"},
    ]
    assert set(multiprocessing.active_children()) == before


@pytest.mark.parametrize("task", [gpu_steps.without_data, gpu_steps.dying_process])
def test_a_trial_that_fails_or_kills_its_process_is_a_failure(task, tmp_path):
    job = a_job(tmp_path)
    photographs.compare(job, "bad", task, Config(output="none"), [("bn", 0.1, 0), ("plain", 0.1, 0)], 1)
    told = [failure["what"] for failure in rows_of(job)["failures"]]
    assert sorted(told) == (
        ["the trials"] if task is gpu_steps.dying_process else ["bn at 0.1, seed 0", "plain at 0.1, seed 0"]
    )
    assert job.failed == len(told)


def test_the_summary_is_of_rates_that_all_arms_have_finished_with_the_same_seeds():
    row = Row(1.0, 10, 0.1, 0.5, 0.8, 0.6, 0.7, 99.0)
    wanted = [(arm, lr, seed) for seed in range(3) for lr in (0.1, 0.01) for arm in photographs.ARMS]
    trials = [Trial(*key, "batch", None, (row,), 1.0) for key in wanted]

    def rates_and_seeds(count: int) -> tuple[set[float], int]:
        found = photographs.complete(reversed(trials[:count]))
        assert len(found) == 3 * len({t.lr for t in found}) * len({t.seed for t in found})
        return {t.lr for t in found}, len({t.seed for t in found})

    assert rates_and_seeds(2) == (set(), 0)
    assert rates_and_seeds(5) == ({0.1}, 1)
    assert rates_and_seeds(6) == ({0.1, 0.01}, 1)
    assert rates_and_seeds(9) == ({0.1}, 2)  # as many trials as one seed at both rates
    assert rates_and_seeds(12) == rates_and_seeds(15) == ({0.1, 0.01}, 2)
    assert rates_and_seeds(18) == ({0.1, 0.01}, 3)


def test_photographs_need_data_and_the_packages_of_fine_tuning(tmp_path, monkeypatch):
    with pytest.raises(NotPossible, match="photographs"):
        photographs.squeezenet(a_job(tmp_path))
    (tmp_path / "trash").mkdir()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else True)
    with pytest.raises(NotPossible, match="needs tensorboard"):
        photographs.vgg16(a_job(tmp_path))


def test_the_tasks_do_without_scikit_learn():
    code = "import sys; sys.modules['sklearn'] = None; import benchmarks.tasks"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_busy_process_ends_with_an_error_and_with_its_parent():
    with pytest.raises(ZeroDivisionError), timing.busy() as pid:
        raise ZeroDivisionError
    assert gone(pid)
    code = "from benchmarks.timing import busy\nwith busy() as pid: print(pid, flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as parent:
        pid = int(parent.stdout.readline())
        parent.kill()
    assert gone(pid)


def test_the_benchmark_of_the_op_prints_its_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(norm, "SHAPES", {"table": [(2, 8, 4, 4), (16, 12)]})
    monkeypatch.setattr(norm, "SECONDS", 1e-6)
    file = tmp_path / "norm.json"
    monkeypatch.setattr(sys, "argv", ["norm", "--device", "cpu", "--rounds", "2", "--busy", "--json", str(file)])
    norm.main()
    rows = json.loads(file.read_text())["rows"]
    assert [(row["shape"], row["layout"], row["mode"], row["load"]) for row in rows] == [
        (shape, layout, mode, load)
        for load in ("quiet", "busy")
        for shape, layout in (([2, 8, 4, 4], "NCHW"), ([2, 8, 4, 4], "NHWC"), ([16, 12], "NC"))
        for mode in ("train", "eval")
    ]
    assert all(len(row["seconds"][name]) == 2 for row in rows for name in ("torch", "fused", "unfused"))
    printed = capsys.readouterr().out
    assert printed.count("2×8×4×4") >= 4 and printed.count(" of 3") == 12


def without_a_gpu(code: str) -> str:
    """What Python prints where CPU tensors go the way of CUDA tensors, and launches do nothing."""
    if not has_triton():
        pytest.skip("no Triton here takes the kernels, and the op does without them")
    script = "from benchmarks import host; host.lead_the_cuda_way(); host.idle()\n" + code
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_what_the_sanitizer_watches_runs_every_kernel():
    printed = without_a_gpu("from benchmarks.gpu import every_kernel; every_kernel.main('cpu')")
    assert printed == "every kernel ran\n"


def test_launches_of_a_layer():
    """Two in either direction, three where programs share a channel; the running statistics need no reduction."""
    printed = without_a_gpu(
        "for shape in host.SHAPES.values():\n"
        "    print([host.Stack(shape, name).launches() for name in (*host.STATISTICS, 'eval')])"
    )
    alone, shared = map(json.loads, printed.replace("(", "[").replace(")", "]").splitlines())
    assert alone == [[2, 2], [2, 2], [1, 2], [1, 0]]
    assert shared == [[3, 3], [3, 3], [1, 3], [1, 0]]


def test_the_table_at_the_end_is_short_and_the_page_is_complete():
    """Only so many characters of what is printed come back from such a machine."""
    rows = [{"table": "tests", "test": f"file.py::test[{i}]", "outcome": "passed", "seconds": 1.0} for i in range(5)]
    failures = [{"what": f"file.py::test[{i}]", "why": "| off by one\n" * 9} for i in range(50)]
    step = {"verdict": "failed", "reason": "50 failures", "seconds": 480.0, "failures": failures, "rows": rows}
    step["keys"] = [f"a key figure {'÷' * 200}"] * 9
    data = {"steps": [{"name": s.name, "description": s.description, **step} for s in STEPS], "device": "cuda"}
    data |= {"quick": False, "commit": None, "started": "then"}
    text = report.short(data)
    assert len(text.splitlines()) <= 1 + 4 * len(STEPS) and len(text.encode()) < 12_000
    assert "test[1], and 48 more" in text
    page = report.markdown(data)
    assert page.count("Failed: file.py::test[49]") == len(STEPS)
    assert page.count("| file.py::test | 5 |") == len(STEPS)
