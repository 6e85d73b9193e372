"""Write a network for those who do not have this package: stock state dicts, ONNX, torch.export."""

import importlib.util
import inspect
import io
import logging
import math
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
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
from bnsurgery.networks import onnx_files, pretrained
from bnsurgery.records.record import SurgeryRecord, state_digest
from bnsurgery.running.batches import Inputs, join
from bnsurgery.running.calls import placed
from bnsurgery.running.modes import evaluate, evaluating
from bnsurgery.statistics.verification import EquivalenceReport, verify
from bnsurgery.surgery.copies import on_meta
from bnsurgery.surgery.folding import fold as fold_model
from bnsurgery.surgery.folding import gained_biases
from bnsurgery.surgery.stock import to_torch
from bnsurgery.text.tables import WIDTH
from bnsurgery.text.words import with_article

from .programs import AXES, Job, axes_of, compare_doubled, write_onnx, write_program

Format = Literal["torchvision-bn", "torchvision", "state-dict", "onnx", "exported-program"]
SUFFIXES = {
    "torchvision-bn": ".safetensors",
    "torchvision": ".safetensors",
    "state-dict": ".safetensors",
    "onnx": ".onnx",
    "exported-program": ".pt2",
}
_PROGRAMS = ("onnx", "exported-program")
_PICKLES = (".pth", ".pt")
_NAMED = 3  # layers in a line
_MAX_INPUT = 2**26  # numbers in one input that is made up: a quarter of a gigabyte
# Of the largest output: what float32 rounding in a deep network amounts to.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Export:
    """What was written, and how it was found to compare.

    Attributes:
        path: the file.
        format: one of `SUFFIXES`.
        network: what it holds, such as "vgg16_bn".
        origin: whose weights these are, in words.
        folds_back: whether they are, to the bit, those that were inserted into.
        equivalence: of the network with BatchNorm to the one read back from the file, in eval mode.
        usage: a line or more of Python that load it without this package.
        feed: how to feed it, in words: the input's shape, preprocessing and class names, as far as they are known.
        new_biases: layers of the folded network that had no bias and got one: their class has to have bias=True there.
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
        what = f"{self.network}, {self.format}: {self.origin}"
        return f"{what}\n{self.proof}\n\n{self.steps}"

    @property
    def steps(self) -> str:
        """What was written, how to load it, and how to feed it."""
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
    - "torchvision": the same, made sure to fit torchvision's own class.
    - "torchvision-bn": for torchvision's vgg*_bn: BatchNorm behind the convolutions stays, the rest is folded.
    - "onnx": the folded network in eval mode for any batch size, or for one image where it takes no more at a time;
      tried in onnxruntime. Of a network from `from_onnx` the same graph, with new initializers where tensors changed.
    - "exported-program": the same by `torch.export`.

    What images go through and the names of the classes, where they are known, stand in the file as JSON, called
    "preprocessing" (the fields of `bnsurgery.images.preprocessing.Preprocessing`, and the formula) and "classes":
    in the metadata of safetensors and ONNX, in the `extra_files` preprocessing.json and classes.json of a program.

    Args:
        bn_model: from `insert` or `load`, trained since or not; not changed.
        path: the file to write.
        to: the format.
        example: an input batch, as for `plan`; needed where the input is not one tensor of real numbers. Several inputs
            may also come as a plain tuple, (a, b), where `forward` needs them.
        preprocessing: what images go through; as the record has it where None.
        keep_bn: leave the BatchNorm layers in, as torch's own; "torchvision" has no place for them.
        bias: as for `fold`; what was added is said in `Export.new_biases` and `usage`.
        dynamic: which sizes of the input may differ from the example's in "onnx" and "exported-program": any of
            "batch", "height" and "width", the latter of images (N, C, H, W). Each is tried at twice the example's.
        overwrite: whether an old file may be replaced.

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
    done = current_record(bn_model)
    _check(to, done, keep_bn, dynamic)
    preprocessing = preprocessing or pretrained.noted_preprocessing(done)
    inputs = placed(bn_model, _taken(bn_model, _example(bn_model, done, example, preprocessing)))
    axes = axes_of(inputs, dynamic) if to in _PROGRAMS else []
    classes = pretrained.classes_of(done)
    with evaluating(bn_model):
        folded = None if to == "torchvision-bn" or keep_bn else fold_model(bn_model, bias=bias)
        network = folded if folded is not None else to_torch(bn_model, keep=_keeps(to))
        network.eval()
        folds_back = folded is not None and state_digest(folded.state_dict()) == done.weights_digest
        with atomic_write(path, overwrite=overwrite) as temporary, _quiet():
            written = Job(network, temporary, inputs, path.suffix, done, keep_bn, axes, labels(preprocessing, classes))
            again = _WRITERS[to](written)
            equivalence = verify(again, bn_model, [inputs], drift_batch_sizes=())
            _require_same(path, equivalence)
            for axis in {name: None for called in axes for name in called.values()}:
                _require_same(path, compare_doubled(again, bn_model, inputs, axes, axis), f", with {axis} doubled,")
    name = _name(to, done)
    origin = pretrained.origin(done, folds_back) if folded is not None else "with its BatchNorm"
    gained = tuple(gained_biases(bn_model, done.sites).values()) if folded is not None else ()
    usage = _usage(to, path, done, keep_bn, gained)
    feed = _feed(inputs, axes, preprocessing, classes, in_file=path.suffix not in _PICKLES)
    return Export(str(path), to, name, origin, folds_back, equivalence, usage, feed, gained)


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
    inputs = placed(model, _taken(model, Inputs.of(example)))
    with evaluating(model):
        folded = fold_model(model, bias=bias, example=inputs)
        with atomic_write(path, overwrite=overwrite) as temporary:
            again = _state_dict(folded, temporary, path.suffix, {})
            equivalence = verify(again, model, [inputs], drift_batch_sizes=())
            _require_same(path, equivalence)
    gained = [key.removesuffix(".bias") for key in folded.state_dict().keys() - model.state_dict().keys()]
    biases = tuple(name for name, _ in folded.named_modules() if name in gained)
    name = type(model).__name__
    more = f" and {len(biases) - _NAMED} more" if len(biases) > _NAMED else ""
    with_bias = f", bias=True in {', '.join(biases[:_NAMED])}{more}" if biases else ""
    usage = (
        f"model = ...  # a {name} with nn.Identity for BatchNorm{with_bias}\n      model.load_state_dict({_load(path)})"
    )
    feed = _feed(inputs, [], None, (), in_file=False)
    return Export(str(path), "state-dict", name, "its own BatchNorm folded", False, equivalence, usage, feed, biases)


def _check(to: str, done: SurgeryRecord, keep_bn: bool, dynamic: Sequence[str]) -> None:
    if to not in SUFFIXES:
        raise ValueError(f"export: to must be one of {tuple(SUFFIXES)}, got {to!r}")
    if isinstance(dynamic, str) or not set(dynamic) <= set(AXES):
        raise ValueError(f"export: dynamic must be some of {AXES}, got {dynamic!r}")
    architecture = done.architecture
    if to.startswith("torchvision") and architecture is None:
        raise ExportError(f"export: {done.model} is not one of torchvision's: use state-dict, onnx or exported-program")
    if to == "torchvision" and keep_bn:
        raise ExportError("export: torchvision's own network has no place for BatchNorm: use torchvision-bn")
    if to == "torchvision-bn" and architecture is not None:
        if not hasattr(models, f"{architecture.name}_bn"):
            raise ExportError(
                f"export: torchvision has no {architecture.name}_bn: use state-dict with keep_bn (--keep-bn), or onnx"
            )
        normed = {site.site.name for site in done.sites if site.site.kind == "conv"}
        convs = [n for n, m in architecture.build("meta").named_modules() if isinstance(m, nn.Conv2d)]
        missing = [name for name in convs if name not in normed]
        if missing or done.plan.placement != "pre-activation":
            what = f"'{missing[0]}' has none" if missing else f"here it is {done.plan.placement}"
            raise ExportError(f"export: {architecture.name}_bn has BatchNorm right behind every convolution; {what}")
    for needed in ("onnx", "onnxscript", "onnxruntime") if to == "onnx" else ():
        if importlib.util.find_spec(needed) is None:
            raise ExportError(f"export: needs {needed}, which is not installed: pip install 'bnsurgery[export]'")


def _keeps(to: str) -> Callable[[Any], bool]:
    return lambda site: to != "torchvision-bn" or site.site.kind == "conv"


def _example(bn_model: nn.Module, done: SurgeryRecord, example: Any, preprocessing: Preprocessing | None) -> Inputs:
    if example is not None:
        inputs = Inputs.of(example)
        if isinstance(example, tuple) and not _binds(bn_model, inputs) and _binds(bn_model, Inputs(example)):
            inputs = Inputs(example)
        # torch.export takes a size of 1 for a constant.
        return (join([inputs, inputs]) or inputs) if inputs.samples == 1 else inputs
    origin = onnx_files.source(bn_model)
    if origin is not None:
        return Inputs(origin.noise(2 if origin.any_batch else 1))
    shape: Sequence[int] | None = done.input_shape
    if preprocessing is not None:
        shape = preprocessing.shape
    if shape is None:
        raise ExportError(
            f"export: what {with_article(done.model)} takes is not known: pass example=, a batch of its inputs"
        )
    if math.prod(shape) > _MAX_INPUT:  # a file says so
        raise ExportError(
            f"export: an input of shape {shown(shape)} is too large to try: pass example=, or --image-size"
        )
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


def _taken(bn_model: nn.Module, inputs: Inputs) -> Inputs:
    """These, or the first of them where the network takes no more than one at a time."""
    try:
        evaluate("export", bn_model, inputs)
    except CalibrationError:
        inputs = inputs.take(0, 1)
        evaluate("export", bn_model, inputs)
    return inputs


def _state_dict(network: nn.Module, temporary: Path, suffix: str, labels: Mapping[str, str]) -> nn.Module:
    _write_state(network, temporary, suffix, labels)
    again = on_meta(network)
    again.load_state_dict(read_tensors(temporary), assign=True)
    return again


def _stock(job: Job) -> nn.Module:
    _write_state(job.network, job.temporary, job.suffix, job.labels)
    architecture = job.done.architecture
    assert architecture is not None
    has_bn = any(key.endswith("running_mean") for key in job.network.state_dict())
    with torch.device("meta"):
        name = architecture.name + ("_bn" if has_bn else "")
        again: nn.Module = models.get_model(name, weights=None, num_classes=architecture.num_classes)
    again.load_state_dict(read_tensors(job.temporary), assign=True)
    return again.to(next(job.network.parameters()).device).eval()


def _write_state(network: nn.Module, temporary: Path, suffix: str, labels: Mapping[str, str]) -> None:
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


_WRITERS: dict[str, Callable[..., Any]] = {
    "torchvision-bn": _stock,
    "torchvision": _stock,
    "state-dict": lambda job: _state_dict(job.network, job.temporary, job.suffix, job.labels),
    "onnx": write_onnx,
    "exported-program": write_program,
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch's exporters warn of their own insides and, where they fail, print the graph to stderr: none of that."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


def _require_same(path: Path, equivalence: EquivalenceReport, when: str = "") -> None:
    if not equivalence.within(_TOLERANCE):
        raise ExportError(
            f"export: '{path}': what was written{when} differs by {equivalence.max_rel:.3g} of the largest output; "
            "nothing is left of it"
        )


def _feed(
    inputs: Inputs,
    axes: Sequence[dict[int, str]],
    preprocessing: Preprocessing | None,
    classes: Sequence[str],
    *,
    in_file: bool,
) -> str:
    lines = []
    for tensor, called in zip(inputs.tensors, axes or [{0: "batch"}] * len(inputs.tensors), strict=True):
        lines.append(f"input of shape ({', '.join(str(called.get(n, size)) for n, size in enumerate(tensor.shape))})")
    if preprocessing is not None:
        lines += textwrap.wrap(str(preprocessing), WIDTH - 6)
    if classes:
        lines.append(f"outputs: {len(classes)} classes, from {shown(classes[0])} to {shown(classes[-1])}")
    if in_file and (preprocessing is not None or classes):
        lines.append("(in the file's metadata, too)")
    return "\n".join(lines)


def _name(to: str, done: SurgeryRecord) -> str:
    name = done.architecture.name if done.architecture is not None else done.model
    return f"{name}_bn" if to == "torchvision-bn" else name


def _usage(to: str, path: Path, done: SurgeryRecord, keep_bn: bool, gained: Sequence[str]) -> str:
    load = _load(path)
    if to == "state-dict" and keep_bn:
        return f"{load}, for a network with BatchNorm in these places"
    head = f", with {len(done.task.classes)} classes" if done.task is not None and done.task.head is not None else ""
    with_bias = f", with bias=True in {', '.join(gained)}" if gained else ""
    made = f"...  # what {done.provenance.get('model', done.model)} makes{head}{with_bias}"
    if done.architecture is not None:
        made = f"torchvision.models.{_name(to, done)}(num_classes={done.architecture.num_classes})"
    return {
        "onnx": f'onnxruntime.InferenceSession("{path}")',
        "exported-program": f'torch.export.load("{path}").module()',
    }.get(to, f"model = {made}\n      model.load_state_dict({load})")


def _load(path: Path) -> str:
    if path.suffix in _PICKLES:
        return f'torch.load("{path}", weights_only=True)'
    return f'safetensors.torch.load_file("{path}")'
