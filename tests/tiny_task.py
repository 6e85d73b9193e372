"""A tiny network without BatchNorm and a task for it, for runs of a second."""

import torch
from torch import nn


def tiny(seed: int = 0) -> nn.Module:
    """Two convs and two dense layers for (N, 1, 8, 8), 4 classes, with activations of order 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 16),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(16, 4),
        )
        for layer in model:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight)
    return model.eval()


def patterns(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with a bright quadrant: which one is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    images = torch.randint(0, 120, (count, 1, 8, 8), generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[:, row : row + 4, column : column + 4] += 60
    return images.to(torch.uint8), labels
