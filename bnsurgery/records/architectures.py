"""torchvision's BN-free classifiers: build and recognise them."""

import difflib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models import WeightsEnum

from bnsurgery.errors import ArchitectureError, shown
from bnsurgery.graph.layer_kinds import NORMS

NAMES = ("alexnet", "squeezenet1_0", "squeezenet1_1", "vgg11", "vgg13", "vgg16", "vgg19")


@dataclass(frozen=True)
class Architecture:
    """A torchvision classifier and the arguments that shape it.

    Attributes:
        name: torchvision's builder, such as "vgg16".
        num_classes: outputs of the head.
        dropout: probability in the classifier's dropout layers.
    """

    name: str
    num_classes: int = 1000
    dropout: float = 0.5

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"name: got {shown(self.name)}, expected one of {', '.join(NAMES)}")
        if self.num_classes < 1:
            raise ValueError(f"num_classes: got {shown(self.num_classes)}, expected 1 or more")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout: got {shown(self.dropout)}, expected 0 to 1")

    def build(self, device: torch.device | str = "meta", variant: str = "") -> nn.Module:
        """The network in eval mode; on "meta", without memory or initialization. `variant` "_bn" is the one with BN."""
        options: dict[str, Any] = {"num_classes": self.num_classes, "dropout": self.dropout}
        with torch.device(device):
            return models.get_model(self.name + variant, weights=None, **options).eval()

    @property
    def weights(self) -> type[WeightsEnum]:
        """Torchvision's enum of pretrained weights."""
        return models.get_model_weights(self.name)

    @property
    def weight_names(self) -> tuple[str, ...]:
        """The members of the enum for the whole network; *_FEATURES have NaN for the classifier."""
        return tuple(member.name for member in self.weights if not member.name.endswith("_FEATURES"))

    @property
    def min_size(self) -> int:
        """The smallest image side in pixels that the network takes."""
        return max(self.weights.DEFAULT.meta["min_size"])


def architecture(name: str) -> Architecture:
    """The architecture called `name`, with torchvision's defaults.

    Raises:
        ArchitectureError: torchvision has none of that name, or it is normalized already or not a plain CNN.
    """
    if name in NAMES:
        return Architecture(name)
    known = ", ".join(NAMES)
    if name not in models.list_models():
        close = difflib.get_close_matches(name, NAMES, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(close)}?" if close else f"Known: {known}."
        raise ArchitectureError(f"'{name}': no such architecture or file. {hint}")
    norm = _first_norm(name)
    if norm is None:
        raise ArchitectureError(f"'{name}': not one of the networks this command handles: {known}.")
    free = name.removesuffix("_bn")
    hint = f" Its BN-free twin is {free}." if free in NAMES else ""
    raise ArchitectureError(f"'{name}' has normalization layers already, the first: {norm}.{hint}")


def _first_norm(name: str) -> str | None:
    """The first norm of torchvision's classifier `name`; None if there is none, or it is unknown."""
    if name not in models.list_models(module=models):
        return None
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # two builders announce a change of their initialization
        try:
            model = models.get_model(name, weights=None)
        except NotImplementedError:  # RegNet computes its widths with tensors
            return None
    found = ((fqn, module) for fqn, module in model.named_modules() if isinstance(module, NORMS))
    return next((f"'{fqn}' ({type(module).__name__})" for fqn, module in found), None)


def identify(shapes: Mapping[str, torch.Size], candidates: Iterable[Architecture] = ()) -> Architecture | None:
    """The architecture with a state dict of these shapes, by key, but any number of classes; None if there is none.

    Args:
        candidates: the architectures to try; all, if empty.
    """
    for candidate in candidates or map(Architecture, NAMES):
        head_bias = list(state_shapes(candidate.build()))[-1]
        classes = shapes.get(head_bias, ())
        if len(classes) == 1 and classes[0]:
            found = replace(candidate, num_classes=classes[0])
            if state_shapes(found.build()) == dict(shapes):
                return found
    return None


def identify_model(model: nn.Module) -> Architecture | None:
    """The architecture of `model`, compared layer by layer; None for a subclass, or if a layer was changed."""
    if type(model) not in (models.VGG, models.AlexNet, models.SqueezeNet):
        return None
    found = identify(state_shapes(model))
    if found is None:
        return None
    dropout = next((module.p for module in model.modules() if isinstance(module, nn.Dropout)), found.dropout)
    found = replace(found, dropout=dropout)
    built, given = (str(network).replace("inplace=True", "inplace=False") for network in (found.build(), model))
    return found if built == given else None


def state_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """The shape of every entry of the state dict."""
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def summary(name: str) -> dict[str, Any]:
    """One row of `bnsurgery archs`: numbers of layers, parameters in millions with 1000 classes, pixels, weights."""
    chosen = architecture(name)
    model = chosen.build()
    return {
        "name": name,
        "conv": sum(isinstance(module, nn.Conv2d) for module in model.modules()),
        "dense": sum(isinstance(module, nn.Linear) for module in model.modules()),
        "parameters": round(sum(p.numel() for p in model.parameters()) / 1e6, 1),
        "min_size": chosen.min_size,
        "weights": chosen.weight_names,
    }
