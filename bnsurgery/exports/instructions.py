"""How to load an exported file and what to feed the network in it, in words and code."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from bnsurgery.errors import shown
from bnsurgery.images.preprocessing import Preprocessing
from bnsurgery.records.record import SurgeryRecord
from bnsurgery.running.batches import Inputs
from bnsurgery.surgery.foldable import OWN_NORMS
from bnsurgery.text.tables import WIDTH
from bnsurgery.text.words import with_article

from .formats import PICKLES
from .writers import Axes

Shapes = Sequence[Sequence[int | str]]
_INDENT = " " * 6
_LOAD_FOLDED = """\
model = ...  # the {} with BatchNorm
state = {}
for name, module in list(model.named_modules()):
    if hasattr(module, "running_var") and f"{{name}}.running_var" not in state:
        model.set_submodule(name, torch.nn.Identity())
    elif f"{{name}}.bias" in state and module.bias is None:
        module.bias = torch.nn.Parameter(state[f"{{name}}.bias"])
model.load_state_dict(state)
"""


def usage(to: str, path: Path, name: str, record: SurgeryRecord, keep_bn: bool, gained: Sequence[str]) -> str:
    """Python that loads the file, with the network called `name`, without this package; `gained` layers got a bias."""
    if to == "onnx":
        return f'onnxruntime.InferenceSession("{path}")'
    if to == "exported-program":
        return f'torch.export.load("{path}").module()'
    if to == "state-dict" and keep_bn:
        return f"{_tensors(path)}, for a network with BatchNorm in these places"
    task, model = record.task, str(record.provenance.get("model", record.model))
    changes = [f"with {len(task.classes)} classes"] if task is not None and task.head is not None else []
    changes += _with_biases(gained)
    if record.architecture is not None:
        made = f"torchvision.models.{name}(num_classes={record.architecture.num_classes})"
    elif "onnx" in record.provenance:
        made = f'bnsurgery.from_onnx("{model}")' + (f"  # {', '.join(changes)}" if changes else "")
    else:
        made = f"...  # {', '.join([f'what {model} makes', *changes])}"
    return _loaded_into(made, path)


def usage_of_folded(path: Path, model: nn.Module, folded: nn.Module, gained: Sequence[str]) -> str:
    """Python that loads the tensors of `folded`, whose own BatchNorm was folded, into the class of `model`."""
    name = type(model).__name__
    norms = [fqn for fqn, module in model.named_modules() if isinstance(module, OWN_NORMS)]
    if all(type(folded.get_submodule(fqn)) is nn.Identity for fqn in norms):
        return textwrap.indent(_LOAD_FOLDED.format(name, _tensors(path)), _INDENT).strip()
    made = f"...  # {with_article(name)} with each norm's activation, or nn.Identity, in its place"
    return _loaded_into(", ".join([made, *_with_biases(gained)]), path)


def feed(
    shapes: Shapes, preprocessing: Preprocessing | None = None, classes: Sequence[str] = (), in_file: bool = False
) -> str:
    """The inputs, their preprocessing and the classes, in words; `in_file` where the metadata has these, too."""
    lines = [f"input of shape ({', '.join(map(str, shape))})" for shape in shapes]
    if preprocessing is not None:
        lines += textwrap.wrap(str(preprocessing), WIDTH - len(_INDENT))
    if classes:
        lines.append(f"outputs: {len(classes)} classes, from {shown(classes[0])} to {shown(classes[-1])}")
    if in_file and (preprocessing is not None or classes):
        lines.append("(in the file's metadata, too)")
    return "\n".join(lines)


def shapes(inputs: Inputs, axes: Axes = ()) -> Shapes:
    """The shape of every tensor in the inputs, with the names of dimensions of any size; by default the batch's."""
    named = zip(inputs.tensors, axes or [{0: "batch"}] * len(inputs.tensors), strict=True)
    return [[names.get(at, size) for at, size in enumerate(tensor.shape)] for tensor, names in named]


def _loaded_into(made: str, path: Path) -> str:
    return f"model = {made}\n{_INDENT}model.load_state_dict({_tensors(path)})"


def _with_biases(gained: Sequence[str]) -> list[str]:
    return [f"with bias=True in {', '.join(gained)}"] if gained else []


def _tensors(path: Path) -> str:
    if path.suffix in PICKLES:
        return f'torch.load("{path}", weights_only=True)'
    return f'safetensors.torch.load_file("{path}")'
