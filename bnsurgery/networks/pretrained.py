"""A network with its weights and its preprocessing, from a name or a file, without a random initialization first."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import WeightsEnum

from bnsurgery.errors import ArchitectureError, CheckpointError, UntraceableModelError, printable, shown
from bnsurgery.files.checkpoint import read_record
from bnsurgery.files.weights import read_weights
from bnsurgery.graph.layer_kinds import LAYERS
from bnsurgery.graph.tracing import Trace, is_layer
from bnsurgery.images.preprocessing import MAX_SIDE, NOTHING, Preprocessing, Wanted
from bnsurgery.records.architectures import Architecture, identify, names, state_shapes
from bnsurgery.records.record import SurgeryRecord, carries_record, record
from bnsurgery.surgery.copies import sharing_tensors
from bnsurgery.surgery.folding import strip_

from . import factories
from .downloads import download
from .fitting import BEST_FIT, Choice, fill_, find

_CROP = 224
_OWN_INPUTS = ("googlenet", "inception_v3")  # with weights they rescale their input, and drop their training heads
_RESIZE = 256


@dataclass(frozen=True)
class Pretrained:
    """A network in eval mode, ready to run.

    Attributes:
        name: how to call it: "vgg16", "timm:vgg16", "net.py:small".
        architecture: which of torchvision's it is, if any; the number of classes is the weights'.
        weights: where they came from, in words.
        preprocess: from an image to its input: the weights' own, or ImageNet's, but for what was asked for.
    """

    name: str
    model: nn.Module
    architecture: Architecture | None
    weights: str
    preprocess: Preprocessing


def load(
    architecture: Architecture,
    weights: str,
    *,
    choice: Choice = BEST_FIT,
    wanted: Wanted = NOTHING,
    seed: int = 0,
    progress: bool = False,
) -> Pretrained:
    """The network `architecture` with `weights`.

    Args:
        weights: "DEFAULT" or another name in torchvision's enum (downloaded unless cached), "random" (torchvision's
            initialization, seeded), or a path to a .pth, .pt or .safetensors file holding a state dict.
        choice: which tensors of a file to take.
        wanted: what of the preprocessing shall be otherwise than the weights say.
        seed: for "random", and for what a file does not have.
        progress: show the download.

    Raises:
        CheckpointError: no such weights, or they are damaged, hostile, of another network or not finite.
        ArchitectureError: the image size is below what the network takes.
        DataError: the preprocessing does not go with the network.
    """
    if wanted.size is not None and min(wanted.size) < architecture.min_size:
        raise ArchitectureError(
            f"image size {min(wanted.size)} is too small for {architecture.name}, which takes "
            f"{architecture.min_size} or more"
        )
    known = ("DEFAULT", *architecture.weight_names, "random")
    _check_choice(choice, weights, known)
    if weights == "random":
        model, description = _random(architecture, seed), f"random, seed {seed}"
    elif weights in known:
        member: WeightsEnum = architecture.weights[weights]
        model, description = architecture.build("meta"), str(member)
        fill_(model, architecture.name, download(member, progress=progress), choice)
    else:
        file = read_weights(weights)
        _refuse_inserted(file.path)
        shapes = find(file, state_shapes(architecture.build()), choice).shapes
        architecture = identify(shapes, (architecture,)) or architecture
        model = _random(architecture, seed) if choice.partial else architecture.build("meta")
        fill_(model, architecture.name, file, choice)
        model, description = model.float(), f"file {file.path.name}"  # of half precision: CPUs compute in single
    return Pretrained(
        architecture.name, model, architecture, description, preprocessing(architecture, description, wanted)
    )


def own_network(name: str, weights: str = "DEFAULT", seed: int = 0, choice: Choice = BEST_FIT) -> tuple[nn.Module, str]:
    """A network that is not torchvision's, by the name of what makes it, and where its weights came from, in words.

    Args:
        name: see `factories.build`.
        weights: a path to a file that holds its state dict; "DEFAULT" for torchvision's or timm's own, or what the
            factory made; "random" for torchvision's or timm's initialization.
        seed: for whatever the factory draws.
        choice: which tensors of a file to take.

    Raises:
        ArchitectureError, CheckpointError: there is no such network, or these are not its weights.
    """
    known = ("DEFAULT", "random")
    _check_choice(choice, weights, known)
    stock = factories.is_torchvision(name)
    if weights == "random" and not (stock or factories.is_timm(name)):
        raise CheckpointError(f"weights 'random': '{name}' makes its own: leave --weights out, or pass a file")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = factories.build(name, pretrained=factories.is_timm(name) and weights == "DEFAULT")
    description = f"random, seed {seed}"
    if weights == "DEFAULT":
        description = f"file {Path(name).name}" if factories.is_onnx(name) else "as they are made"
    if stock and weights == "DEFAULT":
        if name in _OWN_INPUTS:
            raise ArchitectureError(
                f"model '{name}': torchvision makes it another network with its weights: write a function that returns "
                f"torchvision.models.{name}(weights='DEFAULT'), and pass file.py:function"
            )
        member = models.get_model_weights(name).DEFAULT
        fill_(model, name, download(member, progress=False), BEST_FIT)
        description = str(member)
    if weights not in known:
        file = read_weights(weights)
        _refuse_inserted(file.path)
        fill_(model, name, file, choice)
        description = f"file {file.path.name}"
    return model, description


def own_preprocessing(model: nn.Module, wanted: Wanted = NOTHING) -> Preprocessing:
    """From an image to the input of a network that is not torchvision's.

    Args:
        model: its first layer says whether images are grey; a timm network knows the rest. Of others, colour is
            normalized as ImageNet's, and grey is left between 0 and 1.
        wanted: what shall be otherwise.

    Raises:
        ArchitectureError: the size is not known, or the first layer takes neither 1 nor 3 channels.
        DataError: what is wanted does not go with the network.
    """
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    channels = input_channels(model)
    if channels not in (1, 3):
        raise ArchitectureError(
            f"{type(model).__name__} takes {channels} channels, expected 1 or 3, as images have. For other inputs "
            "insert, verify, finetune and export take --data FILE.py:FUNCTION, which gives them"
        )
    height, width = wanted.size or (config.get("input_size") or (None, None))[-2:]
    if height is None or width is None:
        raise ArchitectureError("the image size of a network of your own is not known: pass --image-size")
    own = Preprocessing(height, width, round(min(height, width) * _RESIZE / _CROP))
    if channels == 1:
        own = replace(own, mean=(0.0,), std=(1.0,), channels="grey")
    elif "mean" in config and "std" in config:
        kind = config.get("interpolation") or own.interpolation
        own = replace(own, mean=tuple(config["mean"]), std=tuple(config["std"]), interpolation=kind)
    return wanted.of(own)


def noise(model: nn.Module, size: tuple[int, int] | None = None) -> Tensor:
    """Two images to try a network on, (2, C, *size): of timm's own height and width where none is given, else 224."""
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    height, width = size or (config.get("input_size") or (_CROP, _CROP))[-2:]
    return torch.randn(2, input_channels(model), height, width, generator=torch.Generator().manual_seed(0))


def input_channels(model: nn.Module) -> int:
    """Colour channels that a network takes: as its record has it, else its first layer; 3 where that is no conv."""
    if carries_record(model):
        done = record(model)
        if done.task is not None and done.task.preprocessing is not None:
            return done.task.preprocessing.shape[0]
        if done.input_shape is not None:
            return done.input_shape[0]
        model = sharing_tensors(model)
        strip_(model, done.sites)  # a layer with a norm is one module with it
    try:
        first = next((node.meta.get("module") for node in Trace(model).nodes if is_layer(node)), None)
    except UntraceableModelError:  # without an input: then the first to be defined
        first = next((module for module in model.modules() if isinstance(module, LAYERS)), None)
    return first.in_channels if isinstance(first, LAYERS) and not isinstance(first, nn.Linear) else 3


def preprocessing(architecture: Architecture, weights: str = "", wanted: Wanted = NOTHING) -> Preprocessing:
    """The preprocessing of torchvision's weights called `weights`, such as "VGG16_Weights.DEFAULT"; else ImageNet's."""
    own = Preprocessing(_CROP, _CROP, _RESIZE)
    member = _member(architecture, weights)
    if member is not None:
        found = member.transforms()
        (size,), (resize,) = set(found.crop_size), set(found.resize_size)
        own = replace(own, height=size, width=size, resize=resize, mean=tuple(found.mean), std=tuple(found.std))
    return wanted.of(own)


def _member(architecture: Architecture, weights: str) -> WeightsEnum | None:
    return next((member for member in architecture.weights if str(member) == weights), None)


def classes_of(record: SurgeryRecord) -> tuple[str, ...]:
    """What the outputs of a checkpoint's network are called: its task's classes, or those of torchvision's weights."""
    if record.task is not None and record.task.classes:
        return record.task.classes
    weights = str(record.provenance.get("weights"))
    return categories(record.architecture, weights) if record.architecture else ()


def categories(architecture: Architecture, weights: str) -> tuple[str, ...]:
    """What the outputs of torchvision's weights called `weights` are called; empty for others."""
    member = _member(architecture, weights)
    return tuple(member.meta["categories"]) if member else ()


def noted_preprocessing(record: SurgeryRecord) -> Preprocessing | None:
    """What images of a checkpoint go through, where its record says so, or names torchvision's weights."""
    if record.task is not None:
        return record.task.preprocessing
    weights = str(record.provenance.get("weights"))
    found = record.architecture is not None and _member(record.architecture, weights) is not None
    return preprocessing(record.architecture, weights) if found and record.architecture else None


def preprocessing_of(record: SurgeryRecord, model: nn.Module, wanted: Wanted = NOTHING) -> Preprocessing:
    """What images of a checkpoint go through: as its record has it, but for what is wanted.

    Raises:
        ArchitectureError: as `own_preprocessing`.
        CheckpointError: what the record notes is out of range.
        DataError: what is wanted does not go with the network.
    """
    if record.task is not None:
        if record.task.preprocessing is None:
            raise ArchitectureError(
                f"{type(model).__name__} was fine-tuned on '{record.provenance.get('task')}', not on images: insert, "
                "verify and export take --data FILE.py:FUNCTION, which gives batches of what it takes"
            )
        return wanted.of(record.task.preprocessing)
    if record.architecture is not None:
        return preprocessing(record.architecture, str(record.provenance.get("weights")), wanted)
    # Files of format 1 and 2 note it there.
    noted = {"image_size": None, "normalize": "auto", **record.provenance}
    size, kind = noted["image_size"], noted["normalize"]
    if size is not None and not (isinstance(size, int) and 1 <= size <= MAX_SIDE):
        raise CheckpointError(f"record.provenance.image_size: got {shown(size)}, expected 1 to {MAX_SIDE}")
    if kind not in ("auto", "imagenet", "none"):
        raise CheckpointError(f"record.provenance.normalize: got {shown(kind)}, expected auto, imagenet or none")
    return wanted.of(own_preprocessing(model, Wanted(wanted.image_size or size, str(kind))))


def recognise(path: Path, choice: Choice = BEST_FIT) -> Architecture:
    """The architecture that a plain weights file belongs to.

    Raises:
        CheckpointError: the file cannot be read, or fits none.
    """
    file = read_weights(path)
    _refuse_inserted(path)
    for name in names():
        candidate = Architecture(name)
        expected = state_shapes(candidate.build())
        fit = find(file, expected, replace(choice, partial=False))
        found = identify(fit.shapes, (candidate,)) if len(fit.names) == len(expected) else None
        if found is not None and (fit.norm is None or choice.partial):
            return found
    norm = next((name for name in file.tensors if name.endswith("running_mean")), None)
    if norm is not None:
        raise CheckpointError(
            f"'{path}' holds a network that has BatchNorm already ('{printable(norm)}'). Nothing to insert."
        )
    raise CheckpointError(f"'{path}': its keys and shapes fit none of the architectures of `bnsurgery archs`")


def origin(record: SurgeryRecord, untouched: bool) -> str:
    """What a checkpoint's folded weights are, in words; `untouched` where their digest is the original's."""
    if untouched:
        return "the weights it was made from, bit for bit"
    if record.options.absorb_bias:
        return "weights equal to those it was made from up to rounding, since biases were absorbed, or trained since"
    return "trained weights (changed since the insertion)"


def example(preprocess: Preprocessing, *, on_meta: bool) -> Tensor:
    """An input for planning: on the meta device, where nothing is computed, unless code is run that is the user's."""
    return torch.zeros(1, *preprocess.shape, device="meta" if on_meta else None)


def _random(architecture: Architecture, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return architecture.build("cpu")


def _check_choice(choice: Choice, weights: str, known: tuple[str, ...]) -> None:
    if weights in known and choice != BEST_FIT:
        raise CheckpointError(f"weights '{weights}': a key, a prefix and partial are for weights from a file")
    if weights not in known and not Path(weights).exists():
        raise CheckpointError(f"weights '{weights}': no such file, nor one of {', '.join(known)}")


def _refuse_inserted(path: Path) -> None:
    if read_record(path) is not None:
        raise CheckpointError(
            f"'{path}' holds a network that has been inserted into already. Fold it first: bnsurgery fold {path}"
        )
