"""Batch norm + ReLU on VGG-16's shapes and small ones: ours, fused, against eager and compiled torch, and a copy.

"copy" is the time of a device copy of the bytes that must move: forward reads x twice and writes y; backward reads x
and the gradient twice and writes dx; as a share of ours, it is the fraction of copy bandwidth reached. On CUDA every
candidate is replayed from a CUDA graph, so launches cost nothing: what these cost, `launches` says.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config

import bnsurgery
from benchmarks.timing import geomean, interleave, median, ratio

from .job import Job

CONVS = [(64, 224), (128, 112), (256, 56), (512, 28), (512, 14)]
REPEATS = 10  # calls in one measurement on CUDA, so that launching it and waiting for it count little
PASSES = {"forward": 3, "backward": 5, "both": 8}
SMALL = [(2, 8, 4, 4), (8, 64, 7, 7), (8, 512, 14, 14), (32, 128, 28, 28)]
LONGEST = 4  # seconds that a case which is not compiled takes on a GPU
L2 = 60 << 20  # tensors below may be served from cache; the bandwidth goal is for those above


@dataclass(frozen=True)
class How:
    """How to measure.

    Attributes:
        directions: some of PASSES.
        rounds: in which every candidate takes its turn.
        graphs: replay CUDA graphs, so that launches cost nothing.
        compiled: measure torch.compile, too, which takes seconds a shape.
        training: by the batch's statistics, or by running ones.
    """

    device: str
    directions: Sequence[str] = tuple(PASSES)
    rounds: int = 5
    graphs: bool = False
    compiled: bool = True
    training: bool = True


class Candidate:
    """One way to compute BN + ReLU, with its own parameters, on shared input and gradient."""

    def __init__(self, make: Callable[[int], nn.Module], x: Tensor, grad: Tensor, training: bool) -> None:
        self.module = make(x.shape[1]).to(x.device).train(training)
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


def candidates(x: Tensor, grad: Tensor, how: How) -> dict[str, Candidate]:
    plain = stock if x.ndim == 4 else stock_dense
    ours = bnsurgery.nn.BatchNorm2d if x.ndim == 4 else bnsurgery.nn.BatchNorm1d
    made = {
        "ours": Candidate(lambda c: ours(c, activation="relu"), x, grad, how.training),
        "eager": Candidate(plain, x, grad, how.training),
    }
    if how.compiled:
        torch.compiler.reset()
        functorch_config.donated_buffer = False  # lets a compiled backward run more than once on one graph
        made["compiled"] = Candidate(lambda c: torch.compile(plain(c), mode="default"), x, grad, how.training)
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


def measure(shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, how: How):
    """One row of results for every direction. With graphs, the current stream must not be the default one."""
    x = torch.randn(shape, device=how.device).to(dtype)
    grad = torch.randn(shape, device=how.device).to(dtype)
    if x.ndim == 4:
        x, grad = x.to(memory_format=memory_format), grad.to(memory_format=memory_format)
    made = candidates(x, grad, how)
    repeats = REPEATS if how.device == "cuda" else 1
    target = torch.empty_like(x)
    for direction in how.directions:
        plain = {name: getattr(candidate, direction) for name, candidate in made.items()}
        plain["copy"] = lambda: target.copy_(x)
        calls = {name: replayed(call) if how.graphs else synchronized(call, repeats) for name, call in plain.items()}
        times = interleave(calls, how.rounds)
        passes = PASSES[direction] if how.training or direction != "forward" else 2  # eval mode needs no moments
        moved = passes / 2  # a copy reads and writes: two passes
        yield {
            "shape": list(shape),
            "dtype": str(dtype).removeprefix("torch."),
            "layout": "dense" if x.ndim == 2 else str(memory_format).removeprefix("torch."),
            "mode": "train" if how.training else "eval",
            "direction": direction,
            "milliseconds": {name: 1e3 * median(values) / repeats for name, values in times.items()},
            "eager ÷ ours": ratio(times, "eager", "ours"),
            "compiled ÷ ours": ratio(times, "compiled", "ours") if how.compiled else None,
            "of copy": moved * ratio(times, "copy", "ours"),
            "bytes": x.numel() * x.element_size(),
        }


def on_a_side_stream() -> None:
    """Graphs are captured on another stream than the default one, and autograd must have seen no other."""
    torch.cuda.set_stream(torch.cuda.Stream())


def means(results: list[dict]) -> list[dict]:
    """Geometric means over VGG-16's conv shapes by dtype, layout, mode and direction."""
    convs = [r for r in results if r["layout"] != "dense" and tuple(r["shape"]) not in SMALL]
    by = ("dtype", "layout", "mode", "direction")
    found = []
    for group in dict.fromkeys(tuple(r[name] for name in by) for r in convs):
        members = [r for r in convs if tuple(r[name] for name in by) == group]
        compiled = [r["compiled ÷ ours"] for r in members if r["compiled ÷ ours"]]
        found.append({
            **dict(zip(by, group, strict=True)),
            "shapes": len(members),
            "eager ÷ ours": geomean(r["eager ÷ ours"] for r in members),
            "compiled ÷ ours": geomean(compiled) if compiled else None,
            "shapes compiled": len(compiled),
            "of copy": geomean(r["of copy"] for r in members if r["bytes"] > L2),
        })  # fmt: skip
    return found


def cases(quick: bool) -> Iterator[tuple[tuple[int, ...], torch.dtype, torch.memory_format, bool]]:
    """Shape, dtype, layout and whether in train mode, those that say most first."""
    vgg = [(batch, c, size, size) for batch in (32, 128) for c, size in CONVS]
    for training, shapes in ((True, vgg), (True, [(128, 4096), *SMALL]), (False, vgg)):
        for dtype in (torch.bfloat16, torch.float32):
            for memory_format in (torch.channels_last, torch.contiguous_format):
                for shape in [s for s in shapes if math.prod(s) < 20_000][:1] if quick else shapes:
                    if len(shape) == 4 or memory_format == torch.contiguous_format:
                        yield shape, dtype, memory_format, training


def step(job: Job) -> None:
    """Compiled as well until half of the time is over."""
    torch.manual_seed(0)
    how = How(job.device, rounds=2 if job.quick else 7, graphs=job.device == "cuda")
    if how.graphs:
        on_a_side_stream()
    results: list[dict] = []
    left_out = 0
    half = math.inf if job.device == "cpu" and job.quick else job.left() / 2  # compiling takes long there
    for *case, training in cases(job.quick):
        if job.left() < LONGEST:
            left_out += 1
            continue
        directions = how.directions if training else ("forward", "backward")
        now = replace(how, training=training, directions=directions, compiled=training and job.left() > half)
        with job.part(f"{case}"):
            rows = None
            try:
                rows = list(measure(*case, now))
            except Exception as error:
                if not now.compiled:
                    raise
                job.failure(f"compiled, {case}", repr(error))
                half = math.inf
            if rows is None:  # not above: the error holds the memory of what failed
                rows = list(measure(*case, replace(now, compiled=False)))
            for row in rows:
                results.append(row)
                times = {f"{name}, ms": value for name, value in row["milliseconds"].items()}
                job.row("BatchNorm + ReLU", **{k: v for k, v in row.items() if k != "milliseconds"}, **times)
    if left_out:
        job.row("left out", what=f"{left_out} cases", reason="no time left")
    for row in means(results):
        job.row("geometric means over VGG-16's conv shapes", **row)
        if (row["mode"], row["direction"]) == ("train", "both"):
            ratio_, count = row["compiled ÷ ours"], f"{row['shapes compiled']} of {row['shapes']} shapes"
            compiled = f", compiled ÷ ours {ratio_:.2f} ({count})" if ratio_ else ""
            where = f"{row['dtype']} {row['layout']}, forward + backward"
            job.key(f"{where}: eager ÷ ours {row['eager ÷ ours']:.2f}{compiled}, {row['of copy']:.2f} of copy")
