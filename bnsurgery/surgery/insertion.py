"""Put BatchNorm into a network: the edit of the module tree, and the parameters that change nothing."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace as replace_fields
from typing import Any

import numpy as np
import torch
from torch import nn

from bnsurgery.errors import BNSurgeryError, BNSurgeryWarning, CalibrationError
from bnsurgery.graph.layer_kinds import LAYERS, device_and_dtype, find_lrn
from bnsurgery.graph.planning import Layers, Placement, Plan, Site
from bnsurgery.graph.planning import plan as find_sites
from bnsurgery.images.preprocessing import Preprocessing
from bnsurgery.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, LastDimBatchNorm1d
from bnsurgery.nn.identity import identity_parameters
from bnsurgery.nn.normed import attach_
from bnsurgery.nn.settings import freeze_, is_frozen
from bnsurgery.records.record import (
    InsertedSite,
    Options,
    SurgeryRecord,
    attach_record,
    carries_record,
    describe_model,
    record,
)
from bnsurgery.records.task import Task
from bnsurgery.running.batches import Inputs, peek
from bnsurgery.running.calls import equal
from bnsurgery.running.modes import evaluate
from bnsurgery.statistics.calibration import calibrate, warn_of_dead_channels
from bnsurgery.statistics.moments import ChannelMoments, digest

from .copies import independent, sharing_tensors
from .lrn import warn_of_change, without_lrn
from .module_tree import insert_after
from .relu_fusion import fuse_relu_

_EXACT = ("cpu", "cuda", "meta")  # devices that keep every bit; the rounding of others is untested
_NORM_CLASSES: dict[int, type[BatchNorm1d | BatchNorm2d | BatchNorm3d]] = {
    2: BatchNorm1d,
    3: BatchNorm1d,
    4: BatchNorm2d,
    5: BatchNorm3d,
}


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
    """A copy of `model` with BatchNorm behind its layers that computes, in eval mode, the same bits.

    Every site's mean μ and population variance σ² are measured on `batches`; the norm there gets running_mean = bias
    = μ, running_var = σ² and the weight = √(σ² + eps) whose rounding makes the layer exactly the identity. In train
    mode it normalizes by the batch and so drifts with small batches: see `verify`.

    Threads may insert, calibrate, verify and fold at once, each its own model, while others compute: the bits are those
    of one after the other. But torch's random state belongs to the process and is put back at the end, with whatever
    another thread drew meanwhile: pass loaders that shuffle by a generator of their own.

    The copy is in the mode that `model` is in: put it into eval mode to compute the same.

    A norm inherits `requires_grad` from its layer's weight: where that is frozen, or that of the layer that a
    post-activation norm folds into, its weight and bias take no gradient and train mode goes by its running statistics,
    so that after training `fold` gives the frozen weights back as they were. `set_statistics_` with `where` and the
    norm's `requires_grad_` choose otherwise.

    In a `nn.Sequential` the norm follows its layer and what is behind is renumbered, which with `layers="conv"` gives
    torchvision's vgg*_bn layout; elsewhere it becomes the layer's child `norm`, and the layer keeps its keys.

    Args:
        model: a BN-free network; not changed.
        batches: calibration inputs in `model`'s own preprocessing: an iterable of tensors, of dicts of keyword
            arguments, or of tuples or lists, as a DataLoader gives, whose first item is the input: a tensor, a dict, a
            tuple of several arguments, or a list as one (of images, for a detector). Of a dict, keys that `forward` has
            no parameter for, such as labels, are left out; where it has none for any, it gets the dict as one argument.
        placement: "pre-activation" or "post-activation", see `plan`.
        layers: "all", "conv", "dense", or a predicate (fqn, module) -> bool.
        head: also put one behind the output layer.
        absorb_bias: drop the layers' biases, but frozen ones, which BN's shift makes redundant; equal to about 1e-6
            then, not bitwise.
        fuse_relu: also call `fuse_relu_`: the norms then apply the ReLUs behind them.
        eps: added to the variance, above 0 and at most 1.
        momentum: of the running statistics in training, as in torch; None averages cumulatively over the training
            batches, the first of which replaces what was calibrated.
        drop_lrn: first take out the `nn.LocalResponseNorm` layers, as of AlexNet (2012), which an `nn.Identity` then
            stands for. This changes the function, and a warning says by how much; the rest is exact as ever.
        plan: where BatchNorm goes, from `plan`, in the place of `placement`, `layers` and `head`.
        moments: the statistics of every site of that plan, from `calibrate`; then only the first batch is used, to
            check the result on.
        share_weights: let the copy have the parameters and buffers of `model` itself, which costs no memory: training
            one of the two changes the other.
        preprocessing: what the inputs, images, went through; noted in the record for `save`, `export` and the commands.
        provenance: where weights and data came from, by any name, for the record.
        progress: show a bar on stderr.

    Raises:
        UntraceableModelError, NoSitesError, CalibrationError: see `plan` and `calibrate`; `model` is as before.
        BNSurgeryError: `model` was inserted into before, cannot be copied, or its code looks at its own layers so that
            the result would compute something else; or `plan` or `moments` are of another network.
        ValueError: an option is out of range, or given beside what takes its place.

    References: Ioffe & Szegedy 2015, arXiv:1502.03167, section 3.
    """
    if plan is not None and (placement, layers, head) != ("pre-activation", "all", False):
        raise ValueError("insert: placement, layers and head are the plan's: leave them out beside plan=")
    if moments is not None and plan is None:
        raise ValueError("insert: moments are those of a plan's sites: pass plan=, too")
    options = Options(absorb_bias, fuse_relu, eps, momentum)
    options.check(placement if plan is None else plan.placement)
    if isinstance(batches, Iterator):  # its random numbers go on from here
        example, batches = peek(batches)
    else:
        with torch.random.fork_rng(devices=[]):  # a shuffling loader draws a seed at every start
            example, batches = peek(batches)
    dropped = find_lrn(model) if drop_lrn else ()
    reference = model
    if drop_lrn:
        reference = without_lrn(model)
        warn_of_change(model, reference, example, len(dropped))
    if plan is None:
        plan = find_sites(reference, example, placement=placement, layers=layers, head=head)
    _check_model(model)
    _check_plan(reference, plan, moments)
    bn_model = sharing_tensors(reference) if share_weights else independent(reference)
    if moments is None:
        moments = calibrate(reference, plan, batches, progress=progress)
    _insert_(bn_model, plan, moments, options)
    done = replace_fields(
        record(bn_model),
        dropped_lrn=dropped,
        input_shape=example.shape,
        task=None if preprocessing is None else Task((), None, preprocessing),
        provenance=dict(provenance or {}),
    )
    attach_record(bn_model, done)
    _check_result(reference, bn_model, example.take(0, 1))
    norms = {site.layer: bn_model.get_submodule(site.norm) for site in record(bn_model).sites}
    training = [layer for layer, norm in norms.items() if norm.training and not is_frozen(norm)]
    if training:
        warnings.warn(
            f"insert: {type(model).__name__} is in train mode (such as '{training[0]}'), and so is the copy with "
            "BatchNorm, which normalizes by the batch there and so computes something else. Call .eval() on it for "
            "what the network computed; train mode is for training.",
            BNSurgeryWarning,
            stacklevel=2,
        )
    return bn_model


def _insert_(model: nn.Module, plan: Plan, moments: Mapping[str, ChannelMoments], options: Options) -> None:
    parameters = {site.name: _parameters(model, site, moments[site.name], options) for site in plan.sites}
    warn_of_dead_channels(moments, options.eps)
    description = describe_model(model)
    with torch.inference_mode(False):
        sites = edit_(model, plan.sites, options)
        for inserted in sites:
            norm = model.get_submodule(inserted.norm)
            with torch.no_grad():
                for name, value in parameters[inserted.site.name].items():
                    getattr(norm, name).copy_(value)
    done = SurgeryRecord(
        **description,
        plan=plan,
        options=options,
        sites=sites,
        calibration_digest=digest(moments),
    )
    attach_record(model, done)
    if options.fuse_relu:
        fuse_relu_(model)


def _check_model(model: nn.Module) -> None:
    if carries_record(model):
        raise BNSurgeryError(
            f"insert: {type(model).__name__} has been inserted into already, and one record describes one insertion: "
            "fold it first, then choose all layers at once"
        )


def _check_plan(model: nn.Module, plan: Plan, moments: Mapping[str, ChannelMoments] | None) -> None:
    modules = dict(model.named_modules())
    for site in plan.sites:
        layer = modules.get(site.name)
        if type(layer).__name__ != site.layer or site.anchor not in modules:
            raise BNSurgeryError(
                f"insert: the plan is of another network: {type(model).__name__} has no {site.layer} '{site.name}'"
            )
        if moments is not None and (site.name not in moments or len(moments[site.name].mean) != site.channels):
            raise BNSurgeryError(
                f"insert: the moments are of another plan: they have none of {site.channels} channels for '{site.name}'"
            )


def _check_result(model: nn.Module, bn_model: nn.Module, sample: Inputs) -> None:
    """The promise, kept or the model is not given out: code may do what no trace shows, such as index its layers."""
    done = record(bn_model)
    exact = not done.options.absorb_bias and all(parameter.device.type in _EXACT for parameter in model.parameters())
    once, again = (evaluate("insert", model, sample) for _ in range(2))  # with the same random numbers
    silent = {site.norm for site in done.sites}
    handles = [
        bn_model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: silent.discard(name))
        for name in tuple(silent)
    ]
    got, failure = [], None
    try:
        got = evaluate("insert", bn_model, sample)
    except CalibrationError as error:
        failure = error
    finally:
        for handle in handles:
            handle.remove()
    what = ""
    if failure:
        what = "no longer runs"
    elif _same(once, again, exact=True) and not _same(once, got, exact=exact):
        what = "computes something else"
    elif silent:
        what = f"does not run {len(silent)} of its BatchNorms"
    if what:
        raise BNSurgeryError(
            f"insert: {type(model).__name__} {what} after the insertion, so it is not given out. Does "
            "its code look at its own layers (by index, type, hook)? Leave these out with layers="
            + (", or fuse_relu=False." if done.options.fuse_relu else ".")
        ) from failure
    if not once:
        warnings.warn(
            f"insert: {type(model).__name__} returns no tensors, so it was not checked that they stay the same",
            BNSurgeryWarning,
            stacklevel=3,
        )


def _same(expected: list[torch.Tensor], got: list[torch.Tensor], *, exact: bool) -> bool:
    """The same bits, NaN being NaN; or, unless `exact`, up to what rounding in the outputs' dtype comes to."""
    if [t.shape for t in expected] != [t.shape for t in got]:
        return False
    pairs = [(a, b) for a, b in zip(expected, got, strict=True) if exact or a.is_floating_point()]
    return all(bool((equal(a, b) if exact else _near(a, b)).all()) for a, b in pairs)


def _near(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    finite = a[a.isfinite()].abs()
    reach = 1e4 * torch.finfo(a.dtype).eps * (finite.max().item() if finite.numel() else 0.0)
    return equal(a, b) | ((a - b).abs() <= reach)


def edit_(model: nn.Module, sites: Iterable[Site], options: Options) -> tuple[InsertedSite, ...]:
    """Change the module tree only: fresh norms behind every site's anchor, biases dropped; no ReLU is fused.

    Works on a model on the meta device too, where nothing is allocated.
    """
    edits = []
    for site in sites:  # modules before any edit: renumbering changes names
        layer, anchor = model.get_submodule(site.name), model.get_submodule(site.anchor)
        relu = model.get_submodule(site.relu) if site.relu is not None else None
        following = model.get_submodule(site.next_layer) if site.next_layer is not None else None
        edits.append((site, layer, anchor, relu, following))
    made = []
    for site, layer, anchor, relu, following in edits:
        norm = _norm_class(site)(
            site.channels,
            options.eps,
            options.momentum,
            device=device_and_dtype(layer)[0],
            dtype=_norm_dtype(layer),
        ).train(anchor.training)
        frozen = _is_frozen(layer) or (following is not None and _is_frozen(following))
        if frozen:
            freeze_(norm)
        absorbed = options.absorb_bias and _bias(layer) is not None and anchor is layer and not frozen
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
            relu=names[relu] if relu is not None else None,
            relu_inplace=bool(relu is not None and relu.inplace),
            next_layer=names[following] if following is not None else None,
            absorbed_bias=absorbed,
        )
        for site, layer, norm, relu, following, absorbed in made
    )


def _parameters(model: nn.Module, site: Site, moments: ChannelMoments, options: Options) -> dict[str, torch.Tensor]:
    layer = model.get_submodule(site.name)
    dtype = _norm_dtype(layer)
    mean, variance = moments.mean.numpy(), moments.variance.numpy()
    largest = max(np.abs(mean).max(), variance.max())
    if largest > torch.finfo(dtype).max / 4:
        raise CalibrationError(
            f"insert: '{site.name}' ({site.layer}): a channel's mean or variance is {largest:.3g}, "
            f"too large for {dtype}"
        )
    values = identity_parameters(mean, variance, options.eps, dtype)
    bias = _bias(layer)
    if options.absorb_bias and bias is not None and not _is_frozen(layer):
        values["running_mean"] = (moments.mean - bias.detach().cpu().double()).to(dtype)
    return values


def _norm_class(site: Site) -> type[BatchNorm1d | BatchNorm2d | BatchNorm3d]:
    return _NORM_CLASSES[site.ndim] if site.channel_dim == 1 else LastDimBatchNorm1d


def _bias(layer: nn.Module) -> torch.Tensor | None:
    """The bias that may be dropped: a plain one, of torch's own layers. A user's code may count on its own."""
    return layer._parameters.get("bias") if isinstance(layer, LAYERS) else None


def _is_frozen(layer: nn.Module) -> bool:
    """Whether the weight takes no gradient; where it is computed, whether nothing in the layer does.

    A frozen bias alone is no sign: the biases that torch's own fusing makes take no gradient.
    """
    weight = layer._parameters.get("weight")
    return not any(p.requires_grad for p in (layer.parameters() if weight is None else [weight]))


def _norm_dtype(layer: nn.Module) -> torch.dtype:
    return torch.float64 if device_and_dtype(layer)[1] == torch.float64 else torch.float32
