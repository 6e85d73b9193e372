"""Images to write for tests."""

import numpy as np
from PIL import Image


def gradient(width=48, height=36):
    """Red grows to the right, green downwards, blue to the left: every orientation looks different."""
    x = np.linspace(0, 255, width).astype(np.uint8)[None].repeat(height, 0)
    y = np.linspace(0, 255, height).astype(np.uint8)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([x, y, 255 - x], 2))


def save(path, image=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or gradient()).save(path, **options)
    return path
