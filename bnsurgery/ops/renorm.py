"""Batch Renormalization: train-mode outputs tied to the running statistics, less and less."""

import math

import torch
from torch import Tensor


def schedule(running_mean: Tensor, taken: int, steps: int) -> Tensor:
    """The state of a layer after `taken` of `steps` steps, before the next one begins.

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
