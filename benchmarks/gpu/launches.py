"""What a layer costs beside its arithmetic: kernels launched and time on the host; and CUDA graphs and torch.compile.

Host time is that of the calls alone, on tensors so small that the GPU is never the slower one, over a stack of layers.
A layer of ours leaves small tensors in training to ATen; "our kernels" is what it would be if it did not.
"""

import copy
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import bnsurgery
from bnsurgery.ops import functional

from . import checks
from .job import Job, NotPossible
from .networks import noise, squeezenet

LAYERS, ROUNDS = 40, 15
STACK = 5  # seconds that one takes
# Shapes, and the most launches of our kernels a direction in training: one more where programs share a channel.
SHAPES = {(2, 8, 4, 4): 2, (32, 64, 14, 14): 3, (32, 256): 2}


def step(job: Job) -> None:
    torch.manual_seed(0)
    with job.part("a training step as a CUDA graph"):
        job.cuda_only()
        graph(job)
    if job.device == "cuda" or not job.quick:  # compiling takes long on a CPU
        checks.run(job, "tests/gpu/test_graphs.py", processes=4)
    with job.part("compiled"):
        compiled(job)
    with job.part("small tensors"):
        job.cuda_only()
        small_tensors(job)
    for shape in list(SHAPES)[: 1 if job.quick else None]:
        for training in (True, False):
            with job.part(f"a stack of layers, {shape}, {'train' if training else 'eval'}"):
                if job.left() < STACK:
                    raise NotPossible("no time left")
                stacks(job, shape, training)


def stacks(job: Job, shape: tuple[int, ...], training: bool) -> None:
    layers = 4 if job.quick else LAYERS
    x = torch.randn(shape, device=job.device, requires_grad=True)
    ours, torchs = (
        (bnsurgery.nn.BatchNorm2d, nn.BatchNorm2d) if x.ndim == 4 else (bnsurgery.nn.BatchNorm1d, nn.BatchNorm1d)
    )
    channels, mode = shape[1], "train" if training else "eval"
    kinds: dict[str, Callable[[], nn.Module]] = {
        "ours": lambda: ours(channels, activation="relu"),
        "our kernels": lambda: ours(channels, activation="relu"),
        "torch's + ReLU": lambda: nn.Sequential(torchs(channels), nn.ReLU(inplace=True)),
        "torch's": lambda: torchs(channels),
    }
    host: dict[str, tuple[float, float]] = {}
    launches = ""
    for name, make in kinds.items():
        stack = nn.Sequential(*(make() for _ in range(layers))).to(job.device).train(training)
        with aten_up_to(-1 if name == "our kernels" else functional._ATEN_UP_TO):
            host[name] = host_time(stack, x, layers)
            forward, backward = launched(stack, x, layers, job.device)
        job.row(
            "one layer", shape=list(shape), mode=mode, layer=name,
            **{"host forward, μs": 1e6 * host[name][0], "host backward, μs": 1e6 * host[name][1],
               "kernels forward": forward, "kernels backward": backward},
        )  # fmt: skip
        if name == "our kernels" and forward is not None and backward is not None:
            launches = f", {forward:.0f} + {backward:.0f} launches"
            most = SHAPES[shape] if training else 1, SHAPES[shape]
            if forward > most[0] or backward > most[1]:
                job.failure(f"launches at {shape}, {mode}", f"{forward} + {backward} a layer, at most {most} expected")
    if shape == (2, 8, 4, 4):
        mine, kernels, theirs = (sum(host[name]) for name in ("ours", "our kernels", "torch's + ReLU"))
        times = f"{1e6 * mine:.0f} μs, {mine / theirs:.2f} × torch's"
        job.key(f"host time of a layer, {mode}: {times}; by our kernels {1e6 * kernels:.0f} μs{launches}")


def aten_up_to(elements: int) -> AbstractContextManager[object]:
    """Layers of ours leave tensors of so many elements to ATen."""
    return patch.object(functional, "_ATEN_UP_TO", elements)


def small_tensors(job: Job) -> None:
    """A layer in training by ATen and by our kernels, by size: what `functional._ATEN_UP_TO` should be."""
    better = []
    for images in (1, 4, 16, 64, 256):
        x = torch.randn(images, 64, 14, 14, device=job.device, requires_grad=True)
        stack = nn.Sequential(*(bnsurgery.nn.BatchNorm2d(64, activation="relu") for _ in range(LAYERS))).to(job.device)
        training, times = Training(stack, x), {}
        for name, limit in (("ATen", x.numel()), ("our kernels", -1)):
            with aten_up_to(limit):
                training()
                times[name] = least(training) / LAYERS
        if times["our kernels"] < times["ATen"]:
            better.append(x.numel())
        job.row("small tensors", elements=x.numel(), **{f"{name}, μs a layer": 1e6 * t for name, t in times.items()})
    job.key(f"a layer in training is faster by our kernels at {better} elements; ATen up to {functional._ATEN_UP_TO}")


def host_time(stack: nn.Module, x: Tensor, layers: int) -> tuple[float, float]:
    """Seconds a layer that the calls of forward and backward take; the least over the rounds."""
    best = [float("inf")] * 2
    grad = torch.randn_like(x)
    for _ in range(ROUNDS):
        finish(x)
        start = time.perf_counter()
        y = stack(x)
        middle = time.perf_counter()
        finish(x)
        again = time.perf_counter()
        torch.autograd.grad(y, (x, *stack.parameters()), grad)
        end = time.perf_counter()
        best = [min(best[0], middle - start), min(best[1], end - again)]
    finish(x)
    return best[0] / layers, best[1] / layers


def launched(stack: nn.Module, x: Tensor, layers: int, device: str) -> tuple[float | None, float | None]:
    """Kernels a layer, forward and backward; None on the CPU."""
    if device != "cuda":
        return None, None
    grad = torch.randn_like(x)
    kept: list[Tensor] = []
    forward = count(lambda: kept.append(stack(x)))
    backward = count(lambda: torch.autograd.grad(kept[0], (x, *stack.parameters()), grad))
    if not forward:  # the profiler is not let at the GPU
        return None, None
    return sum(forward.values()) / layers, sum(backward.values()) / layers


def count(call: Callable[[], object]) -> Counter[str]:
    """What runs on the GPU in `call`, by name."""
    finish()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        call()
        finish()
    events = found.events() or []
    return Counter(event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA)


def finish(x: Tensor | None = None) -> None:
    if torch.cuda.is_available() and (x is None or x.is_cuda):
        torch.cuda.synchronize()


class Training:
    """Forward, loss and backward of an inserted SqueezeNet, the gradients as results."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x, self.parameters = model, x, list(model.parameters())

    def __call__(self) -> tuple[Tensor, ...]:
        loss = self.model(self.x).square().mean()
        return loss, *torch.autograd.grad(loss, self.parameters)


def inserted(job: Job, size: int) -> tuple[nn.Module, Tensor]:
    """In train mode, without dropout, whose random numbers would differ from run to run."""
    x = noise(4 if job.quick else 16, size, job.device).to(memory_format=torch.channels_last)
    network = squeezenet(job.data).to(job.device, memory_format=torch.channels_last)
    model = bnsurgery.insert(network, [x], fuse_relu=True).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model, x


def graph(job: Job) -> None:
    """Capture, replay, and compare with plain calls: loss, gradients, and running statistics after as many steps."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False, allow_tf32=False):
        model, x = inserted(job, 64 if job.quick else 128)
        twin = Training(copy.deepcopy(model), x)
        mine = Training(model, x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                mine()
        torch.cuda.current_stream().wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, stream=stream):
            results = mine()
        for _ in range(2):
            captured.replay()
        for _ in range(5):
            want = twin()
        torch.cuda.synchronize()
        same = all(map(torch.equal, results, want))
        buffers = tuple(model.buffers()), tuple(twin.model.buffers())
        error = max(apart(results[:1], want[:1]), apart(results[1:], want[1:]), apart(*buffers))
        replay, plain = (least(call) for call in (captured.replay, twin))
    figures = {"the same bits": same, "largest relative L2 difference": error}
    figures |= {"replay, ms": 1e3 * replay, "calls, ms": 1e3 * plain}
    job.row("a training step as a CUDA graph", network="squeezenet1_0", batch=len(x), **figures)
    job.key(f"CUDA graph: {'the same bits' if same else f'differs by {error:.1e}'}; {plain / replay:.2f} × as fast")
    if not error <= 1e-3:  # NaN is no more
        raise AssertionError(f"a replayed training step differs from plain calls by {error:.3g} relative L2")


def apart(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Relative L2 distance of all together: the gradient of a bias in front of a norm is 0 but for rounding."""
    difference, size = (
        float(torch.stack([tensor.double().norm() for tensor in tensors]).norm())
        for tensors in ([a.double() - b.double() for a, b in zip(got, want, strict=True)], want)
    )
    return difference / max(size, 1e-30)


def least(call: Callable[[], object], rounds: int = 10) -> float:
    times = []
    for _ in range(rounds):
        finish()
        start = time.perf_counter()
        call()
        finish()
        times.append(time.perf_counter() - start)
    return min(times)


def compiled(job: Job) -> None:
    """The whole network in one graph: the ops in it, the numbers, and on CUDA our kernels among those that run."""
    model, x = inserted(job, 32 if job.quick else 64)
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    seen: Counter[str] = Counter()

    def look(graph_module: torch.fx.GraphModule, example: list[Tensor]) -> Callable:
        seen.update(str(node.target) for node in graph_module.graph.nodes if node.op == "call_function")
        return graph_module.forward

    torch.compiler.reset()
    torch.compile(copy.deepcopy(model), backend=look, fullgraph=True)(x)
    ours = sum(number for name, number in seen.items() if name.startswith("bnsurgery.batch_norm_fwd"))
    job.row("compiled", what="layers that are our op in the graph", value=f"{ours} of {norms}")
    if ours != norms:
        job.failure("compiled", f"{ours} of {norms} layers are our op in the graph; it has {dict(seen)}")
    if job.device != "cuda":
        return
    from benchmarks.kernel_resources import NAMES  # needs Triton

    torch.compiler.reset()
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False, allow_tf32=False):
        fast, plain = Training(torch.compile(copy.deepcopy(model), fullgraph=True), x), Training(model, x)
        (loss, *grads), (want, *wanted) = fast(), plain()
        kernels = count(fast)
        times = {name: least(call) for name, call in (("compiled", fast), ("eager", plain))}
    error = apart(grads, wanted)
    run = {name: kernels[name] for name in NAMES}
    job.row("compiled", what="loss, eager", value=float(want))
    job.row("compiled", what="loss, compiled", value=float(loss))
    job.row("compiled", what="relative L2 difference of the gradients", value=error)
    job.row("compiled", what="our kernels that ran in a step", value=str(run))
    job.row(
        "compiled", what="ms a step, compiled and eager", value=str({k: round(1e3 * v, 3) for k, v in times.items()})
    )
    job.key(f"compiled: {sum(run.values())} of our kernels ran; gradients within {error:.1e}")
    if not kernels:
        job.row("left out", what="kernels in the compiled step", reason="torch.profiler sees no kernel here")
    elif not all(run.values()):
        job.failure("compiled", f"not all of our kernels ran: {run}; those that ran: {dict(kernels)}")
    if not error <= 1e-2:
        job.failure("compiled", f"gradients differ by {error:.3g} relative L2 from those of plain calls")
