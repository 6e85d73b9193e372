"""A network as a program that needs no class of its own: ONNX and torch.export, written and read back."""

import inspect
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bnsurgery.errors import ExportError
from bnsurgery.files.labels import label_onnx
from bnsurgery.networks import onnx_files
from bnsurgery.records.record import SurgeryRecord
from bnsurgery.running.batches import Inputs
from bnsurgery.running.calls import outputs
from bnsurgery.running.modes import evaluate
from bnsurgery.statistics.verification import EquivalenceReport, verify

AXES = ("batch", "height", "width")


@dataclass(frozen=True)
class Job:
    """What the writers of a format need to know. They give back what the file holds: a network, or a function."""

    network: nn.Module
    temporary: Path
    inputs: Inputs
    suffix: str
    done: SurgeryRecord
    keep_bn: bool
    axes: list[dict[int, str]]  # names of those of any size, for every tensor of the input
    labels: dict[str, str]


def axes_of(inputs: Inputs, dynamic: Sequence[str]) -> list[dict[int, str]]:
    """Of every tensor in the inputs, the dimensions that may have any size, by number; of a batch of one, not that."""
    found = []
    for tensor in inputs.tensors:
        whole = tensor.ndim > 0 and len(tensor) == inputs.samples > 1  # torch.export takes a size of 1 for a constant
        named = {0: "batch"} if whole else {}
        named |= {2: "height", 3: "width"} if tensor.ndim == 4 else {}
        found.append({number: name for number, name in named.items() if name in dynamic})
    missing = [name for name in dynamic if name != "batch" and not any(name in axes.values() for axes in found)]
    if missing:
        raise ExportError(f"export: no input of shape (N, C, H, W), so no {missing[0]} that could be of any size")
    return found


def _shapes(job: Job) -> Any:
    """The same for torch.export, in the form of the arguments."""
    if not any(job.axes):
        return None
    # Of a batch any size is asked for, of height and width whatever the network allows: it is tried.
    kinds = {"batch": torch.export.Dim("batch"), "height": torch.export.Dim.AUTO, "width": torch.export.Dim.AUTO}
    axes = {id(tensor): called for tensor, called in zip(job.inputs.tensors, job.axes, strict=True)}
    given = inspect.signature(job.network.forward).bind(*job.inputs.args, **job.inputs.kwargs).arguments

    def shape(leaf: Any) -> dict[int, Any] | None:
        return {n: kinds[name] for n, name in axes.get(id(leaf), {}).items()} or None

    return tree_map(shape, dict(given))


def compare_doubled(
    written: Callable[..., Any], bn_model: nn.Module, inputs: Inputs, axes: Sequence[dict[int, str]], axis: str
) -> EquivalenceReport:
    """Compared on inputs twice as large in one axis: a copy of them is set beside them."""
    numbers = iter([next((n for n, name in called.items() if name == axis), None) for called in axes])

    def doubled(leaf: Any) -> Any:
        number = next(numbers) if isinstance(leaf, Tensor) else None
        return leaf if number is None else torch.cat([leaf, leaf], number)

    try:
        return verify(written, bn_model, [inputs.map(doubled)], drift_batch_sizes=())
    except Exception as error:  # the network's, or of whatever runs the file
        raise ExportError(f"export: {axis} cannot be of any size here: with twice as much: {reason(error)}") from error


def write_onnx(job: Job) -> Callable[..., list[Tensor]]:
    """ONNX, its axes and outputs named; what onnxruntime makes of the file comes back.

    A network that came from an ONNX file goes back into the same graph.
    """
    origin = onnx_files.source(job.network)
    if origin is not None and not job.keep_bn:
        onnx_files.write(job.network, origin, job.temporary, job.labels)
        return onnx_files.session(job.temporary)
    import onnxruntime

    exported = _capture(job)  # as for the other format, and with its errors
    try:
        program = torch.onnx.export(
            exported,
            dynamo=True,
            optimize=not job.keep_bn,  # or BN is folded
            verbose=False,
            output_names=_output_names(job),
        )
    except Exception as error:  # the exporter's, of many kinds
        raise ExportError(f"export: torch.onnx cannot export {job.done.model}: {reason(error)}") from error
    assert program is not None
    model = program.model_proto
    label_onnx(model, job.axes, job.labels)
    job.temporary.write_bytes(model.SerializeToString())
    try:
        session = onnxruntime.InferenceSession(str(job.temporary), providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no base of their own
        dtype = next((str(p.dtype) for p in job.network.parameters() if p.dtype != torch.float32), None)
        advice = f" It has few operations in {dtype.removeprefix('torch.')}: export model.float()" if dtype else ""
        raise ExportError(f"export: onnxruntime cannot load {job.done.model}: {reason(error)}.{advice}") from error

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        tensors = [tensor.cpu().numpy() for tensor in Inputs(args, kwargs).tensors]
        names = [entry.name for entry in session.get_inputs()]
        return [torch.from_numpy(array) for array in session.run(None, dict(zip(names, tensors, strict=True)))]

    return run


def write_program(job: Job) -> Callable[..., list[Tensor]]:
    """What `torch.export.load` reads, and what that makes of the file."""
    program = _capture(job)
    archive = io.BytesIO()  # not the file: on a full disk torch ends the process, and by name it insists on the suffix
    torch.export.save(program, archive, extra_files={f"{name}.json": text for name, text in job.labels.items()})
    job.temporary.write_bytes(archive.getbuffer())
    with job.temporary.open("rb") as file:
        again = torch.export.load(file).module()
    return lambda *args, **kwargs: outputs(again(*args, **kwargs))


def _capture(job: Job) -> torch.export.ExportedProgram:
    shapes = _shapes(job)
    first: Exception | None = None
    for strict in (False, True):  # each follows code that the other does not, such as torch.tensor(data=...)
        try:
            return torch.export.export(
                job.network, job.inputs.args, job.inputs.kwargs, dynamic_shapes=shapes, strict=strict
            )
        except Exception as error:  # the exporter's, of many kinds
            first = first or error
    assert first is not None
    raise ExportError(f"export: torch.export cannot export {job.done.model}: {reason(first)}") from first


def _output_names(job: Job) -> list[str]:
    """What to call them: "logits" of a classifier; "output", "output_2" and so on of others."""
    found = evaluate("export", job.network, job.inputs)
    if len(found) == 1 and found[0].ndim == 2 and (job.done.architecture is not None or "classes" in job.labels):
        return ["logits"]
    return [f"output_{number}" if number > 1 else "output" for number in range(1, len(found) + 1)]


def reason(error: Exception) -> str:
    """Its first line."""
    cause = error.__cause__ or error
    return next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)[:300]
