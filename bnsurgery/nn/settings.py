"""Settings for all BatchNorm layers of a network at once."""

import warnings
from collections.abc import Callable, Iterable
from typing import cast

from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from bnsurgery.errors import BNSurgeryError, BNSurgeryWarning
from bnsurgery.ops.batch_statistics import group_name
from bnsurgery.text.words import counted

from .batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, Insertable, Statistics

OURS: dict[type, type] = {nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d, nn.BatchNorm3d: BatchNorm3d}


def set_statistics_(
    bn_model: nn.Module,
    mode: Statistics,
    where: Callable[[str, nn.Module], bool] | None = None,
    *,
    renorm_steps: int = 1000,
) -> None:
    """Choose what the BatchNorm layers of `bn_model` normalize by in train mode. `.train()` and `.eval()` keep it.

    - "batch": the batch's statistics, ordinary BN, as `insert` sets it.
    - "running": the running ones, which then stay as they are: frozen BN, for batches too small for statistics.
    - "renorm": the batch's, corrected towards the running ones (Batch Renormalization) by limits that close over the
      next `renorm_steps` training steps. The first step computes the function of eval mode, the last one plain BN.

    A step of "renorm" ends when torch sees the layer's weight or bias change: by an edit in place or another tensor,
    not through `.data`. Until then all calls, as of a siamese network or with accumulated gradients, count as one in
    num_batches_tracked and share the limits and running statistics of the step's beginning. So a layer with frozen
    weights stays at its first step. Without weight and bias, and in compiled code, every call is a step; a CUDA graph
    has to include the optimizer.

    Eval mode always uses the running statistics. Copies and pickles keep the mode; `save` does not store it. Gradient
    checkpointing runs a layer twice, and so moves running statistics twice, as in torch. To resume a schedule, set the
    mode before `load_state_dict`, which restores the number of steps (num_batches_tracked).

    For a mode other than "batch" each `torch.nn.BatchNorm1d/2d/3d`, the same object with its names and tensors, becomes
    the class of `bnsurgery.nn` derived from its own. A warning names the layers that stay as they are: those that
    cannot be set, such as SyncBatchNorm, and, unless `where` chooses them, frozen ones, which are in the mode "running"
    with a weight and bias of `requires_grad=False`, as `insert` makes them behind a frozen layer.

    Args:
        bn_model: a network with BatchNorm layers.
        mode: see above.
        where: which of them, (name, module) -> bool; None for all but frozen ones.
        renorm_steps: length of the closing schedule in training steps, above 0; used by "renorm" alone.

    Raises:
        ValueError: `mode` or `renorm_steps` is none of these.
        BNSurgeryError: no BatchNorm can be set, `where` chooses none, or a chosen one has no running statistics.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> bnsurgery.set_statistics_(model, "running")
        >>> type(model[1]), model[1].statistics
        (<class 'bnsurgery.nn.batchnorm.BatchNorm2d'>, 'running')

    References: Ioffe 2017, "Batch Renormalization", arXiv:1702.03275, section 3.
    """
    if mode not in ("batch", "running", "renorm"):
        raise ValueError(f"set_statistics_: `mode` must be 'batch', 'running' or 'renorm', got {mode!r}")
    if mode == "renorm" and renorm_steps < 1:
        raise ValueError(f"set_statistics_: `renorm_steps` must be at least 1, got {renorm_steps}")
    found = {name: module for name, module in bn_model.named_modules() if isinstance(module, _BatchNorm)}
    norms = {name: norm for name, norm in found.items() if where is None or where(name, norm)}
    frozen = [name for name, norm in norms.items() if where is None and mode != "running" and is_frozen(norm)]
    convertible = [name for name, norm in norms.items() if type(norm) in OURS and norm.running_mean is not None]
    foreign = [name for name, norm in norms.items() if not isinstance(norm, Insertable) and name not in convertible]
    chosen = {name: norm for name, norm in norms.items() if name not in frozen and name not in foreign}
    if not chosen and not frozen:
        which = "for which `where(name, module)` is true" if where is not None else "that it can set: insert some first"
        raise BNSurgeryError(f"set_statistics_: {type(bn_model).__name__} has no BatchNorm {which}")
    for name, norm in chosen.items():
        if (norm.running_mean is None or norm.num_batches_tracked is None) and mode != "batch":
            raise BNSurgeryError(
                f"set_statistics_: '{name}' has no running statistics, which {mode!r} needs: leave it out with `where`"
            )
    for norm in chosen.values():
        if mode != "batch" and not isinstance(norm, Insertable):
            norm.__class__, norm.__module__ = OURS[type(norm)], type(norm).__module__
        if isinstance(norm, Insertable):
            norm.statistics = mode
            norm._buffers.pop("renorm_state", None)
            if mode == "renorm":
                norm.start_renorm_(0, renorm_steps)
    if frozen:
        note = f"left {listed(frozen)} in 'running' mode: frozen (requires_grad=False), which {mode!r} would undo. "
        note += "`where=lambda name, norm: True` sets frozen ones, too."
        warnings.warn(f"set_statistics_: {note}", BNSurgeryWarning, stacklevel=2)
    if foreign and mode != "batch":
        kinds = ", ".join(sorted({type(norms[name]).__name__ for name in foreign}))
        note = f"left {listed(foreign)} ({kinds}), which normalizes by the batch in train mode: its .eval() after "
        note += "every .train() of the network freezes it, if it has running statistics."
        warnings.warn(f"set_statistics_: {note}", BNSurgeryWarning, stacklevel=2)


def freeze_(norm: nn.Module) -> None:
    """Freeze a norm: no gradient, and the running statistics in train mode."""
    norm.requires_grad_(False)
    cast(Insertable, norm).statistics = "running"


def is_frozen(norm: nn.Module) -> bool:
    """Whether training leaves this norm as it is: see `freeze_`."""
    gradients = {parameter.requires_grad for parameter in norm.parameters()}
    return getattr(norm, "statistics", None) == "running" and gradients == {False}


def listed(names: Iterable[str]) -> str:
    """The first of these names and the number of the others, in words."""
    first, *rest = names
    return f"'{first}'" + (f" and {counted(len(rest), 'more BatchNorm')}" if rest else "")


def set_process_group_(bn_model: nn.Module, process_group: ProcessGroup | None) -> None:
    """Share the batch statistics of `bn_model`'s BatchNorm layers over a process group: synchronized BN.

    Every rank gathers (count, mean, m2) in the forward and two sums in the backward, so all ranks must call both, an
    empty local batch included. Works with any backend that gathers tensors of the model's device (gloo, NCCL).

    Args:
        bn_model: a network with layers of `bnsurgery.nn`.
        process_group: such as `torch.distributed.group.WORLD`; None ends the sharing.

    Raises:
        BNSurgeryError: the model has no layer of `bnsurgery.nn`, or None is given and nothing is shared.

    Examples:
        >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), bnsurgery.nn.BatchNorm2d(8))
        >>> bnsurgery.set_process_group_(model, torch.distributed.group.WORLD)
        >>> model(torch.randn(4, 3, 8, 8)).shape
        torch.Size([4, 8, 6, 6])
        >>> torch.distributed.destroy_process_group()
    """
    norms = [module for module in bn_model.modules() if isinstance(module, Insertable)]
    if not norms:
        name = type(bn_model).__name__
        raise BNSurgeryError(f"set_process_group_: {name} has no BatchNorm of bnsurgery.nn: insert some first")
    if process_group is None and not any(norm.process_group for norm in norms):
        raise BNSurgeryError(
            "set_process_group_: got None, and no BatchNorm has a process group to remove. "
            "torch.distributed.group.WORLD is None before torch.distributed.init_process_group: call that first"
        )
    for norm in norms:
        norm.process_group = group_name(process_group)
