"""A network as a strip of boxes: its layers in order of definition, with the BatchNorms marked."""

from collections.abc import Iterator

from torch import nn

from bnsurgery.graph.layer_kinds import LAYERS, is_activation
from bnsurgery.pages.page import Box
from bnsurgery.records.record import record
from bnsurgery.surgery.relu_fusion import is_fused
from bnsurgery.text.tables import cell_text


def boxes(bn_model: nn.Module) -> dict[str, list[Box]]:
    """The layers in order of definition, a BatchNorm behind its layer, by the network's top-level part."""
    inserted = record(bn_model).sites
    norms = {site.norm: site for site in inserted}
    sites = {site.layer: site.site.name for site in inserted}
    fused = {site.relu for site in inserted if is_fused(bn_model, site)}
    strip: dict[str, list[Box]] = {}
    for name, module in _layers(bn_model, ""):
        if name in norms:
            box = Box(name, f"BN {norms[name].site.channels}", "inserted")
        elif name in fused:
            box = Box(name, "ReLU", "taken")
        else:
            box = Box(name, *_label_and_kind(module), sites.get(name, ""))
        place = norms[name].layer if name in norms else name  # a norm inside its layer goes to the layer's part
        strip.setdefault(place.split(".")[0] if "." in place else "", []).append(box)
    return strip


def _layers(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules without children; a conv or dense layer as well, and behind it the BatchNorm that it carries."""
    children = [(key, child) for key, child in module.named_children() if key != "parametrizations"]
    if isinstance(module, LAYERS) or not children:
        yield name, module
    if isinstance(module, LAYERS):
        children = [(key, child) for key, child in children if key == "norm"]
    for key, child in children:
        yield from _layers(child, f"{name}.{key}" if name else key)


def _label_and_kind(module: nn.Module) -> tuple[str, str]:
    names = (cls.__name__ for cls in type(module).__mro__)
    name = next(name for name in names if not name.startswith(("Normed", "Parametrized")))
    if isinstance(module, nn.Linear):
        return f"{name} {module.out_features}", "dense"
    if isinstance(module, LAYERS):
        return f"{name} {module.out_channels}", "conv"
    return cell_text(name), "activation" if is_activation(module) else "other"
