"""A network's inputs and outputs: how images are preprocessed, and what the classes are called."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum

from bnsurgery.errors import ArchitectureError, CheckpointError, UntraceableModelError, shown
from bnsurgery.graph.layer_kinds import LAYERS
from bnsurgery.graph.tracing import Trace, is_layer
from bnsurgery.images.preprocessing import MAX_SIDE, NORMALIZE, NOTHING, Preprocessing, Wanted
from bnsurgery.records.architectures import Architecture
from bnsurgery.records.record import SurgeryRecord, carries_record
from bnsurgery.records.record import record as record_of
from bnsurgery.surgery.copies import sharing_tensors
from bnsurgery.surgery.folding import strip_

from . import onnx_files

_CROP, _RESIZE = 224, 256  # torchvision's
_ADVICE = "pass `data=FILE.py:FUNCTION`, a function that gives batches of the network's inputs"


def preprocessing(architecture: Architecture, weights: str = "", wanted: Wanted = NOTHING) -> Preprocessing:
    """The preprocessing of torchvision's weights called `weights`, such as "VGG16_Weights.DEFAULT"; else ImageNet's."""
    own = Preprocessing(_CROP, _CROP, _RESIZE)
    member = _member(architecture, weights)
    if member is not None:
        found = member.transforms()
        (size,), (resize,) = set(found.crop_size), set(found.resize_size)
        own = replace(own, height=size, width=size, resize=resize, mean=tuple(found.mean), std=tuple(found.std))
    return wanted.of(own)


def own_preprocessing(model: nn.Module, wanted: Wanted = NOTHING) -> Preprocessing:
    """The preprocessing of images for a network that is not torchvision's.

    A network of timm's brings its preprocessing. Other colour images are normalized as ImageNet's, and grey images are
    left between 0 and 1.

    Args:
        model: its first layer tells whether images are grey.
        wanted: changes to it.

    Raises:
        ArchitectureError: the size is not known, the first layer takes neither 1 nor 3 channels, or the network comes
            from an ONNX file of inputs (N, H, W, C).
        DataError: the changes do not go with the network.
    """
    config, channels, origin = _timm_config(model), input_channels(model), onnx_files.source(model)
    if origin is not None and onnx_files.channels_last(origin.example[0].shape):
        raise ArchitectureError(f"the ONNX file takes inputs of shape (N, H, W, C), expected (N, C, H, W): {_ADVICE}")
    if channels not in (1, 3):
        raise ArchitectureError(f"{type(model).__name__} takes {channels} channels, expected 1 or 3: {_ADVICE}")
    height, width = wanted.size or (config.get("input_size") or (None, None))[-2:]
    if height is None or width is None:
        raise ArchitectureError("the image size of a network of your own is not known: pass `image_size`")
    own = Preprocessing(height, width, round(min(height, width) * _RESIZE / _CROP))
    if channels == 1:
        own = replace(own, mean=(0.0,), std=(1.0,), channels="grey")
    elif "mean" in config and "std" in config:
        kind = config.get("interpolation") or own.interpolation
        own = replace(own, mean=tuple(config["mean"]), std=tuple(config["std"]), interpolation=kind)
    return wanted.of(own)


def noted_preprocessing(record: SurgeryRecord) -> Preprocessing | None:
    """The preprocessing of a checkpoint's images, where its record has one or names torchvision's weights."""
    if record.task is not None:
        return record.task.preprocessing
    weights = str(record.provenance.get("weights"))
    if record.architecture is None or _member(record.architecture, weights) is None:
        return None
    return preprocessing(record.architecture, weights)


def preprocessing_of(record: SurgeryRecord, model: nn.Module, wanted: Wanted = NOTHING) -> Preprocessing:
    """The preprocessing of a checkpoint's images: its record's, with the changes in `wanted`.

    Raises:
        ArchitectureError: as `own_preprocessing`.
        CheckpointError: the record's is out of range.
        DataError: the changes do not go with the network.
    """
    if record.task is not None:
        if record.task.preprocessing is None:
            name, task = type(model).__name__, record.provenance.get("task")
            raise ArchitectureError(f"{name} was fine-tuned on '{task}', not on images: {_ADVICE}")
        return wanted.of(record.task.preprocessing)
    if record.architecture is not None:
        return preprocessing(record.architecture, str(record.provenance.get("weights")), wanted)
    # Files of format 1 and 2 have it in the provenance.
    size, kind = record.provenance.get("image_size"), record.provenance.get("normalize", "auto")
    if size is not None and not (isinstance(size, int) and 1 <= size <= MAX_SIDE):
        raise CheckpointError(f"record.provenance.image_size: got {shown(size)}, expected 1 to {MAX_SIDE}")
    if kind not in NORMALIZE:
        raise CheckpointError(f"record.provenance.normalize: got {shown(kind)}, expected {', '.join(NORMALIZE)}")
    return wanted.of(own_preprocessing(model, Wanted(wanted.image_size or size, str(kind))))


def takes_images(record: SurgeryRecord, model: nn.Module) -> bool:
    """Whether a checkpoint's input is an image, as far as its record and its first layer tell."""
    if record.task is not None:
        return record.task.preprocessing is not None
    is_image = record.input_shape is None or len(record.input_shape) == 3
    return record.architecture is not None or (is_image and input_channels(model) in (1, 3))


def classes_of(record: SurgeryRecord) -> tuple[str, ...]:
    """The names of a checkpoint's outputs: its task's classes, or those of torchvision's weights."""
    if record.task is not None and record.task.classes:
        return record.task.classes
    return categories(record.architecture, str(record.provenance.get("weights")))


def categories(architecture: Architecture | None, weights: str) -> tuple[str, ...]:
    """The names of the outputs of torchvision's weights called `weights`; empty for others."""
    member = _member(architecture, weights)
    return tuple(member.meta["categories"]) if member else ()


def _member(architecture: Architecture | None, weights: str) -> WeightsEnum | None:
    members = architecture.weights if architecture is not None else ()
    return next((member for member in members if str(member) == weights), None)


def _timm_config(model: nn.Module) -> dict[str, Any]:
    return getattr(model, "pretrained_cfg", None) or {}


def noise(model: nn.Module, size: tuple[int, int] | None = None) -> Tensor:
    """Two images to try a network on, (2, C, *size): by default of timm's height and width, else 224."""
    height, width = size or (_timm_config(model).get("input_size") or (_CROP, _CROP))[-2:]
    return torch.randn(2, input_channels(model), height, width, generator=torch.Generator().manual_seed(0))


def example(preprocess: Preprocessing, *, on_meta: bool) -> Tensor:
    """An input for planning: on the meta device, where nothing is computed, unless a user's code runs."""
    return torch.zeros(1, *preprocess.shape, device="meta" if on_meta else None)


def input_channels(model: nn.Module) -> int:
    """Colour channels that a network takes: its record's, else its first layer's; 3 where that is no conv."""
    if carries_record(model):
        record = record_of(model)
        noted = record.task.preprocessing if record.task is not None else None
        shape = noted.shape if noted is not None else record.input_shape
        if shape is not None:
            return shape[0]
        model = sharing_tensors(model)
        strip_(model, record.sites)  # a layer and its norm are one module
    try:
        first = next((node.meta.get("module") for node in Trace(model).nodes if is_layer(node)), None)
    except UntraceableModelError:  # without an input: then the first in the code
        first = next((module for module in model.modules() if isinstance(module, LAYERS)), None)
    return first.in_channels if isinstance(first, LAYERS) and not isinstance(first, nn.Linear) else 3
