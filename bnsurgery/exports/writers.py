"""Write a network in one format. Every writer returns the network or function that it reads back from the file."""

import copy
import inspect
import io
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bnsurgery.errors import ExportError
from bnsurgery.files.checkpoint import has_place_for, same_bits, torch_save
from bnsurgery.files.labels import sort_metadata
from bnsurgery.files.weights import read_tensors
from bnsurgery.networks.onnx_files import Source, session
from bnsurgery.networks.third_party import errors_as, reason
from bnsurgery.running.batches import Inputs
from bnsurgery.running.calls import outputs
from bnsurgery.running.modes import evaluate

from .formats import PICKLES

if TYPE_CHECKING:
    from onnx import ModelProto

Axes = Sequence[Mapping[int, str]]  # for every tensor in the inputs, the names of the dimensions of any size


def write_state(
    network: nn.Module, file: Path, suffix: str, metadata: Mapping[str, str], again: nn.Module
) -> nn.Module:
    """Write the network's tensors, and return `again`, given on the meta device, with the tensors of the file.

    A final name with one of the suffixes in `PICKLES` gives `torch.save`'s format, which holds no metadata.
    """
    form = torch.contiguous_format  # a clone each: safetensors takes no two names for one storage
    state = network.state_dict().items()
    tensors = {name: tensor.detach().cpu().clone(memory_format=form) for name, tensor in state}
    odd = next((name for name, tensor in tensors.items() if not has_place_for(tensor.dtype)), None)
    if suffix in PICKLES:
        torch_save(tensors, file)
    elif odd is not None:
        raise ExportError(
            f"export: safetensors has no place for '{odd}', which is {tensors[odd].dtype}: give the file a name in .pth"
        )
    else:
        save_file(tensors, file, metadata={"format": "pt", **metadata})
        sort_metadata(file)
    again.load_state_dict(read_tensors(file), assign=True)
    return again.to(next(network.parameters()).device)


def write_program(
    network: nn.Module, inputs: Inputs, axes: Axes, file: Path, metadata: Mapping[str, str]
) -> Callable[..., list[Tensor]]:
    """Write a program for `torch.export.load`."""
    archive = io.BytesIO()  # not the file: on a full disk torch ends the process, and by name it insists on the suffix
    extra_files = {f"{name}.json": text for name, text in metadata.items()}
    torch.export.save(_capture(network, inputs, axes), archive, extra_files=extra_files)
    file.write_bytes(archive.getbuffer())
    with file.open("rb") as opened:
        again = torch.export.load(opened).module()
    return lambda *args, **kwargs: outputs(again(*args, **kwargs))


def write_onnx(
    model: "ModelProto", network: nn.Module, file: Path, metadata: Mapping[str, str]
) -> Callable[..., list[Tensor]]:
    """Write the ONNX model that was made of `network`, and return the file in onnxruntime."""
    from onnx import helper

    helper.set_model_props(model, {entry.key: entry.value for entry in model.metadata_props} | dict(metadata))
    file.write_bytes(model.SerializeToString())
    try:
        return session(file)
    except Exception as error:  # onnxruntime's have no common base
        name = type(network).__name__
        dtype = next((str(p.dtype) for p in network.parameters() if p.dtype != torch.float32), None)
        advice = f" It has few operations in {dtype.removeprefix('torch.')}: export model.float()" if dtype else ""
        raise ExportError(f"export: onnxruntime cannot load {name}: {reason(error)}.{advice}") from error


def new_graph(network: nn.Module, inputs: Inputs, axes: Axes, *, optimize: bool, classifies: bool) -> "ModelProto":
    """The network as an ONNX model with named axes and outputs.

    Args:
        optimize: simplify the graph, which folds BatchNorm.
        classifies: call a single output of shape (N, classes) "logits".
    """
    exported = _capture(network, inputs, axes)  # as for a program, and with its errors
    found = evaluate("export", network, inputs)
    names = ["output", *(f"output_{number}" for number in range(2, len(found) + 1))][: len(found)]
    if classifies and [tensor.ndim for tensor in found] == [2]:
        names = ["logits"]
    with errors_as(ExportError, f"export: torch.onnx cannot export {type(network).__name__}"):
        program = torch.onnx.export(exported, dynamo=True, optimize=optimize, verbose=False, output_names=names)
    assert program is not None
    model = program.model_proto  # a new one on every access
    called: dict[str, str] = {}
    for value, of_input in zip(model.graph.input, axes, strict=True):
        for number, name in of_input.items():
            called.setdefault(value.type.tensor_type.shape.dim[number].dim_param, name)
    called.pop("", None)  # of a fixed size
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:  # a symbol, or an expression of symbols
                dim.dim_param = re.sub(r"\w+", lambda match: called.get(match[0], match[0]), dim.dim_param)
    return model


def _capture(network: nn.Module, inputs: Inputs, axes: Axes) -> torch.export.ExportedProgram:
    # Any size of a batch, and of height and width what the network allows: the export is tried on it.
    kinds = {"batch": torch.export.Dim("batch"), "height": torch.export.Dim.AUTO, "width": torch.export.Dim.AUTO}
    of_tensor = {
        id(tensor): {number: kinds[name] for number, name in names.items()}
        for tensor, names in zip(inputs.tensors, axes, strict=True)
    }
    given = inspect.signature(network.forward).bind(*inputs.args, **inputs.kwargs).arguments
    shapes = tree_map(lambda leaf: of_tensor.get(id(leaf)) or None, dict(given)) if any(axes) else None
    export = partial(torch.export.export, network, inputs.args, inputs.kwargs, dynamic_shapes=shapes)
    with errors_as(ExportError, f"export: torch.export cannot export {type(network).__name__}"):
        try:
            return export(strict=False)
        except Exception as error:  # each way follows code that the other does not, such as torch.tensor(data=...)
            with suppress(Exception):
                return export(strict=True)
            raise error


def updated(origin: Source, network: nn.Module) -> "ModelProto":
    """The model in the file that `network` was made from, with the tensors that the network has now.

    The graph stays, and so does every initializer whose tensor has not changed, to the byte. An initializer that
    several nodes share is copied for those whose tensor changed, and a layer that got a bias gets an input for it.

    Raises:
        ExportError: a tensor has another shape or type, or has changed, and its place in the file is not known.
    """
    from onnx import numpy_helper

    model = copy.deepcopy(origin.model)
    graph = model.graph
    nodes = {tuple(node.output): node for node in graph.node}
    users = Counter(name for node in graph.node for name in node.input)
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    for key, tensor in network.state_dict().items():
        before = origin.before.get(key, tensor)
        if key in origin.before and same_bits(tensor, before):
            continue
        if (tensor.dtype, tensor.shape) != (before.dtype, before.shape):
            raise ExportError(
                f"export: '{key}' is {tensor.dtype} {tuple(tensor.shape)}, and {before.dtype} {tuple(before.shape)} in "
                f"the ONNX file, whose graph is kept: export model.to({before.dtype}), with layers of the old sizes"
            )
        place = origin.places.get(key)
        if place is None:
            raise ExportError(f"export: '{key}' has changed, and where it stands in the ONNX file is not known")
        node = nodes[place.outputs]
        node.input.extend([""] * (place.input + 1 - len(node.input)))
        name = node.input[place.input]
        old = initializers.get(name)
        array = tensor.numpy(force=True)
        array = array.T if place.transposed else array
        new = numpy_helper.from_array(array if old is None else array.reshape(tuple(old.dims)), name)
        if old is not None and users[name] == 1:
            old.CopyFrom(new)
        else:
            new.name = node.input[place.input] = f"{key}.bnsurgery"
            graph.initializer.append(new)
    return model
