"""Channels that are nearly constant on the data: which ones are, and the warning of them."""

import warnings
from collections.abc import Mapping

from torch import Tensor

from bnsurgery.errors import BNSurgeryWarning
from bnsurgery.text.words import counted


def is_dead(variance: Tensor, eps: float) -> Tensor:
    """By channel: σ² < eps, the norm's. Such a channel is nearly constant on the data."""
    return variance.cpu().double() < eps


def warn_of_dead_channels(variances: Mapping[str, Tensor], eps: float) -> None:
    """Warn of the dead channels of these sites: train-mode BN amplifies their small differences."""
    dead = {name: count for name, variance in variances.items() if (count := int(is_dead(variance, eps).sum()))}
    if dead:
        worst = sorted(dead, key=lambda name: -dead[name])[:3]
        listed = ", ".join(f"'{name}' {dead[name]} of {len(variances[name])}" for name in worst)
        warnings.warn(
            f"channels with a variance below eps ({eps:g}) on this data, dead or nearly: {sum(dead.values())} in "
            f"{counted(len(dead), 'layer')}, most in {listed}. They stay exact; training may amplify them.",
            BNSurgeryWarning,
            stacklevel=3,
        )
