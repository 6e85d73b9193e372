"""Which layers can take up the BatchNorm behind them, and why the others cannot."""

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
        name: its fqn; for a call of `F.batch_norm` the name of that.
        layer: fqn of the layer whose outputs it alone consumes, if there is one.
        obstacle: why it cannot be taken out, or None.
    """

    name: str
    layer: str | None = None
    obstacle: str | None = None


def own_norms(model: nn.Module, example: Inputs | None = None) -> list[OwnNorm]:
    """The BatchNorm layers of `model`, in order of definition, whatever put them there.

    Raises:
        UntraceableModelError: the forward pass cannot be followed.
        CalibrationError: the model does not take the example.
    """
    trace = Trace(model, example)
    found = [_considered(trace, norm) for norm in trace.names if isinstance(norm, OWN_NORMS)]
    for node in trace.nodes:
        if node.target is F.batch_norm:
            caller = node.meta["caller"]
            where = f"'{trace.names[caller]}'" if trace.names.get(caller) else type(caller).__name__
            reason = f"F.batch_norm is called in the middle of {where}'s forward: make this call a module of its own"
            found.append(OwnNorm(node.name, obstacle=reason))
    return found


def rest(norm: nn.Module) -> nn.Module:
    """What stays in the place of a norm that is folded: an Identity, or what the same module did to its output."""
    if _is_timms(norm):
        return nn.Sequential(norm.get_submodule("drop"), norm.get_submodule("act"))
    return nn.ReLU() if getattr(norm, "activation", None) == "relu" else nn.Identity()


def _is_timms(norm: nn.Module) -> bool:
    return isinstance(norm, nn.BatchNorm2d) and type(norm).forward.__module__ == _TIMM


def _considered(trace: Trace, norm: nn.Module) -> OwnNorm:
    name = trace.names[norm]
    if (type(norm).forward not in _NORM_FORWARDS and not _is_timms(norm)) or "forward" in vars(norm):
        return OwnNorm(name, obstacle=f"is {with_article(type(norm).__name__)}, which has a forward of its own")
    if norm.running_mean is None or norm.running_var is None:
        return OwnNorm(name, obstacle="has no running statistics: it normalizes by the batch in eval mode, too")
    if is_hooked(norm):
        return OwnNorm(name, obstacle="has hooks, which would be lost: remove them first")
    if norm in trace.read:
        return OwnNorm(name, obstacle="the code of another module reads its parameters")
    calls = trace.calls(norm)
    if not calls:
        reason = trace.obstacle(norm)
        if reason is None:
            reason = "is never called in eval mode, so that what it follows is not known"
        elif trace.observed is None:
            reason += ": pass example=, a batch, if it is shapes that its code asks for"
        return OwnNorm(name, obstacle=reason)
    layer, reason = _layer_before(trace, norm)
    return OwnNorm(name, trace.names[layer] if layer is not None else None, reason)


def _layer_before(trace: Trace, norm: nn.Module) -> tuple[nn.Module | None, str | None]:
    """The layer whose every output goes into `norm` and nowhere else; or None, and why."""
    after, before = norm, _source(trace, norm)
    while isinstance(before, _NOTHING_IN_EVAL) and trace.only_user(before) is after and not is_hooked(before):
        after, before = before, _source(trace, before)
    if not isinstance(before, LAYERS):
        what = "different things" if before is None else f"{type(before).__name__} '{trace.names[before]}'"
        if before is None and (nodes := _inputs(trace, after)) and len(nodes) == 1:
            what = f"'{nodes.pop()}', which is no module"
        return None, f"does not stand behind a conv or dense layer, but behind {what}"
    name = trace.names[before]
    if trace.only_user(before) is not after:
        return None, f"the output of '{name}' before it is used elsewhere, too"
    if trace.part(before) != trace.part(norm):
        return None, f"'{name}' and it are followed apart"
    if before in trace.read:
        return None, f"the code of another module reads the parameters of '{name}'"
    if is_hooked(before):
        return None, f"'{name}' has hooks, which may change what reaches the norm: remove them first"
    if isinstance(before, nn.Linear) and not isinstance(norm, LastDimBatchNorm1d) and not trace.shapes(before):
        return None, f"may normalize another dimension than the features of '{name}': pass example=, a batch"
    if not _same_channels(trace, before, norm):
        return None, f"normalizes another dimension than the channels of '{name}'"
    return before, None


def _source(trace: Trace, module: nn.Module) -> nn.Module | None:
    """The module that every call of `module` gets its input from."""
    sources = {
        node.all_input_nodes[0].meta.get("module") if node.all_input_nodes else None for node in trace.calls(module)
    }
    return sources.pop() if len(sources) == 1 else None


def _inputs(trace: Trace, module: nn.Module) -> set[str]:
    return {str(source) for node in trace.calls(module) for source in node.all_input_nodes}


def _same_channels(trace: Trace, layer: Layer, norm: nn.Module) -> bool:
    """Whether the norm's channels are the layer's: dim 1 behind a conv, the last behind a dense layer."""
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if channels != cast(Any, norm).running_mean.numel():
        return False
    if isinstance(norm, LastDimBatchNorm1d):
        return isinstance(layer, nn.Linear)
    if isinstance(layer, nn.Linear) and not isinstance(norm, (nn.BatchNorm1d, nn.SyncBatchNorm)):
        return False
    return {len(shape) for shape in trace.shapes(layer)} <= {batched_ndim(layer)}


def unfoldable(model: nn.Module, layer: nn.Module) -> str | None:
    """Why scaling this layer's weight would not scale its output, or would scale something else too; or None."""
    plain = detached_class(layer)
    if plain.forward not in _PLAIN_FORWARDS or getattr(plain, "_conv_forward", None) not in _PLAIN_CONV_FORWARDS:
        return "whose class has a forward of its own"
    if "forward" in vars(layer):
        return "whose forward was replaced on the object"
    weight = layer._parameters.get("weight")
    if weight is None or layer._forward_pre_hooks:
        return "whose weight is computed (parametrized, normalized or pruned)"
    users = [m for m in model.modules() if any(p is weight for p in m._parameters.values())]
    return "whose weight is tied to another layer's" if len(users) > 1 else None
