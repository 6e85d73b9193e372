"""The network to fine-tune: found, given a head for the classes, inserted into, and set up as the recipe says."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnsurgery.errors import ArchitectureError, BNSurgeryError, CheckpointError, shown
from bnsurgery.files.checkpoint import load, read_record
from bnsurgery.files.labels import noted_classes
from bnsurgery.graph.planning import Plan
from bnsurgery.images.preprocessing import Preprocessing
from bnsurgery.networks import factories, interface, pretrained
from bnsurgery.networks.fitting import BEST_FIT, Choice
from bnsurgery.nn import set_statistics_
from bnsurgery.records import architectures
from bnsurgery.records.record import attach_record, carries_record, record
from bnsurgery.records.task import Task
from bnsurgery.running.batches import Inputs
from bnsurgery.statistics.verification import statistics_for
from bnsurgery.surgery.copies import independent, sharing_tensors
from bnsurgery.surgery.folding import fold, strip_
from bnsurgery.surgery.heads import find_head, outputs_of, replace_head_
from bnsurgery.surgery.insertion import insert
from bnsurgery.surgery.relu_fusion import fuse_relu_, unfuse_relu_

from .config import Config
from .datasets import Data

_RESIZE = 256 / 224  # of a photograph's shorter side to the input, as torchvision evaluates


@dataclass(frozen=True)
class Source:
    """A network as found, and what is known of it.

    Attributes:
        description: where it came from, in words.
        preprocess: what its images go through, where that is known.
        task: what it was fine-tuned to before, if it was.
        classes: what its outputs are called, where that is known.
    """

    model: nn.Module
    description: str
    preprocess: Preprocessing | None = None
    task: Task | None = None
    classes: tuple[str, ...] = ()


def find(config: Config) -> Source:
    """The network that `config` names, inserted into or not.

    Raises:
        ArchitectureError, CheckpointError: there is none of that name, or the file is not one.
    """
    if not config.source and not config.model:
        raise ArchitectureError("finetune: no network: name an architecture or a file, or pass --model")
    path, of_images = Path(config.source), not factories.names_code(config.data)
    is_file = bool(config.source) and path.is_file() and config.source not in architectures.names()
    if is_file and config.weights != "DEFAULT":
        raise CheckpointError(f"finetune: '{path}' is a file of weights: leave --weights {config.weights} out")
    choice = Choice(config.weights_key, config.weights_prefix, config.partial)
    if is_file and read_record(path) is not None:
        if choice != BEST_FIT:
            raise CheckpointError(f"'{path}' is a whole checkpoint: a key, a prefix and partial are for plain weights")
        custom = factories.build(config.model) if config.model else None
        model = load(path, model=custom)
        done = record(model)
        preprocess = interface.preprocessing_of(done, model, config.wanted) if of_images else None
        return Source(model, f"checkpoint {path.name}", preprocess, done.task, interface.classes_of(done))
    own = own_name(config)
    if own:
        weights = config.source if config.model and config.source else config.weights
        model, description = pretrained.own_network(own, weights, config.seed, choice)
        known = interface.own_preprocessing(model, config.wanted) if factories.is_timm(own) and of_images else None
        return Source(model, f"{own}, {description}", known, classes=noted_classes(weights))
    if is_file:
        architecture, weights = pretrained.recognise(path, choice), config.source
    else:
        architecture, weights = architectures.architecture(config.source), config.weights
    found = pretrained.load(architecture, weights, choice=choice, wanted=config.wanted, seed=config.seed)
    classes = interface.categories(architecture, found.weights) or noted_classes(weights)
    return Source(found.model, f"{found.name}, {found.weights}", found.preprocess, classes=classes)


def own_name(config: Config) -> str | None:
    """What `factories.build` makes the network from, where it is not torchvision's."""
    return config.model or (config.source if factories.is_timm(config.source) else None)


def given(model: nn.Module) -> Source:
    """A network at hand; a copy of it."""
    copied, name = independent(model).eval(), type(model).__name__
    if not carries_record(model):
        return Source(copied, name)
    task = record(model).task
    return Source(copied, name, task.preprocessing if task else None, task, interface.classes_of(record(model)))


def task_of(source: Source, data: Data, config: Config) -> Task:
    """What goes in and what shall come out: sizes and colours from the network, classes from the data.

    Raises:
        BNSurgeryError: the image size is not known, what is wanted of the preprocessing does not go with the network,
            that takes neither 1 nor 3 channels, or the head does not fit though it shall be kept.
    """
    preprocessing = None if data.examples else _preprocessing(source, data, config)
    shape = data.examples[0] if preprocessing is None else preprocessing.shape
    if not keeps_head(source, shape, data.classes, config)[0]:
        return Task(data.classes, find_head(_original(source.model), shape), preprocessing)
    outputs = _outputs(source, shape)
    if outputs != len(data.classes):
        raise BNSurgeryError(
            f"finetune: the head tells {outputs} classes apart and cannot be kept for {len(data.classes)}: "
            "use --head new"
        )
    return Task(data.classes, source.task.head if source.task else None, preprocessing)


def _preprocessing(source: Source, data: Data, config: Config) -> Preprocessing:
    own = source.preprocess or interface.own_preprocessing(source.model, config.wanted)
    found = config.wanted.of(own)
    side = min(found.height, found.width)
    return replace(found, resize=round(side * _RESIZE) if data.photographs else side)


def keeps_head(
    source: Source, shape: Sequence[int] | Inputs | None, classes: tuple[str, ...], config: Config
) -> tuple[bool, str]:
    """Whether the network goes on with the output layer that it has, and why.

    By default it does where that layer is for these classes: of the same names in the same order, or, where its names
    are not known, as many.

    Args:
        shape: as for `find_head`.
        classes: of the data.
    """
    if config.head != "auto":
        return config.head == "keep", "as asked"
    if source.classes == classes:
        return True, "it is for these classes"
    if sorted(source.classes) == sorted(classes):
        return False, "the old one is for these classes in another order"
    if source.classes:
        return False, f"the old one is for other classes, such as {shown(source.classes[0])}"
    outputs = _outputs(source, shape)
    if outputs != len(classes):
        return False, f"the old one is for {outputs} classes"
    return True, f"it is for {outputs} classes, too; their names are not known (--head new: another)"


def _outputs(source: Source, shape: Sequence[int] | Inputs | None) -> int:
    return outputs_of(source.model.get_submodule(find_head(source.model, shape)))


def prepare(
    source: Source,
    task: Task,
    config: Config,
    batches: Iterable[Any],
    show: bool = False,
    example: Inputs | None = None,
) -> tuple[nn.Module, nn.Module]:
    """The network to train, and its head: new where the task says so; with BatchNorm, but for the plain arm.

    That one has a record all the same, of no sites: it holds the task, and what is kept can be loaded.

    Args:
        source: its model is used up.
        batches: images of the training data, to calibrate on.
        example: an input, where they are no images.

    Raises:
        BNSurgeryError: as `bnsurgery.insert` does.
    """
    model, shape = source.model, task.preprocessing.shape if task.preprocessing else example
    head = find_head(model, shape)
    keeps, _ = keeps_head(source, shape, task.classes, config)
    if carries_record(model) and (config.arm == "plain" or not record(model).sites):
        model = fold(model)
        head = find_head(model, shape)
    if not keeps:
        if config.train == "bn":
            raise BNSurgeryError(
                "finetune: --train bn would leave the new head as it is, random: use --train bn+head, or --head keep"
            )
        replace_head_(model, head, len(task.classes), config.seed)
    if config.arm == "plain":
        model = insert(model, batches, plan=_nowhere(model), moments={}, share_weights=True)
    elif not carries_record(model):
        model = insert(model, batches, layers=config.layers, progress=show)  # type: ignore[arg-type]
    unfuse_relu_(model)  # one state, whatever the file's: see `fuse_for_training_`
    provenance = {**record(model).provenance, "weights": source.description, "task": config.data}
    own = own_name(config)
    provenance |= {"model": own} if own else {}
    attach_record(model, replace(record(model), task=task, provenance=provenance))
    if example is not None:
        attach_record(model, replace(record(model), input_shape=example.shape))
    if config.arm != "plain":
        set_statistics_(model, "batch", where=lambda name, norm: True)  # `Config.train` says what is frozen
    return model, model.get_submodule(find_head(model, shape))


def _nowhere(model: nn.Module) -> Plan:
    """A plan of no sites."""
    return Plan(type(model).__name__, (), (), "pre-activation", "all", head=False)


def fuse_for_training_(network: nn.Module, device: torch.device) -> None:
    """On a GPU let the norms apply their ReLUs, which spares it passes over the tensors; `RunDirectory` saves unfused.

    A network whose norms or ReLUs have hooks is trained as it is.
    """
    if fuses(device):
        with suppress(BNSurgeryError):
            fuse_relu_(network)


def fuses(device: torch.device) -> bool:
    """Whether fused ReLUs train faster there."""
    return device.type == "cuda"


def forget_(model: nn.Module) -> None:
    """The "bn-naive" arm: every BatchNorm gets weight 1 and bias 0, as a new one has. Its statistics want measuring."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def choose_statistics(config: Config, drift: Callable[[], float]) -> tuple[str, str]:
    """The statistics mode for `config`, and why.

    Args:
        drift: measures ‖train − eval‖/‖eval‖ of the outputs at the run's batch size; called only where it matters.
    """
    if config.arm == "plain":
        return "none", "there is no BatchNorm"
    if config.statistics != "auto":
        return config.statistics, "as asked"
    if config.train == "head":
        return "running", "only the head is trained, so the features shall stay as they are"
    return statistics_for(config.batch_size, drift)


def _original(model: nn.Module) -> nn.Module:
    """The network as it was before an insertion, but for the numbers in it."""
    skeleton = sharing_tensors(model)
    if carries_record(model):
        strip_(skeleton, record(model).sites)
    return skeleton
