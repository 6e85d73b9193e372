"""A network as a strip of boxes: its layers in order of definition, with what was inserted marked."""

from dataclasses import dataclass

from torch import nn

from bnsurgery.layer_kinds import LAYERS, is_activation
from bnsurgery.nn import Normed
from bnsurgery.surgery_record import record


@dataclass(frozen=True)
class Box:
    """One layer.

    Attributes:
        name: fqn.
        label: class and channels, short.
        kind: "inserted", "taken" (a ReLU that the BatchNorm applies), "conv", "dense", "activation" or "other".
    """

    name: str
    label: str
    kind: str


def boxes(bn_model: nn.Module) -> dict[str, list[Box]]:
    """The layers without children, in order of definition, by the network's top-level part that they are in."""
    done = record(bn_model)
    norms = {site.norm for site in done.sites}
    relus = {site.relu for site in done.sites}
    found: dict[str, list[Box]] = {}

    def add(name: str, module: nn.Module) -> None:
        box = _box(name, module, norms, relus)
        found.setdefault(name.split(".")[0] if "." in name else "", []).append(box)

    for name, module in bn_model.named_modules():
        if isinstance(module, Normed) or not any(True for _ in module.children()):
            add(name, module)
    return found


def _box(name: str, module: nn.Module, norms: set[str], relus: set[str | None]) -> Box:
    kind = type(module).__name__.removeprefix("Normed" if isinstance(module, Normed) else "")
    if name in norms:
        return Box(name, f"BN {module.num_features}", "inserted")
    if name in relus:
        return Box(name, "ReLU", "taken")
    if isinstance(module, LAYERS):
        dense = isinstance(module, nn.Linear)
        return Box(
            name, f"{kind} {module.out_features if dense else module.out_channels}", "dense" if dense else "conv"
        )
    return Box(name, kind, "activation" if is_activation(module) else "other")
