"""Is the pretrained function of use to a task? Measured by heads that are fitted with it and without it."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from bnsurgery.machine.devices import keeping_random
from bnsurgery.nn import set_statistics_
from bnsurgery.running.batches import Inputs
from bnsurgery.running.calls import run
from bnsurgery.running.modes import observing
from bnsurgery.statistics.calibration import recalibrate_
from bnsurgery.surgery.heads import outputs_of

from .head_fit import fit_head_
from .loading import evaluation
from .network import forget_
from .results import TaskKind
from .setup import EVALUATED_TOGETHER, Setup

_IMAGES = 512  # to fit on and to measure on, each; to fit on 20 a class where that is more


def measure(setup: Setup) -> TaskKind | None:
    """Measure a run of the arm "bn" before its first step; None if no head can be fitted.

    Every process fits on the same 512 training images, or 20 a class, and measures on about 512 of its validation
    images. The run's network and random numbers stay as they are.
    """
    images = max(_IMAGES, 20 * outputs_of(setup.network.get_submodule(setup.head)))
    fitted_on = evaluation(setup.prepared, EVALUATED_TOGETHER, setup.reader._replace(rank=0, world=1), images=images)
    accuracies = []
    with keeping_random(setup.accelerator.device):
        for fresh in (False, True):
            network = copy.deepcopy(setup.network)
            set_statistics_(network, "batch", where=lambda name, norm: True)  # which allows a reset
            if fresh:
                forget_(network)
                recalibrate_(network, fitted_on)
            if fit_head_(network, fitted_on, network.get_submodule(setup.head)).refusal is not None:
                return None
            accuracies.append(_accuracy(network, setup.val))
    return TaskKind(*accuracies)


@torch.no_grad()
def _accuracy(network: nn.Module, batches: Iterable[Any]) -> float:
    """On the first images of `batches`."""
    right = seen = 0
    with observing(network):
        for batch in batches:
            chosen = run("finetune", network, Inputs.of(batch)).argmax(1).cpu()
            right += int((chosen == batch[1].cpu()).sum())
            seen += len(chosen)
            if seen >= _IMAGES:
                break
    return right / seen
