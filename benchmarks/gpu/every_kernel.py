"""Every kernel once at small odd shapes, forward and backward: what `sanitizer` watches. Needs CUDA."""

import torch

from bnsurgery import ops

CASES = [
    ((3, 5, 7), torch.float32, torch.contiguous_format),
    ((2, 33, 5, 3), torch.bfloat16, torch.channels_last),
    ((37, 9), torch.float16, torch.contiguous_format),
]


def main() -> None:
    torch.manual_seed(0)
    for shape, dtype, memory_format in CASES:
        x = torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=memory_format).requires_grad_()
        channels = shape[1]
        running = torch.zeros(channels, device="cuda"), torch.ones(channels, device="cuda")
        weight, bias = (torch.randn(channels, device="cuda", requires_grad=True) for _ in range(2))
        for training in (True, False):
            y = ops.batch_norm(x, *running, weight, bias, training, relu=True)
            y.backward(torch.randn_like(y))
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
