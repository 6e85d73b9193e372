"""The fine-tuning loop against one written by hand: same network, same images, same transforms and loader workers.

    python -m benchmarks.finetune_loop [--arch vgg16] [--image-size 224] [--batch N] [--steps N] [--rounds N]

Seconds a step over epochs, reading and augmenting images included, of a network with BatchNorm, channels_last, and the
peak memory of the process. The loop by hand has no schedule, no metrics and no checks. No validation in either.
"""

import argparse
import copy
import resource
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import models

from bnsurgery import finetune
from bnsurgery.finetune.loop import Trainer
from bnsurgery.finetune.setup import build, processes
from bnsurgery.finetune.stopping import StopRequest
from bnsurgery.text.tables import table

from .timing import interleave, median, ratio


class Loop(Trainer):
    """Epochs of the trainer without the validation at their end."""

    def _validation_is_due(self) -> bool:
        return False

    def epoch(self) -> None:
        with nullcontext(self._bar()) as bar:
            self._train_epoch(bar, StopRequest())


class Images(Dataset[tuple[Tensor, int]]):
    """The same images by number alone, as one would write it."""

    def __init__(self, images: Tensor, labels: Tensor, transform: nn.Module) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), int(self.labels[index])


class ByHand:
    """What one would write in ten lines."""

    def __init__(self, network: nn.Module, data: Images, batch: int) -> None:
        self.network = network.train()
        self.optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9, nesterov=True, weight_decay=1e-4)
        self.loader = DataLoader(data, batch, shuffle=True, num_workers=1, persistent_workers=True)

    def epoch(self) -> None:
        for images, labels in self.loader:
            loss = nn.functional.cross_entropy(self.network(images.to(memory_format=torch.channels_last)), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vgg16")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6, help="of an epoch, which is a round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    size = args.image_size
    images = torch.randint(0, 256, (args.batch * args.steps, 3, size, size), dtype=torch.uint8)
    labels = torch.arange(len(images)) % 2
    data = finetune.from_tensors((images, labels), (images[:2], labels[:2]), ["even", "odd"])
    config = finetune.Config(
        data="noise", output="unused", image_size=size, batch_size=args.batch, lr=1e-4, augment="resized-crop",
        recalibrate=8, num_workers=1, clip=0.0, epochs=1000, device="cpu",
    )  # fmt: skip
    setup = build(config, processes(config), models.get_model(args.arch, weights=None).eval(), data, None, False)
    ours = Loop(setup, None, False)
    ours.objective.train()
    by_hand = ByHand(copy.deepcopy(setup.network), Images(images, labels, setup.prepared.augmented), args.batch)
    times = interleave({"finetune": ours.epoch, "by hand": by_hand.epoch}, args.rounds)
    print(f"{args.arch} at {size}, batch {args.batch}, {args.steps} steps a round, torch {torch.__version__}")
    rows = [(name, median(t) / args.steps, ratio(times, name, "by hand")) for name, t in times.items()]
    print(table(("loop", "seconds a step", "÷ by hand"), rows))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.2f} GiB, for two networks with momentum")


if __name__ == "__main__":
    main()
