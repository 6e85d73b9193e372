"""Take BatchNorm out: fold it into the neighbouring layers. What was inserted leaves them as they originally were."""

import warnings
from collections.abc import Iterable
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnsurgery.errors import BNSurgeryError, BNSurgeryWarning, FoldError
from bnsurgery.graph.layer_kinds import TRANSPOSED, Layer
from bnsurgery.nn import Normed
from bnsurgery.nn.identity import kernel_scale_shift
from bnsurgery.nn.normed import detach_
from bnsurgery.nn.settings import is_frozen
from bnsurgery.records.record import InsertedSite, carries_record, detach_record, record
from bnsurgery.running.batches import Inputs
from bnsurgery.text.words import counted, with_article

from .copies import independent
from .foldable import OWN_NORMS, OwnNorm, own_norms, rest, unfoldable
from .module_tree import place, remove, replace
from .recomputation import keep_activations_
from .relu_fusion import give_back_, is_fused

_NAMED = 8  # layers in a message
_NO_BIAS = "shifts, and '{}' has no bias that could take the shift: bias='add' (--bias add) gives it one"
_NOT_FINITE = "its parameters or statistics are not finite"
_PARTIAL = "allow_partial=True leaves such norms in place."


def fold(
    bn_model: nn.Module, *, allow_partial: bool = False, bias: Literal["add", "refuse"] = "add", example: Any = None
) -> nn.Module:
    """A copy of `bn_model` without its BatchNorm layers, computing the same in eval mode.

    With scale a = weight/√(running_var + eps) and shift s = bias − running_mean·a, a layer before its norm becomes
    W·a, b·a + s (per output channel), and a layer behind a post-activation norm W·a, b + W·s (per input channel).
    Channels that are still the identity (a = 1, s = 0) keep their bits, so an untrained insertion folds back to the
    original exactly. Class and state-dict keys are the original's; only a layer that never had a bias gets one if
    its norm shifts, and a warning names it: strict loading into the original class then fails, and without `strict` the
    shift would be lost.

    Of a model from `insert` or `load` those norms go that were inserted. Of any other network all of its own go, each
    into the layer before it whose output it alone takes, as torch.fx traces the forward pass in eval mode. An
    `nn.Identity` stands in the place of each (or the activation that was part of it), so that every other module and
    tensor keeps its name; layers without bias get one where their norm shifts.

    A warning names layers that take no gradient, while others do, and whose weights change here all the same: their
    norms were trained. Those behind layers that were frozen at the insertion are not.

    Args:
        bn_model: trained or not; not changed.
        allow_partial: leave in place what cannot be folded, instead of raising; a warning names the network's own norms
            that stay. The result then still carries a norm or more, and no record.
        bias: "add" gives layers without a bias one where a norm shifts; "refuse" takes that for what cannot be folded.
        example: a batch, as for `plan`, for a network with its own norms: code that asks for shapes can then be
            followed, and a dense layer on (N, T, C) with T = C is told from one on (N, C).

    Raises:
        FoldError: a norm has no layer that could take it, or a norm or layer is gone or was replaced by something else,
            has hooks or no running statistics, or the layer's output goes elsewhere, too, or its weight is tied,
            computed, or used in a way of its own; named, with the reason.
        BNSurgeryError: the model carries no record, and no BatchNorm.
        UntraceableModelError: nothing of the forward pass of a network with its own norms can be followed.
        ValueError: `bias` is neither of the two.

    ```python
    model = torchvision.models.resnet18().eval()
    plain = bnsurgery.fold(model)  # no BatchNorm in it: plain.conv1 has a bias, plain.bn1 is an nn.Identity
    ```
    """
    if bias not in ("add", "refuse"):
        raise ValueError(f"fold: bias must be 'add' or 'refuse', got {bias!r}")
    if not carries_record(bn_model) and any(isinstance(module, OWN_NORMS) for module in bn_model.modules()):
        return _fold_own(bn_model, allow_partial, bias, example)
    the_record = record(bn_model)
    obstacles = {inserted.norm: _obstacle(bn_model, inserted) for inserted in the_record.sites}
    gained = gained_biases(bn_model, [site for site in the_record.sites if not obstacles[site.norm]])
    if bias == "refuse":
        obstacles |= {norm: _NO_BIAS.format(name) for norm, name in gained.items()}
    if not allow_partial:
        _refuse(obstacles, _PARTIAL)
    changed = _changed_though_frozen(bn_model, [site for site in the_record.sites if not obstacles[site.norm]])
    if changed:
        warnings.warn(
            f"fold: {_layers(changed)} of requires_grad=False had a norm that was trained or went by the batch, so "
            "folding changes the weights. To keep such layers as they are, freeze the norms with them before training: "
            "norm.requires_grad_(False), then bnsurgery.set_statistics_(model, 'running', where=lambda name, norm: not "
            "norm.weight.requires_grad)",
            BNSurgeryWarning,
            stacklevel=2,
        )
    plain = independent(bn_model)
    keep_activations_(plain)
    fold_(plain, [inserted for inserted in the_record.sites if not obstacles[inserted.norm]])
    detach_record(plain)
    if gained and bias == "add":
        warnings.warn(
            f"fold: {told_of_biases(gained.values())}. Load the weights into a network that has bias=True there: "
            "load_state_dict with strict=False would drop the shift, which changes what is computed. bias='refuse' "
            "(--bias refuse) folds nothing then.",
            BNSurgeryWarning,
            stacklevel=2,
        )
    return plain


def _fold_own(model: nn.Module, allow_partial: bool, bias: str, example: Any) -> nn.Module:
    """`fold` of a network that came with its norms."""
    found = own_norms(model, Inputs.of(example) if example is not None else None)
    obstacles = {norm.name: norm.obstacle or _own_obstacle(model, norm, bias) for norm in found}
    if not allow_partial:
        _refuse(obstacles, _PARTIAL)
    plain = independent(model)
    for own in found:
        if not obstacles[own.name]:
            norm, layer = plain.get_submodule(own.name), _layer(plain, str(own.layer))
            _fold_into_output(layer, *(torch.from_numpy(array) for array in _scale_shift(norm)))
            replace(plain, norm, rest(norm))
    left = [f"'{name}': {reason}" for name, reason in obstacles.items() if reason]
    if left:
        more = f"; and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
        warnings.warn(
            f"fold: {len(left)} of {len(found)} BatchNorm layers stay: {'; '.join(left[:_NAMED])}{more}",
            BNSurgeryWarning,
            stacklevel=3,
        )
    return plain


def _own_obstacle(model: nn.Module, own: OwnNorm, bias: str) -> str | None:
    """Why this norm cannot go into the layer before it, or None."""
    layer = _layer(model, str(own.layer))
    scale, shift = _scale_shift(model.get_submodule(own.name))
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        return _NOT_FINITE
    reason = unfoldable(model, layer)
    if reason:
        return f"cannot be folded into {type(layer).__name__} '{own.layer}', {reason}"
    return _NO_BIAS.format(own.layer) if bias == "refuse" and layer.bias is None and (shift != 0).any() else None


def gained_biases(model: nn.Module, sites: Iterable[InsertedSite]) -> dict[str, str]:
    """By norm, the original names of the layers that have no bias and get one where these norms are folded."""
    found = {}
    for inserted in sites:
        if inserted.absorbed_bias or not (_scale_shift(model.get_submodule(inserted.norm))[1] != 0).any():
            continue
        behind = inserted.site.anchor == inserted.site.name
        now, name = (inserted.layer, inserted.site.name) if behind else (inserted.next_layer, inserted.site.next_layer)
        if now is not None and name is not None and _layer(model, now).bias is None:
            found[inserted.norm] = name
    return found


def told_of_biases(names: Iterable[str]) -> str:
    """Which layers got one, in words."""
    return f"{_layers(names)} had no bias and got one, since the BatchNorm there shifts"


def _layers(names: Iterable[str]) -> str:
    listed = [f"'{name}'" for name in names]
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return f"layer{'s' if len(listed) > 1 else ''} {', '.join(listed[:_NAMED])}{more}"


def _changed_though_frozen(model: nn.Module, sites: Iterable[InsertedSite]) -> list[str]:
    """The original names of frozen layers that change where these norms are folded; none if no layer is trained."""
    changed, trained = [], False
    for inserted in sites:
        behind = inserted.site.anchor == inserted.site.name
        now, name = (inserted.layer, inserted.site.name) if behind else (inserted.next_layer, inserted.site.next_layer)
        if now is None or name is None:
            continue
        weight, norm = _layer(model, now)._parameters.get("weight"), model.get_submodule(inserted.norm)
        if weight is not None and weight.requires_grad:
            trained = True
        elif weight is not None and not is_frozen(norm):
            scale, shift = _scale_shift(norm)
            if (scale != 1).any() or ((shift != 0).any() and not inserted.absorbed_bias):
                changed.append(name)
    return changed if trained else []


def fold_(model: nn.Module, sites: Iterable[InsertedSite]) -> None:
    """Fold these norms, in place; the rest, and the record, stay.

    Raises:
        FoldError: as `fold`.
    """
    sites = list(sites)
    _refuse({inserted.norm: _obstacle(model, inserted) for inserted in sites}, "")
    _fold_(model, sites)
    strip_(model, sites)


def _refuse(obstacles: dict[str, str | None], advice: str) -> None:
    refused = {norm: reason for norm, reason in obstacles.items() if reason}
    if refused:
        norm, reason = next(iter(refused.items()))
        more = f" ({len(refused) - 1} more like it)" if len(refused) > 1 else ""
        raise FoldError(f"fold: '{norm}': {reason}{more}. {advice}".rstrip())


def _obstacle(model: nn.Module, inserted: InsertedSite) -> str | None:
    """Why this norm cannot be folded, or None."""
    try:
        norm, layer = model.get_submodule(inserted.norm), model.get_submodule(inserted.layer)
        target = model.get_submodule(inserted.next_layer) if inserted.next_layer is not None else None
        is_fused(model, inserted)
    except AttributeError as error:
        return f"the model was changed since the insertion: {error}"
    except BNSurgeryError as error:
        return str(error)
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
        return f"is {with_article(type(norm).__name__)}, expected a BatchNorm with running statistics"
    scale, shift = _scale_shift(norm)
    if len(scale) != inserted.site.channels:
        return f"has {counted(len(scale), 'channel')}, expected {inserted.site.channels}"
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        return _NOT_FINITE
    if (scale == 1).all() and (shift == 0).all():
        return None
    parent = model.get_submodule(inserted.norm.rpartition(".")[0])
    if not isinstance(parent, Normed) and model.get_submodule(inserted.layer)._forward_hooks:
        return f"'{inserted.layer}' has forward hooks, which may change what reaches the norm: remove them first"
    if inserted.site.anchor != inserted.site.name:
        if target is None:
            return (
                f"stands behind the activation of '{inserted.layer}', and no single dense layer, or conv without zero "
                "padding, follows that could take its shift"
            )
        layer = target
    reason = unfoldable(model, layer)
    return (
        f"cannot be folded into {type(layer).__name__} '{inserted.next_layer or inserted.layer}', {reason}"
        if reason
        else None
    )


def _fold_(model: nn.Module, sites: list[InsertedSite]) -> None:
    for inserted in sites:
        layer = _layer(model, inserted.layer)
        scale, shift = (torch.from_numpy(array) for array in _scale_shift(model.get_submodule(inserted.norm)))
        if inserted.absorbed_bias:  # the bias was dropped: give it back before adding to it
            layer.bias = _zero_bias(layer)
        if bool((scale == 1).all() and (shift == 0).all()):
            continue  # nothing to fold, and every bit stays
        if inserted.site.anchor == inserted.site.name:
            _fold_into_output(layer, scale, shift)
        elif inserted.next_layer is not None:
            _fold_into_input(_layer(model, inserted.next_layer), scale, shift)


def strip_(model: nn.Module, sites: Iterable[InsertedSite]) -> None:
    """Change the module tree only: norms out, ReLUs and dropped biases back, numbers as they were.

    Raises:
        BNSurgeryError: a ReLU is lost, see `is_fused`; nothing is changed then.
    """
    sites = list(sites)
    give_back_(model, sites)
    found = [  # before any edit: removing a sibling renumbers those behind it
        (
            inserted,
            model.get_submodule(inserted.norm),
            _layer(model, inserted.layer),
        )
        for inserted in sites
    ]
    for inserted, norm, layer in found:
        parent, name = place(model, norm)
        if isinstance(parent, Normed):
            detach_(parent)
        else:
            remove(parent, name)
        if inserted.absorbed_bias and layer.bias is None:
            layer.bias = _zero_bias(layer)


def _fold_into_output(layer: Layer, scale: Tensor, shift: Tensor) -> None:
    """W·a and b·a + s, per output channel, where not the identity.

    Output channels are dim 0 of the weight; of a transposed conv's, dim 1 within each group of input channels.
    """
    weight, bias = layer.weight.detach().cpu(), _bias(layer)
    identity = (scale == 1) & (shift == 0)
    per_weight = scale.view(-1, *[1] * (weight.ndim - 1))
    if isinstance(layer, TRANSPOSED):
        per_weight = scale.view(layer.groups, 1, weight.shape[1]).expand(-1, weight.shape[0] // layer.groups, -1)
        per_weight = per_weight.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
    _set(layer, "weight", weight * per_weight)
    if layer.bias is not None or bool((shift != 0).any()):
        _set(layer, "bias", torch.where(identity, bias, bias * scale + shift))


def _fold_into_input(layer: Layer, scale: Tensor, shift: Tensor) -> None:
    """W·a and b + W·s, per input channel (dim 1; features of a flattened map in channel-major order)."""
    weight = layer.weight.detach().cpu()
    if isinstance(layer, nn.Linear):
        repeats = layer.in_features // len(scale)
        a, s = scale.repeat_interleave(repeats), shift.repeat_interleave(repeats)
    else:  # each group of output channels sees its own slice of the input channels
        per_group = weight.shape[1]
        rows = torch.arange(weight.shape[0]) // (weight.shape[0] // layer.groups)
        shape = (weight.shape[0], per_group, *[1] * (weight.ndim - 2))
        a, s = scale.view(-1, per_group)[rows].view(shape), shift.view(-1, per_group)[rows].view(shape)
    if layer.bias is not None or bool((s != 0).any()):
        _set(layer, "bias", _bias(layer) + (weight * s).flatten(1).sum(1, dtype=torch.float64))
    _set(layer, "weight", weight * a)


def _zero_bias(layer: Layer) -> nn.Parameter:
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return nn.Parameter(layer.weight.new_zeros(channels), layer.weight.requires_grad)


def _bias(layer: Layer) -> Tensor:
    """The layer's bias, or zeros, in float64: where terms cancel, float32 sums would lose digits."""
    bias = _zero_bias(layer) if layer.bias is None else layer.bias
    return bias.detach().cpu().double()


def _set(layer: Layer, name: str, value: Tensor) -> None:
    old = getattr(layer, name)
    like = layer.weight if old is None else old
    value = value.to(device=like.device, dtype=like.dtype)
    if old is None:
        layer.register_parameter(name, nn.Parameter(value, requires_grad=like.requires_grad))
    else:
        with torch.no_grad():
            old.copy_(value)


def _layer(model: nn.Module, name: str) -> Layer:
    return cast(Layer, model.get_submodule(name))


def _scale_shift(module: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    norm = cast(_BatchNorm, module)
    assert norm.running_mean is not None and norm.running_var is not None
    mean, var, weight, bias = map(_at_least_single, (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    return kernel_scale_shift(mean, var, weight, bias, norm.eps)


def _at_least_single(tensor: Any) -> Any:
    """In half precision the kernels compute in single."""
    return tensor.float() if tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16) else tensor
