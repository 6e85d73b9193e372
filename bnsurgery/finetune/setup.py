"""What has to be there before the first step: processes, data, network, and what "auto" comes to."""

import importlib.util
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bnsurgery.errors import BNSurgeryError, DataError
from bnsurgery.images.decoding import told_of
from bnsurgery.machine import devices
from bnsurgery.networks import factories
from bnsurgery.nn import set_process_group_, set_statistics_
from bnsurgery.running.batches import Inputs
from bnsurgery.running.calls import run
from bnsurgery.running.modes import observing
from bnsurgery.statistics.calibration import input_moments, recalibrate_
from bnsurgery.statistics.verification import DRIFT_SAMPLES, verify
from bnsurgery.surgery.heads import find_head
from bnsurgery.text.words import counted, thousands, with_article

from . import recipe
from .config import Config
from .datasets import Data, open_data
from .head_fit import fit_head_
from .loading import Loader, Prepared, TrainBatches, default_workers
from .network import Source, choose_statistics, find, forget_, fuse_for_training_, given, keeps_head, prepare, task_of
from .own_data import open_own
from .results import Resolved
from .streams import Share, Stream, evaluation, training
from .streams import source as as_taken

if TYPE_CHECKING:
    from accelerate import Accelerator

_DEVICE = "ACCELERATE_TORCH_DEVICE"
EVALUATED_TOGETHER = 32  # at least: without gradients there is room, and statistics want more than a few images


@dataclass
class Setup:
    """A run, ready to start.

    Attributes:
        network: on its device, without wrappers; what is trained takes a gradient.
        conditioner: of the head's gradients.
        facts: lines that say what was found and chosen.
        batches, train: this rank's share of the augmented training batches, and the loader that follows it.
        calibration: this rank's share of training images, without augmentation.
        val: this rank's share of the validation images.
    """

    config: Config
    accelerator: "Accelerator"
    network: nn.Module
    conditioner: recipe.HeadConditioner | None
    resolved: Resolved
    facts: list[str]
    prepared: Prepared | Stream
    batches: TrainBatches | Share
    train: Loader | Share
    calibration: Loader | Share
    val: Loader | Share

    @property
    def recalibrates(self) -> bool:
        """Whether the network to keep gets population statistics; frozen ones are what was trained with."""
        return self.config.arm != "plain" and self.resolved.statistics != "running"


def processes(config: Config) -> "Accelerator":
    """Hugging Face's Accelerate: one process, or those that torchrun or accelerate launch started.

    Raises:
        BNSurgeryError: it is not installed, this process was set up for another precision or device before, or there
            is no such device.
    """
    for needed in ("accelerate", "tensorboard", "matplotlib", "psutil"):  # the last three before hours of training
        if importlib.util.find_spec(needed) is None:
            raise BNSurgeryError(f"finetune: needs {needed}, which is not installed: pip install 'bnsurgery[finetune]'")
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import patch_environment

    place = computes_on(config)
    try:
        # The only way to tell Accelerate; of launched processes, launchers say which each has.
        with patch_environment(**({} if _launched() else {_DEVICE: str(place)})):
            accelerator = Accelerator(
                cpu=place.type == "cpu",  # or it looks for a GPU, with no group
                mixed_precision=_precision(config, place),
                dynamo_backend="inductor" if config.compile else "no",
                # Every rank computes the same statistics: there is nothing to send.
                kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
            )
    except ValueError as error:
        raise BNSurgeryError(f"finetune: {str(error).splitlines()[0]}") from error
    got = accelerator.device
    if got.type != place.type or (place.index is not None and place.index != (got.index or 0)):
        each = f"its launcher gave this process {got}: name the kind alone, such as cuda, which shares them out"
        why = each if _launched() else f"this process computes on {got} already: start another"
        raise BNSurgeryError(f"finetune: --device {place}: {why}")
    if place.index:  # the current one too, or what is pinned for it would go by way of the first
        torch.get_device_module(place).set_device(place)
    return accelerator


def _launched() -> bool:
    """Whether torchrun or accelerate launch started this process."""
    return "LOCAL_RANK" in os.environ


def computes_on(config: Config) -> torch.device:
    """The device that `config` names, or Accelerate's environment; of a launched process, its kind.

    Raises:
        BNSurgeryError: there is none.
    """
    from accelerate.utils import parse_flag_from_env

    name = os.environ.get(_DEVICE) if config.device == "auto" else config.device
    if name is None:
        return devices.CPU if parse_flag_from_env("ACCELERATE_USE_CPU") else devices.automatic()
    return devices.device(name)


def forked_random(accelerator: "Accelerator") -> AbstractContextManager[None]:
    """Torch's random numbers, on the CPU and the run's device, are afterwards what they were."""
    return devices.keeping_random(accelerator.device)


def load_data(config: Config, show: bool = False) -> Data:
    """The images that `config` names.

    Raises:
        DataError: see `open_data` and `open_own`.
    """
    return (open_own if factories.names_code(config.data) else open_data)(config, show)


def build(
    config: Config,
    accelerator: "Accelerator",
    model: nn.Module | None,
    data: Data,
    resolved: Resolved | None,
    show: bool,
) -> Setup:
    """Everything up to the first step.

    Args:
        model: instead of the one that `config` names; copied.
        resolved: what "auto" came to, where a run is resumed.
        show: print what happens.

    Raises:
        BNSurgeryError: see `run`.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    _check_sizes(config, data, world)
    source = find(config) if model is None else given(model)
    task = task_of(source, data, config)
    source.model.to(accelerator.device)

    workers = default_workers() if config.num_workers is None else config.num_workers
    augment = data.augment if config.augment == "auto" else config.augment
    prepared = as_taken(data.train, task, augment, config.seed)
    pinned = accelerator.device.type == "cuda"
    batches, train = training(prepared, config.batch_size, config.seed, workers, rank=rank, world=world, pinned=pinned)
    share: dict[str, Any] = {
        "rank": rank,
        "world": world,
        "workers": workers,
        "batch_size": max(EVALUATED_TOGETHER, config.batch_size // world),
        "pinned": pinned,
    }
    calibration = evaluation(prepared, images=config.recalibrate, **share)
    val = evaluation(as_taken(data.val, task, "none", 0), **share)

    shape = data.examples[0] if task.preprocessing is None else task.preprocessing.shape
    kept, why = keeps_head(source, shape, data.classes, config)
    network, head = prepare(source, task, config, calibration, show, *data.examples[:1])
    recipe.set_dropout_(network, config.dropout)
    recipe.choose_parameters_(network, config.train, head)
    for example in data.examples or [Inputs((torch.zeros(2, *shape),))]:  # type: ignore[misc]
        _check_network(config, network, example, len(data.classes))
    if resolved is None:
        resolved = _resolve(config, network, prepared)
    if config.arm == "bn-naive":
        forget_(network)
        recalibrate_(network, calibration)  # every layer sees something else now
    if not resolved.head:
        made = "" if kept else _fit_head_(config, network, head, prepared, share)
        resolved = replace(resolved, head=f"{'kept' if kept else 'new'}: {why}{made}")
    conditioner = None
    if recipe.HeadConditioner.suits(config, head):
        seen = input_moments(network, find_head(network, shape), calibration)
        conditioner = recipe.HeadConditioner(head, seen.mean, seen.variance.mean())  # type: ignore[arg-type]
    if config.arm != "plain":
        # The schedule ends with the run: the network has come to live with plain BN by then, where batches allow it.
        set_statistics_(network, resolved.statistics, renorm_steps=config.epochs * batches.per_epoch)  # type: ignore[arg-type]
        if world > 1:
            set_process_group_(network, torch.distributed.group.WORLD)
    fuse_for_training_(network, accelerator.device)
    if config.channels_last:
        for parameter in network.parameters():  # those of Conv2d: Module.to refuses a Conv3d's
            if parameter.ndim == 4:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)
    return Setup(
        config=config,
        accelerator=accelerator,
        network=network,
        conditioner=conditioner,
        resolved=resolved,
        facts=_facts(config, source, data, resolved, batches.left_over),
        prepared=prepared,
        batches=batches,
        train=train,
        calibration=calibration,
        val=val,
    )


def _resolve(config: Config, network: nn.Module, prepared: Prepared | Stream) -> Resolved:
    size = config.batch_size

    def drift() -> float:
        loader = evaluation(prepared, size, 0, images=max(DRIFT_SAMPLES, size))
        found = verify(network, network, loader, drift_batch_sizes=(size,))
        if found.no_drift is not None:
            raise BNSurgeryError(f"finetune: no drift to choose by: {found.no_drift}. Pass --statistics.")
        return found.train_drift[size]

    statistics, reason = choose_statistics(config, drift)
    if config.lr in (None, "auto"):
        return Resolved(recipe.default_rate(config), statistics, reason, f"the default for a batch of {size}", head="")
    return Resolved(float(config.lr), statistics, reason, "as asked", head="")


def _fit_head_(
    config: Config, network: nn.Module, head: nn.Module, prepared: Prepared | Stream, share: dict[str, Any]
) -> str:
    """Give a new head its first weights, and say how. Every process fits the same one, on all training images.

    In every arm the features are those of eval mode, which validation sees: the inserted network's are the original's
    to the bit, and the naive one's go by the population statistics that it was just given.
    """
    if config.head_init == "random":
        return "; random"
    found = fit_head_(network, evaluation(prepared, **{**share, "rank": 0, "world": 1}), head)
    return f"; {'' if found.refusal is None else 'random, '}{found}"


def _facts(config: Config, source: Source, data: Data, resolved: Resolved, left: int) -> list[str]:
    facts = [
        f"network      {source.description}",
        f"data         {data.description}: {thousands(len(data.train))} training and "
        f"{counted(len(data.val), f'validation {data.thing}')}, {len(data.classes)} classes",
        f"head         {resolved.head}",
    ]
    if left:
        others = "" if isinstance(data.train, Stream) else ", others every time"
        facts.append(f"left out     {counted(left, data.thing)} in each epoch{others}: too few for a batch")
    if data.skipped:
        facts.append(f"left out     {counted(len(data.skipped), 'damaged image')}, the first: {data.skipped[0]}")
    if data.passed_over:
        facts.append(f"left out     {told_of(data.passed_over, 'no images by name or in no class folder')}")
    if config.arm != "plain":
        facts.append(f"statistics   {resolved.statistics}: {resolved.reason}")
    return facts


def _check_sizes(config: Config, data: Data, world: int) -> None:
    images, own = len(data.train), isinstance(data.train, Stream)
    if own and config.batch_size < world:
        raise DataError(
            f"finetune: batches of at most {config.batch_size} cannot be shared by {world} processes: make them larger"
        )
    if config.batch_size > images:
        raise DataError(
            f"finetune: a batch of {config.batch_size} is more than the {images} training {data.thing}s: "
            f"pass --batch-size {images} or less"
        )
    if config.batch_size % world and not own:
        raise BNSurgeryError(
            f"finetune: a batch of {config.batch_size} cannot be shared evenly by {world} processes: "
            f"pass --batch-size {world * max(1, config.batch_size // world)}"
        )
    if config.batch_size == 1 and config.arm != "plain" and config.statistics not in ("auto", "running"):
        raise BNSurgeryError(
            f"finetune: a batch of 1 has no statistics: with --statistics {config.statistics} use "
            "--batch-size 2 or more, or --statistics running"
        )


def _check_network(config: Config, network: nn.Module, example: Inputs, classes: int) -> None:
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise BNSurgeryError(f"finetune: --train {config.train} leaves nothing to train in the arm {config.arm}")
    with observing(network):
        found = run("finetune", network, example)  # says so where the image size does not fit
    if not isinstance(found, torch.Tensor) or found.shape != (example.samples, classes):
        got = f"shape {tuple(found.shape)}" if isinstance(found, torch.Tensor) else with_article(type(found).__name__)
        raise BNSurgeryError(
            f"finetune: {type(network).__name__} gives {got}, expected ({example.samples}, {classes}): of each input a "
            "number for every class"
        )


def _precision(config: Config, place: torch.device) -> str | None:
    if config.precision != "auto":
        return config.precision
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return None  # as accelerate launch was told
    return "bf16" if devices.takes_bfloat16(place) else "no"
