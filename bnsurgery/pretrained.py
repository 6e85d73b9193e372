"""A network with its weights and its preprocessing, from a name or a file, without a random initialization first."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum
from torchvision.transforms._presets import ImageClassification

from .checkpoint import read_record
from .errors import ArchitectureError, BNSurgeryError, CheckpointError
from .models import Architecture, identify, state_shapes
from .surgery_record import SurgeryRecord
from .weights import check_finite, describe_mismatch, download, read_state_dict

_CROP = 224
_RESIZE = 256


@dataclass(frozen=True)
class Pretrained:
    """A network in eval mode, ready to run.

    Attributes:
        architecture: what it is; the number of classes is the weights'.
        weights: where they came from, in words.
        preprocess: from a PIL image to a normalized tensor: the weights' own, or ImageNet's.
    """

    model: nn.Module
    architecture: Architecture
    weights: str
    preprocess: ImageClassification


def load(
    architecture: Architecture, weights: str, *, image_size: int | None = None, seed: int = 0, progress: bool = False
) -> Pretrained:
    """The network `architecture` with `weights`.

    Args:
        weights: "DEFAULT" or another name in torchvision's enum (downloaded unless cached), "random" (torchvision's
            initialization, seeded), or a path to a .pth, .pt or .safetensors file holding a state dict.
        image_size: side of the images in pixels; the weights' own where None.
        seed: for "random".
        progress: show the download.

    Raises:
        CheckpointError: no such weights, or they are damaged, hostile, of another network or not finite.
        ArchitectureError: `image_size` is below what the network takes.
    """
    if image_size is not None and image_size < architecture.min_size:
        raise ArchitectureError(
            f"image size {image_size} is too small for {architecture.name}, which takes {architecture.min_size} or more"
        )
    if weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = architecture.build("cpu")
        description = f"random, seed {seed}"
    elif weights in ("DEFAULT", *architecture.weight_names):
        member: WeightsEnum = architecture.weights[weights]
        model = _fill(architecture, download(member, progress=progress), member.url)
        description = str(member)
    else:
        path = Path(weights)
        if not path.exists():
            known = ", ".join(["DEFAULT", *architecture.weight_names, "random"])
            raise CheckpointError(f"weights '{weights}': no such file, nor one of {known}")
        state = read_state_dict(path)
        _refuse_inserted(path, state)
        architecture = identify({name: tensor.shape for name, tensor in state.items()}, (architecture,)) or architecture
        model, description = _fill(architecture, state, weights), f"file {path.name}"
    return Pretrained(model, architecture, description, preprocessing(architecture, description, image_size))


def preprocessing(architecture: Architecture, weights: str = "", image_size: int | None = None) -> ImageClassification:
    """The preprocessing of torchvision's weights called `weights`, such as "VGG16_Weights.DEFAULT"; else ImageNet's."""
    transforms = next((member.transforms() for member in architecture.weights if str(member) == weights), None)
    return _sized(transforms or ImageClassification(crop_size=_CROP, resize_size=_RESIZE), image_size)


def recognise(path: Path) -> Architecture:
    """The architecture that a plain weights file belongs to.

    Raises:
        CheckpointError: the file cannot be read, or fits none.
    """
    state = read_state_dict(path)
    _refuse_inserted(path, state)
    found = identify({name: tensor.shape for name, tensor in state.items()})
    if found is None:
        raise CheckpointError(f"'{path}': its keys and shapes fit none of the architectures of `bnsurgery archs`")
    return found


def origin(record: SurgeryRecord, untouched: bool) -> str:
    """What a checkpoint's folded weights are, in words; `untouched` where their digest is the original's."""
    if untouched:
        return "the weights it was made from, bit for bit"
    if record.absorb_bias:
        return "other bits than it was made from: its biases were absorbed"
    return "other weights than it was made from: changed since the insertion"


def device(name: str) -> torch.device:
    """The device called `name`, made sure of.

    Raises:
        BNSurgeryError: there is no such device here.
    """
    try:
        found = torch.device(name)
        torch.empty(1, device=found).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BNSurgeryError(f"device '{name}' cannot be used here: {str(error).splitlines()[0][:100]}") from None
    return found


def example(preprocess: ImageClassification) -> Tensor:
    """An input of the right shape on the meta device, for planning."""
    (size,) = set(preprocess.crop_size)
    return torch.empty(1, 3, size, size, device="meta")


def fill_(model: nn.Module, state: dict[str, Tensor], origin: str, name: str) -> None:
    """Give `model`, which is called `name`, the tensors of `state`, which came from `origin`.

    Raises:
        CheckpointError: keys or shapes differ, or a value is not finite.
    """
    mismatch = describe_mismatch(state_shapes(model), {name: tensor.shape for name, tensor in state.items()})
    if mismatch:
        raise CheckpointError(f"weights '{origin}' are not those of {name}: {mismatch}")
    check_finite(state, origin)
    model.load_state_dict(state, assign=True)


def _fill(architecture: Architecture, state: dict[str, Tensor], origin: str) -> nn.Module:
    """Build on the meta device and assign the tensors; half precision becomes float32, which CPUs compute in."""
    model = architecture.build("meta")
    fill_(model, state, origin, architecture.name)
    return model.float()


def _refuse_inserted(path: Path, state: dict[str, Tensor]) -> None:
    if read_record(path) is not None:
        raise CheckpointError(
            f"'{path}' holds a network that has been inserted into already. Fold it first: bnsurgery fold {path}"
        )
    norm = next((name for name in state if name.endswith("running_mean")), None)
    if norm is not None:
        raise CheckpointError(f"'{path}' holds a network that has BatchNorm already ('{norm}'). Nothing to insert.")


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
