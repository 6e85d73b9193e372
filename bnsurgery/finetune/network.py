"""Find the network to fine-tune, choose its head, and insert BatchNorm into it."""

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
from bnsurgery.graph.layer_kinds import LAYERS
from bnsurgery.graph.planning import Plan
from bnsurgery.images.preprocessing import Preprocessing
from bnsurgery.networks import factories, interface, onnx_files, pretrained
from bnsurgery.networks.fitting import BEST_FIT, Choice
from bnsurgery.nn import set_statistics_
from bnsurgery.records import architectures
from bnsurgery.records.record import Task, attach_record, carries_record, record
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
    """A network as found, and what is known about it.

    Attributes:
        description: where it comes from, in words.
        preprocess: preprocessing of its images, if known.
        task: of an earlier fine-tuning.
        classes: names of its outputs, if known.
    """

    model: nn.Module
    description: str
    preprocess: Preprocessing | None = None
    task: Task | None = None
    classes: tuple[str, ...] = ()


def find(config: Config) -> Source:
    """The network that `config` names, with or without BatchNorm."""
    if not config.source and not config.model:
        raise ArchitectureError("finetune: no network: name an architecture or a file, or pass `model`")
    path, of_images = Path(config.source), not factories.names_code(config.data)
    is_file = path.is_file() and not factories.is_onnx(config.source) and config.source not in architectures.NAMES
    if is_file and config.weights != "DEFAULT":
        raise CheckpointError(f"finetune: '{path}' is a file of weights: leave `weights={config.weights!r}` out")
    choice, wanted = Choice(config.weights_key, config.weights_prefix, config.partial), config.wanted
    if is_file and (saved := read_record(path)) is not None:
        if choice != BEST_FIT:
            raise CheckpointError(
                f"'{path}' is a whole checkpoint: `weights_key`, `weights_prefix` and `partial` are for plain weights"
            )
        name = config.model or factories.original(saved, path)
        model = load(path, model=factories.build(name) if name else None)
        known = record(model)
        preprocess = interface.preprocessing_of(known, model, wanted) if of_images else None
        return Source(model, f"checkpoint {path.name}", preprocess, known.task, interface.classes_of(known))
    weights = config.source if is_file or (config.model and config.source) else config.weights
    if own := own_name(config):
        model, description = pretrained.own_network(own, weights, config.seed, choice)
        of_timm = factories.is_timm(own) and of_images
        preprocess = interface.own_preprocessing(model, wanted) if of_timm else None
        return Source(model, f"{own}, {description}", preprocess, classes=noted_classes(weights))
    architecture = pretrained.recognise(path, choice) if is_file else architectures.architecture(config.source)
    found = pretrained.load(architecture, weights, choice=choice, wanted=wanted, seed=config.seed)
    classes = interface.categories(architecture, found.weights) or noted_classes(weights)
    return Source(found.model, f"{architecture.name}, {found.weights}", found.preprocess, classes=classes)


def own_name(config: Config) -> str | None:
    """The name from which `factories.build` makes the network, unless it is torchvision's."""
    is_own = factories.is_timm(config.source) or factories.is_onnx(config.source)
    return config.model or (config.source if is_own else None)


def given(model: nn.Module) -> Source:
    """A copy of a network in memory."""
    copied, name = independent(model).eval(), type(model).__name__
    if not carries_record(model):
        return Source(copied, name)
    task = record(model).task
    return Source(copied, name, task.preprocessing if task else None, task, interface.classes_of(record(model)))


@dataclass(frozen=True)
class Head:
    """The output layer of a network.

    Attributes:
        position: among the conv and dense layers of the module tree. Insertion and folding change names, not this.
        kept: whether the network keeps it; otherwise a new layer replaces it.
        why: the reason, in words.
    """

    position: int
    kept: bool
    why: str

    def name_in(self, model: nn.Module) -> str:
        """Its name in `model`, with or without BatchNorm."""
        return [name for name, module in model.named_modules() if isinstance(module, LAYERS)][self.position]


def choose_head(source: Source, shape: Sequence[int] | Inputs | None, classes: tuple[str, ...], config: Config) -> Head:
    """Find the output layer, and decide whether the network keeps it.

    By default it is kept if it is for the data's classes: the same names in the same order or, if its names are not
    known, the same number.
    """
    layer = source.model.get_submodule(find_head(source.model, shape))
    outputs = outputs_of(layer)
    if config.head != "auto":
        kept, why = config.head == "keep", "as asked"
    elif source.classes == classes:
        kept, why = True, "it is for these classes"
    elif sorted(source.classes) == sorted(classes):
        kept, why = False, "the old one is for these classes in another order"
    elif source.classes:
        kept, why = False, f"the old one is for other classes, such as {shown(source.classes[0])}"
    elif outputs != len(classes):
        kept, why = False, f"the old one is for {outputs} classes"
    else:
        kept, why = True, f"it is for {outputs} classes, too; their names are not known (`head='new'` replaces it)"
    if kept and outputs != len(classes):
        raise BNSurgeryError(
            f"finetune: the head has {outputs} outputs and cannot be kept for {len(classes)} classes: use `head='new'`"
        )
    return Head([m for m in source.model.modules() if isinstance(m, LAYERS)].index(layer), kept, why)  # type: ignore[arg-type]


def task_of(source: Source, data: Data, config: Config) -> tuple[Task, Head]:
    """The task, with image size and colours from the network and classes from the data; and the head for it."""
    preprocessing = None
    if not data.examples:
        found = config.wanted.of(source.preprocess or interface.own_preprocessing(source.model, config.wanted))
        side = min(found.height, found.width)
        preprocessing = replace(found, resize=round(side * _RESIZE) if data.photographs else side)
    head = choose_head(source, preprocessing.shape if preprocessing else data.examples[0], data.classes, config)
    if head.kept:
        return Task(data.classes, source.task.head if source.task else None, preprocessing), head
    original = source.model
    if carries_record(original):
        original = sharing_tensors(original)
        strip_(original, record(original).sites)
    return Task(data.classes, head.name_in(original), preprocessing), head


def prepare(
    source: Source,
    task: Task,
    head: Head,
    config: Config,
    batches: Iterable[Any],
    show: bool = False,
    example: Inputs | None = None,
) -> nn.Module:
    """The network to train: with a new head unless that is kept, and with BatchNorm unless the arm is "plain".

    The plain arm has a record of no sites, which holds the task, so that what is saved can be loaded.

    The model of `source` is used up. `batches` are training data to calibrate on; `example` is one input of them, if
    they are no images.
    """
    model = source.model
    if not head.kept and (config.train, config.head_init) == ("bn", "random"):
        raise BNSurgeryError(
            "finetune: `train='bn'` would leave the new head random: fit it with `head_init='fit'`, train it with "
            "`train='bn+head'`, or keep the old one with `head='keep'`"
        )
    if carries_record(model) and (config.arm == "plain" or not record(model).sites):
        model = fold(model)
    if not head.kept:
        replace_head_(model, head.name_in(model), len(task.classes), config.seed)
    if config.arm == "plain":
        nowhere = Plan(type(model).__name__, (), (), "pre-activation", "all", head=False)
        model = insert(model, batches, plan=nowhere, moments={}, share_weights=True)
    elif not carries_record(model):
        model = insert(model, batches, layers=config.layers, progress=show)  # type: ignore[arg-type]
    unfuse_relu_(model)  # the same state for every source: see `fuse_for_training_`
    provenance = {**record(model).provenance, "weights": source.description, "task": config.data}
    if own := own_name(config):
        provenance["model"] = own
    if origin := onnx_files.source(model):
        provenance["onnx"] = origin.digest
    shape = example.shape if example else record(model).input_shape
    attach_record(model, replace(record(model), task=task, provenance=provenance, input_shape=shape))
    if config.arm != "plain":
        set_statistics_(model, "batch", where=lambda name, norm: True)  # `Config.train` decides what is frozen
    return model


def fuse_for_training_(network: nn.Module, device: torch.device) -> None:
    """On a GPU, let norms without hooks apply their ReLUs, which saves passes over the tensors.

    `RunDirectory` saves the network unfused.
    """
    if fuses(device):
        with suppress(BNSurgeryError):
            fuse_relu_(network)


def fuses(device: torch.device) -> bool:
    """Whether fused ReLUs train faster on `device`."""
    return device.type == "cuda"


def forget_(model: nn.Module) -> None:
    """For the arm "bn-naive", make every BatchNorm a new one: weight 1 and bias 0. Recalibrate it afterwards."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.reset_parameters()


def choose_statistics(config: Config, drift: Callable[[], float]) -> tuple[str, str]:
    """The statistics mode for `config`, and the reason.

    `drift` measures ‖train − eval‖/‖eval‖ of the outputs at the run's batch size; it is called only if needed.
    """
    if config.arm == "plain":
        return "none", "there is no BatchNorm"
    if config.statistics != "auto":
        return config.statistics, "as asked"
    if config.train == "head":
        return "running", "only the head is trained, so the features stay fixed"
    return statistics_for(config.batch_size, drift)
