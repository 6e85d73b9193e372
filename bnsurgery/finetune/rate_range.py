"""The learning-rate range test: raise the rate step by step on a copy, and find where the loss is lowest."""

import itertools
from collections.abc import Sequence

import numpy as np
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from bnsurgery.errors import BNSurgeryError
from bnsurgery.machine.devices import keeping_random
from bnsurgery.nn.batchnorm import Insertable
from bnsurgery.surgery.copies import independent

from . import recipe
from .loading import moved, training
from .results import RateRange
from .setup import Setup

_FROM, _TO, _STEPS = 1e-5, 10.0, 100
_BELL = 3.0  # steps, the standard deviation of the smoothing kernel: a factor of 1.5 in the rate
_REACH = 6  # steps, two standard deviations
_RISE = 0.3  # of ln(loss): a third
_CLEAR = 2.0  # standard deviations of single losses from the curve: more than chance
_LEAST = 1e-12  # a loss of 0 has no logarithm


def find_rate(setup: Setup, show: bool = False) -> RateRange:
    """Run the test, on process 0 with whole batches, and `choose` the rate; network and random numbers stay the same.

    The rate rises geometrically from 1e-5 to 10 within 100 steps, which are otherwise those of training, over batches
    in an order that training does not use. The test ends once the loss has risen again or is not finite.

    References: Smith 2017, "Cyclical learning rates", arXiv:1506.01186, section 3.3.
    """
    found = None
    if setup.accelerator.is_main_process:
        with keeping_random(setup.accelerator.device):
            found = choose(*_test(setup, show), recipe.default_rate(setup.config))
    return broadcast_object_list([found])[0]


def choose(rates: Sequence[float], losses: Sequence[float], default: float) -> RateRange:
    """Choose the peak rate: the lowest rate at which the loss is about as low as anywhere.

    The curve is ln(loss), smoothed by a symmetric kernel, so that it does not lag like a running mean, and a loss of
    10^9 at the end does not matter. The lowest point is searched up to where the curve has risen by more than a third
    and by twice the scatter of single losses about it: a collapsed network at still higher rates is not of interest.
    In a wide valley the lowest point can be anywhere, so the rate is taken from the valley's lower end: the first point
    that is above the lowest by at most half the scatter.

    If the lowest point is at the end of the test, or the curve falls by less than twice the scatter, `default` is
    chosen. `rates` rise geometrically, and `losses` are those of single batches.

    References: Smith 2017, as above, for the loss that stops falling as the upper bound of the rate. fastai's finder
    takes a tenth of the rate of the lowest loss, but of a running mean, which lags.
    """
    curve, low, scatter, broke = _read(losses)
    floor = int((curve <= curve[low] + scatter / 2).argmax())
    if curve[0] - curve[low] <= _CLEAR * scatter:
        chosen, why = default, "the loss falls at no rate, so the default"
    elif not broke and low >= len(curve) - _REACH:
        chosen, why = default, f"the loss falls up to the last rate tried, {rates[-1]:.2g}, so the default"
    else:
        chosen, why = rates[floor], f"the loss is lowest from {rates[floor]:.2g} to {rates[low]:.2g}"
    return RateRange(tuple(rates), tuple(losses), tuple(np.exp(curve).tolist()), chosen, f"range test: {why}")


def _read(losses: Sequence[float]) -> tuple[NDArray[np.float64], int, float, bool]:
    """The curve; its lowest point before it broke; the losses' standard deviation from it up to there; if it broke."""
    values, at = np.log(np.maximum(losses, _LEAST)), np.arange(len(losses))
    weights = np.exp(-0.5 * ((at[:, None] - at) / _BELL) ** 2)
    curve = weights @ values / weights.sum(1)
    apart = values - curve
    low = 0
    for step in range(_REACH, len(curve) - _REACH):  # the kernel covers only one side of the others
        if low == 0 or curve[step] <= curve[low]:
            low = step
        elif curve[step] - curve[low] > max(_RISE, _CLEAR * apart[: step + _REACH].std()):
            return curve, low, float(apart[: low + _REACH].std()), True
    low = int(curve.argmin())
    return curve, low, float(apart[: low + _REACH].std()), False


def _test(setup: Setup, show: bool) -> tuple[list[float], list[float]]:
    config, accelerator = setup.config, setup.accelerator
    network, conditioner = independent((setup.network, setup.conditioner))  # the copies belong together
    network.train()
    for module in network.modules():
        if isinstance(module, Insertable):
            module.process_group = ""  # the other processes wait
    objective = recipe.Objective(network, config.label_smoothing)
    optimizer = recipe.optimizer(config, network, _FROM)
    trained = [p for p in network.parameters() if p.requires_grad]
    whole = setup.reader._replace(rank=0, world=1)
    batches, loader = training(setup.prepared, config.batch_size, config.seed, whole)
    batches.epoch = config.epochs  # an order that training does not use
    endless = itertools.chain.from_iterable(itertools.repeat(loader))
    rates: list[float] = []
    losses: list[float] = []
    disable = None if show else True  # None: unless stderr is a terminal
    with tqdm(total=_STEPS, desc="range test", unit="step", disable=disable, leave=False) as bar:
        for step, batch in enumerate(itertools.islice(endless, _STEPS)):
            rate = _FROM * (_TO / _FROM) ** (step / (_STEPS - 1))
            for group in optimizer.param_groups:
                group["lr"] = rate
            with accelerator.autocast():
                inputs, labels = moved(network, batch, accelerator.device)
                loss, _ = objective(labels, *inputs.args, **inputs.kwargs)
            if not loss.isfinite():
                break
            rates.append(rate)
            losses.append(loss.item())
            if _read(losses)[3]:
                break
            loss.backward()
            if conditioner is not None:
                conditioner.apply_()
            if config.clip:
                clip_grad_norm_(trained, config.clip)
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix(rate=f"{rate:.2g}", loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
    if not losses:
        raise BNSurgeryError("finetune: `lr='auto'`: the first loss is not finite")
    return rates, losses
