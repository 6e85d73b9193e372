"""BatchNorm layers for insertion: torch's on our op, with a fused ReLU, statistics modes and exact casts."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bnsurgery.errors import BNSurgeryError
from bnsurgery.ops.batch_statistics import schedule
from bnsurgery.ops.functional import check, normalize

from .identity import identity_parameters, kernel_scale_shift

Activation = Literal["relu"] | None
Statistics = Literal["batch", "running", "renorm"]


class Insertable(nn.modules.batchnorm._BatchNorm):
    """Torch's BatchNorm on our op, with the settings that the classes below add to torch's."""

    # Tensor | None in torch's stubs; the constructor's arguments decide which.
    running_mean: Any
    running_var: Any
    num_batches_tracked: Any
    weight: Any
    bias: Any

    activation: Activation = None
    statistics: Statistics = "batch"  # by which train mode normalizes, see `set_statistics_`
    renorm_start: int = 0  # num_batches_tracked when `statistics` became "renorm"
    renorm_state: Any  # see `schedule`; a buffer of the mode "renorm" that the state dict leaves out
    renorm_weights: dict[Tensor, int] | None = None  # see `_weights`; at the last call, since a change ends a step
    process_group: str = ""  # name of the group whose ranks share the batch's statistics

    def __init__(self, *args: Any, activation: Activation = None, **kwargs: Any) -> None:
        if activation not in (None, "relu"):
            raise ValueError(f"{type(self).__name__}: `activation` must be None or 'relu', got {activation!r}")
        super().__init__(*args, **kwargs)
        self.activation = activation
        # torch.fx and torchvision's create_feature_extractor do not trace into modules of torch.nn.
        self.__module__ = nn.BatchNorm2d.__module__

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input` of shape (N, C, *), then apply the fused activation. Same shape, dtype and layout."""
        self._check_input_dim(input)
        if _exporting():
            return self._in_torch(input)
        # nn.Module's __getattr__ takes half a microsecond, which counts in a small layer.
        buffers: dict[str, Any] = self._buffers
        running_mean, running_var = buffers["running_mean"], buffers["running_var"]
        if running_mean is None or input.shape[1] != running_mean.numel() or not input.is_floating_point():
            check(input, type(self).__name__, **self._affine_and_statistics())
        training, group, counter, renorm, momentum = self.training, "", None, None, 0.0
        if training and self.statistics != "running":
            group = self.process_group
            if self.track_running_stats and running_mean is not None:
                counter = buffers["num_batches_tracked"]
                momentum = 1 / (counter + 1) if self.momentum is None else self.momentum
                if self.statistics == "renorm":
                    renorm = buffers["renorm_state"]
                    if not torch.compiler.is_compiling() and self._weights() == self.renorm_weights != {}:
                        counter = None  # the step goes on; compiled code cannot see that, and begins one
            else:
                running_mean = running_var = None
        else:
            training = running_mean is None
        output = normalize(
            input, running_mean, running_var, self.weight, self.bias, training, momentum, self.eps,
            self.activation is not None, group, counter, renorm,
        )  # fmt: skip
        if renorm is not None and not torch.compiler.is_compiling():
            self.renorm_weights = self._weights()
        return output

    def _weights(self) -> dict[Tensor, int]:
        """Weight and bias with their versions, without computed ones. As keys, tensors equal only themselves."""
        return {t: t._version for t in (self.weight, self.bias) if t is not None and t.is_leaf and not t.is_inference()}

    def _in_torch(self, input: Tensor) -> Tensor:
        """`forward` in torch's operators, for programs that run without this package."""
        if self.training and (self.statistics == "renorm" or self.process_group):
            raise BNSurgeryError(
                f"export: {type(self).__name__}: torch's operators cannot train with statistics='renorm' or a process "
                "group: export in eval mode, or after set_statistics_(model, 'batch'), set_process_group_(model, None)"
            )
        if self.training and self.statistics == "running":
            output = nn.functional.batch_norm(input, **self._affine_and_statistics(), eps=self.eps)
        else:
            output = nn.modules.batchnorm._BatchNorm.forward(self, input)
        return output.relu() if self.activation == "relu" else output

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.statistics == "renorm" and not self.num_batches_tracked.is_meta:
            taken = max(int(self.num_batches_tracked) - self.renorm_start, 0)
            self.start_renorm_(taken, int(self.renorm_state[3, 0]))

    def start_renorm_(self, taken: int, steps: int) -> None:
        """Normalize by "renorm" from now on, as after the first `taken` of its training steps."""
        self.statistics, self.renorm_weights = "renorm", None
        self.renorm_start = int(self.num_batches_tracked) - taken
        self.register_buffer("renorm_state", schedule(self.running_mean, taken, steps), persistent=False)

    def reset_running_stats(self) -> None:
        """Torch's, which `torch.optim.swa_utils.update_bn` calls; refused if train mode needs the statistics."""
        if self.statistics != "batch":
            raise BNSurgeryError(
                f"reset_running_stats: with statistics={self.statistics!r} train mode needs the running statistics and "
                "does not measure them anew: use bnsurgery.recalibrate_, or set_statistics_(model, 'batch') first"
            )
        super().reset_running_stats()

    def extra_repr(self) -> str:
        """Torch's text, and the settings that torch's class does not have."""
        return ", ".join([super().extra_repr(), *self._beyond_torch("process_group")])

    @property
    def num_features(self) -> int:
        """Torch's; refused where a converter of norms would lose a setting.

        Code that replaces this norm by another (torch's `convert_sync_batchnorm`, timm's `freeze_batch_norm_2d`, loops
        over `isinstance(module, nn.BatchNorm2d)`) reads it, and copies only what torch's classes have.
        """
        if self._beyond_torch():
            raise BNSurgeryError(
                f"num_features: this {type(self).__name__} has {' and '.join(self._beyond_torch())}, which a converter "
                "of norms would drop. First call bnsurgery.unfuse_relu_(model), or set_statistics_(model, 'batch', "
                "where=lambda name, norm: True); to share statistics between processes use set_process_group_"
            )
        return int(vars(self)["num_features"])

    @num_features.setter
    def num_features(self, value: int) -> None:
        vars(self)["num_features"] = value  # torch's `extra_repr` reads it there

    def __dir__(self) -> list[str]:
        """The readable attributes, since torch.jit.trace reads all of them."""
        return [name for name in super().__dir__() if name != "num_features" or not self._beyond_torch()]

    def _beyond_torch(self, *more: str) -> list[str]:
        """Those settings that torch's classes do not have and that change the function, and `more`, in repr's form."""
        names = "activation", "statistics", *more
        return [f"{name}={getattr(self, name)!r}" for name in names if getattr(self, name) != getattr(Insertable, name)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Insertable":
        """Follow `.to()` and the like, but keep float32 under half precision and identity channels exact.

        Half precision would spoil the statistics, and torch's kernels take float32 parameters beside such an input. A
        cast between float32 and float64 changes the rounding, so exact identity channels are solved again.
        """

        def keep_precision(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            half = tensor.is_floating_point() and result.dtype in (torch.float16, torch.bfloat16)
            return tensor.to(result.device, torch.float32) if half else result

        old = {name: value.detach() for name, value in self._affine_and_statistics().items()}
        super()._apply(keep_precision, recurse)
        new = self._affine_and_statistics()
        dtypes = {tensors["weight"].dtype for tensors in (old, new)} if len(old) == 4 else set()
        if dtypes == {torch.float32, torch.float64} and not new["weight"].is_meta:
            scale, shift = kernel_scale_shift(**old, eps=self.eps)
            identity = (scale == 1) & (shift == 0)
            mean, var = (old[name].cpu().double().numpy()[identity] for name in ("running_mean", "running_var"))
            where = torch.from_numpy(identity).to(new["weight"].device)
            for name, values in identity_parameters(mean, var, self.eps, new["weight"].dtype).items():
                new[name].data[where] = values.to(where.device)
        return self

    def _affine_and_statistics(self) -> dict[str, Any]:
        tensors = {name: getattr(self, name) for name in ("running_mean", "running_var", "weight", "bias")}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _exporting() -> bool:
    """Whether torch.export or torch.jit.trace makes a program here, which has to run without this package.

    torch.compiler.is_exporting() does not exist in torch 2.6, and until 2.14 it is true wherever TorchDynamo runs.
    """
    if torch.compiler.is_dynamo_compiling():
        return torch._dynamo.config.do_not_emit_runtime_asserts  # set by torch.export(strict=True), not torch.compile
    return torch.compiler.is_compiling() or torch._C._is_tracing()


class BatchNorm1d(Insertable, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` for inputs (N, C) or (N, C, L), with an optional fused ReLU.

    y = (x − mean)/√(var + eps)·weight + bias per channel, then max(y, 0) with `activation="relu"`. Mean and
    (population) variance are the batch's in train mode and the running ones in eval mode; `set_statistics_` offers
    others, `set_process_group_` those of several processes. Other arguments, parameters, buffers and state dict are
    torch's; tensors stay float32 under `.half()` and `.bfloat16()`, and a cumulative average stays on the device.

    Args:
        activation: None, or "relu" to apply ReLU to the output in the same pass; also an attribute. Code that replaces
            this norm by another would drop it: see `num_features`.

    Raises:
        ValueError: unknown `activation`, wrong number of dimensions, or one value per channel in train mode.

    Examples:
        >>> norm = bnsurgery.nn.BatchNorm1d(3, activation="relu")
        >>> x = torch.randn(16, 3)
        >>> torch.equal(norm(x), nn.BatchNorm1d(3)(x).relu())
        True

    References: Ioffe & Szegedy 2015, arXiv:1502.03167, section 3.
    """


class LastDimBatchNorm1d(BatchNorm1d):
    """`BatchNorm1d` over the last dimension of (N, *, C), where `nn.Linear` puts its features; all others are samples.

    Raises:
        ValueError: as `BatchNorm1d`; the input has fewer than 2 dimensions.

    Examples:
        >>> bnsurgery.nn.LastDimBatchNorm1d(8)(torch.randn(4, 10, 8)).shape
        torch.Size([4, 10, 8])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input` of shape (N, *, C), then apply the fused activation. Same shape and dtype."""
        if input.dim() < 2:
            raise ValueError(f"expected an input (N, *, C), got {input.dim()} dimensions")
        return super().forward(input.flatten(0, -2)).view(input.shape)


class BatchNorm2d(Insertable, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, for (N, C, H, W), with an optional ReLU, `activation="relu"`: see `BatchNorm1d`.

    Examples:
        >>> bnsurgery.nn.BatchNorm2d(8, activation="relu")(torch.randn(2, 8, 5, 5)).min() >= 0
        tensor(True)
    """


class BatchNorm3d(Insertable, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`, for (N, C, D, H, W), with an optional ReLU, `activation="relu"`: see `BatchNorm1d`.

    Examples:
        >>> bnsurgery.nn.BatchNorm3d(8)(torch.randn(2, 8, 4, 5, 5)).shape
        torch.Size([2, 8, 4, 5, 5])
    """
