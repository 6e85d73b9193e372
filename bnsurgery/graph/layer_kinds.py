"""Which modules and functions are conv or dense layers, norms, activations and LRN."""

from torch import nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Layer = Conv | nn.Linear
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, FrozenBatchNorm2d)
NORM_FUNCTIONS = {F.batch_norm, F.instance_norm, F.layer_norm, F.group_norm, F.rms_norm}

# Dimensions of the output for a batch. The channels are dimension 1, or the last one behind a dense layer.
_NDIM: dict[type, int] = {nn.Linear: 2}
_NDIM |= {getattr(nn, f"Conv{kind}{d}d"): 2 + d for kind in ("", "Transpose") for d in (1, 2, 3)}
LAYER_FUNCTIONS = {F.linear: 2}
LAYER_FUNCTIONS |= {getattr(F, f"conv{kind}{d}d"): 2 + d for kind in ("", "_transpose") for d in (1, 2, 3)}
# The names of functions and methods. F.logsigmoid calls itself log_sigmoid.
ACTIVATION_FUNCTIONS = {
    "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "prelu", "rrelu", "elu", "elu_", "selu", "celu", "gelu",
    "silu", "mish", "hardtanh", "hardswish", "hardsigmoid", "softplus", "softsign", "log_sigmoid", "tanh", "tanh_",
    "sigmoid", "sigmoid_", "clamp", "clamp_",
}  # fmt: skip


def batched_ndim(layer: nn.Module) -> int:
    """Dimensions of the layer's output for a batch: 2 for a dense one, 4 for a `Conv2d`."""
    return next(n for cls, n in _NDIM.items() if isinstance(layer, cls))


def is_activation(module: nn.Module | None) -> bool:
    """Whether `module` is one of torch's activation modules."""
    return type(module).__module__ == nn.ReLU.__module__ and not isinstance(module, (nn.MultiheadAttention, nn.GLU))


def find_lrn(model: nn.Module) -> tuple[str, ...]:
    """Fqns of the `nn.LocalResponseNorm` layers."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, nn.LocalResponseNorm))
