"""The learning-rate range test: raise the rate step by step on a copy, and see where the loss falls and breaks."""

import itertools
import math
from dataclasses import dataclass

from accelerate.utils import broadcast_object_list

from bnsurgery.copies import independent
from bnsurgery.errors import BNSurgeryError
from bnsurgery.nn.batchnorm import Insertable

from . import recipe
from .loop import Objective, moved
from .setup import Setup, forked_random
from .streams import training

_FROM, _TO, _STEPS = 1e-5, 10.0, 100
_SMOOTHING = 0.9
_BROKEN = 3.0  # times the lowest loss: it has diverged
_MARGIN = 4.0  # below the rate of the lowest loss, where it is about to rise


@dataclass(frozen=True)
class RateRange:
    """Smoothed losses by rate, and the peak rate that follows from them."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    chosen: float


def find_rate(setup: Setup) -> RateRange:
    """The test, on process 0 with whole batches; the network, and everything random, are left as they were.

    The rate rises geometrically from 1e-5 to 10 within 100 steps, over batches that training does not see in this
    order; the test ends where the smoothed loss triples. Chosen: a quarter of the rate at the lowest loss.

    Raises:
        BNSurgeryError: the loss is not finite from the start.

    References: Smith 2017, "Cyclical learning rates", arXiv:1506.01186, section 3.3.
    """
    found: list[RateRange | None] = [None]
    if setup.accelerator.is_main_process:
        with forked_random(setup.accelerator):
            found = [_test(setup)]
    broadcast_object_list(found)
    assert found[0] is not None
    return found[0]


def _test(setup: Setup) -> RateRange:
    config, accelerator = setup.config, setup.accelerator
    network, conditioner = independent((setup.network, setup.conditioner))  # the copies belong together
    network.train()
    for module in network.modules():
        if isinstance(module, Insertable):
            module.process_group = ""  # the other processes wait
    objective = Objective(network, config.label_smoothing)
    optimizer = recipe.optimizer(config, network, _FROM)
    batches, loader = training(
        setup.prepared, config.batch_size, config.seed, setup.train.workers, pinned=setup.train.pinned
    )
    batches.epoch = config.epochs  # an order that training does not come to
    endless = itertools.chain.from_iterable(itertools.repeat(loader))
    rates: list[float] = []
    losses: list[float] = []
    average = 0.0
    for step, batch in enumerate(itertools.islice(endless, _STEPS)):
        rate = _FROM * (_TO / _FROM) ** (step / (_STEPS - 1))
        recipe.set_rate_(optimizer, rate)
        with accelerator.autocast():
            inputs, labels = moved(network, batch, accelerator.device)
            loss, _ = objective(labels, *inputs.args, **inputs.kwargs)
        average = _SMOOTHING * average + (1 - _SMOOTHING) * loss.item()
        smoothed = average / (1 - _SMOOTHING ** (step + 1))
        if not math.isfinite(smoothed) or (losses and smoothed > _BROKEN * min(losses)):
            break
        rates.append(rate)
        losses.append(smoothed)
        loss.backward()
        if conditioner is not None:
            conditioner.apply_()
        optimizer.step()
        optimizer.zero_grad()
    if not losses:
        raise BNSurgeryError("finetune: --lr auto: the loss is no finite number from the start")
    return RateRange(tuple(rates), tuple(losses), rates[losses.index(min(losses))] / _MARGIN)
