"""--report, --plot and `bnsurgery report`, and how the terminal looks."""

import json
from pathlib import Path

import click
import pytest
import torch

from bnsurgery.cli.output import show
from bnsurgery.text.tables import is_number, table
from bnsurgery.text.words import counted, percent, thousands

pytestmark = pytest.mark.slow

NET = ["--model", "net.py:tiny", "--image-size", "8", "--normalize", "none"]
FEW = [*NET, "--num-images", "6", "--batch-size", "3"]
RUN = [*NET, "--data", "digits", "--limit", "64", "--epochs", "1", "--num-workers", "0", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(cli):
    """The working directory, with a grey network of four classes and its inserted checkpoint."""
    Path("net.py").write_text("from tiny_task import tiny\n")
    code, _, err = cli("insert", *FEW, "--quiet", "-o", "bn.safetensors")
    assert code == 0, err
    return cli


def test_insert_and_verify(folder):
    code, out, err = folder("insert", *FEW, "--report", "r.html", "--plot", "figures")
    assert code == 0, err
    assert "Wrote r.html.\nWrote 12 figures into figures.\n" in out
    assert "the same output bits on 6 images" in Path("r.html").read_text()
    assert {path.suffix for path in Path("figures").iterdir()} == {".svg", ".png"}
    code, out, _ = folder("verify", "bn.safetensors", *FEW, "--report", "v.html", "--json")
    assert code == 0 and json.loads(out)["bit_identical"]
    assert "the same output bits on 6 images" in Path("v.html").read_text()


@pytest.mark.parametrize(
    "command", [["insert", *FEW, "-o", "new.safetensors"], ["verify", "bn.safetensors", *FEW], ["finetune", *RUN]]
)
def test_nothing_is_started_that_cannot_be_written(command, folder):
    Path("r.html").write_text("mine")
    Path("figures").mkdir()
    Path("figures/mine").write_text("mine")
    for option, message in (
        (("--report", "r.html"), "existing file"),
        (("--report", "no/r.html"), "Create it first"),
        (("--plot", "figures"), "expected an empty one"),
        (("--plot", "net.py"), "Choose another place"),
    ):
        code, out, err = folder(*command, *option)
        assert (code, out) == (1, "") and message in err
    assert Path("r.html").read_text() == "mine" and not Path("new.safetensors").exists() and not Path("runs").exists()


def test_a_report_takes_no_other_file_s_place(folder):
    kept = Path("bn.safetensors").rename("bn.html").read_bytes()
    for command in (
        ["insert", *FEW, "-o", "new.html", "--report", "new.html"],
        ["insert", *FEW, "-o", "new.html", "--report", "./new.html", "--force"],
        ["verify", "bn.html", *FEW, "--report", "bn.html", "--force"],
        ["report", "bn.html", *FEW, "--force"],
    ):
        code, _, err = folder(*command)
        assert code == 1 and "needs that file itself" in err
    assert Path("bn.html").read_bytes() == kept and not Path("new.html").exists()
    code, _, err = folder("verify", "bn.safetensors", *FEW, "--report", "page.pdf")
    assert code == 1 and "ends in .html" in err


def test_a_report_beside_what_it_is_of(folder):
    code, out, err = folder("finetune", *RUN, "-o", "runs/x", "--report", "runs/x/report.html", "--json")
    assert code == 0 and json.loads(out)["report"] == "runs/x/report.html", err
    code, out, err = folder("verify", "bn.safetensors", *FEW, "--plot", "f", "--report", "f/page.html", "--json")
    assert code == 0 and (json.loads(out)["plot"], json.loads(out)["report"]) == ("f", "f/page.html"), err
    assert Path("runs/x/report.html").exists() and Path("f/page.html").exists()


def test_force(folder):
    Path("r.html").write_text("mine")
    assert folder("verify", "bn.safetensors", *FEW, "--report", "r.html", "--force", "--quiet") == (0, "", "")
    assert "<!DOCTYPE html>" in Path("r.html").read_text()


def test_report_of_a_checkpoint(folder):
    code, out, err = folder("report", "bn.safetensors", *FEW)
    assert code == 0, err
    assert out.endswith("Wrote bn.html.\nNext: open bn.html in a browser.\n")
    assert "from the weights" not in out and "the same output bits on 6 images" in out
    code, _, err = folder("report", "bn.safetensors", *FEW)
    assert code == 1 and "existing file" in err


def test_report_of_runs_and_comparisons(folder):
    code, _, err = folder("finetune", *RUN, "-o", "run", "--report", "f.html")
    assert code == 0, err
    code, out, err = folder("report", "run", "-o", "again.html", "--plot", "figures")
    assert code == 0 and "of the validation images right" in out, err
    assert Path("again.html").read_text() == Path("f.html").read_text()
    code, out, err = folder("report", "run/best.safetensors", *NET, "--num-images", "4", "--json")
    assert code == 0 and json.loads(out)["output"] == "best.html", err
    assert "fine-tuned on" in Path("best.html").read_text()
    comparing = ["compare", *RUN, "--rates", "0.1", "--arms", "plain,bn", "--jobs", "1", "-o", "cmp"]
    code, out, err = folder(*comparing, "--report", "c.html")
    assert code == 0, err
    hint = out.splitlines()[-1]
    assert hint == "Next: bnsurgery finetune --from cmp --model net.py:tiny --num-workers 0"
    assert folder("report", "cmp", "-o", "d.html")[0] == 0
    assert folder("report", "cmp/comparison.json", "-o", "e.html")[0] == 0
    assert Path("c.html").read_text() == Path("d.html").read_text() == Path("e.html").read_text()


def test_damaged_and_empty_places(folder):
    Path("empty").mkdir()
    Path("cmp").mkdir()
    Path("cmp/comparison.json").write_text('{"task": 3, "trials": []}')
    Path("run").mkdir()
    code, _, _ = folder("finetune", *RUN, "-o", "run2", "--quiet")
    Path("run/config.json").write_text(Path("run2/config.json").read_text())
    Path("run2/metrics.csv").write_text("epoch,step\n1.0,two\n")
    for place, message in (
        ("empty", "neither a run of finetune"),
        ("cmp", "comparison.json"),
        ("run", "metrics.csv: there was no validation yet"),
        ("run2", "metrics.csv cannot be read"),
    ):
        code, out, err = folder("report", place, "-o", "x.html")
        assert (code, out) == (1, "") and message in err, err
    assert folder("report", "missing")[0] == 1 and not Path("x.html").exists()


def test_without_matplotlib(folder, monkeypatch):
    from importlib import util

    real = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == "matplotlib" else real(name, *rest))
    code, _, err = folder("verify", "bn.safetensors", *FEW, "--report", "r.html")
    assert code == 1 and "pip install 'bnsurgery[report]'" in err
    assert folder("verify", "bn.safetensors", *FEW, "--quiet")[0] == 0


def test_tables_fit_a_terminal():
    name = "backbone.stages.3.blocks.11.feed_forward.pointwise_expansion.inner.convolution"
    rows = [(name, "Conv2d", 512, "ReLU", "left out, since " + "a very long reason " * 8, 0.123456)]
    text = table(("site", "layer", "channels", "activation", "why", "σ"), rows)
    assert max(map(len, text.splitlines())) <= 80
    columns = [line[: len("backbone.stages.3.bl")].strip() for line in text.splitlines()[2:]]
    assert "".join(columns).startswith("backbone.stages.3") and "".join(text.split()).count("averylong") >= 1
    assert "0.123" in text and "512" in text


def test_numbers_are_aligned_and_written_out():
    text = table(
        ("arm", "0.1", "seconds"), [("plain", "5.00 %", 27123.4), ("bn", "diverges", 0.5), ("naive", None, 1e7)]
    )
    assert text.splitlines()[2:] == [
        "plain    5.00 %    27,123",
        "bn     diverges     0.500",
        "naive         –  1.00e+07",
    ]


def test_numbers_as_people_read_them():
    assert [percent(0.467), percent(1, ".4g"), percent(None)] == ["46.70 %", "100 %", "–"]
    assert [thousands(n) for n in (0, 9999, 10_000, -1234567, 12345.6)] == [
        "0",
        "9999",
        "10,000",
        "-1,234,567",
        "12,346",
    ]
    assert [counted(n, "layer") for n in (0, 1, 25, 25_000)] == ["0 layers", "1 layer", "25 layers", "25,000 layers"]
    assert all(map(is_number, ("46.70 %", "10,000", "-1,234,567", "–", "1.00e+07")))
    assert not any(map(is_number, ("1, 2", "%", "batch", "")))


@pytest.mark.parametrize(
    ("terminal", "variable", "coloured"), [(True, None, True), (True, "1", False), (False, None, False)]
)
def test_colours_only_on_a_terminal(terminal, variable, coloured, monkeypatch, capsys):
    import sys

    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if variable:
        monkeypatch.setenv("NO_COLOR", variable)
    with click.Context(click.Command("x"), obj={"json": False, "quiet": False}):
        show("eval mode    bit-identical\nNext: on", {})
    assert ("\x1b[" in capsys.readouterr().out) == coloured
