"""Batch Renormalization: train-mode outputs tied to the running statistics, less and less."""

import math

import torch
from torch import Tensor

from bnsurgery.ops.library import define


def limits(step: Tensor, steps: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(r_max, d_max) at a training step: (∞, ∞) at step 0, (3, 5) half way, (1, 0) from `steps` on.

    With p = step/steps: ln r_max = ln 3·(1 − p)/p and d_max = 5·(1 − p)/p. The paper opens from (1, 0) to (3, 5); here
    the running statistics are right from the start and the weights shall come to live with plain batch norm.

    Args:
        step: 0-dim, the training steps done, on any device, where it stays.
        steps: length of the schedule; 0 gives (1, 0) throughout.
        dtype: of the limits.

    References: Ioffe 2017, arXiv:1702.03275, section 4.
    """
    p = (step.to(dtype) / steps).clamp(0, 1) if steps else torch.ones_like(step, dtype=dtype)
    openness = (1 - p) / p
    return (math.log(3) * openness).exp(), 5 * openness


def _r_and_d(
    mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, eps: float, r_max: Tensor, d_max: Tensor
) -> tuple[Tensor, Tensor]:
    """R = clip(σ_B/σ, 1/r_max, r_max) and d = clip((μ_B − μ)/σ, −d_max, d_max), constants for the gradient; (C,)."""
    running_std = (running_var.to(var.dtype) + eps).sqrt()
    r = ((var + eps).sqrt() / running_std).clamp(1 / r_max, r_max)
    d = ((mean - running_mean) / running_std).clamp(-d_max, d_max)
    return r.to(running_mean.dtype), d.to(running_mean.dtype)


# A custom op, so that no compiler computes it again in the backward, from running statistics that have moved on since:
# torch 2.15's partitioner does that to plain ops, and gets another r and d.
r_and_d = define(
    "renorm_r_d(Tensor mean, Tensor var, Tensor running_mean, Tensor running_var, float eps, Tensor r_max, "
    "Tensor d_max) -> (Tensor r, Tensor d)",
    lambda mean, var, running_mean, *_: (torch.empty_like(running_mean), torch.empty_like(running_mean)),
    CompositeExplicitAutograd=_r_and_d,
)


def correction(
    mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None,
    eps: float, r_max: Tensor, d_max: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The weight and bias with which plain batch norm computes weight·(r·x̂ + d) + bias: weight·r and weight·d + bias.

    Wide open (r_max = d_max = ∞) that is weight·(x − running_mean)/√(running_var + eps) + bias, the eval function.
    """
    r, d = r_and_d(mean, var, running_mean, running_var, eps, r_max, d_max)
    scale = r if weight is None else weight * r
    shift = d if weight is None else weight * d
    return scale, shift if bias is None else shift + bias
