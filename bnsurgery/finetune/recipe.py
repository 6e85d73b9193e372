"""The parts of the recipe: augmentation, parameters, decay, learning rate, dropout, loss, head's gradients."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torchvision.transforms import v2

from bnsurgery.images.preprocessing import Preprocessing

from .config import Config

_CROP_AREA = (0.35, 1.0)  # of the photograph; from-scratch training takes from 0.08, which is harsh on a fine-tune

_MOMENTUM = 0.9
_DROPOUT = 0.2
_RATE_AT_64 = {"sgd": 0.05, "adamw": 1e-3}
_LARGEST_RATE = {"sgd": 0.2, "adamw": 3e-3}
_DECAY = {"sgd": 1e-4, "adamw": 0.01}


def augmentation(preprocessing: Preprocessing, kind: str) -> Callable[[Any], Any]:
    """The way of a training image to the network's input, with the augmentation `kind` of `Config.augment`."""
    size = height, width = preprocessing.shape[1:]
    resize, flip = v2.Resize(size), v2.RandomHorizontalFlip()
    shift = v2.RandomCrop(size, padding=[max(1, width // 8), max(1, height // 8)], padding_mode="edge")
    zoom = v2.RandomResizedCrop(size, scale=_CROP_AREA)
    steps: dict[str, list[v2.Transform]] = {
        "none": [],
        "crop": [resize, shift],
        "crop-flip": [resize, shift, flip],
        "resized-crop": [zoom, flip],
        "trivial": [zoom, flip, v2.TrivialAugmentWide()],
    }
    return preprocessing.transform(*steps[kind]) if steps[kind] else preprocessing


def default_rate(config: Config) -> float:
    """The default peak rate: proportional to the batch size, up to a limit."""
    return min(_RATE_AT_64[config.optimizer] * config.batch_size / 64, _LARGEST_RATE[config.optimizer])


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """The rate of a step, 0 to steps − 1, as a share of the peak: a linear rise, then a half cosine to 0.

    References: Loshchilov & Hutter 2017, arXiv:1608.03983 (cosine); Goyal et al. 2017, arXiv:1706.02677 (warm-up).
    """
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def set_dropout_(model: nn.Module, probability: float | None) -> None:
    """Set every Dropout module; None lowers those above 0.2, since BN regularizes too (Ioffe & Szegedy 2015, 4.2.1)."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = min(module.p, _DROPOUT) if probability is None else probability


def choose_parameters_(model: nn.Module, train: str, head: nn.Module) -> list[str]:
    """Let only the parameters that `train` names take a gradient; return the names of those that took none before."""
    frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    model.requires_grad_(train == "all")
    for module in model.modules():
        if (isinstance(module, _BatchNorm) and "bn" in train) or (module is head and "head" in train):
            module.requires_grad_()
    return [name for name, parameter in frozen.items() if parameter.requires_grad]


def optimizer(config: Config, model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """SGD or AdamW over the parameters that take a gradient; weights decay, biases and BatchNorm do not.

    The scale of a weight before a BatchNorm does not matter, so decay only raises its effective rate; decay of the
    norm's own weight and bias pulls the function towards zero (He et al. 2019, arXiv:1812.01187, section 3.1).
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    decay = _DECAY[config.optimizer] if config.weight_decay is None else config.weight_decay
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},  # biases and all of BatchNorm
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate)
    return torch.optim.SGD(groups, lr=rate, momentum=_MOMENTUM, nesterov=True)


class Objective(nn.Module):
    """Network and loss in one module, which is compiled, distributed and cast as a whole."""

    def __init__(self, network: nn.Module, label_smoothing: float) -> None:
        super().__init__()
        self.network = network
        self.label_smoothing = label_smoothing

    def forward(self, labels: Tensor, /, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The mean loss and the accuracy, 0 to 1; further arguments are the network's."""
        logits = self.network(*args, **kwargs)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return loss, (logits.detach().argmax(1) == labels).float().mean()


class HeadConditioner:
    """Lets SGD train a head as if its input were standardized, without changing the head.

    Every layer but the head is followed by a BatchNorm, so that mean and scale of its input do not matter. The head's
    input has those of the pretrained network, such as a mean of 5 and a deviation of 2 in every feature, which limits
    the rate of the whole network. With x̂ = (x − m)/s the head computes V·x̂ + c, where V = W·s and c = b + W·m. A step
    of SGD on V and c equals one on W and b with the gradients

        G_W' = (G_W − g_b·mᵀ)/s²    and    g_b' = g_b − G_W'·m.

    This map is linear and fixed, so momentum carries over. s² is the mean variance over the features, but at least 1:
    the rate is only ever lowered, since features that hardly vary at first may grow in training.

    Args:
        head: a dense or conv layer; for a conv, m is per input channel.
        mean: m, of the head's input on the training data, shape (features,).
        variance: of the head's input, mean over the features, 0-dim.
    """

    def __init__(self, head: nn.Linear | nn.modules.conv._ConvNd, mean: Tensor, variance: Tensor) -> None:
        self._head = head
        self._shape = (1, -1, *[1] * (head.weight.ndim - 2))
        self.mean, self.variance = (tensor.to(head.weight) for tensor in (mean, variance.clamp_min(1.0)))

    @torch.no_grad()
    def apply_(self) -> None:
        """Change the gradients, between backward pass and optimizer step."""
        assert self._head.bias is not None
        weight, bias = self._head.weight.grad, self._head.bias.grad
        assert weight is not None and bias is not None
        mean = self.mean.view(self._shape)
        weight.sub_(bias.view(-1, *[1] * (weight.ndim - 1)) * mean).div_(self.variance)
        bias.sub_((weight * mean).flatten(1).sum(1))

    @staticmethod
    def suits(config: Config, head: nn.Module) -> bool:
        """Whether it applies: the optimizer is SGD (Adam scales by itself), and the head is trained and has a bias."""
        bias = getattr(head, "bias", None)
        trained = isinstance(bias, nn.Parameter) and bias.requires_grad and getattr(head, "groups", 1) == 1
        return config.optimizer == "sgd" and trained
