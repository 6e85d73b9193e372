"""What counts as a conv or dense layer, as a norm, as an activation and as LRN: modules and functions."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Layer = Conv | nn.Linear
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    FrozenBatchNorm2d,
)
NORM_FUNCTIONS = {F.batch_norm, F.instance_norm, F.layer_norm, F.group_norm, F.rms_norm}

# Dimensions of the output for a batch; the channels are the second, but the last of a dense layer's.
_NDIM = {
    nn.Linear: 2,
    nn.Conv1d: 3,
    nn.Conv2d: 4,
    nn.Conv3d: 5,
    nn.ConvTranspose1d: 3,
    nn.ConvTranspose2d: 4,
    nn.ConvTranspose3d: 5,
}
LAYER_FUNCTIONS = {
    F.linear: 2,
    F.conv1d: 3,
    F.conv2d: 4,
    F.conv3d: 5,
    F.conv_transpose1d: 3,
    F.conv_transpose2d: 4,
    F.conv_transpose3d: 5,
}
ACTIVATION_FUNCTIONS = {
    getattr(place, name)
    for place in (F, torch, Tensor)
    for name in (
        "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "prelu", "rrelu", "elu", "elu_", "selu", "celu", "gelu",
        "silu", "mish", "hardtanh", "hardswish", "hardsigmoid", "softplus", "softsign", "logsigmoid", "tanh", "tanh_",
        "sigmoid", "sigmoid_", "clamp", "clamp_",
    )
    if hasattr(place, name)
}  # fmt: skip


def batched_ndim(layer: nn.Module) -> int:
    """Dimensions of the layer's output for a batch: 2 for a dense one, 4 for a `Conv2d`."""
    return next(n for cls, n in _NDIM.items() if isinstance(layer, cls))


def is_activation(module: nn.Module | None) -> bool:
    """Whether `module` is one of torch's activation modules."""
    return type(module).__module__ == nn.ReLU.__module__ and not isinstance(module, (nn.MultiheadAttention, nn.GLU))


def device_and_dtype(layer: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a layer computes, by its first parameter."""
    first = next(layer.parameters())
    return first.device, first.dtype


def find_lrn(model: nn.Module) -> tuple[str, ...]:
    """Fqns of the `nn.LocalResponseNorm` layers."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, nn.LocalResponseNorm))
