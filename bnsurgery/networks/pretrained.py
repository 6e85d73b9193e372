"""A network with its weights and its preprocessing, from a name or a file, without a random initialization first."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torchvision import models
from torchvision.models import WeightsEnum

from bnsurgery.errors import ArchitectureError, CheckpointError, printable
from bnsurgery.files.checkpoint import read_record
from bnsurgery.files.labels import noted_preprocessing
from bnsurgery.files.weights import WeightsFile, read_weights
from bnsurgery.images.preprocessing import NOTHING, Preprocessing, Wanted
from bnsurgery.records.architectures import NAMES, Architecture, identify, state_shapes

from . import factories
from .downloads import download
from .fitting import BEST_FIT, Choice, fill_, find
from .interface import preprocessing

_OWN_INPUTS = ("googlenet", "inception_v3")  # with weights they rescale their input, and drop their training heads


@dataclass(frozen=True)
class Pretrained:
    """A network in eval mode, ready to run.

    Attributes:
        architecture: torchvision's; the number of classes is the weights'.
        weights: their origin, in words.
        preprocess: from an image to its input: the weights' own, or ImageNet's, with the caller's changes.
    """

    model: nn.Module
    architecture: Architecture
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
        wanted: changes to the preprocessing; a file from `export` has its own in its metadata.
        seed: for "random", and for tensors that the file does not have.
        progress: show the download.

    Raises:
        CheckpointError: there are no such weights, or they are damaged, hostile, of another network or not finite.
        ArchitectureError: the image size is smaller than the network takes.
        DataError: the preprocessing does not go with the network.
    """
    if wanted.size is not None and min(wanted.size) < architecture.min_size:
        least = architecture.min_size
        raise ArchitectureError(f"image size {min(wanted.size)}: {architecture.name} takes {least} or more")
    known = ("DEFAULT", *architecture.weight_names, "random")
    _check_choice(choice, weights, known)
    noted = None if weights in known else noted_preprocessing(weights)
    if weights == "random":
        model, origin = _seeded(seed, lambda: architecture.build("cpu")), f"random, seed {seed}"
    else:
        file, origin = _file(weights, architecture.weights.__members__, progress)
        shapes = find(file, state_shapes(architecture.build()), choice).shapes
        architecture = identify(shapes, (architecture,)) or architecture
        model = _seeded(seed, lambda: architecture.build("cpu")) if choice.partial else architecture.build()
        fill_(model, architecture.name, file, choice)
        model.float()  # CPUs compute in single, not in half precision
    if noted is not None and noted.channels != "grey":
        preprocess = wanted.of(noted)
    else:
        preprocess = preprocessing(architecture, origin, wanted)
    return Pretrained(model, architecture, origin, preprocess)


def own_network(name: str, weights: str = "DEFAULT", seed: int = 0, choice: Choice = BEST_FIT) -> tuple[nn.Module, str]:
    """A network that is not torchvision's, by the name of what makes it, and where its weights came from, in words.

    Args:
        name: see `factories.build`.
        weights: a path to a file that holds its state dict; "DEFAULT" for torchvision's or timm's own, or those that
            the factory gives; "random" for torchvision's or timm's initialization.
        seed: for the random numbers that the factory draws.
        choice: which tensors of a file to take.

    Raises:
        ArchitectureError, CheckpointError: there is no such network, or these are not its weights.
    """
    _check_choice(choice, weights, ("DEFAULT", "random"))
    stock, timm = factories.is_torchvision(name), factories.is_timm(name)
    if weights == "random" and not (stock or timm):
        raise CheckpointError(f"weights 'random': '{name}' makes its own: leave `weights` out, or pass a file")
    if weights == "DEFAULT" and name in _OWN_INPUTS:
        raise ArchitectureError(
            f"model '{name}': torchvision makes it another network with its weights: write a function that returns "
            f"torchvision.models.{name}(weights='DEFAULT'), and pass file.py:function"
        )
    model = _seeded(seed, lambda: factories.build(name, pretrained=timm and weights == "DEFAULT"))
    if weights == "random":
        return model, f"random, seed {seed}"
    if weights == "DEFAULT" and not stock:
        return model, f"file {Path(name).name}" if factories.is_onnx(name) else "its own weights"
    file, origin = _file(weights, models.get_model_weights(name).__members__ if stock else {})
    fill_(model, name, file, choice)
    return model, origin


def recognise(path: Path, choice: Choice = BEST_FIT) -> Architecture:
    """The architecture that a plain weights file belongs to.

    Raises:
        CheckpointError: the file cannot be read, or fits none.
    """
    file = _plain_file(path)
    for candidate in map(Architecture, NAMES):
        fit = find(file, state_shapes(candidate.build()), replace(choice, partial=False))
        found = identify(fit.shapes, (candidate,))
        if found is not None and (fit.norm is None or choice.partial):
            return found
    norm = next((name for name in file.tensors if name.endswith("running_mean")), None)
    if norm is not None:
        raise CheckpointError(f"'{path}': its network has BatchNorm already ('{printable(norm)}'): nothing to insert")
    raise CheckpointError(f"'{path}': its keys and shapes fit none of the architectures of `bnsurgery archs`")


def _file(weights: str, members: Mapping[str, WeightsEnum], progress: bool = False) -> tuple[WeightsFile, str]:
    """The content of torchvision's weights of that name, or of the file at that path; and its origin, in words."""
    if weights in members:
        return download(members[weights], progress=progress), str(members[weights])
    file = _plain_file(weights)
    return file, f"file {file.path.name}"


def _seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _check_choice(choice: Choice, weights: str, known: tuple[str, ...]) -> None:
    if weights in known and choice != BEST_FIT:
        raise CheckpointError(f"weights '{weights}': a key, a prefix and partial are for weights from a file")
    if weights not in known and not Path(weights).exists():
        raise CheckpointError(f"weights '{weights}': no such file, nor one of {', '.join(known)}")


def _plain_file(path: str | Path) -> WeightsFile:
    """The weights in a file that is no checkpoint of an inserted network."""
    file = read_weights(path)
    if read_record(path) is not None:
        raise CheckpointError(
            f"'{path}' holds a network that has been inserted into already. Fold it first: bnsurgery fold {path}"
        )
    return file
