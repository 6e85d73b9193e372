"""Set up a run before its first step: processes, data, network, and the values that "auto" stands for."""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from bnsurgery.errors import BNSurgeryError, DataError
from bnsurgery.images.folders import told_of
from bnsurgery.machine import devices
from bnsurgery.networks import factories
from bnsurgery.nn import set_process_group_, set_statistics_
from bnsurgery.running.batches import Inputs
from bnsurgery.running.calls import run
from bnsurgery.running.modes import observing
from bnsurgery.statistics.calibration import input_moments, recalibrate_
from bnsurgery.statistics.verification import DRIFT_SAMPLES, verify
from bnsurgery.text.words import counted, thousands, with_article

from . import recipe
from .config import Config
from .datasets import Data, open_data
from .head_fit import fit_head_
from .loading import Loader, Prepared, Reader, Share, TrainBatches, default_workers, evaluation, training
from .loading import source as as_taken
from .network import Source, choose_statistics, find, forget_, fuse_for_training_, given, prepare, task_of
from .own_data import open_own
from .parts import Stream
from .results import Resolved

if TYPE_CHECKING:
    from accelerate import Accelerator

_DEVICE = "ACCELERATE_TORCH_DEVICE"
EVALUATED_TOGETHER = 32  # at least: without gradients there is memory, and statistics need more than a few images


@dataclass
class Setup:
    """A run, ready to start.

    Attributes:
        network: on its device, without wrappers; the parameters to train take a gradient.
        head: name of its output layer.
        conditioner: of the head's gradients.
        facts: lines that say what was found and chosen.
        prepared, reader: the training data, and how this process reads it.
        batches, train: this rank's share of the augmented training batches, and the loader that follows it.
        calibration: this rank's share of training images, without augmentation.
        val, test: this rank's share of the validation and test images; `test` is None without such a part.
    """

    config: Config
    accelerator: "Accelerator"
    network: nn.Module
    head: str
    conditioner: recipe.HeadConditioner | None
    resolved: Resolved
    facts: list[str]
    prepared: Prepared | Stream
    reader: Reader
    batches: TrainBatches | Share
    train: Loader | Share
    calibration: Loader | Share
    val: Loader | Share
    test: Loader | Share | None


def processes(config: Config) -> "Accelerator":
    """Hugging Face's Accelerate: one process, or those that torchrun or accelerate launch started."""
    own = config.log_with != "tensorboard"  # a tracker that no extra brings
    for needed in ("accelerate", config.log_with, "matplotlib"):  # the last two before hours of training
        if importlib.util.find_spec(needed) is None:
            package = needed if own and needed == config.log_with else "'bnsurgery[finetune]'"
            raise BNSurgeryError(f"finetune: needs {needed}, which is not installed: pip install {package}")
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import patch_environment

    place, launched = computes_on(config), "LOCAL_RANK" in os.environ
    precision: str | None = config.precision
    if precision == "auto":
        precision = "bf16" if devices.takes_bfloat16(place) else "no"
        if "ACCELERATE_MIXED_PRECISION" in os.environ:
            precision = None  # for the option of accelerate launch
    try:
        # There is no other way to choose the device; the launcher chooses that of each launched process.
        with patch_environment(**({} if launched else {_DEVICE: str(place)})):
            accelerator = Accelerator(
                cpu=place.type == "cpu",  # otherwise it looks for a GPU, with no group
                mixed_precision=precision,
                dynamo_backend="inductor" if config.compile else "no",
                log_with=config.log_with if own else None,
                # Every rank computes the same statistics: there is nothing to send.
                kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
            )
    except ValueError as error:
        raise BNSurgeryError(f"finetune: {str(error).splitlines()[0]}") from error
    got = accelerator.device
    if got.type != place.type or (place.index is not None and place.index != (got.index or 0)):
        why = f"this process computes on {got} already: start another"
        if launched:
            why = f"the launcher gave this process {got}: name the kind alone, such as cuda, to use one GPU per process"
        raise BNSurgeryError(f"finetune: `device='{place}'`: {why}")
    if place.index:  # also the current device, or memory would be pinned by way of the first one
        torch.get_device_module(place).set_device(place)
    return accelerator


def computes_on(config: Config) -> torch.device:
    """The device that `config` or Accelerate's environment names; for a launched process, only its kind."""
    from accelerate.utils import parse_flag_from_env

    name = os.environ.get(_DEVICE) if config.device == "auto" else config.device
    if name is None:
        return devices.CPU if parse_flag_from_env("ACCELERATE_USE_CPU") else devices.automatic()
    return devices.device(name)


def load_data(config: Config, show: bool = False) -> Data:
    """The data that `config` names."""
    return (open_own if factories.names_code(config.data) else open_data)(config, show)


def build(
    config: Config,
    accelerator: "Accelerator",
    model: nn.Module | None,
    data: Data,
    resolved: Resolved | None,
    show: bool,
    restored: bool = False,
) -> Setup:
    """Do everything before the first step.

    Args:
        model: the network, instead of the one that `config` names; it is copied.
        resolved: the values of a run that is resumed.
        restored: whether the caller loads a saved state next, so that no head needs to be fitted.
    """
    world = accelerator.num_processes
    _check_sizes(config, data, world)
    source = find(config) if model is None else given(model)
    task, head = task_of(source, data, config)
    source.model.to(accelerator.device)

    resolved = resolved or _resolve(config, data)
    prepared = as_taken(data.train, task, resolved.augment, config.seed)
    workers = default_workers() if config.num_workers is None else config.num_workers
    reader = Reader(workers, accelerator.process_index, world, pinned=accelerator.device.type == "cuda")
    together = max(EVALUATED_TOGETHER, config.batch_size // world)
    batches, train = training(prepared, config.batch_size, config.seed, reader)
    calibration = evaluation(prepared, together, reader, images=config.recalibrate)
    val = evaluation(as_taken(data.val, task, "none", 0), together, reader)
    test = None if data.test is None else evaluation(as_taken(data.test, task, "none", 0), together, reader)

    network = prepare(source, task, head, config, calibration, show, *data.examples[:1])
    name = head.name_in(network)
    layer = network.get_submodule(name)
    recipe.set_dropout_(network, config.dropout)
    unfrozen = recipe.choose_parameters_(network, config.train, layer)
    examples = data.examples or [Inputs((torch.zeros(2, *task.preprocessing.shape),))]  # type: ignore[union-attr]
    for example in examples:
        _check_network(config, network, example, len(data.classes))
    if not resolved.statistics:
        statistics, reason = choose_statistics(config, partial(_drift, network, prepared, config.batch_size))
        resolved = replace(resolved, statistics=statistics, reason=reason)
    if config.arm == "bn-naive":
        forget_(network)
        recalibrate_(network, calibration)  # the inputs of every layer have changed
    made = ""
    if not head.kept and not restored:
        everything = evaluation(prepared, together, reader._replace(rank=0, world=1))
        made = _initialize_head_(config, network, layer, everything)
    if not resolved.head:
        resolved = replace(resolved, head=f"{'kept' if head.kept else 'new'}: {head.why}{made}")
    conditioner = None
    if recipe.HeadConditioner.suits(config, layer):
        moments = input_moments(network, name, calibration)
        conditioner = recipe.HeadConditioner(layer, moments.mean, moments.variance.mean())  # type: ignore[arg-type]
    if config.arm != "plain":
        # The schedule ends with the run: the network is trained for plain BN by then, where batches allow it.
        set_statistics_(network, resolved.statistics, renorm_steps=config.epochs * batches.per_epoch)  # type: ignore[arg-type]
        if world > 1:
            set_process_group_(network, torch.distributed.group.WORLD)
    fuse_for_training_(network, accelerator.device)
    if config.channels_last:
        for parameter in network.parameters():  # those of Conv2d: Module.to refuses a Conv3d's
            if parameter.ndim == 4:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)
    facts = _facts(config, source, data, resolved, batches.left_over, unfrozen)
    loaders = prepared, reader, batches, train, calibration, val, test
    return Setup(config, accelerator, network, name, conditioner, resolved, facts, *loaders)


def _resolve(config: Config, data: Data) -> Resolved:
    """Choose rate and augmentation; statistics and head, which the network decides, stay empty."""
    rate, rate_reason = recipe.default_rate(config), f"the default for a batch of {config.batch_size}"
    if config.lr not in (None, "auto"):
        rate, rate_reason = float(config.lr), "as asked"
    augment, augment_reason = config.augment, "as asked"
    if data.examples:
        augment, augment_reason = "none", "a function's data is taken as it is"
    elif augment == "auto":
        augment, augment_reason = data.augment, f"the default for {data.kind or data.description}"
    return Resolved(rate, "", "", rate_reason, "", augment, augment_reason, config.batch_size)


def _drift(network: nn.Module, prepared: Prepared | Stream, size: int) -> float:
    loader = evaluation(prepared, size, images=max(DRIFT_SAMPLES, size))
    report = verify(network, network, loader, drift_batch_sizes=(size,))
    if report.no_drift is not None:
        raise BNSurgeryError(f"finetune: no drift to choose by: {report.no_drift}. Pass `statistics`.")
    return report.train_drift[size]


def _initialize_head_(config: Config, network: nn.Module, head: nn.Module, loader: Loader | Share) -> str:
    """Initialize a new head, and say how. Every process fits the same one, on all training images.

    In every arm the features are those of eval mode, which validation uses: those of the inserted network are the
    original's to the bit, and the naive one normalizes by its new population statistics.
    """
    if config.head_init == "random":
        return "; random"
    fit = fit_head_(network, loader, head)
    if fit.refusal is None:
        return f"; {fit}"
    if config.train == "bn":
        raise BNSurgeryError(
            f"finetune: `train='bn'` would leave the new head random, because it cannot be fitted ({fit.refusal}): "
            "train it with `train='bn+head'`, or keep the old one with `head='keep'`"
        )
    return f"; random, {fit}"


def _facts(
    config: Config, source: Source, data: Data, resolved: Resolved, left: int, unfrozen: Sequence[str]
) -> list[str]:
    tested = f", {thousands(len(data.test))} to test on" if data.test is not None else ""
    facts = [
        f"network      {source.description}",
        f"data         {data.description}: {thousands(len(data.train))} training and "
        f"{counted(len(data.val), f'validation {data.thing}')}{tested}, {len(data.classes)} classes",
        f"head         {resolved.head}",
    ]
    if unfrozen:
        count = counted(len(unfrozen), "parameter")
        facts.append(
            f"trained      {config.train}, {count} of which took no gradient before, the first: {unfrozen[0]}. `train` "
            "chooses what is trained"
        )
    if left:
        others = "" if isinstance(data.train, Stream) else ", others every time"
        facts.append(f"left out     {counted(left, data.thing)} in each epoch{others}: too few for a batch")
    if data.skipped:
        facts.append(f"left out     {counted(len(data.skipped), 'damaged image')}, the first: {data.skipped[0]}")
    if data.passed_over:
        facts.append(f"left out     {told_of(data.passed_over, 'no images by name or in no class folder')}")
    if not data.examples:
        facts.append(f"augment      {resolved.augment}: {resolved.augment_reason}")
    if config.arm != "plain":
        facts.append(f"statistics   {resolved.statistics}: {resolved.reason}")
    return facts


def _check_sizes(config: Config, data: Data, world: int) -> None:
    size, in_batches = config.batch_size, isinstance(data.train, Stream)
    if size > len(data.train):
        count = f"the {len(data.train)} training {data.thing}s"
        raise DataError(
            f"finetune: a batch of {size} is more than {count}: pass `batch_size={len(data.train)}` or less"
        )
    if size < world or (size % world and not in_batches):
        advice = "make the batches larger" if in_batches else f"pass `batch_size={world * max(1, size // world)}`"
        raise DataError(f"finetune: a batch of {size} cannot be shared evenly by {world} processes: {advice}")
    if size == 1 and config.arm != "plain" and config.statistics not in ("auto", "running"):
        raise BNSurgeryError(
            f"finetune: a batch of 1 has no statistics: with `statistics={config.statistics!r}` use `batch_size=2` or "
            "more; or use `statistics='running'`"
        )


def _check_network(config: Config, network: nn.Module, example: Inputs, classes: int) -> None:
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise BNSurgeryError(f"finetune: `train={config.train!r}` leaves nothing to train in the arm {config.arm}")
    with observing(network):
        output = run("finetune", network, example)  # which names an image size that does not fit
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else None
    if shape != (example.samples, classes):
        got = f"shape {shape}" if shape is not None else with_article(type(output).__name__)
        raise BNSurgeryError(
            f"finetune: {type(network).__name__} returns {got}, expected ({example.samples}, {classes}): a number per "
            "input and class"
        )
