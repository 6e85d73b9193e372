"""Settings of all BatchNorm layers of a network at once."""

from torch import nn
from torch.distributed import ProcessGroup

from bnsurgery.errors import BNSurgeryError
from bnsurgery.ops.sync import group_name

from .batchnorm import Insertable, Statistics


def set_statistics_(bn_model: nn.Module, mode: Statistics, *, renorm_steps: int = 1000) -> None:
    """Choose what the BatchNorm layers of `bn_model` normalize by in train mode. `.train()` and `.eval()` keep it.

    - "batch": the batch's statistics, ordinary BN; what `insert` sets.
    - "running": the running ones, which then stay as they are: frozen BN, for batches too small for statistics.
    - "renorm": the batch's, corrected towards the running ones (Batch Renormalization) by limits that close over the
      next `renorm_steps` training steps: the first step computes what eval mode does, the last plain BN.

    A step of "renorm" ends when a layer's weight or bias changes. Until then its calls, as of a siamese network or of
    gradients accumulated, count as one in num_batches_tracked and share the limits and the running statistics of the
    step's beginning; so a layer of frozen weights stays at its first step. Compiled code cannot see the change: there
    every call is a step. A CUDA graph repeats what it was captured with: capture a whole step, optimizer included.

    Eval mode always uses the running ones. Copies and pickles keep the mode; `save` does not store it. Gradient
    checkpointing runs a layer twice, and so moves running statistics twice as in torch. A schedule is resumed by
    setting the mode on the network as it was, before `load_state_dict` restores the steps (num_batches_tracked).

    Args:
        bn_model: a network with layers of `bnsurgery.nn`; other norms in it are left alone.
        mode: see above.
        renorm_steps: length of the closing schedule in training steps, above 0; used by "renorm" alone.

    Raises:
        ValueError: `mode` or `renorm_steps` is none of these.
        BNSurgeryError: the model has no layer of `bnsurgery.nn`, or one without running statistics.

    References: Ioffe 2017, "Batch Renormalization", arXiv:1702.03275, section 3.
    """
    if mode not in ("batch", "running", "renorm"):
        raise ValueError(f"set_statistics_: mode must be 'batch', 'running' or 'renorm', got {mode!r}")
    if mode == "renorm" and renorm_steps < 1:
        raise ValueError(f"set_statistics_: renorm_steps must be at least 1, got {renorm_steps}")
    norms = _norms(bn_model, "set_statistics_")
    for name, norm in norms.items():
        if (norm.running_mean is None or norm.num_batches_tracked is None) and mode != "batch":
            raise BNSurgeryError(f"set_statistics_: '{name}' has no running statistics, which {mode!r} needs")
    for norm in norms.values():
        norm.statistics, norm.renorm_state = mode, None
        if mode == "renorm":
            norm.start_renorm_(0, renorm_steps)


def set_process_group_(bn_model: nn.Module, process_group: ProcessGroup | None) -> None:
    """Let the BatchNorm layers of `bn_model` share batch statistics over a process group: synchronized BN.

    Every rank gathers (count, mean, m2) in the forward and two sums in the backward, so all ranks must call both, an
    empty local batch included. Works with any backend that gathers tensors of the model's device (gloo, NCCL).

    Args:
        bn_model: a network with layers of `bnsurgery.nn`.
        process_group: such as `torch.distributed.group.WORLD`; None ends the sharing.

    Raises:
        BNSurgeryError: the model has no layer of `bnsurgery.nn`, or there is no sharing that None could end.
    """
    norms = _norms(bn_model, "set_process_group_").values()
    if process_group is None and not any(norm.process_group for norm in norms):
        raise BNSurgeryError(
            "set_process_group_: got None, and there is no process group to take away. torch.distributed.group.WORLD "
            "is None before torch.distributed.init_process_group: call that first"
        )
    for norm in norms:
        norm.process_group = group_name(process_group)


def _norms(model: nn.Module, caller: str) -> dict[str, Insertable]:
    norms = {name: module for name, module in model.named_modules() if isinstance(module, Insertable)}
    if not norms:
        raise BNSurgeryError(f"{caller}: {type(model).__name__} has no BatchNorm of bnsurgery.nn: insert some first")
    return norms
