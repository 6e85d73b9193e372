"""Networks by name, and other results of functions that a user names. Their code runs by design."""

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from torchvision import models

from bnsurgery.errors import ArchitectureError, CheckpointError, printable
from bnsurgery.records.record import SurgeryRecord
from bnsurgery.text.words import with_article

from . import onnx_files
from .third_party import errors_as

_TIMM = "timm:"
# The folders that a user's code came from in this process, and the files in them that were run: they stay importable.
_folders: dict[str, set[str]] = {}
_files: dict[str, ModuleType] = {}  # the modules that were run as files, by their names in sys.modules


def is_timm(name: str) -> bool:
    """Whether `name` is that of one of timm's networks."""
    return name.startswith(_TIMM)


def is_onnx(name: str) -> bool:
    """Whether `name` is that of an ONNX file."""
    return name.endswith(onnx_files.SUFFIX)


def is_torchvision(name: str) -> bool:
    """Whether `name` is one of torchvision's classifiers, as `torchvision.models.list_models` has it."""
    return name in models.list_models(module=models)


def build(name: str, *, pretrained: bool = False) -> nn.Module:
    """The network called "timm:NAME", "net.onnx" or, without weights, "resnet18" as in torchvision, in eval mode.

    Any other name is that of a `function` that makes the network. Nothing read from a checkpoint ever gets here.

    Args:
        pretrained: let timm fill its network with its weights, downloaded unless cached.

    Raises:
        ArchitectureError: as `function` and its call; or timm has no such network, or the function returns none.
        CheckpointError: timm cannot get the weights, or as `onnx_files.from_onnx`.
    """
    if is_onnx(name):
        return onnx_files.from_onnx(name)
    if is_timm(name):
        model = _timm(name, pretrained)
    elif is_torchvision(name):
        model = models.get_model(name, weights=None)
    else:
        model = function(name)()
    if not isinstance(model, nn.Module):
        raise ArchitectureError(
            f"model '{name}': returned {with_article(type(model).__name__)}, expected a torch.nn.Module"
        )
    return model.eval()


def original(record: SurgeryRecord, file: Path) -> str | None:
    """The ONNX file that a checkpoint's network was made from, in its or the current folder; None for other networks.

    Raises:
        CheckpointError: the ONNX file is in neither folder.
    """
    if "onnx" not in record.provenance:
        return None
    found = onnx_files.find(str(record.provenance["onnx"]), file.parent, Path.cwd())
    if found is None:
        made = printable(str(record.provenance.get("model", "")))
        raise CheckpointError(
            f"'{file}' was made from an ONNX file, {made}, which is in neither folder: pass `model=FILE.onnx`"
        )
    return str(found)


def names_code(name: str) -> bool:
    """Whether `name` is "package.module:function" or "file.py:function", and not that of a file or folder."""
    place, _, called = name.rpartition(":")
    return bool(place) and called.isidentifier() and not Path(name).exists()


def function(name: str, what: str = "model", gives: str = "a network") -> Callable[[], Any]:
    """The function called "package.module:function" or "file.py:function", to be called without arguments.

    Its prints go to stderr, and its errors become ArchitectureErrors. Modules beside the file, or in the current folder
    where a module is named, can be imported as under `python file.py`: also by functions that are called later, and in
    child processes. A process has one module of a name, so modules of the same name in two folders are refused.

    Args:
        what: the field that has the name, for messages: "model", "data".
        gives: the result that is expected, for messages.

    Raises:
        ArchitectureError: there is no such function, its module cannot be run, or it imports a module that another
            folder has under the same name.
    """
    place, _, called = name.rpartition(":")
    if not place or not called.isidentifier():
        if name.endswith(".py"):
            raise ArchitectureError(f"{what} '{name}': name the function in it that gives {gives}: {name}:FUNCTION")
        also = " or timm:NAME" if what == "model" else ""
        raise ArchitectureError(f"{what} '{name}': expected package.module:factory, file.py:factory{also}")
    found = _found(place, called, what)
    if found is None:
        raise ArchitectureError(f"{what} '{name}': '{place}' has no '{called}'")
    if isinstance(found, nn.Module) or not callable(found):
        raise ArchitectureError(
            f"{what} '{name}': '{called}' is {with_article(type(found).__name__)}, expected a function that returns "
            f"{gives}. Write one, such as def make(): return {called}, and pass {place}:make"
        )

    def call() -> Any:
        result = running(name, found, what)
        _refuse_namesakes(name, _folders)
        return result

    return call


def running(name: str, found: Callable[[], Any], what: str) -> Any:
    """The result of a user's code, with its prints on stderr; an ArchitectureError where it fails."""
    with _users_code(name.rpartition(":")[0], f"{what} '{name}': calling it failed"):
        return found()


def _timm(name: str, pretrained: bool) -> Any:
    if importlib.util.find_spec("timm") is None:
        raise ArchitectureError(f"model '{name}': timm is not installed: pip install timm")
    import timm

    kind = name.removeprefix(_TIMM)
    if not timm.is_model(kind):
        close = " or ".join(_TIMM + match for match in difflib.get_close_matches(kind, timm.list_models(), n=3))
        hint = f" Did you mean {close}?" if close else ""
        raise ArchitectureError(f"model '{name}': timm has none of that name.{hint}")
    advice = "pass `weights=PATH`, or `weights='random'` to try without"
    with errors_as(CheckpointError, f"model '{name}': timm cannot load its weights: {advice}"):
        return timm.create_model(kind, pretrained=pretrained)


@contextmanager
def _users_code(place: str, problem: str) -> Iterator[None]:
    """Keep a user's prints out of a command's output, the command's words from the code, and its errors in a line."""
    words, sys.argv = sys.argv, [place]
    try:
        with redirect_stdout(sys.stderr):
            yield
    except StopIteration:
        raise
    except (Exception, SystemExit) as error:
        advice = ""
        if isinstance(error, ModuleNotFoundError):
            advice = ". Install it, or add the folder that holds it to PYTHONPATH"
        elif isinstance(error, ImportError) and "relative import" in str(error):
            advice = ". The file is part of a package: from the folder above that, pass package.module:function"
        raise ArchitectureError(f"{problem}: {type(error).__name__}: {error}{advice}") from error
    finally:
        sys.argv = words


def _found(place: str, called: str, what: str) -> object:
    """The object of a name in a module, which may be in the current folder, or in a file, which is run; or None."""
    path = Path(os.path.realpath(place)) if place.endswith(".py") else None  # resolve raises for a link to itself
    if path is not None and not path.is_file():
        raise ArchitectureError(f"{what} '{place}': no such file")
    folder, stem = (path.parent, path.stem) if path is not None else (Path.cwd(), "")
    _make_importable(str(folder), place, stem)
    with _users_code(place, f"{what} '{place}': cannot be {'imported' if path is None else 'run'}"):
        return getattr(importlib.import_module(place) if path is None else _run(path), called, None)


def _run(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if sys.modules.get(path.stem) is _files.get(path.stem):  # not one that is installed
        # Dataclasses and pickle look a class's module up there.
        sys.modules[path.stem] = _files[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _make_importable(folder: str, place: str, stem: str) -> None:
    """Put `folder` in front of the search path, which child processes inherit; `stem` is to be run as a file."""
    importlib.invalidate_caches()
    folders = {**_folders, folder: {*_folders.get(folder, ()), stem}}
    _refuse_namesakes(place, folders)
    for name, module in list(_files.items()):
        if _home(module) != folder and _has(folder, name):
            del _files[name], sys.modules[name]  # or it would be taken for this folder's
    sys.path[:] = [folder, *(other for other in sys.path if other != folder)]
    _folders.update(folders)


def _refuse_namesakes(place: str, folders: Mapping[str, set[str]]) -> None:
    """Refuse to go on where a module was imported from one folder that another has, too: both would get the first's."""
    for name, module in list(sys.modules.items()):
        home = _home(module)
        if "." in name or home not in folders or module is _files.get(name):
            continue
        other = next((at for at, run in folders.items() if at != home and name not in run and _has(at, name)), None)
        if other is not None:
            raise ArchitectureError(
                f"model '{place}': '{name}' was imported from '{home}', and '{other}' has one of that name, too. Use a "
                "process for each, or give them different names."
            )


def _home(module: ModuleType) -> str:
    """The folder that a top-level module was found in; "." where it is built in."""
    file = Path(getattr(module, "__file__", None) or "")
    return str((file.parent if file.name == "__init__.py" else file).parent)


def _has(folder: str, name: str) -> bool:
    spec = PathFinder.find_spec(name, [folder])
    return spec is not None and spec.origin is not None  # a folder of that name is no module yet
