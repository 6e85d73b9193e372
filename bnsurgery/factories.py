"""A network that is not torchvision's: made by a function that the user names. This runs the user's code, by design."""

import importlib
import importlib.util
import sys
from pathlib import Path

from torch import nn

from .errors import ArchitectureError


def build(name: str) -> nn.Module:
    """The network that "package.module:factory" or "file.py:factory" makes, in eval mode.

    The factory is called without arguments. Nothing read from a checkpoint ever gets here.

    Raises:
        ArchitectureError: no such module or function, or it fails, or what it returns is no network.
    """
    place, separator, function = name.rpartition(":")
    if not separator or not place or not function.isidentifier():
        raise ArchitectureError(f"model '{name}': expected package.module:factory or file.py:factory")
    try:
        factory = getattr(_module(place), function)
    except ModuleNotFoundError as error:
        raise ArchitectureError(f"model '{name}': {error}. Install it, or give the path of a .py file.") from error
    except AttributeError:
        raise ArchitectureError(f"model '{name}': '{place}' has no '{function}'") from None
    try:
        model = factory()
    except Exception as error:  # the user's own code
        raise ArchitectureError(f"model '{name}': calling it failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ArchitectureError(f"model '{name}': returned a {type(model).__name__}, expected a torch.nn.Module")
    return model.eval()


def _module(place: str) -> object:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place).resolve()
    if not path.is_file():
        raise ArchitectureError(f"model: '{place}': no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickle look a class's module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code
        raise ArchitectureError(f"model: '{place}': cannot be run: {type(error).__name__}: {error}") from error
    return module
