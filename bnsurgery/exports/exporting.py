"""Write a network for those who do not have this package: stock state dicts, ONNX, torch.export."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torchvision import models

from bnsurgery.errors import CalibrationError, ExportError, shown
from bnsurgery.files.checkpoint import current_record
from bnsurgery.files.labels import labels
from bnsurgery.files.writing import atomic_write
from bnsurgery.images.preprocessing import Preprocessing
from bnsurgery.networks import interface, onnx_files
from bnsurgery.networks.third_party import errors_as, quiet, require
from bnsurgery.records.record import SurgeryRecord, state_digest
from bnsurgery.running.batches import Inputs, join
from bnsurgery.running.calls import placed
from bnsurgery.running.modes import evaluate, evaluating
from bnsurgery.statistics.verification import EquivalenceReport, verify
from bnsurgery.surgery.copies import on_meta
from bnsurgery.surgery.folding import fold as fold_model
from bnsurgery.surgery.folding import gained_biases
from bnsurgery.surgery.stock import to_torch

from . import instructions, writers
from .formats import AXES, PICKLES, PROGRAMS, SUFFIXES, Format

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
    inputs = _accepted(bn_model, _inputs(bn_model, record, example, preprocessing))
    axes = _axes(inputs, dynamic) if to in PROGRAMS else []
    in_file = onnx_files.source(bn_model)
    new_head = record.task is not None and record.task.head is not None
    origin = None if keep_bn or new_head or to != "onnx" else in_file  # whose graph stays
    stays = keep_bn or to == "torchvision-bn"
    name = record.architecture.name if record.architecture is not None else record.model
    variant = "_bn" if to == "torchvision-bn" else ""
    name += variant
    stock = record.architecture if to.startswith("torchvision") else None
    with evaluating(bn_model):
        if stays:
            network = to_torch(bn_model, keep=lambda site: to != "torchvision-bn" or site.site.kind == "conv")
        else:
            network = fold_model(bn_model, bias=bias)
        network.eval()
        folds_back = not stays and state_digest(network.state_dict()) == record.weights_digest
        known = labels(preprocessing, classes)
        with atomic_write(path, overwrite=overwrite) as temporary, quiet():
            written: nn.Module | Callable[..., Any]
            if origin is not None:
                written = writers.write_onnx(writers.updated(origin, network), network, temporary, known)
            elif to == "onnx":
                classifies = record.architecture is not None or bool(classes)
                graph = writers.new_graph(network, inputs, axes, optimize=not keep_bn, classifies=classifies)
                written = writers.write_onnx(graph, network, temporary, known)
            elif to == "exported-program":
                written = writers.write_program(network, inputs, axes, temporary, known)
            else:
                again = on_meta(network) if stock is None else stock.build(variant=variant)
                written = writers.write_state(network, temporary, path.suffix, known, again)
            equivalence = _compare(written, bn_model, inputs, f"as {to}, the network cannot be run")
            for axis in dict.fromkeys(name for names in axes for name in names.values()):
                problem = f"{axis} cannot be of any size here: twice the example's fails"
                _compare(written, bn_model, _doubled(inputs, axes, axis), problem, f", with {axis} doubled,")
    weights = "with its BatchNorm" if stays else origin_of(record, folds_back)
    if to == "onnx" and in_file is not None and new_head:
        weights += "; a new graph, since the head is new"
    gained = () if stays else tuple(gained_biases(bn_model, record.sites).values())
    usage = instructions.usage(to, path, name, record, keep_bn, gained)
    shapes = origin.shapes if origin is not None else instructions.shapes(inputs, axes)
    feed = instructions.feed(shapes, preprocessing, classes, in_file=path.suffix not in PICKLES)
    return Export(str(path), to, name, weights, folds_back, equivalence, usage, feed, gained)


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
        example: an input batch, to compare on.
        path, bias, overwrite: as for `export`.

    Raises:
        ExportError, FoldError, CalibrationError, CheckpointError: as `export`.
    """
    path = Path(path)
    inputs = _accepted(model, [Inputs.of(example)])
    with evaluating(model):
        folded = fold_model(model, bias=bias, example=inputs)
        with atomic_write(path, overwrite=overwrite) as temporary:
            written = writers.write_state(folded, temporary, path.suffix, {}, on_meta(folded))
            equivalence = _compare(written, model, inputs, "the folded network cannot be run")
    keys = folded.state_dict().keys() - model.state_dict().keys()
    gained = tuple(name for name, _ in folded.named_modules() if f"{name}.bias" in keys)
    usage = instructions.usage_of_folded(path, model, folded, gained)
    feed = instructions.feed(instructions.shapes(inputs))
    name, origin = type(model).__name__, "its own BatchNorm folded"
    return Export(str(path), "state-dict", name, origin, False, equivalence, usage, feed, gained)


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
            f"export: {record.model} is not one of torchvision's: use state-dict, {' or '.join(PROGRAMS)}"
        )
    if to == "torchvision" and keep_bn:
        raise ExportError("export: torchvision's own network has no place for BatchNorm: use torchvision-bn")
    if to == "torchvision-bn" and record.architecture is not None:
        name = f"{record.architecture.name}_bn"
        if not hasattr(models, name):
            raise ExportError(f"export: torchvision has no {name}: use state-dict with `keep_bn`, or onnx")
        modules = record.architecture.build().named_modules()
        convs = {name for name, module in modules if isinstance(module, nn.Conv2d)}
        missing = sorted(convs - {site.site.name for site in record.sites})
        if missing or record.plan.placement != "pre-activation":
            found = f"'{missing[0]}' has none" if missing else f"here it is {record.plan.placement}"
            raise ExportError(f"export: {name} has BatchNorm right behind every convolution; {found}")
    if to == "onnx":
        require("export", "onnx", "onnxscript", "onnxruntime")


def _inputs(
    bn_model: nn.Module, record: SurgeryRecord, example: Any, preprocessing: Preprocessing | None
) -> list[Inputs]:
    """Inputs to compare on: the example's, the likeliest reading first, or noise. Noise shows differences as well."""
    if example is not None:
        ways = [Inputs.of(example), *([Inputs(example)] if isinstance(example, tuple) else [])]
        # torch.export takes a size of 1 for a constant.
        return [(join([way, way]) or way) if way.samples == 1 else way for way in ways]
    origin = onnx_files.source(bn_model)
    if origin is not None:
        return [Inputs(origin.example)]
    shape = record.input_shape if preprocessing is None else preprocessing.shape
    if shape is None:
        raise ExportError(f"export: the input of {record.model} is not known: pass `example`, a batch of its inputs")
    if math.prod(shape) > onnx_files.MAX_INPUT:  # a file can name any shape
        raise ExportError(f"export: an input of shape {shown(shape)} is too large to try: pass `example`")
    return [Inputs((torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)),))]


def _accepted(model: nn.Module, ways: Sequence[Inputs]) -> Inputs:
    """The first of these that the model takes, on its device, or one sample of it where it takes no more at a time."""
    errors = []
    for inputs in (part for way in ways for part in (way, way.take(0, 1))):
        try:
            evaluate("export", model, inputs)
            return placed(model, inputs)
        except CalibrationError as error:
            errors.append(error)
    raise errors[1]  # the likeliest way's, on one sample


def _axes(inputs: Inputs, dynamic: Sequence[str]) -> list[dict[int, str]]:
    """The dimensions that may have any size, by number, of every tensor in the inputs; of a batch of one, not that."""
    found = []
    for tensor in inputs.tensors:
        whole = tensor.ndim > 0 and len(tensor) == inputs.samples > 1  # torch.export takes a size of 1 for a constant
        named = ({0: "batch"} if whole else {}) | ({2: "height", 3: "width"} if tensor.ndim == 4 else {})
        found.append({number: name for number, name in named.items() if name in dynamic})
    missing = [name for name in dynamic if name != "batch" and not any(name in axes.values() for axes in found)]
    if missing:
        raise ExportError(f"export: no input of shape (N, C, H, W), so no {missing[0]} that could be of any size")
    return found


def _doubled(inputs: Inputs, axes: writers.Axes, axis: str) -> Inputs:
    """The inputs twice as large in one axis: a copy of them is appended."""
    tensors = zip(inputs.tensors, axes, strict=True)
    numbers = {id(tensor): n for tensor, names in tensors for n, name in names.items() if name == axis}
    return inputs.map(lambda leaf: torch.cat([leaf, leaf], numbers[id(leaf)]) if id(leaf) in numbers else leaf)


def _compare(
    written: nn.Module | Callable[..., Any], model: nn.Module, inputs: Inputs, problem: str, when: str = ""
) -> EquivalenceReport:
    """Compare the content of a file with the network.

    Raises:
        ExportError: the content cannot be run, which is the `problem`, or computes something else.
    """
    with errors_as(ExportError, f"export: {problem}"):
        equivalence = verify(written, model, [inputs], drift_batch_sizes=())
    if not equivalence.within(_TOLERANCE):
        raise ExportError(
            f"export: what was written{when} differs by {equivalence.max_rel:.3g} of the largest output and is removed"
        )
    return equivalence
