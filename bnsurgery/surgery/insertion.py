"""Insert BatchNorm into a network: the edit of the module tree, and parameters that keep the function."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from bnsurgery.errors import BNSurgeryError, BNSurgeryWarning, CalibrationError
from bnsurgery.graph.layer_kinds import LAYERS, find_lrn
from bnsurgery.graph.planning import Layers, Placement, Plan, Site
from bnsurgery.graph.planning import plan as find_sites
from bnsurgery.images.preprocessing import Preprocessing
from bnsurgery.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, LastDimBatchNorm1d
from bnsurgery.nn.identity import identity_parameters
from bnsurgery.nn.normed import attach_
from bnsurgery.nn.settings import freeze_, is_frozen
from bnsurgery.records.architectures import identify_model
from bnsurgery.records.record import (
    InsertedSite,
    Options,
    SurgeryRecord,
    Task,
    attach_record,
    carries_record,
    state_digest,
)
from bnsurgery.running.batches import Inputs, peek
from bnsurgery.running.calls import equal
from bnsurgery.running.modes import evaluate
from bnsurgery.statistics.calibration import calibrate
from bnsurgery.statistics.dead_channels import warn_of_dead_channels
from bnsurgery.statistics.moments import ChannelMoments, digest
from bnsurgery.text.words import counted, percent

from .copies import independent, refuse_sharded, sharing_tensors, without_lrn
from .module_tree import insert_after
from .relu_fusion import fuse_relu_

_EXACT = ("cpu", "cuda", "meta")  # devices that keep every bit; the rounding of others is untested
_NORM_CLASSES: dict[int, Any] = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}


def insert(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    placement: Placement = "pre-activation",
    layers: Layers = "all",
    head: bool = False,
    absorb_bias: bool = False,
    fuse_relu: bool = False,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    drop_lrn: bool = False,
    plan: Plan | None = None,
    moments: Mapping[str, ChannelMoments] | None = None,
    share_weights: bool = False,
    preprocessing: Preprocessing | None = None,
    provenance: Mapping[str, str | int] | None = None,
    progress: bool = False,
) -> nn.Module:
    """A copy of `model` with BatchNorm behind its layers that computes the same bits in eval mode.

    Every site's mean μ and population variance σ² are measured on `batches`; its norm gets running_mean = bias = μ,
    running_var = σ² and weight = √(σ² + eps), rounded so that it is exactly the identity. In train mode it normalizes
    by the batch and so drifts with small batches, see `verify`. The copy is in the mode of `model`: call `.eval()` on
    it to compute the same.

    A norm inherits `requires_grad` from its layer's weight. If that is frozen, or that of the layer that a
    post-activation norm folds into, the norm's weight and bias take no gradient and train mode uses its running
    statistics, so that `fold` restores the frozen weights after training. `set_statistics_` with `where` and the norm's
    `requires_grad_` change that.

    In a `nn.Sequential` the norm follows its layer and the modules behind are renumbered, which with `layers="conv"`
    gives torchvision's vgg*_bn layout. Elsewhere it becomes the layer's child `norm`, and the layer keeps its keys.

    Threads may insert, calibrate, verify and fold different models at once, with the same bits. But torch's random
    state belongs to the process and is restored at the end, whatever another thread drew meanwhile: pass loaders that
    shuffle with a separate generator.

    Args:
        model: a BN-free network; not changed.
        batches: calibration inputs, preprocessed for `model`: an iterable of tensors, of dicts of keyword arguments, or
            of tuples or lists, as a DataLoader gives, whose first item is the input: a tensor, a dict, a tuple of
            several arguments, or a list as one (of images, for a detector). Keys of a dict without a parameter of
            `forward`, such as labels, are left out; if there is one for none, the dict is the one argument.
        placement: "pre-activation" or "post-activation", see `plan`.
        layers: "all", "conv", "dense", or a predicate (fqn, module) -> bool.
        head: also insert one behind the output layer.
        absorb_bias: drop the layers' biases, except frozen ones, since BN's shift makes them redundant; the outputs are
            then equal to about 1e-6, not bit-identical.
        fuse_relu: also call `fuse_relu_`: the norms then apply the ReLUs behind them.
        eps: added to the variance, above 0 and at most 1.
        momentum: of the running statistics in training, as in torch; None averages cumulatively over the training
            batches, the first of which replaces what was calibrated.
        drop_lrn: first replace the `nn.LocalResponseNorm` layers, as of AlexNet (2012), by `nn.Identity`. This changes
            the function, and a warning says by how much; the insertion itself is exact.
        plan: where BatchNorm goes, from `plan`, instead of `placement`, `layers` and `head`.
        moments: the statistics of every site of that plan, from `calibrate`; then only the first batch is used, to
            check the result.
        share_weights: use the parameters and buffers of `model` itself, which costs no memory: training one of the two
            networks changes the other.
        preprocessing: from an image to the input, for the record, which `save`, `export` and the commands use.
        provenance: the sources of weights and data, under any names, for the record.
        progress: show a bar on stderr.

    Raises:
        UntraceableModelError, NoSitesError, CalibrationError: see `plan` and `calibrate`; `model` is as before.
        BNSurgeryError: `model` contains an insertion already, cannot be copied, or its code depends on its layers so
            that the result would compute something else; or `plan` or `moments` are of another network.
        ValueError: an option is out of range, or excluded by `plan`.

    References: Ioffe & Szegedy 2015, arXiv:1502.03167, section 3.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 10)).eval()
        >>> batches = torch.randn(32, 3, 16, 16).split(8)
        >>> bn_model = bnsurgery.insert(model, batches)
        >>> type(bn_model[1]).__name__, torch.equal(model(batches[0]), bn_model(batches[0]))
        ('BatchNorm2d', True)
    """
    if plan is not None and (placement, layers, head) != ("pre-activation", "all", False):
        raise ValueError("insert: placement, layers and head are the plan's: leave them out beside `plan`")
    if moments is not None and plan is None:
        raise ValueError("insert: moments are those of a plan's sites: pass `plan`, too")
    for name, value in (provenance or {}).items():
        if type(value) not in (str, int):
            raise ValueError(f"insert: provenance: expected text or a whole number for {name!r}, got {value!r}")
    if not isinstance(preprocessing, Preprocessing | None):
        raise ValueError(f"insert: preprocessing must be a Preprocessing, got {type(preprocessing).__name__}")
    refuse_sharded("insert", model)
    options = Options(absorb_bias, fuse_relu, eps, momentum)
    options.check(placement if plan is None else plan.placement)
    # A shuffling loader draws a seed on every start; an iterator has started and continues its random numbers.
    with nullcontext() if isinstance(batches, Iterator) else torch.random.fork_rng(devices=[]):
        example, batches = peek(batches)
    dropped = find_lrn(model) if drop_lrn else ()
    reference = without_lrn(model) if drop_lrn else model
    if drop_lrn:
        _warn_of_change(model, reference, example, len(dropped))
    if plan is None:
        plan = find_sites(reference, example, placement=placement, layers=layers, head=head)
    if carries_record(model):
        raise BNSurgeryError(
            f"insert: {type(model).__name__} has been inserted into already, and one record describes one insertion: "
            "fold it first, then choose all layers at once"
        )
    _check_plan(reference, plan, moments)
    bn_model = sharing_tensors(reference) if share_weights else independent(reference)
    if moments is None:
        moments = calibrate(reference, plan, batches, progress=progress)
    with torch.inference_mode(False), torch.no_grad():
        sites = edit_(bn_model, plan.sites, options)
        norms: dict[str, Any] = {site.site.name: bn_model.get_submodule(site.norm) for site in sites}
        for site in sites:
            name = site.site.name
            _set_identity_(norms[name], moments[name], f"'{name}' ({site.site.layer})")
            if site.absorbed_bias:
                bias = reference.get_parameter(f"{name}.bias").cpu().double()
                norms[name].running_mean.copy_(moments[name].mean - bias)
    warn_of_dead_channels({name: norm.running_var for name, norm in norms.items()}, eps)
    frozen = [name for name, p in reference.named_parameters(remove_duplicate=False) if not p.requires_grad]
    new_record = SurgeryRecord(
        plan=plan,
        options=options,
        architecture=identify_model(reference),
        weights_digest=state_digest(reference.state_dict()),
        sites=sites,
        calibration_digest=digest(moments),
        provenance=dict(provenance or {}),
        task=None if preprocessing is None else Task((), None, preprocessing),
        dropped_lrn=dropped,
        input_shape=example.shape,
        frozen=tuple(frozen),
    )
    attach_record(bn_model, new_record)
    if fuse_relu:
        fuse_relu_(bn_model)
    _check_result(reference, bn_model, norms.values(), options, example.take(0, 1))
    training = [name for name, norm in norms.items() if norm.training and not is_frozen(norm)]
    if training:
        warnings.warn(
            f"insert: {type(model).__name__} is in train mode (such as '{training[0]}'), and so is the copy with "
            "BatchNorm, which normalizes by the batch there and so computes something else. Call .eval() on it to "
            "compute the same; train mode is for training.",
            BNSurgeryWarning,
            stacklevel=2,
        )
    return bn_model


def _warn_of_change(model: nn.Module, without: nn.Module, example: Inputs, dropped: int) -> None:
    """Warn of the change of the outputs without the LRN layers, ‖without − with‖₂/‖with‖₂ on `example`."""
    before, after = (evaluate("insert", network, example) for network in (model, without))
    change = sum((b - a).cpu().double().square().sum().item() for a, b in zip(before, after, strict=True))
    size = sum(a.cpu().double().square().sum().item() for a in before)
    moved = (change / size) ** 0.5 if size else torch.inf
    warnings.warn(
        f"{counted(dropped, 'LocalResponseNorm layer')} dropped, which changes the function: the "
        f"outputs move by {percent(moved, '.3g')} on the first calibration batch. "
        "The insertion keeps the function of the network without them; fine-tune it.",
        BNSurgeryWarning,
        stacklevel=3,
    )


def _check_plan(model: nn.Module, plan: Plan, moments: Mapping[str, ChannelMoments] | None) -> None:
    modules = dict(model.named_modules())
    if len({site.name for site in plan.sites}) < len(plan.sites):
        raise BNSurgeryError("insert: the plan has a layer twice")
    for site in plan.sites:
        layer = modules.get(site.name)
        named = {site.anchor, site.relu, site.next_layer} - {None}
        # Converters may leave `out_features` wrong.
        channels = len(layer.weight) if isinstance(layer, nn.Linear) else getattr(layer, "out_channels", site.channels)
        if type(layer).__name__ != site.layer or not named <= modules.keys() or channels != site.channels:
            raise BNSurgeryError(
                f"insert: the plan is of another network: {type(model).__name__} has no {site.layer} '{site.name}' of "
                f"{counted(site.channels, 'channel')} as planned"
            )
        if moments is not None and (site.name not in moments or len(moments[site.name].mean) != site.channels):
            raise BNSurgeryError(
                f"insert: the moments are of another plan: they have none of {site.channels} channels for '{site.name}'"
            )


def _check_result(
    model: nn.Module, bn_model: nn.Module, norms: Iterable[nn.Module], options: Options, sample: Inputs
) -> None:
    """Refuse a result that computes something else: code may do what no trace shows, such as index its layers."""
    exact = not options.absorb_bias and all(parameter.device.type in _EXACT for parameter in model.parameters())
    once, again = (evaluate("insert", model, sample) for _ in range(2))  # with the same random numbers
    silent = set(norms)
    failure, defect = None, ""
    with ExitStack() as hooks:
        for norm in tuple(silent):
            hooks.enter_context(norm.register_forward_pre_hook(lambda norm, args: silent.discard(norm)))
        try:
            got = evaluate("insert", bn_model, sample)
            if _same(once, again, exact=True) and not _same(once, got, exact=exact):
                defect = "computes something else"
            elif silent:
                defect = f"does not run {len(silent)} of its BatchNorms"
        except CalibrationError as error:
            failure, defect = error, "no longer runs"
    if defect:
        raise BNSurgeryError(
            f"insert: {type(model).__name__} {defect} after the insertion, so it is not returned. Does its code look "
            "at its own layers (by index, type, hook)? Leave these out with `layers`"
            + (", or pass `fuse_relu=False`." if options.fuse_relu else ".")
        ) from failure
    if not once:
        warnings.warn(
            f"insert: {type(model).__name__} returns no tensors, so it was not checked that they stay the same",
            BNSurgeryWarning,
            stacklevel=3,
        )


def _same(expected: list[torch.Tensor], got: list[torch.Tensor], *, exact: bool) -> bool:
    """Whether all bits are equal, NaN to NaN; unless `exact`, real numbers up to rounding in the outputs' dtype."""
    if [t.shape for t in expected] != [t.shape for t in got]:
        return False
    for a, b in zip(expected, got, strict=True):
        same = equal(a, b)
        if not exact and a.is_floating_point():
            finite = a[a.isfinite()].abs()
            same |= (a - b).abs() <= 1e4 * torch.finfo(a.dtype).eps * (finite.max() if finite.numel() else 0.0)
        if not same.all() and (exact or a.is_floating_point()):
            return False
    return True


def edit_(model: nn.Module, sites: Iterable[Site], options: Options) -> tuple[InsertedSite, ...]:
    """Change only the module tree: add fresh norms behind every site's anchor and drop biases. No ReLU is fused.

    Also works on the meta device, without memory.
    """

    def module(name: str | None) -> Any:
        return None if name is None else model.get_submodule(name)

    # Before any edit, since renumbering changes names.
    found = [(site, *map(module, (site.name, site.anchor, site.relu, site.next_layer))) for site in sites]
    made = []
    for site, layer, anchor, relu, following in found:
        cls = _NORM_CLASSES[site.ndim] if site.channel_dim == 1 else LastDimBatchNorm1d
        like = next(layer.parameters())
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        norm = cls(site.channels, options.eps, options.momentum, device=like.device, dtype=dtype).train(anchor.training)
        frozen = _is_frozen(layer) or (following is not None and _is_frozen(following))
        if frozen:
            freeze_(norm)
        bias = layer._parameters.get("bias") if isinstance(layer, LAYERS) else None  # code of others may need it
        absorbed = options.absorb_bias and bias is not None and anchor is layer and not frozen
        if absorbed:
            layer.register_parameter("bias", None)
        if site.in_sequential:
            insert_after(model, anchor, norm)
        else:
            attach_(anchor, norm)
        made.append((site, layer, norm, relu, following, absorbed))
    names = {module: name for name, module in model.named_modules()}
    return tuple(
        InsertedSite(
            site=site,
            layer=names[layer],
            norm=names[norm],
            relu=names.get(relu),
            relu_inplace=bool(relu is not None and relu.inplace),
            next_layer=names.get(following),
            absorbed_bias=absorbed,
        )
        for site, layer, norm, relu, following, absorbed in made
    )


def _set_identity_(norm: Any, moments: ChannelMoments, where: str) -> None:
    dtype = norm.weight.dtype
    mean, variance = moments.mean.numpy(), moments.variance.numpy()
    largest = max(np.abs(mean).max(), variance.max())
    if largest > torch.finfo(dtype).max / 4:
        raise CalibrationError(f"insert: {where}: a channel's mean or variance is {largest:.3g}, too large for {dtype}")
    for name, value in identity_parameters(mean, variance, norm.eps, dtype).items():
        getattr(norm, name).copy_(value)


def _is_frozen(layer: nn.Module) -> bool:
    """Whether the weight takes no gradient, or nothing in the layer if the weight is computed.

    A frozen bias alone does not count: the biases that torch's fusing creates take no gradient.
    """
    weight = layer._parameters.get("weight")
    return not any(p.requires_grad for p in (layer.parameters() if weight is None else [weight]))
