"""Memory and time of a training step: plain, inserted, inserted with `recompute_activations_`, torchvision's own BN.

    python -m benchmarks.memory [--batch N] [--size N] [--rounds N] [--channels-last]

On the CPU, with BatchNorm behind the convolutions. Kept: what torch's allocator has handed out in a forward and not got
back at its end. Peak: the most that it has handed out at a time in a forward and a backward, so with all gradients.
Parameters and the optimizer's state, the same for all but for the norms' own, were there before and are not counted.
Times come from interleaved rounds, their ratios are medians over the rounds.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torchvision import models

import bnsurgery
from bnsurgery.text.tables import table

from .timing import interleave, median, ratio

NETWORKS = {"vgg16": "vgg16_bn", "squeezenet1_1": None}


def variants(name: str) -> Iterator[tuple[str, nn.Module]]:
    plain = models.get_model(name, weights=None).eval()
    inserted = bnsurgery.insert(plain, [torch.randn(4, 3, 64, 64)], layers="conv")
    recomputing = copy.deepcopy(inserted)
    bnsurgery.recompute_activations_(recomputing)
    yield from {"plain": plain, "inserted": inserted, "inserted, recomputing": recomputing}.items()
    peer = NETWORKS[name]
    if peer:
        yield peer, models.get_model(peer, weights=None)


class Step:
    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model, self.images = model.to(memory_format=memory_format(images)).train(), images

    def forward(self) -> Tensor:
        return self.model(self.images).square().mean()

    def __call__(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.forward().backward()


def memory_format(images: Tensor) -> torch.memory_format:
    nhwc = torch.channels_last
    return nhwc if images.is_contiguous(memory_format=nhwc) else torch.contiguous_format


def held(run: Callable[[], object]) -> list[int]:
    """Bytes handed out in `run` and not given back yet, after every allocation and release; its result is alive."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    del result
    return list(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5, help="of timing; 0 for none")
    parser.add_argument("--channels-last", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    images = torch.randn(args.batch, 3, args.size, args.size).to(memory_format=layout)
    print(
        f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads; {tuple(images.shape)}, {layout}, float32"
    )
    for name in NETWORKS:
        steps = {variant: Step(model, images) for variant, model in variants(name)}
        kept, peak = {}, {}
        for variant, step in steps.items():
            step.model.zero_grad(set_to_none=True)
            kept[variant] = held(step.forward)[-1]
            peak[variant] = max(held(lambda step=step: step.forward().backward()))
        times = interleave(steps, args.rounds) if args.rounds else {}
        rows = [
            (
                variant, kept[variant] / 2**20, kept[variant] / kept["plain"],
                peak[variant] / 2**20, peak[variant] / peak["plain"],
                median(times[variant]) if times else None,
                ratio(times, variant, "inserted") if times else None,
            )
            for variant in steps
        ]  # fmt: skip
        print(table((name, "kept MiB", "÷ plain", "peak MiB", "÷ plain", "seconds", "time ÷ inserted"), rows))


if __name__ == "__main__":
    main()
