"""Settings for all BatchNorm layers of a network at once."""

import warnings
from collections.abc import Callable, Iterable
from typing import cast

from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from bnsurgery.errors import BNSurgeryError, BNSurgeryWarning
from bnsurgery.ops.sync import group_name
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

    - "batch": the batch's statistics, ordinary BN; what `insert` sets.
    - "running": the running ones, which then stay as they are: frozen BN, for batches too small for statistics.
    - "renorm": the batch's, corrected towards the running ones (Batch Renormalization) by limits that close over the
      next `renorm_steps` training steps: the first step computes what eval mode does, the last plain BN.

    A step of "renorm" ends when a layer's weight or bias changes. Until then its calls, as of a siamese network or
    with accumulated gradients, count as one in num_batches_tracked and share the limits and the running statistics of
    the step's beginning. So a layer with frozen weights stays at its first step. Torch must notice the change: an edit
    in place or another tensor, not what an optimizer writes through `.data`. Without weight and bias every call is a
    step, as in compiled code, which sees no change. A CUDA graph repeats what it captured: capture the optimizer, too.

    Eval mode always uses the running ones. Copies and pickles keep the mode; `save` does not store it. Gradient
    checkpointing runs a layer twice, and so moves running statistics twice as in torch. To resume a schedule, set the
    mode on the network as it was before `load_state_dict`, which restores the steps (num_batches_tracked).

    The network's `torch.nn.BatchNorm1d/2d/3d` layers are set, too: for a mode other than "batch" the same object, with
    its names and tensors, becomes the class of `bnsurgery.nn` derived from its own. Layers that cannot be set, such as
    SyncBatchNorm, stay as they are, and a warning names them. So do frozen ones, in the mode "running" with a weight
    and bias of `requires_grad=False`, as `insert` makes them behind a frozen layer, unless `where` chooses them.

    Args:
        bn_model: a network with BatchNorm layers.
        mode: see above.
        where: which of them, (name, module) -> bool; None for all but frozen ones.
        renorm_steps: length of the closing schedule in training steps, above 0; used by "renorm" alone.

    Raises:
        ValueError: `mode` or `renorm_steps` is none of these.
        BNSurgeryError: the model has no BatchNorm that can be set, `where` chooses none, or one that it chooses has no
            running statistics.

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
    norms = {name: module for name, module in bn_model.named_modules() if isinstance(module, _BatchNorm)}
    if where is not None:
        norms = {name: norm for name, norm in norms.items() if where(name, norm)}
    frozen = [] if where is not None or mode == "running" else [name for name, norm in norms.items() if is_frozen(norm)]
    foreign = [name for name, norm in norms.items() if not isinstance(norm, Insertable) and not _has_counterpart(norm)]
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
        if isinstance(norm, Insertable) or mode != "batch":
            ours = _ours_(norm)
            ours.statistics, ours.renorm_state = mode, None
            if mode == "renorm":
                ours.start_renorm_(0, renorm_steps)
    notes = []
    if frozen:
        notes.append(
            f"left {listed(frozen)} in 'running' mode: frozen (requires_grad=False), which {mode!r} would undo. "
            "`where=lambda name, norm: True` sets frozen ones, too."
        )
    if foreign and mode != "batch":
        kinds = ", ".join(sorted({type(norms[name]).__name__ for name in foreign}))
        notes.append(
            f"left {listed(foreign)} ({kinds}), which normalizes by the batch in train mode: its .eval() after every "
            ".train() of the network freezes it, if it has running statistics."
        )
    for note in notes:
        warnings.warn(f"set_statistics_: {note}", BNSurgeryWarning, stacklevel=2)


def freeze_(norm: nn.Module) -> None:
    """Freeze a norm: no gradient, and the running statistics in train mode."""
    norm.requires_grad_(False)
    cast(Insertable, norm).statistics = "running"


def is_frozen(norm: nn.Module) -> bool:
    """Whether training leaves this norm as it is: see `freeze_`."""
    parameters = list(norm.parameters())
    trained = not parameters or any(parameter.requires_grad for parameter in parameters)
    return getattr(norm, "statistics", None) == "running" and not trained


def _has_counterpart(norm: _BatchNorm) -> bool:
    return type(norm) in OURS and norm.running_mean is not None


def _ours_(norm: _BatchNorm) -> Insertable:
    """The same object, whose class changes from torch's to ours."""
    if not isinstance(norm, Insertable):
        template = OURS[type(norm)](0)
        norm.__class__ = type(template)
        for name, value in vars(template).items():
            vars(norm).setdefault(name, value)
        norm.register_buffer("renorm_state", None, persistent=False)
    return cast(Insertable, norm)


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
