"""A layer of BatchNorm and ReLU: torch's time ÷ ours, by shape, memory format, threads, and how busy the machine is.

    python -m benchmarks.norm [--shapes table|vgg|squeezenet|all] [--threads 1 2] [--busy] [--rounds 9] [--json FILE]

Torch's is `nn.BatchNorm2d` + `nn.ReLU(True)` (1d for a dense shape). Ours is fused, `activation="relu"`, or unfused,
our norm + `nn.ReLU(True)`; "itself" is torch's once more, whose ratio says what the others are worth. "train" is
forward and backward by the batch's statistics, "eval" forward by the running ones without gradients. Every round times
each of the four in turn, over as many calls as take 20 ms; a ratio is the median of the rounds'. --busy measures
everything once more beside a process that keeps a core busy.

Goals: a geometric mean of 0.99; each ratio 0.95, or 0.90 where torch takes less than 200 µs. Rows below are listed.
All shapes take some five minutes a number of threads and load on two cores.
"""

import argparse
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bnsurgery
from bnsurgery.text.tables import table

from .timing import busy, geomean, interleave, median, ratio

BATCHES = (1, 8, 32)
VGG = [(64, 224, 224), (128, 112, 112), (256, 56, 56), (512, 28, 28), (512, 14, 14), (4096,)]
SQUEEZENET = [
    (64, 111, 111), (16, 55, 55), (64, 55, 55), (32, 27, 27), (128, 27, 27), (48, 13, 13), (192, 13, 13), (64, 13, 13),
    (256, 13, 13), (1000, 13, 13),
]  # fmt: skip
SHAPES = {
    "table": [(2, 8, 4, 4), (8, 64, 7, 7), (128, 4096), (8, 512, 14, 14), (32, 128, 28, 28), (8, 64, 112, 112)],
    "vgg": [(batch, *rest) for batch in BATCHES for rest in VGG if (batch, *rest) != (1, 4096)],  # one value a channel
    "squeezenet": [(batch, *rest) for batch in BATCHES for rest in SQUEEZENET],
}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
MODES, FORMS = ("train", "eval"), ("fused", "unfused", "itself")
SECONDS = 0.02  # of one candidate in one round, at least
EACH, SMALL, SHORT, MEAN = 0.95, 0.90, 200e-6, 0.99


def layers(shape: tuple[int, ...]) -> dict[str, nn.Module]:
    name, channels = "BatchNorm2d" if len(shape) == 4 else "BatchNorm1d", shape[1]
    torchs, ours = getattr(nn, name), getattr(bnsurgery.nn, name)
    return {
        "torch": nn.Sequential(torchs(channels), nn.ReLU(inplace=True)),
        "fused": ours(channels, activation="relu"),
        "unfused": nn.Sequential(ours(channels), nn.ReLU(inplace=True)),
        "itself": nn.Sequential(torchs(channels), nn.ReLU(inplace=True)),
    }


def call(module: nn.Module, x: Tensor, grad: Tensor, mode: str) -> Callable[[int], None]:
    """What does one layer's work so many times."""
    module.train(mode == "train")
    wanted = [x, *module.parameters()]

    def train(times: int) -> None:
        for _ in range(times):
            torch.autograd.grad(module(x), wanted, grad)
        finish(x)

    @torch.no_grad()
    def evaluate(times: int) -> None:
        for _ in range(times):
            module(x)
        finish(x)

    return train if mode == "train" else evaluate


def finish(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def measure(shape: tuple[int, ...], layout: str, device: str, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each mode, with the seconds of one call in every round."""
    x, grad = (torch.randn(shape, device=device) for _ in range(2))
    if layout in LAYOUTS:
        x, grad = (tensor.to(memory_format=LAYOUTS[layout]) for tensor in (x, grad))
    modules = {name: module.to(device) for name, module in layers(shape).items()}
    for mode in MODES:
        calls = {n: call(module, x.requires_grad_(), grad, mode) for n, module in modules.items()}
        repeats = enough(calls["torch"])
        candidates = {name: functools.partial(run, repeats) for name, run in calls.items()}
        times = {n: [t / repeats for t in found] for n, found in interleave(candidates, rounds).items()}
        yield {"shape": list(shape), "layout": layout, "mode": mode, "seconds": times}


def enough(run: Callable[[int], None]) -> int:
    """Calls that take SECONDS."""
    times = 1
    while True:
        start = time.perf_counter()
        run(times)
        if time.perf_counter() - start >= SECONDS:
            return times
        times *= 2


def forms(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both forms of every row, with torch ÷ ours and its goal."""
    found = []
    for row in rows:
        seconds = median(row["seconds"]["torch"])
        goal = SMALL if seconds < SHORT else EACH
        rest = {name: value for name, value in row.items() if name != "seconds"}
        found += [
            {**rest, "form": form, "torch": seconds, "ratio": ratio(row["seconds"], "torch", form), "goal": goal,
             "upper": upper(row["seconds"]["torch"], row["seconds"][form])}
            for form in FORMS
        ]  # fmt: skip
    return found


def upper(torchs: list[float], ours: list[float]) -> float:
    """The ratio that a quarter of the rounds exceed."""
    ratios = [a / b for a, b in zip(torchs, ours, strict=True)]
    return statistics.quantiles(ratios, n=4)[2]


def show(rows: list[dict[str, Any]]) -> None:
    """Rows of the same threads and load: one line a shape and format."""
    lines: dict[tuple[str, str], list[object]] = {}
    for row in rows:
        line = lines.setdefault((named(row["shape"]), row["layout"]), [])
        line += [1e6 * median(row["seconds"]["torch"]), *(ratio(row["seconds"], "torch", form) for form in FORMS)]
    headers = ("shape", "format", *(name for mode in MODES for name in (f"{mode}, µs", *FORMS)))
    print(table(headers, [(*place, *line) for place, line in lines.items()]), flush=True)


def summarize(rows: list[dict[str, Any]]) -> None:
    """Geometric means by form, mode, load and threads, then what is below its goal."""
    by = ("form", "mode", "load", "threads")
    found, lines = forms(rows), []
    for group in dict.fromkeys(tuple(row[name] for name in by) for row in found):
        members = [row for row in found if tuple(row[name] for name in by) == group]
        ratios, below = [row["ratio"] for row in members], sum(row["ratio"] < row["goal"] for row in members)
        lines.append((*group, geomean(ratios), min(ratios), f"{below} of {len(members)}"))
    print(
        f"\ntorch ÷ ours; goals: a mean of {MEAN}, each {EACH}, or {SMALL:.2f} where torch takes < {1e6 * SHORT:.0f} µs"
    )
    print(table((*by, "geometric mean", "least", "below goal"), sorted(lines)))
    below = [
        (
            named(row["shape"]),
            row["layout"],
            *(row[name] for name in by),
            1e6 * row["torch"],
            row["ratio"],
            row["upper"],
        )
        for row in found
        if row["ratio"] < row["goal"]
    ]
    print("\nbelow their goals (upper: what a quarter of the rounds exceed):")
    headers = ("shape", "format", *by, "torch, µs", "ratio", "upper")
    print(table(headers, sorted(below, key=lambda row: row[-2])) if below else "none")


def named(shape: list[int]) -> str:
    return "×".join(map(str, shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", default="table", choices=(*SHAPES, "all"), help="default: table")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--busy", action="store_true", help="beside a busy process, too")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the raw figures there")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"{args.device}; torch {torch.__version__}, {platform.platform()}; ratios are torch ÷ ours")
    chosen = [shape for name in SHAPES if args.shapes in (name, "all") for shape in SHAPES[name]]
    results: list[dict[str, Any]] = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for load in ("quiet", "busy")[: 1 + args.busy]:
            print(f"\nthreads: {threads}, {load}")
            rows = []
            with busy(load == "busy"):
                for shape in dict.fromkeys(chosen):
                    for layout in LAYOUTS if len(shape) == 4 else ("NC",):
                        found = measure(shape, layout, args.device, args.rounds)
                        rows += [{**row, "threads": threads, "load": load} for row in found]
            show(rows)
            results += rows
            if args.json:
                args.json.write_text(json.dumps({"torch": torch.__version__, "rows": results}, indent=1))
    summarize(results)


if __name__ == "__main__":
    main()
