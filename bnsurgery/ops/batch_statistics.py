"""The statistics of a batch: over all ranks, moved into the running ones, and tied to them by Batch Renormalization."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup  # a stub if torch was built without

Vector = Tensor | None  # (C,); None for the function's default
# Running mean and variance, counter, state of Batch Renormalization, momentum, name of the process group or "".
Moving = tuple[Vector, Vector, Tensor | None, Tensor | None, float, str]


def group_name(process_group: ProcessGroup | str | None) -> str:
    """The name of a process group, which custom ops, compiled graphs, copies and pickles can hold; "" for none."""
    return process_group.group_name if isinstance(process_group, ProcessGroup) else process_group or ""


def gather(vector: Tensor, group: str) -> Tensor:
    """One row per rank, for sums in the same order everywhere, without autograd and as compiled graphs can hold it."""
    from torch.distributed.distributed_c10d import _get_group_size_by_name

    size = _get_group_size_by_name(group)  # type: ignore[arg-type]  # a NewType of str, which compilers cannot trace
    rows = torch.ops._c10d_functional.all_gather_into_tensor(vector.contiguous(), size, group)
    return torch.ops._c10d_functional.wait_tensor(rows).view(size, -1)


def mean_over_ranks(sums: Tensor, count: int, group: str) -> Tensor:
    """`sums` divided by `count`, both summed over the ranks."""
    total = gather(torch.cat((sums.flatten(), sums.new_full((1,), count))), group).sum(0)
    return (total[:-1] / total[-1]).view_as(sums)


def settle_(count: Any, moments: tuple[Tensor, Tensor], eps: float, moving: Moving) -> Tensor:
    """Merge count, mean and m2 over the ranks, update running statistics and counter, and return the statistics.

    These are mean and population variance, (2, C), or with Batch Renormalization's r and d (4, C). An empty batch gives
    zeros and leaves the running statistics alone; others move running_var towards the unbiased variance. The ranks'
    means are weighted by their counts and m2 gains n·(mean − overall mean)²: no large numbers are subtracted.

    References: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", equation 2.1.
    """
    running_mean, running_var, counter, renorm, momentum, group = moving
    mean, m2 = moments
    if group:
        rows = gather(torch.cat((mean.new_full((1,), count), mean, m2)), group)
        counts, (means, m2s) = rows[:, :1], rows[:, 1:].chunk(2, 1)
        count = counts.sum()
        mean = (counts * means).sum(0) / count.clamp_min(1)
        m2 = (m2s + counts * (means - mean).square()).sum(0)
    some = count + (count == 0)
    statistics = torch.stack((mean, m2 / some))
    if renorm is not None and running_mean is not None and running_var is not None:
        r_and_d = r_and_d_(renorm, mean, statistics[1], running_mean, running_var, eps, counter is not None)
        statistics = torch.cat((statistics, r_and_d))
    share = momentum * (count > 0)
    for running, value in ((running_mean, mean), (running_var, m2 / (some - 1 * (some > 1)))):
        if running is not None:
            running.mul_(1 - share).add_(value.to(running.dtype).to(running.device) * share)
    if counter is not None:
        counter.add_(1)
    return statistics


def schedule(running_mean: Tensor, taken: int, steps: int) -> Tensor:
    """The state of a layer's Batch Renormalization after `taken` of `steps` steps, before the next one begins.

    Its rows (4, C): running mean and variance when the step began, the steps before it, the length of the schedule.
    """
    return torch.stack([torch.full_like(running_mean, value) for value in (0, 0, taken - 1, steps)])


def r_and_d_(
    state: Tensor, mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, eps: float, begins: bool
) -> Tensor:
    """Begin a step if `begins`; return r = clip(σ_B/σ, 1/r_max, r_max) and d = clip((μ_B − μ)/σ, −d_max, d_max).

    Rows of (2, C), constants for the gradient. Plain batch norm with weight·r and weight·d + bias then computes
    weight·(r·x̂ + d) + bias; without limits that is the eval function, by the running statistics when the step began.

    With p = step/steps: ln r_max = ln 3·(1 − p)/p and d_max = 5·(1 − p)/p, so (r_max, d_max) is (∞, ∞) at step 0,
    (3, 5) half way and (1, 0) from `steps` on. The paper opens the limits from (1, 0) to (3, 5); here they close, since
    the running statistics are right from the start and the weights adapt to plain BN.

    References: Ioffe 2017, arXiv:1702.03275, section 4.
    """
    if begins:
        state[0].copy_(running_mean)
        state[1].copy_(running_var)
        state[2].add_(1)
    anchor_mean, anchor_var, step, steps = state.to(mean.device).to(mean.dtype)
    p = (step / steps).clamp(0, 1)
    openness = (1 - p) / p
    r_max, d_max = (math.log(3) * openness).exp(), 5 * openness
    std = (anchor_var + eps).sqrt()
    r = ((var + eps).sqrt() / std).clamp(1 / r_max, r_max)
    return torch.stack((r, ((mean - anchor_mean) / std).clamp(-d_max, d_max)))
