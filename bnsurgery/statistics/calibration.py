"""Measure the population moments at every site in one pass over the original network."""

import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, ExitStack
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from bnsurgery.errors import BNSurgeryError, BNSurgeryWarning, CalibrationError, NonFiniteError
from bnsurgery.graph.planning import Plan
from bnsurgery.nn import LastDimBatchNorm1d
from bnsurgery.nn.settings import is_frozen, listed
from bnsurgery.ops import channel_moments
from bnsurgery.running.batches import Inputs, inputs, join
from bnsurgery.running.calls import placed, run
from bnsurgery.running.modes import observing, training_norms
from bnsurgery.text.words import counted

from .moments import ChannelMoments


def calibrate(
    model: nn.Module, plan: Plan, batches: Iterable[Any], *, progress: bool = False
) -> dict[str, ChannelMoments]:
    """Measure mean μ and variance σ² of the input that a BatchNorm at every site of `plan` would get.

    One pass in eval mode under `torch.inference_mode` measures all sites at once: inserting changes no activation, so
    the order of the layers does not matter. The moments are those of the population of all N·H·W samples, over all
    batches and all calls of a module, merged in float64; the split into batches does not matter. With
    `torch.distributed` initialized, every rank passes its shard and gets the moments of all shards.

    Args:
        model: the original network; its modes, hooks, gradients and torch's random state are left as they were.
        batches: as for `insert`; images may differ in size.
        progress: show a bar on stderr.

    Returns:
        The moments by site name, in the plan's order, on the CPU.

    Raises:
        CalibrationError: there is no data, the model does not take a batch, memory runs out, or a site is not reached
            or has fewer than 2 samples. If it is raised on one rank, it is raised on all.
        NonFiniteError: a site has non-finite values. The message names the site, the first batch that caused them, and
            the samples of that batch with a non-finite input, both counted from 0.

    References: Wu & Johnson 2021, arXiv:2105.07576, section 3 (population statistics instead of moving averages).

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 10))
        >>> batches = torch.randn(32, 3, 16, 16).split(8)
        >>> moments = bnsurgery.calibrate(model, bnsurgery.plan(model, batches[0]), batches)
        >>> moments["0"].count == 32 * 14 * 14, moments["0"].mean.shape
        (True, torch.Size([8]))
    """
    anchors = {site.name: model.get_submodule(site.anchor) for site in plan.sites}
    # A norm inside its layer comes before the layer's hooks, a sibling after them.
    first = {site.name for site in plan.sites if not site.in_sequential}
    last_dim = {site.name for site in plan.sites if site.channel_dim == -1}
    return _measure(
        "calibrate", model, anchors, batches, observing(model), progress, output=True, first=first, last_dim=last_dim
    )


def recalibrate_(bn_model: nn.Module, batches: Iterable[Any], *, progress: bool = False) -> None:
    """Replace the running statistics of every BatchNorm by those of the population, in place, after training.

    On one pass over the data each BatchNorm normalizes by the batch; the mean and (population) variance of its input
    over all samples become running_mean and running_var. Weight and bias stay. Dropout is off. A BatchNorm in the
    statistics mode "running", such as that of a frozen layer, was trained with its statistics: it keeps and uses them,
    and a warning names it. A batch of one input, such as the last of a loader, is joined to a larger neighbour: alone
    it has no variance behind a dense layer. As in `calibrate`, the ranks of `torch.distributed` are merged.

    Raises:
        CalibrationError: as `calibrate`; the model is then unchanged.
        BNSurgeryError: the model has no BatchNorm with running statistics, or all of them are in the mode "running".

    References: Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 2; Wu & Johnson 2021, arXiv:2105.07576, section 3.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> bnsurgery.recalibrate_(model, (5 + torch.randn(64, 3, 16, 16)).split(16))
        >>> round(model.eval()(5 + torch.randn(64, 3, 16, 16)).std().item(), 1)
        1.0
    """
    found = {name: module for name, module in bn_model.named_modules() if isinstance(module, _BatchNorm)}
    kept = [name for name, norm in found.items() if getattr(norm, "statistics", None) == "running"]
    norms = {name: norm for name, norm in found.items() if name not in kept and norm.running_mean is not None}
    if not norms and not kept:
        raise BNSurgeryError(f"recalibrate_: {type(bn_model).__name__} has no BatchNorm with running statistics")
    if kept:
        if all(is_frozen(found[name]) for name in kept):
            reason = "these are frozen with their layers (requires_grad=False), which others would change"
        else:
            reason = (
                "the network was trained with these statistics, and others would change its outputs. To measure them "
                "nevertheless, first call bnsurgery.set_statistics_(model, 'batch')"
            )
        if not norms:
            raise BNSurgeryError(f"recalibrate_: every BatchNorm is in the statistics mode 'running': {reason}")
        warnings.warn(
            f"recalibrate_: left {listed(kept)} as before, in the statistics mode 'running': {reason}",
            BNSurgeryWarning,
            stacklevel=2,
        )
    last_dim = {name for name, norm in norms.items() if isinstance(norm, LastDimBatchNorm1d)}
    context = training_norms(bn_model, by_batch=True)
    moments = _measure("recalibrate_", bn_model, norms, batches, context, progress, last_dim=last_dim, joining=True)
    with torch.no_grad():
        for name in norms:
            bn_model.get_buffer(f"{name}.running_mean").copy_(moments[name].mean)
            bn_model.get_buffer(f"{name}.running_var").copy_(moments[name].variance)


def input_moments(model: nn.Module, name: str, batches: Iterable[Any]) -> ChannelMoments:
    """Measure the input of the submodule `name` in eval mode; ranks and errors are as in `calibrate`."""
    return _measure("measure", model, {name: model.get_submodule(name)}, batches, observing(model))[name]


def _measure(
    operation: str,
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Any],
    context: AbstractContextManager[object],
    progress: bool = False,
    *,
    output: bool = False,
    first: Container[str] = (),
    last_dim: Container[str] = (),
    joining: bool = False,
) -> dict[str, ChannelMoments]:
    """The moments of each module's output, or else of its first input, over all batches and ranks.

    The modules named in `first` are watched before their own hooks run. The channels of those in `last_dim` are the
    last dimension, not the second. `joining` joins batches of one sample to a neighbour.
    """
    measured: dict[str, ChannelMoments] = {}
    dtypes: dict[str, torch.dtype] = {}

    def add(name: str, module: nn.Module, args: tuple[Tensor, ...], *output: Tensor) -> None:
        tensor = (output or args)[0]
        moments = ChannelMoments(*channel_moments(tensor.flatten(0, -2) if name in last_dim else tensor))
        measured[name] = measured[name].merge(moments) if name in measured else moments
        dtypes[name] = tensor.dtype

    failure = None
    total = len(batches) if isinstance(batches, Sized) else None
    given = _joining(inputs(batches)) if joining else inputs(batches)
    bar = tqdm(given, desc=operation, total=total, unit="batch", disable=None if progress else True, leave=False)
    with ExitStack() as stack:
        for name, module in modules.items():
            register = module.register_forward_hook if output else module.register_forward_pre_hook
            stack.enter_context(register(partial(add, name), prepend=name in first))
        stack.enter_context(context)
        try:
            for number, batch in enumerate(bar):
                run(operation, model, batch)
                tensors = [tensor for site in measured.values() for tensor in (site.mean, site.m2)]
                # One check of all sites together, so that a GPU is waited for once a batch.
                if tensors and not torch.cat([t.to(tensors[0].device) for t in tensors]).isfinite().all():
                    raise _non_finite(operation, model, measured, dtypes, number, batch)
        except Exception as error:  # also a loader's; a rank that raised it here would leave the others waiting
            failure = error
    return _gather(operation, measured, modules, failure)


def _joining(batches: Iterator[Inputs]) -> Iterator[Inputs]:
    """Join a batch of one sample to a larger neighbour, if the two can be joined."""
    held: Inputs | None = None
    for batch in batches:
        if held is None:
            held = batch
        elif min(sizes := (held.samples, batch.samples)) == 1 < max(sizes) and (both := join([held, batch])):
            held = None
            yield both
        else:
            yield held
            held = batch
    if held is not None:
        yield held


def _non_finite(
    operation: str,
    model: nn.Module,
    measured: dict[str, ChannelMoments],
    dtypes: dict[str, torch.dtype],
    number: int,
    batch: Inputs,
) -> NonFiniteError:
    """The error for the first batch with non-finite activations, with their origin."""
    bad = {name: int((~(site.mean.isfinite() & site.m2.isfinite())).sum()) for name, site in measured.items()}
    name = next(name for name, channels in bad.items() if channels)  # the first that ran
    dtype = dtypes[name]
    if samples := placed(model, batch).non_finite():
        which = ", ".join(map(str, samples[:8])) + (" and others" if len(samples) > 8 else "")
        cause = f", whose input is NaN or Inf in {dtype} in sample {which} (counted from 0). Repair it or leave it out."
    else:
        cause = (
            " (counted from 0), whose input is finite. Look for non-finite weights, or activations beyond "
            f"{torch.finfo(dtype).max:.3g}, the largest {dtype}: a wider dtype may help, with a cast afterwards."
        )
    return NonFiniteError(
        f"{operation}: '{name}' ({type(model.get_submodule(name)).__name__}): NaN or Inf in {bad[name]} of "
        f"{len(measured[name].mean)} channels, first in batch {number}{cause}"
    )


def _gather(
    operation: str, measured: dict[str, ChannelMoments], sites: Mapping[str, nn.Module], failure: Exception | None
) -> dict[str, ChannelMoments]:
    """Merge the moments over the ranks, in rank order on the CPU: all get the same bits, or all raise the error."""
    local = {name: (m.count, m.mean.cpu(), m.m2.cpu()) for name, m in measured.items()}
    shards: list[Any] = [(None, local)]
    if distributed.is_available() and distributed.is_initialized():
        told = failure if failure is None or isinstance(failure, BNSurgeryError) else CalibrationError(repr(failure))
        shards *= distributed.get_world_size()
        distributed.all_gather_object(shards, (told, local))
    if failure is not None:
        raise failure
    for rank, (error, _) in enumerate(shards):
        if error is not None:
            raise type(error)(f"rank {rank}: {error}")
    result: dict[str, ChannelMoments] = {}
    for name, module in sites.items():
        parts = [ChannelMoments(*shard[name]) for _, shard in shards if name in shard]
        where = f"{operation}: '{name}' ({type(module).__name__})"
        if not parts:
            raise CalibrationError(f"{where}: saw no data. Pass at least one batch that reaches it.")
        result[name] = reduce(ChannelMoments.merge, parts)
        seen = counted(result[name].count, "sample")
        if result[name].count < 2:
            raise CalibrationError(f"{where}: saw {seen} per channel, expected 2 or more. Pass more data.")
    return result
