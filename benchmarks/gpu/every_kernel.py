"""Every kernel at odd shapes, forward and backward: what `sanitizer` watches. Needs CUDA."""

import sys
from typing import Any

import torch

import bnsurgery
from benchmarks.kernel_resources import NAMES
from bnsurgery.ops import functional, kernels

# Of the last two several programs share a channel, which takes `combine`.
CASES = [
    ((3, 5, 7), torch.float32, torch.contiguous_format, "batch"),
    ((2, 33, 5, 3), torch.bfloat16, torch.channels_last, "renorm"),
    ((37, 9), torch.float16, torch.contiguous_format, "batch"),
    ((16, 33, 29, 31), torch.float32, torch.contiguous_format, "renorm"),
    ((9, 130, 21, 17), torch.bfloat16, torch.channels_last, "batch"),
]


class Counted:
    """A kernel whose launches are counted."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.launches += 1
        return self.kernel[grid]


def main(device: str = "cuda") -> None:
    torch.manual_seed(0)
    functional._ATEN_UP_TO = -1
    counted = {name: Counted(getattr(kernels, name)) for name in NAMES}
    for name, kernel in counted.items():
        setattr(kernels, name, kernel)
    for shape, dtype, memory_format, statistics in CASES:
        x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
        kind = bnsurgery.nn.BatchNorm2d if x.ndim == 4 else bnsurgery.nn.BatchNorm1d
        norm = kind(shape[1], activation="relu").to(device)
        for mode in (statistics, "running"):
            bnsurgery.set_statistics_(norm, mode)
            y = norm(x)
            y.backward(torch.randn_like(y))
    if device == "cuda":
        torch.cuda.synchronize()
    if missing := [name for name, kernel in counted.items() if not kernel.launches]:
        sys.exit(f"kernels that did not run: {', '.join(missing)}")
    print("every kernel ran")


if __name__ == "__main__":
    main()
