"""A network that is not torchvision's: timm's, or made by a function that the user names, whose code runs by design."""

import difflib
import importlib
import importlib.util
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

from torch import nn

from .errors import ArchitectureError, CheckpointError

_TIMM = "timm:"


def is_timm(name: str) -> bool:
    """Whether `name` asks for one of timm's networks."""
    return name.startswith(_TIMM)


def build(name: str, *, pretrained: bool = False) -> nn.Module:
    """The network that "package.module:factory" or "file.py:factory" makes, or timm's "timm:NAME", in eval mode.

    The factory is called without arguments. Nothing read from a checkpoint ever gets here.

    Args:
        name: as above.
        pretrained: let timm fill it with its weights, downloaded unless cached.

    Raises:
        ArchitectureError: no such module, function or timm network, or it fails, or what it returns is no network.
        CheckpointError: timm cannot get the weights.
    """
    if is_timm(name):
        return _timm(name, pretrained)
    place, separator, function = name.rpartition(":")
    if not separator or not place or not function.isidentifier():
        raise ArchitectureError(f"model '{name}': expected package.module:factory, file.py:factory or timm:NAME")
    with redirect_stdout(sys.stderr):  # what this code prints is no part of a command's output
        factory = getattr(_module(place), function, None)
    if factory is None:
        raise ArchitectureError(f"model '{name}': '{place}' has no '{function}'")
    try:
        with redirect_stdout(sys.stderr):
            model = factory()
    except (Exception, SystemExit) as error:  # the user's own code
        raise ArchitectureError(f"model '{name}': calling it failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ArchitectureError(f"model '{name}': returned a {type(model).__name__}, expected a torch.nn.Module")
    return model.eval()


def _timm(name: str, pretrained: bool) -> nn.Module:
    if importlib.util.find_spec("timm") is None:
        raise ArchitectureError(f"model '{name}': timm is not installed: pip install timm")
    import timm

    kind = name.removeprefix(_TIMM)
    if not timm.is_model(kind):
        close = difflib.get_close_matches(kind, timm.list_models(), n=3)
        raise ArchitectureError(f"model '{name}': timm has none of that name. {_did_you_mean(close)}".rstrip())
    try:
        model: nn.Module = timm.create_model(kind, pretrained=pretrained)
    except Exception as error:  # the hub's, of many kinds
        raise CheckpointError(
            f"model '{name}': timm cannot load its weights: {str(error).splitlines()[0]} Pass --weights PATH, or "
            "--weights random to try without."
        ) from error
    return model.eval()


def _did_you_mean(close: list[str]) -> str:
    return f"Did you mean {' or '.join(_TIMM + name for name in close)}?" if close else ""


def _module(place: str) -> object:
    if not place.endswith(".py"):
        return _package(place)
    path = Path(os.path.realpath(place))  # resolve raises where a link leads back to itself
    if not path.is_file():
        raise ArchitectureError(f"model: '{place}': no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickle look a class's module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's own code
        raise ArchitectureError(f"model: '{place}': cannot be run: {type(error).__name__}: {error}") from error
    return module


def _package(place: str) -> object:
    """Import a module by name, from the current folder too, which an installed command does not look into by itself."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise ArchitectureError(f"model '{place}': {error}. Install it, or give the path of a .py file.") from error
    except (Exception, SystemExit) as error:  # the user's own code
        raise ArchitectureError(f"model '{place}': cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(Path.cwd()))
