"""Is the pretrained function of use to a task? Measured by heads that are fitted with it and without it."""

import copy
import math
from collections.abc import Sequence

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
from .setup import EVALUATED_TOGETHER, Setup
from .task_kind import TaskKind

_IMAGES = 512  # to fit on and to measure on, each; to fit on 20 a class where that is more


def measure(setup: Setup) -> TaskKind | str:
    """Measure a run of the arm "bn" before its first step; or say why no head can be fitted.

    Every process fits on the same 512 training images, or 20 a class, drawn evenly over the classes. Together they
    measure on about 512 validation images. The run's network and random numbers stay as they are.
    """
    images = max(_IMAGES, 20 * outputs_of(setup.network.get_submodule(setup.head)))
    whole = setup.reader._replace(rank=0, world=1)
    fitted_on = evaluation(setup.prepared, EVALUATED_TOGETHER, whole, images=images, evenly=True)
    networks = []
    with keeping_random(setup.accelerator.device):
        for naive in (False, True):
            network = copy.deepcopy(setup.network)
            set_statistics_(network, "batch", where=lambda name, norm: True)  # which allows a reset
            if naive:
                forget_(network)
                recalibrate_(network, fitted_on)
            refusal = fit_head_(network, fitted_on, network.get_submodule(setup.head)).refusal
            if refusal is not None:
                return refusal
            networks.append(network)
        seen, kept, fresh, alone = _counts(networks, setup)
    error = math.sqrt(alone + 1 - (kept - fresh) ** 2 / (seen + 2)) / (seen + 2)
    return TaskKind(kept / seen, fresh / seen, seen, error)


def _counts(networks: Sequence[nn.Module], setup: Setup) -> list[int]:
    """The first validation images, over all processes: seen, right in each network, right in one of the two alone."""
    counts = torch.zeros(4, dtype=torch.long)
    with observing(networks[0]), observing(networks[1]):
        for batch in setup.val:
            labels = batch[1].cpu()
            kept, fresh = (run("finetune", each, Inputs.of(batch)).argmax(1).cpu() == labels for each in networks)
            counts += torch.stack([torch.ones_like(kept), kept, fresh, kept != fresh]).sum(1)
            if counts[0] * setup.accelerator.num_processes >= _IMAGES:
                break
    found: list[int] = setup.accelerator.reduce(counts.to(setup.accelerator.device), "sum").cpu().tolist()
    return found
