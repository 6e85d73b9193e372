"""A network with its weights and its preprocessing, from a name or a file, without a random initialization first."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import WeightsEnum
from torchvision.transforms._presets import ImageClassification

from . import factories
from .checkpoint import read_record
from .copies import sharing_tensors
from .errors import ArchitectureError, CheckpointError, UntraceableModelError, printable, shown
from .fitting import BEST_FIT, Choice, fill_, find
from .folding import strip_
from .layer_kinds import LAYERS
from .models import Architecture, identify, names, state_shapes
from .surgery_record import SurgeryRecord, carries_record, record
from .task import MAX_SIDE
from .tracing import Trace, is_layer
from .weights import download, read_weights

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
        preprocess: from a PIL image to a normalized tensor: the weights' own, or ImageNet's.
    """

    name: str
    model: nn.Module
    architecture: Architecture | None
    weights: str
    preprocess: ImageClassification


def load(
    architecture: Architecture,
    weights: str,
    *,
    choice: Choice = BEST_FIT,
    image_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Pretrained:
    """The network `architecture` with `weights`.

    Args:
        weights: "DEFAULT" or another name in torchvision's enum (downloaded unless cached), "random" (torchvision's
            initialization, seeded), or a path to a .pth, .pt or .safetensors file holding a state dict.
        choice: which tensors of a file to take.
        image_size: side of the images in pixels; the weights' own where None.
        seed: for "random", and for what a file does not have.
        progress: show the download.

    Raises:
        CheckpointError: no such weights, or they are damaged, hostile, of another network or not finite.
        ArchitectureError: `image_size` is below what the network takes.
    """
    if image_size is not None and image_size < architecture.min_size:
        raise ArchitectureError(
            f"image size {image_size} is too small for {architecture.name}, which takes {architecture.min_size} or more"
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
        architecture.name, model, architecture, description, preprocessing(architecture, description, image_size)
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


def load_own(
    name: str,
    weights: str,
    *,
    choice: Choice = BEST_FIT,
    image_size: int | None = None,
    normalize: str = "auto",
    seed: int = 0,
) -> Pretrained:
    """`own_network` with its `own_preprocessing`."""
    model, description = own_network(name, weights, seed, choice)
    return Pretrained(name, model, None, description, own_preprocessing(model, image_size, normalize))


def own_preprocessing(model: nn.Module, image_size: int | None, normalize: str = "auto") -> ImageClassification:
    """From a PIL image to the input of a network that is not torchvision's.

    Args:
        model: its first layer says whether images are grey; a timm network knows the rest.
        image_size: side of the square input in pixels; timm's own where None.
        normalize: "imagenet", "none" (values from 0 to 1), or "auto": timm's own, else ImageNet's for colour.

    Raises:
        ArchitectureError: the size is not known, or the first layer takes neither 1 nor 3 channels.
    """
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    channels = input_channels(model)
    if channels not in (1, 3):
        raise ArchitectureError(
            f"{type(model).__name__} takes {channels} channels, expected 1 or 3: this command is for images. In Python "
            "bnsurgery.insert(model, batches) takes any input"
        )
    size = image_size or (config.get("input_size") or (None, None))[-1]
    if size is None:
        raise ArchitectureError("the image size of a network of your own is not known: pass --image-size")
    mean, std = (0.0,) * channels, (1.0,) * channels
    if normalize != "none" and channels == 3:
        ours = ImageClassification(crop_size=size)
        own = normalize == "auto"
        mean = tuple(config["mean"] if own and "mean" in config else ours.mean)
        std = tuple(config["std"] if own and "std" in config else ours.std)
    elif normalize == "imagenet":
        raise ArchitectureError("the network takes grey images, and ImageNet's are not: pass --normalize none")
    kind = ImageClassification if channels == 3 else _Grey
    return kind(crop_size=size, resize_size=round(size * _RESIZE / _CROP), mean=mean, std=std)


def noise(model: nn.Module, image_size: int | None = None) -> Tensor:
    """Two images to try a network on, (2, C, side, side): of timm's own size where none is given, else 224."""
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    height, width = (image_size, image_size) if image_size else (config.get("input_size") or (_CROP, _CROP))[-2:]
    return torch.randn(2, input_channels(model), height, width, generator=torch.Generator().manual_seed(0))


def input_channels(model: nn.Module) -> int:
    """Colour channels that a network takes: as its record has it, else its first layer; 3 where that is no conv."""
    if carries_record(model):
        done = record(model)
        if done.task is not None:
            return len(done.task.mean)
        if done.input_shape is not None:
            return done.input_shape[0]
        model = sharing_tensors(model)
        strip_(model, done.sites)  # a layer with a norm is one module with it
    try:
        first = next((node.meta.get("module") for node in Trace(model).nodes if is_layer(node)), None)
    except UntraceableModelError:  # without an input: then the first to be defined
        first = next((module for module in model.modules() if isinstance(module, LAYERS)), None)
    return first.in_channels if isinstance(first, LAYERS) and not isinstance(first, nn.Linear) else 3


class _Grey(ImageClassification):
    def forward(self, img: Any) -> Tensor:
        return super().forward(img.convert("L"))


def preprocessing(architecture: Architecture, weights: str = "", image_size: int | None = None) -> ImageClassification:
    """The preprocessing of torchvision's weights called `weights`, such as "VGG16_Weights.DEFAULT"; else ImageNet's."""
    transforms = next((member.transforms() for member in architecture.weights if str(member) == weights), None)
    return _sized(transforms or ImageClassification(crop_size=_CROP, resize_size=_RESIZE), image_size)


def preprocessing_of(
    record: SurgeryRecord, model: nn.Module, image_size: int | None = None, normalize: str = "auto"
) -> ImageClassification:
    """What images of a checkpoint go through: as its record has it, but for what is given here.

    Raises:
        ArchitectureError: as `own_preprocessing`.
        CheckpointError: what the record notes is out of range.
    """
    if record.task is not None and image_size is None:
        task = record.task
        kind = ImageClassification if len(task.mean) == 3 else _Grey
        return kind(crop_size=task.image_size, resize_size=task.resize_size, mean=task.mean, std=task.std)
    if record.architecture is not None:
        return preprocessing(record.architecture, str(record.provenance.get("weights")), image_size)
    noted = {"image_size": None, "normalize": "auto", **record.provenance}
    size, kind = image_size or noted["image_size"], normalize if normalize != "auto" else noted["normalize"]
    if size is not None and not (isinstance(size, int) and 1 <= size <= MAX_SIDE):
        raise CheckpointError(f"record.provenance.image_size: got {shown(size)}, expected 1 to {MAX_SIDE}")
    if kind not in ("auto", "imagenet", "none"):
        raise CheckpointError(f"record.provenance.normalize: got {shown(kind)}, expected auto, imagenet or none")
    return own_preprocessing(model, size, str(kind))


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
    if record.absorb_bias:
        return "other bits than it was made from: its biases were absorbed"
    return "other weights than it was made from: changed since the insertion"


def example(source: Pretrained) -> Tensor:
    """An input for planning: on the meta device, where nothing is computed, but for code that is not torchvision's."""
    (size,) = set(source.preprocess.crop_size)
    device = "meta" if source.architecture is not None else None
    return torch.zeros(1, len(source.preprocess.mean), size, size, device=device)


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


def _sized(transforms: ImageClassification, image_size: int | None) -> ImageClassification:
    if image_size is None:
        return transforms
    return ImageClassification(
        crop_size=image_size,
        resize_size=round(image_size * _RESIZE / _CROP),
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        interpolation=transforms.interpolation,
    )
