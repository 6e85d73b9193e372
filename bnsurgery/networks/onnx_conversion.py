"""Torch modules from ONNX models, by onnx2torch or onnx2pytorch: the first that computes what onnxruntime does."""

import copy
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn

from bnsurgery.errors import CheckpointError
from bnsurgery.graph.layer_kinds import LAYERS
from bnsurgery.running.calls import outputs

from .third_party import quiet, reason

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Nodes = dict[str, "list[NodeProto]"]  # by the names of a module's children, the nodes that each was made of
_OUTPUTS = 64  # of one node, at most
_TOLERANCE = 1e-4  # of the largest output: the float32 rounding of a deep network in two runtimes stays below


def convert(
    path: Path, model: "ModelProto", noise: tuple[Tensor, ...], expected: list[Tensor]
) -> tuple[nn.Module, Nodes]:
    """The first module that computes what is expected of the noise, in eval mode: if possible one for any batch.

    Raises:
        CheckpointError: no converter makes such a module; the message has the error of each.
    """
    errors: dict[str, str] = {}
    for candidate in (_any_batch(model), model):
        for name, converter in _CONVERTERS.items():
            try:
                with quiet(), torch.no_grad():
                    module, nodes = converter(candidate)
                    got = outputs(module.eval()(*noise))
                _compare(expected, got)
            except Exception as error:  # the converter's, of many kinds
                errors[name] = reason(error)
                continue
            for child in module.children():
                # The code of the converter's operators cannot be traced. torch.fx, and quantization with it, takes
                # torch's modules as a whole.
                if not any(isinstance(inner, LAYERS) for inner in child.modules()):
                    child.__module__ = nn.ReLU.__module__
            return module, nodes
    reasons = "; ".join(f"{name}: {error}" for name, error in errors.items())
    raise CheckpointError(f"'{path}': no converter makes a network of it that computes the same: {reasons}")


@torch.no_grad()
def takes_two(module: nn.Module, first: tuple[Tensor, ...]) -> bool:
    """Whether two inputs at a time give what each gives alone."""
    second = [tensor.flip(-1) for tensor in first]
    try:
        alone = [outputs(module(*first)), outputs(module(*second))]
        both = outputs(module(*(torch.cat(pair) for pair in zip(first, second, strict=True))))
        _compare([torch.cat(pair) for pair in zip(*alone, strict=True)], both)
    except Exception:  # an operator's, for a shape that does not fit
        return False
    return True


def _compare(expected: list[Tensor], got: list[Tensor]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        largest = theirs.abs().max() if theirs.numel() else 0
        if ours.shape != theirs.shape or not (ours - theirs).abs().max() <= _TOLERANCE * largest:
            raise ValueError("its network computes something else than onnxruntime")


def _onnx2torch(model: "ModelProto") -> tuple[nn.Module, Nodes]:
    from onnx2torch import convert

    module: nn.Module = convert(copy.deepcopy(model))
    children = [name for name, _ in module.named_children() if name != "initializers"]
    return module, {name: [node] for name, node in zip(children, model.graph.node, strict=True)}


def _onnx2pytorch(model: "ModelProto") -> tuple[nn.Module, Nodes]:
    """Its module walks through the file on every call; traced once, that is a module like any other."""
    from onnx2pytorch import ConvertModel

    module: Any = ConvertModel(copy.deepcopy(model))  # it changes its argument
    forward = _FORWARDS.get(len(module.input_names))
    if forward is None:
        raise NotImplementedError(f"{len(module.input_names)} inputs, at most {max(_FORWARDS)} are supported")
    module.__class__ = type("OnnxNetwork", (ConvertModel,), {"forward": forward(ConvertModel.forward)})
    for layer in module.modules():
        if isinstance(layer, nn.Linear):  # it may hold these the wrong way round
            layer.out_features, layer.in_features = layer.weight.shape
    traced = fx.GraphModule(module, _Children().trace(module.eval()))
    producers = {name: node for node in model.graph.node for name in node.output}
    nodes = {}
    for output, name in module.mapping.items():
        if name in traced._modules:
            node = producers[output]  # a product and the bias added to it become one layer
            nodes[name] = [node, *(producers[i] for i in node.input if i in producers and i not in module.mapping)]
    return traced, nodes


class _Children(fx.Tracer):
    """Follows a module's own code, and none of its children's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Several outputs of a node, of which the code takes those that it has names for."""
        return (operator.getitem(cast(Any, obj), i) for i in range(_OUTPUTS))


# By the number of inputs: fx reads the arguments off the code.
_FORWARDS: dict[int, Callable[[Any], Any]] = {
    1: lambda forward: lambda self, input: forward(self, input),
    2: lambda forward: lambda self, input, second: forward(self, input, second),
    3: lambda forward: lambda self, input, second, third: forward(self, input, second, third),
}
_CONVERTERS = {"onnx2torch": _onnx2torch, "onnx2pytorch": _onnx2pytorch}


def with_initializers(original: "ModelProto") -> "ModelProto":
    """A copy in which weights are initializers, not outputs of Constant and Identity nodes."""
    model = copy.deepcopy(original)
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    replaced = []
    for number, node in enumerate(graph.node):
        value = None
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            value = node.attribute[0].t
        elif node.op_type == "Identity":
            value = constants.get(node.input[0])
        if value is not None and all(node.output[0] != output.name for output in graph.output):
            tensor = constants[node.output[0]] = graph.initializer.add()
            tensor.CopyFrom(value)
            tensor.name = node.output[0]
            replaced.append(number)
    for number in reversed(replaced):
        del graph.node[number]
    return model


def _any_batch(plain: "ModelProto") -> "ModelProto":
    """A copy in which a Reshape to (1, ...) takes over the batch of its input, which ONNX writes as 0."""
    from onnx import numpy_helper

    model = copy.deepcopy(plain)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "Reshape" or node.input[1] not in constants or node.input[0] in constants:
            continue
        shape = numpy_helper.to_array(constants[node.input[1]]).copy()
        if len(shape) > 1 and shape[0] == 1 and not (shape == 0).any():
            shape[0] = 0
            del node.attribute[:]  # allowzero, the only one, takes 0 for a size
            node.input[1] = f"{node.output[0]}.any_batch"
            model.graph.initializer.append(numpy_helper.from_array(shape, node.input[1]))
    for value in [*model.graph.input, *model.graph.output]:
        size = value.type.tensor_type.shape.dim
        if size and size[0].dim_value == 1 and value.name not in constants:
            size[0].dim_param = "batch"
    del model.graph.value_info[:]  # it has the 1, too
    return model
