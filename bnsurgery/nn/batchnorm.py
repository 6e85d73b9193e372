"""BatchNorm modules for insertion: torch's own, plus a fused ReLU and parameters that stay exact under casts."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .identity import identity_parameters, kernel_scale_shift

Activation = Literal["relu"] | None


class _Insertable(torch.nn.modules.batchnorm._BatchNorm):
    """What the three classes below add to torch's."""

    activation: Activation

    def __init__(self, *args: Any, activation: Activation = None, **kwargs: Any) -> None:
        if activation not in (None, "relu"):
            raise ValueError(f"{type(self).__name__}: activation must be None or 'relu', got {activation!r}")
        super().__init__(*args, **kwargs)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input` of shape (N, C, *), then apply the fused activation. Same shape, dtype and layout."""
        output = super().forward(input)
        # In place: batch norm's backward needs its input, not its output.
        return F.relu(output, inplace=True) if self.activation == "relu" else output

    def extra_repr(self) -> str:
        """Torch's text, with the fused activation."""
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Insertable":
        """Follow `.to()` and its kin, but keep float32 under half precision and identity channels exact.

        Statistics in bfloat16 would be worthless, and torch's kernels take float32 parameters beside a half-precision
        input. A cast between float32 and float64 keeps the values but not their rounding, so a channel that was
        exactly the identity is solved anew.
        """

        def keep_precision(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            half = tensor.is_floating_point() and result.dtype in (torch.float16, torch.bfloat16)
            return tensor.to(result.device, torch.float32) if half else result

        old = {name: value.detach() for name, value in self._affine_and_statistics().items()}
        super()._apply(keep_precision, recurse)
        new = self._affine_and_statistics()
        if len(old) == 4 and old["weight"].dtype != new["weight"].dtype and not new["weight"].is_meta:
            self._solve_anew_(old, new)
        return self

    def _affine_and_statistics(self) -> dict[str, Tensor]:
        tensors = {name: getattr(self, name) for name in ("running_mean", "running_var", "weight", "bias")}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def _solve_anew_(self, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
        scale, shift = kernel_scale_shift(**old, eps=self.eps)
        identity = (scale == 1) & (shift == 0)
        mean, var = (old[name].double().cpu().numpy()[identity] for name in ("running_mean", "running_var"))
        where = torch.from_numpy(identity).to(new["weight"].device)
        for name, values in identity_parameters(mean, var, self.eps, new["weight"].dtype).items():
            new[name].data[where] = values.to(where.device)


class BatchNorm1d(_Insertable, torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` for inputs (N, C) or (N, C, L), with an optional fused ReLU.

    y = (x − mean)/√(var + eps)·weight + bias per channel, then max(y, 0) with `activation="relu"`. Mean and
    (population) variance are the batch's in train mode and the running ones in eval mode. Parameters, buffers and state
    dict are torch's own, as are the constructor's other arguments; they stay float32 under `.half()` and `.bfloat16()`.

    Raises:
        ValueError: `activation` is neither None nor "relu", or the input has the wrong number of dimensions.

    References: Ioffe & Szegedy 2015, arXiv:1502.03167, section 3.
    """


class BatchNorm2d(_Insertable, torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` for inputs (N, C, H, W), with an optional fused ReLU; see `BatchNorm1d`."""


class BatchNorm3d(_Insertable, torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` for inputs (N, C, D, H, W), with an optional fused ReLU; see `BatchNorm1d`."""
