"""Measure the population moments at every site in one pass over the original network."""

import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
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
    """Measure μ and σ² of what a BatchNorm at every site of `plan` would see.

    One pass in eval mode under `torch.inference_mode`, all sites at once: inserting changes nothing, so no
    layer-by-layer order is needed. Population moments over all N·H·W samples (and over all calls of a module that is
    called more than once), merged across batches in float64; how the data is split does not matter. With
    `torch.distributed` initialized every rank passes its own shard and all get the moments of the whole.

    Args:
        model: the original network; its modes, hooks, gradients and torch's random state are left as they were.
        batches: iterable of inputs, or of tuples whose first item is the input; images of different sizes are fine.
        progress: show a bar on stderr.

    Returns:
        By site name, in the plan's order, on the CPU.

    Raises:
        CalibrationError: no data, a batch that the model does not take or memory does not hold, a site that is not
            reached or has fewer than 2 samples; on every rank, where it is raised on one.
        NonFiniteError: a site has non-finite values; the message names it, the first batch that gave them, and the
            samples of that batch whose input has them already, both counted from 0.

    References: Wu & Johnson 2021, arXiv:2105.07576, section 3 (population statistics instead of moving averages).
    """
    anchors = {site.name: model.get_submodule(site.anchor) for site in plan.sites}
    # A norm that its layer carries comes before the layer's own hooks, a sibling behind them.
    first = {site.name for site in plan.sites if not site.in_sequential}
    last_dim = {site.name for site in plan.sites if site.channel_dim == -1}
    with _watching(anchors, output=True, first=first, last_dim=last_dim) as measured, observing(model):
        failure = _feed("calibrate", model, batches, measured, progress)
    return _gather("calibrate", measured, anchors, failure)


def recalibrate_(bn_model: nn.Module, batches: Iterable[Any], *, progress: bool = False) -> None:
    """Replace the running statistics of every BatchNorm by the population's, in place, after training.

    While the data passes, each BatchNorm normalizes by the batch; its input's mean and (population) variance over all
    samples become running_mean and running_var. Weight and bias stay. Dropout is off. A BatchNorm in the statistics
    mode "running", as those of frozen layers are, was trained with the statistics that it has: it keeps and uses them,
    and a warning says so.
    A batch of one input, as a loader may give last, is joined to its larger neighbour: alone it has no variance where
    a dense layer sees it. As `calibrate`, it merges over the ranks of `torch.distributed`.

    Raises:
        CalibrationError: as `calibrate`; then the model is unchanged.
        BNSurgeryError: the model has no BatchNorm with running statistics, or all of them are in the mode "running".

    References: Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 2; Wu & Johnson 2021, arXiv:2105.07576, section 3.
    """
    norms: dict[str, nn.Module] = {
        name: module
        for name, module in bn_model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not norms:
        raise BNSurgeryError(f"recalibrate_: {type(bn_model).__name__} has no BatchNorm with running statistics")
    kept = [name for name, norm in norms.items() if getattr(norm, "statistics", None) == "running"]
    norms = {name: norm for name, norm in norms.items() if name not in kept}
    if kept:
        if all(is_frozen(bn_model.get_submodule(name)) for name in kept):
            reason = "these are frozen with their layers (requires_grad=False), which others would change"
        else:  # frozen ones stay out of it, here, too
            reason = (
                "what was trained was trained with the statistics there, and others would change what it computes. To "
                "measure them all the same, first call bnsurgery.set_statistics_(model, 'batch')"
            )
        if not norms:
            raise BNSurgeryError(f"recalibrate_: every BatchNorm is in the statistics mode 'running': {reason}")
        warnings.warn(
            f"recalibrate_: left {listed(kept)} as before, in the statistics mode 'running': {reason}",
            BNSurgeryWarning,
            stacklevel=2,
        )
    last_dim = {name for name, norm in norms.items() if isinstance(norm, LastDimBatchNorm1d)}
    with _watching(norms, output=False, last_dim=last_dim) as measured, training_norms(bn_model, by_batch=True):
        failure = _feed("recalibrate_", bn_model, batches, measured, progress, joining=True)
    moments = _gather("recalibrate_", measured, norms, failure)
    with torch.no_grad():
        for name in norms:
            bn_model.get_buffer(f"{name}.running_mean").copy_(moments[name].mean)
            bn_model.get_buffer(f"{name}.running_var").copy_(moments[name].variance)


def input_moments(model: nn.Module, name: str, batches: Iterable[Any]) -> ChannelMoments:
    """Measure what reaches the submodule `name` in eval mode; as `calibrate`, it merges over the ranks.

    Raises:
        CalibrationError: as `calibrate`.
    """
    modules = {name: model.get_submodule(name)}
    with _watching(modules, output=False) as measured, observing(model):
        failure = _feed("measure", model, batches, measured, progress=False)
    return _gather("measure", measured, modules, failure)[name]


def warn_of_dead_channels(moments: Mapping[str, ChannelMoments], eps: float) -> None:
    """Warn of channels whose variance is below `eps`: BN would blow up whatever little they say in training."""
    dead = {name: int((site.variance < eps).sum()) for name, site in moments.items()}
    dead = {name: count for name, count in dead.items() if count}
    if dead:
        worst = sorted(dead, key=lambda name: -dead[name])[:3]
        listed = ", ".join(f"'{name}' {dead[name]} of {len(moments[name].mean)}" for name in worst)
        warnings.warn(
            f"channels with a variance below eps ({eps:g}) on this data, dead or nearly: {sum(dead.values())} in "
            f"{counted(len(dead), 'layer')}, most in {listed}. They stay exact; training may "
            "amplify them.",
            BNSurgeryWarning,
            stacklevel=4,
        )


class _Measured(dict[str, ChannelMoments]):
    """The moments by name, and the dtype of what they are of."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: dict[str, torch.dtype] = {}


@contextmanager
def _watching(
    modules: dict[str, nn.Module], *, output: bool, first: Container[str] = (), last_dim: Container[str] = ()
) -> Iterator["_Measured"]:
    """Collect the moments of each module's output (or else first input) while inside.

    Args:
        first: names of those watched before their own hooks run.
        last_dim: names of those whose channels are the last dimension, not the second.
    """
    measured = _Measured()

    def add(name: str, tensor: Tensor) -> None:
        moments = ChannelMoments(*channel_moments(tensor.flatten(0, -2) if name in last_dim else tensor))
        measured[name] = measured[name].merge(moments) if name in measured else moments
        measured.dtypes[name] = tensor.dtype

    def watcher(name: str) -> Callable[..., None]:
        if output:
            return lambda module, args, result: add(name, result)
        return lambda module, args: add(name, args[0])

    handles = []
    try:
        for name, module in modules.items():
            register = module.register_forward_hook if output else module.register_forward_pre_hook
            handles.append(register(watcher(name), prepend=name in first))
        yield measured
    finally:
        for handle in handles:
            handle.remove()


def _feed(
    operation: str,
    model: nn.Module,
    batches: Iterable[Any],
    measured: _Measured,
    progress: bool,
    *,
    joining: bool = False,
) -> Exception | None:
    """Run the batches until one fails. The error is given back: a rank that raised would leave the others waiting."""
    total = len(batches) if isinstance(batches, Sized) else None
    given = _joining(inputs(batches)) if joining else inputs(batches)
    bar = tqdm(given, desc=operation, total=total, unit="batch", disable=None if progress else True, leave=False)
    try:
        for number, batch in enumerate(bar):
            run(operation, model, batch)
            if not _are_finite(measured):
                return _non_finite(operation, model, measured, number, batch)
    except Exception as error:  # a loader's own, too
        return error
    return None


def _joining(batches: Iterator[Inputs]) -> Iterator[Inputs]:
    """The same, but a batch of one sample goes with a larger one beside it, where the two can be joined."""
    held: Inputs | None = None
    for batch in batches:
        both = None
        if held is not None and min(held.samples, batch.samples) == 1 < max(held.samples, batch.samples):
            both = join([held, batch])
        if both is not None:
            yield both
            held = None
            continue
        if held is not None:
            yield held
        held = batch
    if held is not None:
        yield held


def _are_finite(measured: dict[str, ChannelMoments]) -> bool:
    """One look at all sites together, so that a GPU is waited for once a batch."""
    tensors = [tensor for site in measured.values() for tensor in (site.mean, site.m2)]
    return not tensors or bool(torch.cat([tensor.to(tensors[0].device) for tensor in tensors]).isfinite().all())


def _non_finite(operation: str, model: nn.Module, measured: _Measured, number: int, batch: Inputs) -> NonFiniteError:
    """Says where it came from, after the first batch that did it."""
    bad = {name: int((~(site.mean.isfinite() & site.m2.isfinite())).sum()) for name, site in measured.items()}
    name = next(name for name, channels in bad.items() if channels)  # the first that ran
    taken = placed(model, batch)
    dtype = measured.dtypes[name]
    samples = taken.non_finite()
    if samples:
        listed = ", ".join(map(str, samples[:8])) + (" and others" if len(samples) > 8 else "")
        cause = (
            f", whose input is NaN or Inf in {dtype} in sample {listed} (counted from 0). Leave that out or repair it."
        )
    else:
        cause = (
            " (counted from 0), whose input is finite. Look for non-finite weights, or activations beyond "
            f"{torch.finfo(dtype).max:.3g}, the largest {dtype}: a wider one may do, and a cast afterwards."
        )
    return NonFiniteError(
        f"{operation}: '{name}' ({type(model.get_submodule(name)).__name__}): NaN or Inf in {bad[name]} of "
        f"{len(measured[name].mean)} channels, first in batch {number}{cause}"
    )


def _gather(
    operation: str,
    measured: _Measured,
    sites: dict[str, nn.Module],
    failure: Exception | None,
) -> dict[str, ChannelMoments]:
    """Move to the CPU, and merge over the ranks in rank order, so that all get the same bits; or all the same error."""
    local = {name: (m.count, m.mean.cpu(), m.m2.cpu()) for name, m in measured.items()}
    told = failure if failure is None or isinstance(failure, BNSurgeryError) else CalibrationError(repr(failure))
    shards: list[tuple[BNSurgeryError | None, dict[str, tuple[int, Tensor, Tensor]]]] = [(told, local)]
    if distributed.is_available() and distributed.is_initialized():
        shards *= distributed.get_world_size()
        distributed.all_gather_object(shards, (told, local))
    if failure is not None:
        raise failure
    for rank, (error, _) in enumerate(shards):
        if error is not None:
            raise type(error)(f"rank {rank}: {error}")
    result: dict[str, ChannelMoments] = {}
    for name, module in sites.items():
        for _, shard in shards:
            if name in shard:
                moments = ChannelMoments(*shard[name])
                result[name] = result[name].merge(moments) if name in result else moments
        where = f"{operation}: '{name}' ({type(module).__name__})"
        if name not in result:
            raise CalibrationError(f"{where}: saw no data. Pass at least one batch that reaches it.")
        count = result[name].count
        if count < 2:
            raise CalibrationError(
                f"{where}: saw {counted(count, 'sample')} per channel, expected 2 or more. Pass more data."
            )
    return result
