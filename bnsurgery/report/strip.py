"""A network as a strip of boxes: its layers in order of definition, with what was inserted marked."""

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from bnsurgery.graph.layer_kinds import LAYERS, is_activation
from bnsurgery.pages.page import Box
from bnsurgery.records.record import record
from bnsurgery.surgery.relu_fusion import is_fused
from bnsurgery.text.tables import cell_text


def boxes(bn_model: nn.Module) -> dict[str, list[Box]]:
    """The layers in order of definition, a BatchNorm behind its layer, by the network's top-level part."""
    done = record(bn_model)
    norms = {site.norm: site.site.channels for site in done.sites}
    relus = {site.relu for site in done.sites if is_fused(bn_model, site)}
    sites = {site.layer: site.site.name for site in done.sites}
    part_of = {site.norm: _part(site.layer) for site in done.sites}  # of a norm inside its layer: the layer's
    found: dict[str, list[Box]] = {}
    for name, module in _layers(bn_model, ""):
        box = replace(_box(name, module, norms, relus), site=sites.get(name, ""))
        found.setdefault(part_of.get(name, _part(name)), []).append(box)
    return found


def _part(name: str) -> str:
    return name.split(".")[0] if "." in name else ""


def _layers(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """What has no layers inside; a conv or dense layer as well, and behind it the BatchNorm that it carries."""
    children = [(key, child) for key, child in module.named_children() if key != "parametrizations"]
    if isinstance(module, LAYERS) or not children:
        yield name, module
    if isinstance(module, LAYERS):
        children = [(key, child) for key, child in children if key == "norm"]
    for key, child in children:
        yield from _layers(child, f"{name}.{key}" if name else key)


def _box(name: str, module: nn.Module, norms: dict[str, int], relus: set[str | None]) -> Box:
    kind = next(cls.__name__ for cls in type(module).__mro__ if not cls.__name__.startswith(("Normed", "Parametrized")))
    if name in norms:
        return Box(name, f"BN {norms[name]}", "inserted")
    if name in relus:
        return Box(name, "ReLU", "taken")
    if isinstance(module, LAYERS):
        dense = isinstance(module, nn.Linear)
        return Box(
            name, f"{kind} {module.out_features if dense else module.out_channels}", "dense" if dense else "conv"
        )
    return Box(name, cell_text(kind), "activation" if is_activation(module) else "other")
