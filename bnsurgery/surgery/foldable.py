"""Which layers a BatchNorm can be folded into, and why not into others."""

from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from bnsurgery.graph.layer_kinds import LAYERS, Layer, batched_ndim
from bnsurgery.graph.planning import is_hooked
from bnsurgery.graph.tracing import Trace
from bnsurgery.nn.batchnorm import Insertable, LastDimBatchNorm1d
from bnsurgery.nn.normed import detached_class
from bnsurgery.running.batches import Inputs
from bnsurgery.text.words import with_article

from .heads import outputs_of

OWN_NORMS = (_BatchNorm, FrozenBatchNorm2d)
_PLAIN_FORWARDS = {cls.forward for cls in LAYERS}
_PLAIN_CONV_FORWARDS = {getattr(cls, "_conv_forward", None) for cls in LAYERS}
_NORM_FORWARDS = {
    cls.forward for cls in (_BatchNorm, nn.SyncBatchNorm, FrozenBatchNorm2d, Insertable, LastDimBatchNorm1d)
}
_TIMM = "timm.layers.norm_act"  # its BatchNorm is one module with the dropout and the activation behind it
_NOTHING_IN_EVAL = (nn.Identity, nn.modules.dropout._DropoutNd)


@dataclass(frozen=True)
class OwnNorm:
    """A BatchNorm that a network came with.

    Attributes:
        name: its fqn, or the name of a call of `F.batch_norm`.
        layer: fqn of the layer whose outputs it alone consumes, if there is one.
        obstacle: the reason why it cannot be folded, or None.
    """

    name: str
    layer: str | None = None
    obstacle: str | None = None


def own_norms(model: nn.Module, example: Inputs | None = None) -> list[OwnNorm]:
    """All BatchNorm layers of `model`, in order of definition. `Trace` raises if it cannot follow the forward pass."""
    trace = Trace(model, example)
    norms = [norm for norm in trace.names if isinstance(norm, OWN_NORMS)]
    found = [OwnNorm(trace.names[norm], *_layer_before(trace, norm)) for norm in norms]
    for node in trace.nodes:
        if node.target is F.batch_norm:
            where = f"in the middle of {trace.called(node.meta['caller'])}'s forward"
            found.append(OwnNorm(node.name, obstacle=f"F.batch_norm is called {where}: make this call a module"))
    return found


def rest(norm: nn.Module) -> nn.Module:
    """The module that replaces a folded norm: an Identity, or the activation that was part of the norm."""
    if _is_timms(norm):
        return nn.Sequential(norm.get_submodule("drop"), norm.get_submodule("act"))
    return nn.ReLU() if getattr(norm, "activation", None) == "relu" else nn.Identity()


def _is_timms(norm: nn.Module) -> bool:
    return isinstance(norm, nn.BatchNorm2d) and type(norm).forward.__module__ == _TIMM


def _layer_before(trace: Trace, norm: nn.Module) -> tuple[str | None, str | None]:
    """The fqn of the layer all of whose outputs go into `norm` and nowhere else; or None, and the reason."""
    if (type(norm).forward not in _NORM_FORWARDS and not _is_timms(norm)) or "forward" in vars(norm):
        return None, f"is {with_article(type(norm).__name__)}, which has a custom forward"
    if norm.running_mean is None or norm.running_var is None:
        return None, "has no running statistics: it normalizes by the batch in eval mode, too"
    if is_hooked(norm):
        return None, "has hooks, which would be lost: remove them first"
    if norm in trace.read:
        return None, "the code of another module reads its parameters"
    if not trace.calls[norm]:
        reason = trace.obstacle(norm)
        if reason is not None and trace.example is None:
            reason += ": pass a batch as `example` if its code asks for shapes"
        return None, reason or "is never called in eval mode, so that its layer is not known"
    after, before = norm, _source(trace, norm)
    while isinstance(before, _NOTHING_IN_EVAL) and trace.only_user(before) is after and not is_hooked(before):
        after, before = before, _source(trace, before)
    if not isinstance(before, LAYERS):
        nodes = {str(source) for node in trace.calls[after] for source in node.all_input_nodes}
        what = f"'{nodes.pop()}', which is no module" if len(nodes) == 1 else "different things"
        what = what if before is None else f"{type(before).__name__} '{trace.names[before]}'"
        return None, f"does not stand behind a conv or dense layer, but behind {what}"
    name = trace.names[before]
    if trace.only_user(before) is not after:
        return None, f"the output of '{name}' before it is used elsewhere, too"
    if trace.part(before) != trace.part(norm):
        return None, f"'{name}' and it are followed separately"
    if before in trace.read:
        return None, f"the code of another module reads the parameters of '{name}'"
    if is_hooked(before):
        return None, f"'{name}' has hooks, which may change the norm's input: remove them first"
    if isinstance(before, nn.Linear) and not isinstance(norm, LastDimBatchNorm1d) and not trace.shapes[before]:
        return None, f"may normalize another dimension than the features of '{name}': pass `example`, a batch"
    if not _same_channels(trace, before, norm):
        return None, f"normalizes another dimension than the channels of '{name}'"
    return name, None


def _source(trace: Trace, module: nn.Module) -> nn.Module | None:
    """The module that gives every call of `module` its input, or None."""
    inputs = [node.all_input_nodes[:1] for node in trace.calls[module]]
    sources = {first[0].meta.get("module") if first else None for first in inputs}
    return sources.pop() if len(sources) == 1 else None


def _same_channels(trace: Trace, layer: Layer, norm: nn.Module) -> bool:
    """Whether the norm's channels are the layer's: dimension 1 behind a conv, the last behind a dense layer."""
    if outputs_of(layer) != cast(Any, norm).running_mean.numel():
        return False
    if isinstance(norm, LastDimBatchNorm1d):
        return isinstance(layer, nn.Linear)
    if isinstance(layer, nn.Linear) and not isinstance(norm, (nn.BatchNorm1d, nn.SyncBatchNorm)):
        return False
    return {len(shape) for shape in trace.shapes[layer]} <= {batched_ndim(layer)}


def unfoldable(model: nn.Module, name: str) -> str | None:
    """The reason why scaling this layer's weight would not just scale its output, or None."""
    layer = model.get_submodule(name)
    plain, weight = detached_class(layer), layer._parameters.get("weight")
    users = [m for m in model.modules() if any(p is weight for p in m._parameters.values())]
    if plain.forward not in _PLAIN_FORWARDS or getattr(plain, "_conv_forward", None) not in _PLAIN_CONV_FORWARDS:
        reason = "class has a custom forward"
    elif "forward" in vars(layer):
        reason = "forward was replaced on the object"
    elif weight is None or layer._forward_pre_hooks:
        reason = "weight is computed (parametrized, normalized or pruned)"
    elif len(users) > 1:
        reason = "weight is tied to another layer's"
    else:
        return None
    return f"cannot be folded into {type(layer).__name__} '{name}', whose {reason}"
