"""Write a network for those who do not have this package: stock state dicts, ONNX, torch.export."""

import importlib.util
import inspect
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchvision import models

from . import onnx_files, pretrained
from .batches import Inputs, join, outputs, placed, run
from .checkpoint import current_record, has_place_for, torch_save
from .copies import on_meta
from .errors import CalibrationError, ExportError, shown
from .files import atomic_write
from .folding import fold as fold_model
from .folding import gained_biases
from .modes import evaluating, observing
from .stock import to_torch
from .surgery_record import SurgeryRecord, state_digest
from .verification import EquivalenceReport, verify
from .weights import read_tensors

Format = Literal["torchvision-bn", "torchvision", "state-dict", "onnx", "exported-program"]
SUFFIXES = {
    "torchvision-bn": ".safetensors",
    "torchvision": ".safetensors",
    "state-dict": ".safetensors",
    "onnx": ".onnx",
    "exported-program": ".pt2",
}
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
        new_biases: layers of the folded network that had no bias and got one: their class has to have bias=True there.
    """

    path: str
    format: str
    network: str
    origin: str
    folds_back: bool
    equivalence: EquivalenceReport
    usage: str
    new_biases: tuple[str, ...] = ()

    def __str__(self) -> str:
        what = f"{self.network}, {self.format}: {self.origin}"
        return f"{what}\n{self.proof}\n\nWrote {self.path}.\nNext: {self.usage}"

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
    keep_bn: bool = False,
    bias: Literal["add", "refuse"] = "add",
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

    Args:
        bn_model: from `insert` or `load`, trained since or not; not changed.
        path: the file to write.
        to: the format.
        example: an input batch, as for `plan`; needed where the input is not one tensor of real numbers.
        keep_bn: leave the BatchNorm layers in, as torch's own; "torchvision" has no place for them.
        bias: as for `fold`; what was added is said in `Export.new_biases` and `usage`.
        overwrite: whether an old file may be replaced.

    Raises:
        ExportError: the format has no place for the network, a package is missing, or what was written computes
            something else; nothing is left behind.
        FoldError: a norm cannot be folded.
        CalibrationError: the network does not take the example.
        CheckpointError: the file exists or cannot be written.
        BNSurgeryError: the model carries no record.
    """
    path = Path(path)
    done = current_record(bn_model)
    _check(to, done, keep_bn)
    inputs = placed(bn_model, _taken(bn_model, _example(bn_model, done, example)))
    with evaluating(bn_model):
        folded = None if to == "torchvision-bn" or keep_bn else fold_model(bn_model, bias=bias)
        network = folded if folded is not None else to_torch(bn_model, keep=_keeps(to))
        network.eval()
        folds_back = folded is not None and state_digest(folded.state_dict()) == done.weights_digest
        with atomic_write(path, overwrite=overwrite) as temporary, _quiet():
            written = _Written(network, temporary, inputs, path.suffix, done, keep_bn)
            again = _WRITERS[to](written)
            equivalence = verify(again, bn_model, [inputs], drift_batch_sizes=())
            _require_same(equivalence, path)
    name = _name(to, done)
    origin = pretrained.origin(done, folds_back) if folded is not None else "with its BatchNorm"
    gained = tuple(gained_biases(bn_model, done.sites).values()) if folded is not None else ()
    usage = _usage(to, path, done, keep_bn, gained)
    return Export(str(path), to, name, origin, folds_back, equivalence, usage, gained)


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
            again = _state_dict(folded, temporary, path.suffix)
            equivalence = verify(again, model, [inputs], drift_batch_sizes=())
            _require_same(equivalence, path)
    gained = [key.removesuffix(".bias") for key in folded.state_dict().keys() - model.state_dict().keys()]
    biases = tuple(name for name, _ in folded.named_modules() if name in gained)
    name = type(model).__name__
    more = f" and {len(biases) - _NAMED} more" if len(biases) > _NAMED else ""
    with_bias = f", bias=True in {', '.join(biases[:_NAMED])}{more}" if biases else ""
    usage = (
        f"model = ...  # a {name} with nn.Identity for BatchNorm{with_bias}\n      model.load_state_dict({_load(path)})"
    )
    return Export(str(path), "state-dict", name, "its own BatchNorm folded", False, equivalence, usage, biases)


@dataclass(frozen=True)
class _Written:
    """What the writers need to know. They give back what the file holds: a network, or a function."""

    network: nn.Module
    temporary: Path
    inputs: Inputs
    suffix: str
    done: SurgeryRecord
    keep_bn: bool


def _check(to: str, done: SurgeryRecord, keep_bn: bool) -> None:
    if to not in SUFFIXES:
        raise ValueError(f"export: to must be one of {tuple(SUFFIXES)}, got {to!r}")
    architecture = done.architecture
    if to.startswith("torchvision") and architecture is None:
        raise ExportError(f"export: {done.model} is not one of torchvision's: use state-dict, onnx or exported-program")
    if to == "torchvision" and keep_bn:
        raise ExportError("export: torchvision's own network has no place for BatchNorm: use torchvision-bn")
    if to == "torchvision-bn" and architecture is not None:
        if not hasattr(models, f"{architecture.name}_bn"):
            raise ExportError(
                f"export: torchvision has no {architecture.name}_bn: use state-dict with keep_bn, or onnx"
            )
        normed = {site.site.name for site in done.sites if site.site.kind == "conv"}
        convs = [n for n, m in architecture.build("meta").named_modules() if isinstance(m, nn.Conv2d)]
        missing = [name for name in convs if name not in normed]
        if missing or done.placement != "pre-activation":
            what = f"'{missing[0]}' has none" if missing else f"here it is {done.placement}"
            raise ExportError(f"export: {architecture.name}_bn has BatchNorm right behind every convolution; {what}")
    for needed in ("onnx", "onnxscript", "onnxruntime") if to == "onnx" else ():
        if importlib.util.find_spec(needed) is None:
            raise ExportError(f"export: needs {needed}, which is not installed: pip install 'bnsurgery[export]'")


def _require_same(equivalence: EquivalenceReport, path: Path) -> None:
    if not equivalence.within(_TOLERANCE):
        raise ExportError(
            f"export: '{path}': what was written differs by {equivalence.max_rel:.3g} of the largest output; nothing "
            "is left of it"
        )


def _keeps(to: str) -> Callable[[Any], bool]:
    return lambda site: to != "torchvision-bn" or site.site.kind == "conv"


def _example(bn_model: nn.Module, done: SurgeryRecord, example: Any) -> Inputs:
    origin = onnx_files.source(bn_model)
    if origin is not None and example is None:
        return Inputs(origin.noise(2 if origin.any_batch else 1))
    if example is not None:
        inputs = Inputs.of(example)
        # torch.export takes a size of 1 for a constant.
        return (join([inputs, inputs]) or inputs) if inputs.samples == 1 else inputs
    shape: Sequence[int] | None = done.input_shape
    if done.task is not None:
        shape = (len(done.task.mean), done.task.image_size, done.task.image_size)
    if shape is None:
        raise ExportError(f"export: what a {done.model} takes is not known: pass example=, a batch of its inputs")
    if math.prod(shape) > _MAX_INPUT:  # a file says so
        raise ExportError(
            f"export: an input of shape {shown(shape)} is too large to try: pass example=, or --image-size"
        )
    # Any input shows whether two networks are one function; noise needs no data.
    return Inputs((torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)),))


def _taken(bn_model: nn.Module, inputs: Inputs) -> Inputs:
    """These, or the first of them where the network takes no more than one at a time."""
    with observing(bn_model):
        try:
            run("export", bn_model, inputs)
        except CalibrationError:
            inputs = inputs.take(0, 1)
            run("export", bn_model, inputs)
    return inputs


def _state_dict(network: nn.Module, temporary: Path, suffix: str) -> nn.Module:
    _write_state(network, temporary, suffix)
    again = on_meta(network)
    again.load_state_dict(read_tensors(temporary), assign=True)
    return again


def _stock(job: _Written) -> nn.Module:
    _write_state(job.network, job.temporary, job.suffix)
    architecture = job.done.architecture
    assert architecture is not None
    has_bn = any(key.endswith("running_mean") for key in job.network.state_dict())
    with torch.device("meta"):
        name = architecture.name + ("_bn" if has_bn else "")
        again: nn.Module = models.get_model(name, weights=None, num_classes=architecture.num_classes)
    again.load_state_dict(read_tensors(job.temporary), assign=True)
    return again.to(next(job.network.parameters()).device).eval()


def _write_state(network: nn.Module, temporary: Path, suffix: str) -> None:
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
        save_file(tensors, temporary, metadata={"format": "pt"})


def _onnx(job: _Written) -> Callable[..., list[Tensor]]:
    origin = onnx_files.source(job.network)
    if origin is not None and not job.keep_bn:
        onnx_files.write(job.network, origin, job.temporary)
        return onnx_files.session(job.temporary)
    import onnxruntime

    exported = _capture(job)  # as for the other format, and with its errors
    try:
        program = torch.onnx.export(exported, dynamo=True, optimize=not job.keep_bn, verbose=False)  # or BN is folded
    except Exception as error:  # the exporter's, of many kinds
        raise ExportError(f"export: torch.onnx cannot export {job.done.model}: {_reason(error)}") from error
    assert program is not None
    program.save(str(job.temporary), external_data=False)
    try:
        session = onnxruntime.InferenceSession(str(job.temporary), providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no base of their own
        dtype = next((str(p.dtype) for p in job.network.parameters() if p.dtype != torch.float32), None)
        advice = f" It has few operations in {dtype.removeprefix('torch.')}: export model.float()" if dtype else ""
        raise ExportError(f"export: onnxruntime cannot load {job.done.model}: {_reason(error)}.{advice}") from error

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        tensors = [tensor.cpu().numpy() for tensor in Inputs(args, kwargs).tensors]
        names = [entry.name for entry in session.get_inputs()]
        return [torch.from_numpy(array) for array in session.run(None, dict(zip(names, tensors, strict=True)))]

    return run


def _exported_program(job: _Written) -> Callable[..., list[Tensor]]:
    program = _capture(job)
    archive = io.BytesIO()  # not the file: on a full disk torch ends the process, and by name it insists on the suffix
    torch.export.save(program, archive)
    job.temporary.write_bytes(archive.getbuffer())
    with job.temporary.open("rb") as file:
        again = torch.export.load(file).module()
    return lambda *args, **kwargs: outputs(again(*args, **kwargs))


def _capture(job: _Written) -> torch.export.ExportedProgram:
    shapes = _any_batch(job.network, job.inputs)
    first: Exception | None = None
    for strict in (False, True):  # each follows code that the other does not, such as torch.tensor(data=...)
        try:
            return torch.export.export(
                job.network, job.inputs.args, job.inputs.kwargs, dynamic_shapes=shapes, strict=strict
            )
        except Exception as error:  # the exporter's, of many kinds
            first = first or error
    assert first is not None
    raise ExportError(f"export: torch.export cannot export {job.done.model}: {_reason(first)}") from first


_WRITERS: dict[str, Callable[..., Any]] = {
    "torchvision-bn": _stock,
    "torchvision": _stock,
    "state-dict": lambda job: _state_dict(job.network, job.temporary, job.suffix),
    "onnx": _onnx,
    "exported-program": _exported_program,
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


def _any_batch(network: nn.Module, inputs: Inputs) -> Any:
    """Of every tensor in the inputs, that its first dimension may have any size; of a batch of one, none."""
    if inputs.samples == 1:  # or torch.export would take that for a constant, and complain
        return None
    count, batch = inputs.samples, torch.export.Dim("batch")
    given = inspect.signature(network.forward).bind(*inputs.args, **inputs.kwargs).arguments
    return tree_map(lambda x: {0: batch} if isinstance(x, Tensor) and x.ndim and len(x) == count else None, dict(given))


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error
    return next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)[:300]


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
