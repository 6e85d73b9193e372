"""Calibration against a plain forward pass over the same batches: vgg16, 224×224, batch 8, both memory formats.

Beside it, the same ratio for what torch and fvcore offer on vgg16_bn: `update_bn` (moving or cumulative averages) and
`update_bn_stats` (Precise BN).
"""

import torch
from fvcore.nn.precise_bn import update_bn_stats
from torch.optim.swa_utils import update_bn
from torchvision import models

import bnsurgery
from bnsurgery.tables import table

from .timing import interleave, median, ratio

BATCHES, BATCH = 2, 8


def main() -> None:
    torch.manual_seed(0)
    plain, bn = models.vgg16(weights=None).eval(), models.vgg16_bn(weights=None)
    plan = bnsurgery.plan(plain, torch.randn(1, 3, 224, 224))
    rows = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        batches = [torch.randn(BATCH, 3, 224, 224).to(memory_format=memory_format) for _ in range(BATCHES)]
        for model in (plain, bn):
            model.to(memory_format=memory_format)

        def forward(model, batches=batches):
            model.eval()
            with torch.inference_mode():
                for batch in batches:
                    model(batch)

        times = interleave(
            {
                "plain forward": lambda: forward(plain),
                "bnsurgery.calibrate": lambda batches=batches: bnsurgery.calibrate(plain, plan, batches),
                "vgg16_bn forward": lambda: forward(bn),
                "torch update_bn": lambda batches=batches: update_bn(batches, bn),
                "fvcore update_bn_stats": lambda batches=batches: update_bn_stats(bn.train(), batches, BATCHES),
            },
            rounds=5,
        )
        for name, peer in (
            ("plain forward", "plain forward"),
            ("bnsurgery.calibrate", "plain forward"),
            ("torch update_bn", "vgg16_bn forward"),
            ("fvcore update_bn_stats", "vgg16_bn forward"),
        ):
            layout = str(memory_format).removeprefix("torch.")
            rows.append((name, layout, median(times[name]), ratio(times, name, peer), peer))
    print(f"vgg16, {BATCHES} batches of {BATCH}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(table(("what", "layout", "seconds", "ratio", "to"), rows))
    print("goal: bnsurgery.calibrate at most 1.05 × the plain forward")


if __name__ == "__main__":
    main()
