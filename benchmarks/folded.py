"""Eval forward of the folded network against the original: the same layers, so 1.00 but for noise."""

import torch
from torchvision import models

import bnsurgery
from bnsurgery.text.tables import table

from .timing import interleave, median, ratio


def main() -> None:
    torch.manual_seed(0)
    original = models.vgg16(weights=None).eval()
    x = torch.randn(8, 3, 224, 224)
    bn_model = bnsurgery.insert(original, [x], fuse_relu=True)
    folded = bnsurgery.fold(bn_model)

    def forward(model):
        with torch.inference_mode():
            model(x)

    networks = {"original": original, "folded": folded, "with BatchNorm, ReLUs fused": bn_model}
    times = interleave({name: lambda model=model: forward(model) for name, model in networks.items()})
    print(f"vgg16, batch 8, eval forward, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(
        table(("network", "seconds", "ratio"), [(n, median(t), ratio(times, n, "original")) for n, t in times.items()])
    )
    print("goal: folded 1.00 × the original")


if __name__ == "__main__":
    main()
