"""Networks and images for the steps: real ones where there is a folder of them, else random ones of the same shape."""

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torchvision import models


def real(data: Path) -> ModuleType:
    """The module in the folder that loads its networks and photographs."""
    spec = importlib.util.spec_from_file_location("real", data / "real.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["real"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def squeezenet(data: Path | None) -> nn.Module:
    """SqueezeNet 1.0 in eval mode, trained on ImageNet or with He-scaled random weights."""
    if data:
        model: nn.Module = real(data).squeezenet1_0_imagenet()
        return model
    model = models.squeezenet1_0(weights=None).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = math.sqrt(2 / parameter[0].numel()) if parameter.ndim > 1 else 0.1
            parameter.normal_(0, spread)
    return model


def noise(count: int, size: int, device: str) -> Tensor:
    """Images whose channels differ in mean and spread."""
    scale = torch.linspace(0.5, 1.5, 3, device=device).view(1, 3, 1, 1)
    return torch.randn(count, 3, size, size, device=device) * scale + scale
