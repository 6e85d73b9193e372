"""What a network was fine-tuned to tell apart, and what it takes: kept in its checkpoint."""

import math
from dataclasses import dataclass

import torch
from torchvision.transforms import v2

from .errors import CheckpointError, shown

MAX_SIDE = 4096  # pixels


@dataclass(frozen=True)
class Task:
    """Class names, and the way from an image to the network's input.

    Attributes:
        classes: names, in the order of the outputs.
        head: fqn of the output layer in the original network, made anew for these classes; None where it was kept.
        image_size: side of the square input in pixels.
        resize_size: length that the image's shorter side gets before its centre is cut out.
        mean, std: per channel, of values 0 to 1; one channel or three.
    """

    classes: tuple[str, ...]
    head: str | None
    image_size: int
    resize_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        sound = (
            len(self.classes) >= 1
            and 0 < self.image_size <= MAX_SIDE
            and self.image_size <= self.resize_size <= 2 * MAX_SIDE
            and len(self.mean) == len(self.std)
            and len(self.mean) in (1, 3)
            and all(math.isfinite(value) for value in (*self.mean, *self.std))
            and all(std > 0 for std in self.std)
        )
        if not sound:
            raise CheckpointError(f"task: classes, image sizes, mean or std out of range: {shown(self)}")

    def preprocess(self, *geometry: v2.Transform) -> v2.Compose:
        """From a PIL image or uint8 tensor (C, H, W) to the network's normalized input.

        Args:
            geometry: what to do instead of resizing and cutting out the centre, such as random crops.
        """
        if not geometry:
            geometry = (v2.Resize(self.resize_size), v2.CenterCrop(self.image_size))
        colour = v2.RGB() if len(self.mean) == 3 else v2.Grayscale()
        to_input = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
        return v2.Compose([colour, *geometry, *to_input, v2.Normalize(list(self.mean), list(self.std))])
