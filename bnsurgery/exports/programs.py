"""A network as a program that needs no class of its own: ONNX and torch.export, written and read back."""

import inspect
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bnsurgery.errors import ExportError
from bnsurgery.networks import onnx_files
from bnsurgery.networks.third_party import reason
from bnsurgery.records.record import SurgeryRecord
from bnsurgery.running.batches import Inputs
from bnsurgery.running.calls import outputs
from bnsurgery.running.modes import evaluate
from bnsurgery.statistics.verification import EquivalenceReport, verify

AXES = ("batch", "height", "width")


@dataclass(frozen=True)
class Job:
    """The arguments of a format's writer, which returns what the file holds: a network, or a function."""

    network: nn.Module
    temporary: Path
    inputs: Inputs
    suffix: str
    record: SurgeryRecord
    keep_bn: bool
    axes: list[dict[int, str]]  # of every tensor in the inputs, the names of the dimensions of any size
    labels: dict[str, str]
    origin: onnx_files.Source | None  # the ONNX file whose graph is kept


def axes_of(inputs: Inputs, dynamic: Sequence[str]) -> list[dict[int, str]]:
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


def _shapes(job: Job) -> Any:
    """The axes for torch.export, in the form of the arguments."""
    if not any(job.axes):
        return None
    # Any size of a batch, and of height and width what the network allows: the export is tried on it.
    kinds = {"batch": torch.export.Dim("batch"), "height": torch.export.Dim.AUTO, "width": torch.export.Dim.AUTO}
    axes = {id(tensor): names for tensor, names in zip(job.inputs.tensors, job.axes, strict=True)}
    given = inspect.signature(job.network.forward).bind(*job.inputs.args, **job.inputs.kwargs).arguments
    return tree_map(lambda leaf: {n: kinds[name] for n, name in axes.get(id(leaf), {}).items()} or None, dict(given))


def compare(written: Callable[..., Any], bn_model: nn.Module, inputs: Inputs, problem: str) -> EquivalenceReport:
    """Compare what was written with the network.

    Raises:
        ExportError: it fails; the message begins with `problem`.
    """
    try:
        return verify(written, bn_model, [inputs], drift_batch_sizes=())
    except Exception as error:  # the network's, or of whatever runs the file
        raise ExportError(f"export: {problem}: {reason(error.__cause__ or error)}") from error


def compare_doubled(
    written: Callable[..., Any], bn_model: nn.Module, inputs: Inputs, axes: Sequence[dict[int, str]], axis: str
) -> EquivalenceReport:
    """Compare on inputs twice as large in one axis, in which a copy of them is appended."""
    numbers = iter([next((n for n, name in names.items() if name == axis), None) for names in axes])

    def doubled(leaf: Any) -> Any:
        number = next(numbers) if isinstance(leaf, Tensor) else None
        return leaf if number is None else torch.cat([leaf, leaf], number)

    problem = f"{axis} cannot be of any size here: twice the example's fails"
    return compare(written, bn_model, inputs.map(doubled), problem)


def write_onnx(job: Job) -> Callable[..., list[Tensor]]:
    """Write ONNX with named axes and outputs, and return the file in onnxruntime.

    A network that came from an ONNX file goes back into the same graph.
    """
    model = job.record.model
    if job.origin is not None:
        onnx_files.write(job.network, job.origin, job.temporary, job.labels)
    else:
        _write_graph(job)
    try:
        return onnx_files.session(job.temporary)
    except Exception as error:  # onnxruntime's have no common base
        dtype = next((str(p.dtype) for p in job.network.parameters() if p.dtype != torch.float32), None)
        advice = f" It has few operations in {dtype.removeprefix('torch.')}: export model.float()" if dtype else ""
        raise ExportError(f"export: onnxruntime cannot load {model}: {reason(error)}.{advice}") from error


def _write_graph(job: Job) -> None:
    exported = _capture(job)  # as for the other format, and with its errors
    try:
        program = torch.onnx.export(
            exported,
            dynamo=True,
            optimize=not job.keep_bn,  # it folds BatchNorm
            verbose=False,
            output_names=_output_names(job),
        )
    except Exception as error:  # the exporter's, of many kinds
        raise ExportError(
            f"export: torch.onnx cannot export {job.record.model}: {reason(error.__cause__ or error)}"
        ) from error
    assert program is not None
    proto = program.model_proto  # a new one on every access
    _label(proto, job.axes, job.labels)
    job.temporary.write_bytes(proto.SerializeToString())


def _label(model: Any, axes: Sequence[Mapping[int, str]], metadata: Mapping[str, str]) -> None:
    """Name the dimensions of any size of an ONNX model, for each input in order, and set its metadata."""
    from onnx import helper

    names: dict[str, str] = {}
    for value, called in zip(model.graph.input, axes, strict=True):
        for number, name in called.items():
            names.setdefault(value.type.tensor_type.shape.dim[number].dim_param, name)
    names.pop("", None)  # of a fixed size
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:  # a symbol, or an expression of symbols
                dim.dim_param = re.sub(r"\w+", lambda match: names.get(match[0], match[0]), dim.dim_param)
    helper.set_model_props(model, {entry.key: entry.value for entry in model.metadata_props} | dict(metadata))


def write_program(job: Job) -> Callable[..., list[Tensor]]:
    """Write a program for `torch.export.load`, and return what that reads."""
    archive = io.BytesIO()  # not the file: on a full disk torch ends the process, and by name it insists on the suffix
    extra_files = {f"{name}.json": text for name, text in job.labels.items()}
    torch.export.save(_capture(job), archive, extra_files=extra_files)
    job.temporary.write_bytes(archive.getbuffer())
    with job.temporary.open("rb") as file:
        again = torch.export.load(file).module()
    return lambda *args, **kwargs: outputs(again(*args, **kwargs))


def _capture(job: Job) -> torch.export.ExportedProgram:
    args, kwargs, shapes = job.inputs.args, job.inputs.kwargs, _shapes(job)
    errors = []
    for strict in (False, True):  # each follows code that the other does not, such as torch.tensor(data=...)
        try:
            return torch.export.export(job.network, args, kwargs, dynamic_shapes=shapes, strict=strict)
        except Exception as error:  # the exporter's, of many kinds
            errors.append(error)
    first = errors[0]
    raise ExportError(
        f"export: torch.export cannot export {job.record.model}: {reason(first.__cause__ or first)}"
    ) from first


def _output_names(job: Job) -> list[str]:
    """A classifier's output is called "logits"; the outputs of other networks "output", "output_2" and so on."""
    found = evaluate("export", job.network, job.inputs)
    if len(found) == 1 and found[0].ndim == 2 and (job.record.architecture is not None or "classes" in job.labels):
        return ["logits"]
    return ["output", *(f"output_{number}" for number in range(2, len(found) + 1))][: len(found)]
