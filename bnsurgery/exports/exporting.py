"""Write a network for those who do not have this package: stock state dicts, ONNX, torch.export."""

import importlib.util
import inspect
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from bnsurgery.errors import CalibrationError, ExportError, shown
from bnsurgery.files.checkpoint import current_record, has_place_for, torch_save
from bnsurgery.files.labels import labels, sort_metadata
from bnsurgery.files.weights import read_tensors
from bnsurgery.files.writing import atomic_write
from bnsurgery.images.preprocessing import Preprocessing
from bnsurgery.networks import interface, onnx_files
from bnsurgery.networks.third_party import quiet
from bnsurgery.records.architectures import Architecture
from bnsurgery.records.record import SurgeryRecord, state_digest
from bnsurgery.running.batches import Inputs, join
from bnsurgery.running.calls import placed
from bnsurgery.running.modes import evaluate, evaluating
from bnsurgery.statistics.verification import EquivalenceReport, verify
from bnsurgery.surgery.copies import on_meta
from bnsurgery.surgery.foldable import OWN_NORMS
from bnsurgery.surgery.folding import fold as fold_model
from bnsurgery.surgery.folding import gained_biases
from bnsurgery.surgery.stock import to_torch
from bnsurgery.text.tables import WIDTH
from bnsurgery.text.words import with_article

from .programs import AXES, Job, axes_of, compare, compare_doubled, write_onnx, write_program

Format = Literal["torchvision-bn", "torchvision", "state-dict", "onnx", "exported-program"]
_PROGRAMS = {"onnx": ".onnx", "exported-program": ".pt2"}
SUFFIXES = dict.fromkeys(("torchvision-bn", "torchvision", "state-dict"), ".safetensors") | _PROGRAMS
_PICKLES = (".pth", ".pt")
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
_TOLERANCE = 1e-5  # of the largest output: the float32 rounding of a deep network stays below


@dataclass(frozen=True)
class Export:
    """The result of `export`: the file, and how it compares with the network.

    Attributes:
        path: the file.
        format: one of `SUFFIXES`.
        network: what the file holds, such as "vgg16_bn".
        origin: where the weights come from, in words.
        folds_back: whether they are, to the bit, the weights before the insertion.
        equivalence: of the network with BatchNorm to the one read back from the file, in eval mode.
        usage: a line or more of Python that load it without this package.
        feed: the input's shape, preprocessing and class names, in words, as far as they are known.
        new_biases: layers of the folded network that had no bias and got one: their class has to have bias=True there.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
        >>> bn_model = bnsurgery.insert(model, [torch.randn(8, 3, 16, 16)])
        >>> exported = bnsurgery.export(bn_model, "net.pth", to="state-dict", overwrite=True)
        >>> exported.folds_back, exported.equivalence.bit_identical
        (True, True)
    """

    path: str
    format: str
    network: str
    origin: str
    folds_back: bool
    equivalence: EquivalenceReport
    usage: str
    feed: str = ""
    new_biases: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.network}, {self.format}: {self.origin}\n{self.proof}\n\n{self.steps}"

    @property
    def steps(self) -> str:
        """The file, how to load it, and what to feed it."""
        feed = "".join(f"\n      {line}" for line in self.feed.splitlines())
        return f"Wrote {self.path}.\nNext: {self.usage}{feed}"

    @property
    def proof(self) -> str:
        """`equivalence` in a line: float32 rounds when weights are folded or another runtime computes."""
        if self.equivalence.bit_identical:
            return str(self.equivalence)
        return (
            f"eval mode    the same function to {self.equivalence.max_rel:.1e} of the largest output, on "
            f"{self.equivalence.samples} inputs (rounding; more than {_TOLERANCE:g} is refused)"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"output": self.path, **asdict(self)}


def export(
    bn_model: nn.Module,
    path: str | PathLike[str],
    *,
    to: Format,
    example: Any = None,
    preprocessing: Preprocessing | None = None,
    keep_bn: bool = False,
    bias: Literal["add", "refuse"] = "add",
    dynamic: Sequence[str] = ("batch",),
    overwrite: bool = False,
) -> Export:
    """Write `bn_model` in a format that needs nothing of this package, read it back, and compare.

    - "state-dict": the folded network's tensors under the original's keys; safetensors, or `torch.save`'s format where
      the file is called .pth or .pt.
    - "torchvision": the same, after a check that torchvision's own class takes it.
    - "torchvision-bn": for torchvision's vgg*_bn: BatchNorm after the convolutions stays, the rest is folded.
    - "onnx": the folded network in eval mode for any batch size, or for one image where it takes no more at a time; run
      once in onnxruntime. A network from `from_onnx` keeps its graph, with the batch size that this is for, and gets
      new initializers where tensors changed. With the new head of a fine-tuning, torch.onnx writes a new graph.
    - "exported-program": the same by `torch.export`.

    The file gets the preprocessing of images and the names of the classes, where they are known, as JSON called
    "preprocessing" (the fields of `bnsurgery.images.preprocessing.Preprocessing`, and the formula) and "classes":
    in the metadata of safetensors and ONNX, in the `extra_files` preprocessing.json and classes.json of a program.

    Args:
        bn_model: from `insert` or `load`, trained since or not; not changed.
        path: the file to write.
        to: the format.
        example: an input batch, as for `plan`; needed where the input is not one tensor of real numbers. Several inputs
            may also come as a plain tuple, (a, b), where `forward` needs them.
        preprocessing: of images; the record's where None.
        keep_bn: leave the BatchNorm layers in, as torch's own; "torchvision" has no place for them.
        bias: as for `fold`; `Export.new_biases` and `usage` name the biases that were added.
        dynamic: which sizes of the input may differ from the example's in "onnx" and "exported-program": any of
            "batch", "height" and "width", the latter of images (N, C, H, W). Each is tried at twice the example's.
        overwrite: whether an old file may be replaced.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
        >>> bn_model = bnsurgery.insert(model, [torch.randn(8, 3, 16, 16)])
        >>> exported = bnsurgery.export(bn_model, "net.pt2", to="exported-program", overwrite=True)
        >>> torch.export.load("net.pt2").module()(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 4, 12, 12])

    Raises:
        ExportError: the format has no place for the network, a package is missing, or what was written computes
            something else; nothing is left behind.
        FoldError: a norm cannot be folded.
        CalibrationError: the network does not take the example.
        ValueError: `to` or `dynamic` is none of the above.
        CheckpointError: the file exists or cannot be written.
        BNSurgeryError: the model carries no record.
    """
    path = Path(path)
    record = current_record(bn_model)
    _check(to, record, keep_bn, dynamic)
    preprocessing = preprocessing or interface.noted_preprocessing(record)
    classes = interface.classes_of(record)
    inputs = _accepted(bn_model, _example(bn_model, record, example, preprocessing))
    axes = axes_of(inputs, dynamic) if to in _PROGRAMS else []
    in_file = onnx_files.source(bn_model)
    new_head = record.task is not None and record.task.head is not None
    origin = None if keep_bn or new_head else in_file  # whose graph stays
    stays = keep_bn or to == "torchvision-bn"
    with evaluating(bn_model):
        if stays:
            network = to_torch(bn_model, keep=lambda site: to != "torchvision-bn" or site.site.kind == "conv")
        else:
            network = fold_model(bn_model, bias=bias)
        network.eval()
        folds_back = not stays and state_digest(network.state_dict()) == record.weights_digest
        with atomic_write(path, overwrite=overwrite) as temporary, quiet():
            known = labels(preprocessing, classes)
            job = Job(network, temporary, inputs, path.suffix, record, keep_bn, axes, known, origin)
            written = _WRITERS[to](job)
            equivalence = compare(written, bn_model, inputs, f"as {to}, the network cannot be run")
            _require_same(path, equivalence)
            for axis in dict.fromkeys(name for names in axes for name in names.values()):
                _require_same(path, compare_doubled(written, bn_model, inputs, axes, axis), f", with {axis} doubled,")
    weights = "with its BatchNorm" if stays else origin_of(record, folds_back)
    if to == "onnx" and in_file is not None and new_head:
        weights += "; a new graph, since the head is new"
    gained = () if stays else tuple(gained_biases(bn_model, record.sites).values())
    usage = _usage(to, path, record, keep_bn, gained)
    shapes = _shapes(inputs, axes) if origin is None or to != "onnx" else origin.shapes
    feed = _feed(shapes, preprocessing, classes, in_file=path.suffix not in _PICKLES)
    return Export(str(path), to, _name(to, record), weights, folds_back, equivalence, usage, feed, gained)


def export_folded(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    example: Any,
    bias: Literal["add", "refuse"] = "add",
    overwrite: bool = False,
) -> Export:
    """Fold a network that came with its own BatchNorm and write its tensors, as `export` to "state-dict" does.

    Args:
        model: with BatchNorm and no record; not changed.
        path: the file to write, safetensors, or `torch.save`'s format where it is called .pth or .pt.
        example: an input batch, to compare on.
        bias: as for `fold`.
        overwrite: whether an old file may be replaced.

    Raises:
        ExportError, FoldError, CalibrationError, CheckpointError: as `export`.
    """
    path = Path(path)
    inputs = _accepted(model, Inputs.of(example))
    with evaluating(model):
        folded = fold_model(model, bias=bias, example=inputs)
        with atomic_write(path, overwrite=overwrite) as temporary:
            written = _write_state(folded, temporary, path.suffix, {}, on_meta(folded))
            equivalence = verify(written, model, [inputs], drift_batch_sizes=())
            _require_same(path, equivalence)
    gained = {key.removesuffix(".bias") for key in folded.state_dict().keys() - model.state_dict().keys()}
    biases = tuple(name for name, _ in folded.named_modules() if name in gained)
    name = type(model).__name__
    norms = [fqn for fqn, module in model.named_modules() if isinstance(module, OWN_NORMS)]
    if all(type(folded.get_submodule(fqn)) is nn.Identity for fqn in norms):
        usage = textwrap.indent(_LOAD_FOLDED.format(name, _load(path)), " " * 6).strip()
    else:
        with_bias = f", and bias=True in {', '.join(biases)}" if biases else ""
        made = f"...  # {with_article(name)} with each norm's activation, or nn.Identity, in its place{with_bias}"
        usage = f"model = {made}\n      model.load_state_dict({_load(path)})"
    feed = _feed(_shapes(inputs), None, (), in_file=False)
    return Export(str(path), "state-dict", name, "its own BatchNorm folded", False, equivalence, usage, feed, biases)


def origin_of(record: SurgeryRecord, untouched: bool) -> str:
    """Where a checkpoint's folded weights come from, in words; `untouched` where their digest is the original's."""
    if untouched:
        return "the weights it was made from, bit for bit"
    if record.options.absorb_bias:
        return "weights equal to those it was made from up to rounding, since biases were absorbed, or trained since"
    return "trained weights (changed since the insertion)"


def _check(to: str, record: SurgeryRecord, keep_bn: bool, dynamic: Sequence[str]) -> None:
    if to not in SUFFIXES:
        raise ValueError(f"export: to must be one of {tuple(SUFFIXES)}, got {to!r}")
    if isinstance(dynamic, str) or not set(dynamic) <= set(AXES):
        raise ValueError(f"export: dynamic must be some of {AXES}, got {dynamic!r}")
    if to.startswith("torchvision") and record.architecture is None:
        raise ExportError(
            f"export: {record.model} is not one of torchvision's: use state-dict, onnx or exported-program"
        )
    if to == "torchvision" and keep_bn:
        raise ExportError("export: torchvision's own network has no place for BatchNorm: use torchvision-bn")
    if to == "torchvision-bn" and record.architecture is not None:
        _check_places(record, record.architecture)
    for needed in ("onnx", "onnxscript", "onnxruntime") if to == "onnx" else ():
        if importlib.util.find_spec(needed) is None:
            raise ExportError(f"export: needs {needed}, which is not installed: pip install 'bnsurgery[export]'")


def _check_places(record: SurgeryRecord, architecture: Architecture) -> None:
    """Refuse a network whose BatchNorm is not where torchvision's vgg*_bn has it."""
    name = f"{architecture.name}_bn"
    if not hasattr(models, name):
        raise ExportError(f"export: torchvision has no {name}: use state-dict with `keep_bn`, or onnx")
    normed = {site.site.name for site in record.sites}
    convs = (name for name, module in architecture.build().named_modules() if isinstance(module, nn.Conv2d))
    missing = next((name for name in convs if name not in normed), None)
    if missing is not None or record.plan.placement != "pre-activation":
        found = f"'{missing}' has none" if missing else f"here it is {record.plan.placement}"
        raise ExportError(f"export: {name} has BatchNorm right behind every convolution; {found}")


def _example(bn_model: nn.Module, record: SurgeryRecord, example: Any, preprocessing: Preprocessing | None) -> Inputs:
    if example is not None:
        inputs = Inputs.of(example)
        if isinstance(example, tuple) and not _binds(bn_model, inputs) and _binds(bn_model, Inputs(example)):
            inputs = Inputs(example)
        # torch.export takes a size of 1 for a constant.
        return (join([inputs, inputs]) or inputs) if inputs.samples == 1 else inputs
    origin = onnx_files.source(bn_model)
    if origin is not None:
        return Inputs(origin.example)
    shape = record.input_shape if preprocessing is None else preprocessing.shape
    if shape is None:
        raise ExportError(
            f"export: the input of {with_article(record.model)} is not known: pass `example`, a batch of its inputs"
        )
    if math.prod(shape) > onnx_files.MAX_INPUT:  # a file can name any shape
        raise ExportError(f"export: an input of shape {shown(shape)} is too large to try: pass `example`")
    # Any input shows whether two networks are one function; noise needs no data.
    return Inputs((torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)),))


def _binds(model: nn.Module, inputs: Inputs) -> bool:
    """Whether `forward` can be called with so many arguments."""
    inputs = inputs.of_signature(model.forward)
    try:
        inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
    except TypeError:
        return False
    return True


def _accepted(model: nn.Module, inputs: Inputs) -> Inputs:
    """The inputs on the model's device, or the first of them where it takes no more than one at a time."""
    try:
        evaluate("export", model, inputs)
    except CalibrationError:
        inputs = inputs.take(0, 1)
        evaluate("export", model, inputs)
    return placed(model, inputs)


def _write_state(
    network: nn.Module, temporary: Path, suffix: str, labels: Mapping[str, str], again: nn.Module
) -> nn.Module:
    """Write the network's tensors, and return `again`, which is on the meta device, with those read back."""
    form = torch.contiguous_format  # a clone each: safetensors takes no two names for one storage
    state = network.state_dict().items()
    tensors = {name: tensor.detach().cpu().clone(memory_format=form) for name, tensor in state}
    odd = next((name for name, tensor in tensors.items() if not has_place_for(tensor.dtype)), None)
    if suffix in _PICKLES:
        torch_save(tensors, temporary)
    elif odd is not None:
        raise ExportError(
            f"export: safetensors has no place for '{odd}', which is {tensors[odd].dtype}: give the file a name in .pth"
        )
    else:
        save_file(tensors, temporary, metadata={"format": "pt", **labels})
        sort_metadata(temporary)
    again.load_state_dict(read_tensors(temporary), assign=True)
    return again


def _write_stock(job: Job) -> nn.Module:
    architecture = job.record.architecture
    assert architecture is not None
    has_bn = any(key.endswith("running_mean") for key in job.network.state_dict())
    with torch.device("meta"):
        name = architecture.name + ("_bn" if has_bn else "")
        stock: nn.Module = models.get_model(name, weights=None, num_classes=architecture.num_classes)
    again = _write_state(job.network, job.temporary, job.suffix, job.labels, stock)
    return again.to(next(job.network.parameters()).device).eval()


_WRITERS: dict[str, Callable[[Job], Any]] = {
    "torchvision-bn": _write_stock,
    "torchvision": _write_stock,
    "state-dict": lambda job: _write_state(job.network, job.temporary, job.suffix, job.labels, on_meta(job.network)),
    "onnx": write_onnx,
    "exported-program": write_program,
}


def _require_same(path: Path, equivalence: EquivalenceReport, when: str = "") -> None:
    if not equivalence.within(_TOLERANCE):
        raise ExportError(
            f"export: '{path}': what was written{when} differs by {equivalence.max_rel:.3g} of the largest output and "
            "is removed"
        )


def _shapes(inputs: Inputs, axes: Sequence[dict[int, str]] = ()) -> list[str]:
    return [
        f"({', '.join(str(names.get(n, size)) for n, size in enumerate(tensor.shape))})"
        for tensor, names in zip(inputs.tensors, axes or [{0: "batch"}] * len(inputs.tensors), strict=True)
    ]


def _feed(shapes: Sequence[str], preprocessing: Preprocessing | None, classes: Sequence[str], *, in_file: bool) -> str:
    lines = [f"input of shape {shape}" for shape in shapes]
    if preprocessing is not None:
        lines += textwrap.wrap(str(preprocessing), WIDTH - 6)
    if classes:
        lines.append(f"outputs: {len(classes)} classes, from {shown(classes[0])} to {shown(classes[-1])}")
    if in_file and (preprocessing is not None or classes):
        lines.append("(in the file's metadata, too)")
    return "\n".join(lines)


def _name(to: str, record: SurgeryRecord) -> str:
    name = record.architecture.name if record.architecture is not None else record.model
    return f"{name}_bn" if to == "torchvision-bn" else name


def _usage(to: str, path: Path, record: SurgeryRecord, keep_bn: bool, gained: Sequence[str]) -> str:
    load = _load(path)
    if to == "state-dict" and keep_bn:
        return f"{load}, for a network with BatchNorm in these places"
    task = record.task
    head = f", with {len(task.classes)} classes" if task is not None and task.head is not None else ""
    with_bias = f", with bias=True in {', '.join(gained)}" if gained else ""
    model = str(record.provenance.get("model", record.model))
    made = f"...  # what {model} makes{head}{with_bias}"
    if "onnx" in record.provenance:
        made = f'bnsurgery.from_onnx("{model}")' + (f"  # {(head + with_bias)[2:]}" if head or with_bias else "")
    if record.architecture is not None:
        made = f"torchvision.models.{_name(to, record)}(num_classes={record.architecture.num_classes})"
    return {
        "onnx": f'onnxruntime.InferenceSession("{path}")',
        "exported-program": f'torch.export.load("{path}").module()',
    }.get(to, f"model = {made}\n      model.load_state_dict({load})")


def _load(path: Path) -> str:
    if path.suffix in _PICKLES:
        return f'torch.load("{path}", weights_only=True)'
    return f'safetensors.torch.load_file("{path}")'
