"""BatchNorm parameters with which the output is the input bit for bit, in the arithmetic of the kernels that run."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def kernel_scale_shift(
    running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[np.ndarray, np.ndarray]:
    """Per-channel (scale, shift), shape (C,), of eval-mode batch norm, y = x·scale + shift, rounded as its kernels do.

    scale = fl(fl(1/fl√(var + eps))·weight) and shift = bias − mean·scale, by NumPy: torch's vectorised 1/sqrt(t) is not
    correctly rounded, while the kernels' scalar code is. A missing weight counts as 1, a missing bias as 0. Damaged
    parameters give inf or NaN.
    """
    mean, var, factor, offset = _numpy(running_mean), _numpy(running_var), _numpy(weight, 1), _numpy(bias, 0)
    dtype = var.dtype.type
    with np.errstate(all="ignore"):
        scale = dtype(1) / np.sqrt(var + dtype(eps)) * factor
        return scale, offset - mean * scale


def identity_parameters(mean: np.ndarray, variance: np.ndarray, eps: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """The norm's four tensors, by name, that normalize by (mean, variance) and undo it exactly.

    running_mean = bias = μ, running_var ≈ σ² and weight ≈ √(σ² + eps), with a scale of exactly 1 in the kernels. The
    rounded weight is off by an ulp for 10 to 25 % of channels. So per channel: try the three weights around 1/invstd,
    and where none gives 1, move var + eps up by an ulp and try again. μ and the population variance σ² are float64 of
    shape (C,), finite, σ² ≥ 0 and eps > 0; the tensors are of `dtype`, float32 or float64, on the CPU.

    Raises:
        ArithmeticError: no exact pair of variance and weight within 64 ulps (never seen).
    """
    real = np.dtype(np.float64 if dtype == torch.float64 else np.float32)
    one, real_eps = real.type(1), real.type(eps)
    center, running_var = mean.astype(real), variance.astype(real)
    total = running_var + real_eps
    weight = np.zeros_like(running_var)
    open_ = np.ones(running_var.shape, dtype=bool)
    up = np.full_like(total, np.inf)
    for step in range(64):  # every real network tried has an exact pair within 6 steps; 64 still take no time
        invstd = one / np.sqrt(total)
        middle = one / invstd
        # Step 0 keeps the measured variance; later ones need a var that adds up to the raised total.
        exact_var = total - real_eps if step else running_var
        for var in (exact_var, np.nextafter(exact_var, -up), np.nextafter(exact_var, up)):
            for candidate in (middle, np.nextafter(middle, up), np.nextafter(middle, -up)):
                hit = open_ & (var >= 0) & (var + real_eps == total) & (invstd * candidate == one)
                running_var[hit], weight[hit] = var[hit], candidate[hit]
                open_ &= ~hit
        if not open_.any():
            arrays = {"running_mean": center, "running_var": running_var, "weight": weight, "bias": center.copy()}
            return {name: torch.from_numpy(array) for name, array in arrays.items()}
        total = np.where(open_, np.nextafter(total, up), total)
    raise ArithmeticError(f"no exact BatchNorm weight for variance {variance[open_][0]!r} with eps {eps}")


def _numpy(tensor: Tensor | None, default: int = 0) -> Any:
    return default if tensor is None else tensor.detach().cpu().numpy()
