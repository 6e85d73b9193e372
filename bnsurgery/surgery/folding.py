"""Take BatchNorm out: fold it into the neighbouring layers. Inserted norms leave the layers of the original."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, cast

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

from .copies import independent, refuse_sharded
from .foldable import OWN_NORMS, OwnNorm, own_norms, rest, unfoldable
from .heads import outputs_of
from .module_tree import place, remove, replace
from .recomputation import keep_activations_
from .relu_fusion import give_back_, is_fused

_NAMED = 8  # items in a message
_NO_BIAS = "shifts, and '{}' has no bias that could take the shift: `bias='add'` gives it one"
_NOT_FINITE = "its parameters or statistics are not finite"
_PARTIAL = "`allow_partial=True` leaves such norms in place."  # a note: the command line does not print these


def fold(
    bn_model: nn.Module, *, allow_partial: bool = False, bias: Literal["add", "refuse"] = "add", example: Any = None
) -> nn.Module:
    """A copy of `bn_model` without its BatchNorm layers that computes the same in eval mode.

    With scale a = weight/√(running_var + eps) and shift s = bias − running_mean·a, a layer before its norm becomes
    W·a, b·a + s (per output channel), and a layer behind a post-activation norm W·a, b + W·s (per input channel).
    Channels that are still the identity (a = 1, s = 0) keep their bits, so an untrained insertion folds back to the
    original exactly. Class and state-dict keys are the original's, except that a layer without a bias gets one if its
    norm shifts. A warning names these layers: strict loading into the original class then fails, and without `strict`
    the shift would be lost.

    In a model from `insert` or `load` the inserted norms are folded. In any other network all norms are folded, each
    into the layer before it whose output it alone consumes, as torch.fx traces the forward pass in eval mode. An
    `nn.Identity` takes the place of each norm (or the activation that was part of it), so that all other modules and
    tensors keep their names.

    A warning names layers that take no gradient, while others do, and whose weights change here because their norms
    were trained. Norms of layers that were frozen at the insertion are not.

    Args:
        bn_model: trained or not; not changed.
        allow_partial: leave norms that cannot be folded in place instead of raising; a warning names those that the
            network came with. The result then still contains a norm, and has no record.
        bias: "add" gives layers without a bias one if a norm shifts; "refuse" counts such norms as not foldable.
        example: a batch, as for `plan`, for a network that came with norms. With it, code that asks for shapes can be
            followed, and a dense layer on (N, T, C) with T = C is told from one on (N, C).

    Raises:
        FoldError: a norm cannot be folded: there is no layer for it, it or the layer is gone, was replaced, has hooks
            or no running statistics, or the layer's output is used elsewhere, or its weight is tied, computed or used
            in a custom forward. The message names the norm and the reason.
        BNSurgeryError: the model has no BatchNorm.
        UntraceableModelError: nothing of the forward pass of a network that came with norms can be followed.
        ValueError: `bias` is neither of the two.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 10)).eval()
        >>> plain = bnsurgery.fold(bnsurgery.insert(model, [torch.randn(8, 3, 16, 16)]))
        >>> all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values()))
        True
        >>> bnsurgery.fold(torchvision.models.resnet18(weights=None).eval()).bn1
        Identity()
    """
    if bias not in ("add", "refuse"):
        raise ValueError(f"fold: bias must be 'add' or 'refuse', got {bias!r}")
    refuse_sharded("fold", bn_model)
    if not carries_record(bn_model):
        if not any(isinstance(module, OWN_NORMS) for module in bn_model.modules()):
            raise BNSurgeryError(f"fold: {type(bn_model).__name__} has no BatchNorm to fold")
        return _fold_own(bn_model, allow_partial, bias, example)
    sites = record(bn_model).sites
    obstacles = {inserted.norm: _obstacle(bn_model, inserted) for inserted in sites}
    gained = gained_biases(bn_model, [inserted for inserted in sites if not obstacles[inserted.norm]])
    if bias == "refuse":
        obstacles |= {norm: _NO_BIAS.format(name) for norm, name in gained.items()}
    if not allow_partial:
        _refuse(obstacles, _PARTIAL)
    folded = [inserted for inserted in sites if not obstacles[inserted.norm]]
    notes = []
    if changed := _changed_though_frozen(bn_model, folded):
        notes.append(
            f"{_layers(changed)} of requires_grad=False had a norm that was trained or went by the batch, so folding "
            "changes the weights. To keep such layers as they are, freeze the norms with them before training: "
            "norm.requires_grad_(False), then bnsurgery.set_statistics_(model, 'running', where=lambda name, norm: not "
            "norm.weight.requires_grad)"
        )
    if gained and bias == "add":
        notes.append(
            f"{_layers(gained.values())} had no bias and got one, since the BatchNorm there shifts. Load the weights "
            "into a network that has bias=True there: load_state_dict with strict=False would drop the shift, which "
            "changes the outputs."
        )
    plain = independent(bn_model)
    keep_activations_(plain)
    fold_(plain, folded)
    detach_record(plain)
    for note in notes:
        warnings.warn(f"fold: {note}", BNSurgeryWarning, stacklevel=2)
    return plain


def _fold_own(model: nn.Module, allow_partial: bool, bias: str, example: Any) -> nn.Module:
    """`fold` of a network that came with norms."""
    found = own_norms(model, Inputs.of(example) if example is not None else None)
    obstacles = {norm.name: norm.obstacle or _own_obstacle(model, norm, bias) for norm in found}
    if not allow_partial:
        _refuse(obstacles, _PARTIAL)
    plain = independent(model)
    for own in found:
        if not obstacles[own.name]:
            norm = plain.get_submodule(own.name)
            _fold_into_output(_layer(plain, str(own.layer)), *_scale_shift(norm))
            replace(plain, norm, rest(norm))
    left = [f"'{name}': {reason}" for name, reason in obstacles.items() if reason]
    if left:
        text = f"fold: {len(left)} of {len(found)} BatchNorm layers stay: {_first(left, '; ')}"
        warnings.warn(text, BNSurgeryWarning, stacklevel=3)
    return plain


def _own_obstacle(model: nn.Module, own: OwnNorm, bias: str) -> str | None:
    """The reason why this norm cannot go into the layer before it, or None."""
    layer = _layer(model, str(own.layer))
    scale, shift = _scale_shift(model.get_submodule(own.name))
    if not (scale.isfinite().all() and shift.isfinite().all()):
        return _NOT_FINITE
    if reason := unfoldable(model, str(own.layer)):
        return reason
    return _NO_BIAS.format(own.layer) if bias == "refuse" and layer.bias is None and shift.any() else None


def _targets(
    model: nn.Module, sites: Iterable[InsertedSite]
) -> Iterator[tuple[InsertedSite, str, Layer, Tensor, Tensor]]:
    """By site: the layer that its norm folds into, with its name in the original, and the norm's scale and shift."""
    for inserted in sites:
        now, name = _target(inserted)
        if now is not None and name is not None:
            yield inserted, name, _layer(model, now), *_scale_shift(model.get_submodule(inserted.norm))


def _target(inserted: InsertedSite) -> tuple[str | None, str | None]:
    """The names of the layer that a norm folds into: now, and in the original."""
    if inserted.site.anchor == inserted.site.name:
        return inserted.layer, inserted.site.name
    return inserted.next_layer, inserted.site.next_layer


def gained_biases(model: nn.Module, sites: Iterable[InsertedSite]) -> dict[str, str]:
    """The original names of the layers without a bias that get one if these norms are folded, by norm."""
    return {
        inserted.norm: name
        for inserted, name, layer, _, shift in _targets(model, sites)
        if shift.any() and layer.bias is None and not inserted.absorbed_bias
    }


def _first(items: list[str], between: str = ", ") -> str:
    return between.join(items[:_NAMED]) + (f" and {len(items) - _NAMED} more" if len(items) > _NAMED else "")


def _layers(names: Iterable[str]) -> str:
    quoted = [f"'{name}'" for name in names]
    return f"layer{'s' if len(quoted) > 1 else ''} {_first(quoted)}"


def _changed_though_frozen(model: nn.Module, sites: Iterable[InsertedSite]) -> list[str]:
    """The original names of frozen layers that change if these norms are folded; none if no layer is trained."""
    changed, trained = [], False
    for inserted, name, layer, scale, shift in _targets(model, sites):
        weight, norm = layer._parameters.get("weight"), model.get_submodule(inserted.norm)
        moves = (scale != 1).any() or (shift.any() and not inserted.absorbed_bias)
        if weight is not None and weight.requires_grad:
            trained = True
        elif weight is not None and moves and not is_frozen(norm):
            changed.append(name)
    return changed if trained else []


def fold_(model: nn.Module, sites: Iterable[InsertedSite]) -> None:
    """Fold these norms, in place, with the errors of `fold`; the others and the record stay."""
    sites = list(sites)
    _refuse({inserted.norm: _obstacle(model, inserted) for inserted in sites})
    for inserted, name, layer, scale, shift in _targets(model, sites):
        if not _is_identity(scale, shift):
            (_fold_into_output if name == inserted.site.name else _fold_into_input)(layer, scale, shift)
    strip_(model, sites)


def _refuse(obstacles: dict[str, str | None], note: str | None = None) -> None:
    refused = [f"'{norm}': {reason}" for norm, reason in obstacles.items() if reason]
    if refused:
        more = f" ({len(refused) - 1} more like it)" if len(refused) > 1 else ""
        error = FoldError(f"fold: {refused[0]}{more}")
        if note:
            error.add_note(note)
        raise error


def _obstacle(model: nn.Module, inserted: InsertedSite) -> str | None:
    """The reason why this norm cannot be folded, or None."""
    now = _target(inserted)[0]
    try:
        norm, layer = model.get_submodule(inserted.norm), model.get_submodule(inserted.layer)
        model.get_submodule(now or "")
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
    if not (scale.isfinite().all() and shift.isfinite().all()):
        return _NOT_FINITE
    if _is_identity(scale, shift):
        return None
    if layer._forward_hooks and not isinstance(model.get_submodule(inserted.norm.rpartition(".")[0]), Normed):
        return f"'{inserted.layer}' has forward hooks, which may change the norm's input: remove them first"
    if now is None:
        return (
            f"stands behind the activation of '{inserted.layer}', and no single dense layer, or conv without zero "
            "padding, follows that could take its shift"
        )
    return unfoldable(model, now)


def strip_(model: nn.Module, sites: Iterable[InsertedSite]) -> None:
    """Change only the module tree: remove the norms, restore ReLUs and dropped biases, and keep all numbers."""
    sites = list(sites)
    give_back_(model, sites)
    # Before any edit: removing a sibling renumbers those behind it.
    found = [(site.absorbed_bias, model.get_submodule(site.norm), _layer(model, site.layer)) for site in sites]
    for absorbed_bias, norm, layer in found:
        parent, name = place(model, norm)
        if isinstance(parent, Normed):
            detach_(parent)
        else:
            remove(parent, name)
        if absorbed_bias and layer.bias is None:
            layer.bias = zero_bias(layer)


def _is_identity(scale: Tensor, shift: Tensor) -> bool:
    return bool((scale == 1).all() and (shift == 0).all())


@torch.no_grad()
def _fold_into_output(layer: Layer, scale: Tensor, shift: Tensor) -> None:
    """W·a and b·a + s per output channel; identity channels keep their bits.

    Output channels are dimension 0 of the weight, or dimension 1 in each group of a transposed conv.
    """
    weight = layer.weight.cpu()
    per_weight = scale.view(-1, *[1] * (weight.ndim - 1))
    if isinstance(layer, TRANSPOSED):
        per_weight = scale.view(layer.groups, 1, weight.shape[1]).expand(-1, weight.shape[0] // layer.groups, -1)
        per_weight = per_weight.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
    layer.weight.copy_(weight * per_weight)
    _change_bias(layer, lambda bias: torch.where((scale == 1) & (shift == 0), bias, bias * scale + shift), shift)


@torch.no_grad()
def _fold_into_input(layer: Layer, scale: Tensor, shift: Tensor) -> None:
    """W·a and b + W·s per input channel (dimension 1; features of a flattened map in channel-major order)."""
    weight = layer.weight.cpu()
    if isinstance(layer, nn.Linear):
        repeats = layer.in_features // len(scale)
        a, s = scale.repeat_interleave(repeats), shift.repeat_interleave(repeats)
    else:  # each group of output channels sees its own slice of the input channels
        rows = torch.arange(weight.shape[0]) // (weight.shape[0] // layer.groups)
        shape = (weight.shape[0], weight.shape[1], *[1] * (weight.ndim - 2))
        a, s = (values.view(-1, weight.shape[1])[rows].view(shape) for values in (scale, shift))
    added = (weight * s).flatten(1).sum(1, dtype=torch.float64)
    _change_bias(layer, lambda bias: bias + added, shift)
    layer.weight.copy_(weight * a)


def _change_bias(layer: Layer, change: Callable[[Tensor], Tensor], shift: Tensor) -> None:
    """Change the bias in float64: float32 sums would lose digits where terms cancel. A shift needs one."""
    if layer.bias is None and shift.any():
        layer.bias = zero_bias(layer)
    if layer.bias is not None:
        layer.bias.copy_(change(layer.bias.cpu().double()))


def zero_bias(layer: Layer) -> nn.Parameter:
    """A bias for `layer` that changes nothing, and takes a gradient if the weight does."""
    return nn.Parameter(layer.weight.new_zeros(outputs_of(layer)), layer.weight.requires_grad)


def _layer(model: nn.Module, name: str) -> Layer:
    return cast(Layer, model.get_submodule(name))


def _scale_shift(module: nn.Module) -> tuple[Tensor, Tensor]:
    norm, half = cast(Any, module), (torch.float16, torch.bfloat16)  # the kernels compute half precision in single
    tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    mean, var, weight, bias = (t.float() if t is not None and t.dtype in half else t for t in tensors)
    scale, shift = kernel_scale_shift(mean, var, weight, bias, norm.eps)
    return torch.from_numpy(scale), torch.from_numpy(shift)
