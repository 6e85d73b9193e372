"""Batch norm + ReLU in training on VGG-16's shapes: ours against eager and compiled torch, and against a copy.

    python -m benchmarks.norm [--device cuda|cpu] [--batches 32 128] [--dtypes bfloat16 float32] [--json FILE]

Conv shapes at 224×224 in both memory formats, and the dense layers' (128, 4096). "copy" is the time of a device copy of
the bytes that must move: forward reads x twice and writes y; backward reads x and the gradient twice and writes dx;
as a share of ours, it is the fraction of copy bandwidth reached. On CUDA every candidate is replayed from a CUDA graph,
so launches cost nothing; `--eager` times plain calls instead.
"""

import argparse
import json
import math
import platform
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config

import bnsurgery
from bnsurgery.tables import table

from .timing import interleave, median, ratio

CONVS = [(64, 224), (128, 112), (256, 56), (512, 28), (512, 14)]
REPEATS = 10  # calls in one measurement on CUDA, so that launching it and waiting for it count little
PASSES = {"forward": 3, "backward": 5, "both": 8}
L2 = 60 << 20  # tensors below may be served from cache; the bandwidth goal is for those above


class Candidate:
    """One way to compute BN + ReLU, with its own parameters, on shared input and gradient."""

    def __init__(self, make: Callable[[int], nn.Module], x: Tensor, grad: Tensor) -> None:
        self.module = make(x.shape[1]).to(x.device)
        self.x = x.detach().requires_grad_()
        self.grad = grad
        self.wanted = [self.x, *self.module.parameters()]
        self.output = self.module(self.x)

    def forward(self) -> None:
        self.module(self.x)

    def backward(self) -> None:
        torch.autograd.grad(self.output, self.wanted, self.grad, retain_graph=True)

    def both(self) -> None:
        torch.autograd.grad(self.module(self.x), self.wanted, self.grad)


def stock(channels: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def stock_dense(channels: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(channels), nn.ReLU(inplace=True))


def candidates(x: Tensor, grad: Tensor) -> dict[str, Candidate]:
    plain = stock if x.ndim == 4 else stock_dense
    ours = bnsurgery.nn.BatchNorm2d if x.ndim == 4 else bnsurgery.nn.BatchNorm1d
    torch.compiler.reset()
    made = {
        "ours": Candidate(lambda c: ours(c, activation="relu"), x, grad),
        "eager": Candidate(plain, x, grad),
    }
    made["compiled"] = Candidate(lambda c: torch.compile(plain(c), mode="default"), x, grad)
    return made


def replayed(call: Callable[[], object]) -> Callable[[], None]:
    """REPEATS calls as one CUDA graph, captured on the current stream, and a synchronization."""
    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(REPEATS):
            call()
    return synchronized(graph.replay, repeats=1)


def synchronized(call: Callable[[], object], repeats: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(repeats):
            call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def measure(shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, args: argparse.Namespace):
    """One row of results for every direction."""
    x = torch.randn(shape, device=args.device).to(dtype)
    grad = torch.randn(shape, device=args.device).to(dtype)
    if x.ndim == 4:
        x, grad = x.to(memory_format=memory_format), grad.to(memory_format=memory_format)
    made = candidates(x, grad)
    repeats = REPEATS if args.device == "cuda" else 1
    graphs = args.device == "cuda" and not args.eager
    target = torch.empty_like(x)
    for direction in args.directions:
        plain = {name: getattr(candidate, direction) for name, candidate in made.items()}
        plain["copy"] = lambda: target.copy_(x)
        calls = {name: replayed(call) if graphs else synchronized(call, repeats) for name, call in plain.items()}
        times = interleave(calls, args.rounds)
        moved = PASSES[direction] / 2  # a copy reads and writes: two passes
        yield {
            "shape": list(shape),
            "dtype": str(dtype).removeprefix("torch."),
            "layout": "dense" if x.ndim == 2 else str(memory_format).removeprefix("torch."),
            "direction": direction,
            "milliseconds": {name: 1e3 * median(values) / repeats for name, values in times.items()},
            "eager ÷ ours": ratio(times, "eager", "ours"),
            "compiled ÷ ours": ratio(times, "compiled", "ours"),
            "of copy": moved * ratio(times, "copy", "ours"),
            "bytes": x.numel() * x.element_size(),
        }


def geomean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def show(results: list[dict]) -> None:
    """The table, then the geometric means over the conv shapes."""
    columns = ("eager ÷ ours", "compiled ÷ ours", "of copy")
    rows = [
        ("×".join(map(str, r["shape"])), r["dtype"], r["layout"], r["direction"], r["milliseconds"]["ours"],
         *(r[column] for column in columns))
        for r in results
    ]  # fmt: skip
    print(table(("shape", "dtype", "layout", "direction", "ours, ms", *columns), rows))
    print("\ngeometric means over the conv shapes (of copy: tensors above the L2 cache alone)")
    groups = sorted({(r["dtype"], r["layout"], r["direction"]) for r in results if r["layout"] != "dense"})
    means = []
    for group in groups:
        members = [r for r in results if (r["dtype"], r["layout"], r["direction"]) == group]
        large = [r["of copy"] for r in members if r["bytes"] > L2]
        means.append((*group, *(geomean(r[c] for r in members) for c in columns[:2]), geomean(large)))
    print(table(("dtype", "layout", "direction", *columns), means))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128] if cuda else [32])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"] if cuda else ["float32"])
    parser.add_argument("--directions", nargs="+", default=list(PASSES), choices=list(PASSES))
    parser.add_argument("--rounds", type=int, default=20 if cuda else 5)
    parser.add_argument("--eager", action="store_true", help="on CUDA, time plain calls instead of CUDA graphs")
    parser.add_argument("--json", type=Path, help="write the raw figures there")
    args = parser.parse_args()
    torch.manual_seed(0)
    functorch_config.donated_buffer = False  # lets a compiled backward run more than once on one graph
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{args.device}: {name}; torch {torch.__version__}, {platform.platform()}")
    if cuda:  # graphs are captured on another stream than the default one, and autograd must have seen no other
        torch.cuda.set_stream(torch.cuda.Stream())
    results = []
    for dtype in (getattr(torch, name) for name in args.dtypes):
        for memory_format in (torch.channels_last, torch.contiguous_format):
            for batch in args.batches:
                for channels, size in CONVS:
                    results += measure((batch, channels, size, size), dtype, memory_format, args)
        results += measure((128, 4096), dtype, torch.contiguous_format, args)
    show(results)
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "device": name, "results": results}, indent=1))


if __name__ == "__main__":
    main()
