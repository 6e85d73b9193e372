"""The parts of the recipe: what is trained, how much it decays, the rate at every step."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from .config import Config

_MOMENTUM = 0.9
_DROPOUT = 0.2
_RATE_AT_64 = {"sgd": 0.05, "adamw": 1e-3}
_LARGEST_RATE = {"sgd": 0.2, "adamw": 3e-3}
_DECAY = {"sgd": 1e-4, "adamw": 0.01}


def default_rate(config: Config) -> float:
    """The peak rate where none is given: in proportion to the batch, up to a limit."""
    return min(_RATE_AT_64[config.optimizer] * config.batch_size / 64, _LARGEST_RATE[config.optimizer])


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """The rate of step 0, 1, ..., steps − 1 as a share of the peak: a linear rise, then a half cosine to 0.

    References: Loshchilov & Hutter 2017, arXiv:1608.03983 (cosine); Goyal et al. 2017, arXiv:1706.02677 (warm-up).
    """
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def set_dropout_(model: nn.Module, probability: float | None) -> None:
    """Set every Dropout module; None lowers those above 0.2, for BN regularizes too (Ioffe & Szegedy 2015, 4.2.1)."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = min(module.p, _DROPOUT) if probability is None else probability


def choose_parameters_(model: nn.Module, train: str, head: nn.Module) -> None:
    """Let only those parameters take a gradient that `Config.train` names."""
    norms = [p for module in model.modules() if isinstance(module, _BatchNorm) for p in module.parameters()]
    chosen = {id(p) for p in (model.parameters() if train == "all" else [])}
    chosen |= {id(p) for p in (norms if "bn" in train else [])}
    chosen |= {id(p) for p in (head.parameters() if "head" in train else [])}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)


def optimizer(config: Config, model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """SGD or AdamW over what takes a gradient, in two groups: weights decay; biases and BatchNorm do not.

    Behind a BatchNorm the scale of a weight does not matter and decay only raises its effective rate, while decaying
    weight and bias of the norm itself pulls the function towards zero (He et al. 2019, arXiv:1812.01187, section 3.1).
    """
    norms = {id(p) for module in model.modules() if isinstance(module, _BatchNorm) for p in module.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    decaying = [p for p in trained if id(p) not in norms and p.ndim > 1]
    other = [p for p in trained if id(p) in norms or p.ndim <= 1]
    decay = _DECAY[config.optimizer] if config.weight_decay is None else config.weight_decay
    groups: list[dict[str, Any]] = [{"params": decaying, "weight_decay": decay}, {"params": other, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate)
    return torch.optim.SGD(groups, lr=rate, momentum=_MOMENTUM, nesterov=True)


def set_rate_(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class HeadConditioner:
    """Lets SGD train a head as if its input were standardized, without changing the head.

    Every layer but the head has a BatchNorm behind it, so that neither mean nor scale of its input matter. The head's
    input has those of the pretrained network, such as a mean of 5 and a deviation of 2 in every feature, and that sets
    the largest rate at which the whole network trains. With x̂ = (x − m)/s the head computes V·x̂ + c, where V = W·s
    and c = b + W·m. A step of SGD on V and c is one on W and b with the gradients

        G_W' = (G_W − g_b·mᵀ)/s²    and    g_b' = g_b − G_W'·m,

    which is a fixed linear map, so momentum carries over, too. s² is the mean variance over the features, but at
    least 1: the rate is only ever lowered, since features that hardly vary at first may grow in training.

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
        """Change the gradients, between backward pass and step."""
        assert self._head.bias is not None
        weight, bias = self._head.weight.grad, self._head.bias.grad
        assert weight is not None and bias is not None
        mean = self.mean.view(self._shape)
        weight.sub_(bias.view(-1, *[1] * (weight.ndim - 1)) * mean).div_(self.variance)
        bias.sub_((weight * mean).flatten(1).sum(1))

    @staticmethod
    def suits(config: Config, head: nn.Module) -> bool:
        """Whether it applies: SGD (Adam scales by itself), and a head in training that has a bias."""
        bias = getattr(head, "bias", None)
        trained = isinstance(bias, nn.Parameter) and bias.requires_grad and getattr(head, "groups", 1) == 1
        return config.optimizer == "sgd" and trained


@torch.no_grad()
def average_(average: Iterable[Tensor], parameters: Iterable[Tensor], decay: float) -> None:
    """Average ← decay·average + (1 − decay)·parameter, in place."""
    torch._foreach_lerp_(list(average), [p.detach() for p in parameters], 1 - decay)
