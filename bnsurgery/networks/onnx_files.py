"""Networks from ONNX files, and back into the same graph with new weights.

Whichever of onnx2torch and onnx2pytorch takes a file, and computes what onnxruntime does, makes the module. Which
initializer became which tensor is found by comparing bytes, so neither is relied on for that.
"""

import copy
import hashlib
import importlib.util
import io
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from bnsurgery.errors import BNSurgeryWarning, CheckpointError, ExportError
from bnsurgery.files.labels import add_metadata
from bnsurgery.graph.layer_kinds import LAYERS
from bnsurgery.running.calls import outputs

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

SUFFIX = ".onnx"
_KEY = "bnsurgery_onnx"
_NEEDED = ("onnx", "onnxruntime", "onnx2torch", "onnx2pytorch")
_OUTPUTS = 64  # of one node, at most
_SIDE = 224  # pixels: of an input whose size the file leaves open
# Of the largest output: what float32 rounding in a deep network amounts to, between two runtimes.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the module stands in the file: an input of a node, and how it lies there.

    Attributes:
        node, input: their numbers in the original graph.
        transposed: whether the module has it so.
    """

    node: int
    input: int
    transposed: bool


@dataclass(frozen=True)
class Source:
    """The file that a module was made from; kept with the module, and by all copies of it.

    Attributes:
        digest: SHA-256 of the file.
        model: what it holds.
        places: by the names of the module's state dict; those that are not found are missing.
        before: the state dict when it was made.
        shapes: of the inputs, by name; open sizes are filled in.
        any_batch: whether the module takes several inputs at a time.
    """

    digest: str
    model: "ModelProto"
    places: dict[str, _Place]
    before: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    any_batch: bool

    def __deepcopy__(self, memo: dict[int, Any]) -> "Source":
        return self  # nothing in it changes

    def noise(self, samples: int = 1) -> tuple[Tensor, ...]:
        """Inputs of the shapes that the file names, `samples` of each where that is not 1."""
        arrays = _noise(self.model.graph, self.shapes)
        return tuple(torch.from_numpy(array).repeat(samples, *[1] * (array.ndim - 1)) for array in arrays.values())


def source(model: nn.Module) -> Source | None:
    """The ONNX file that `model` was made from, or what it was copied or inserted from; None for other networks."""
    found = getattr(model, "meta", None)
    return found.get(_KEY) if isinstance(found, dict) else None


def from_onnx(path: str | PathLike[str]) -> nn.Module:
    """The network in an ONNX file, in eval mode, ready for `insert`; `export(to="onnx")` gives the same graph back.

    It is made by onnx2torch or onnx2pytorch: by the first whose module computes what onnxruntime computes, to 1e-4 of
    the largest output. Where a Reshape has the batch of 1 written into it, it is made to take any; where the module
    still takes one input at a time, a warning says so.

    Raises:
        CheckpointError: no such file, no ONNX model, or no converter makes the same network of it: what each said.
        ExportError: a package is missing.
    """
    path = Path(path)
    _require(*_NEEDED)
    import onnx

    try:
        content = path.read_bytes()
        original = onnx.load(str(path))
        onnx.checker.check_model(original)
    except OSError as error:
        raise CheckpointError(f"'{path}': cannot be read: {error.strerror or error}") from error
    except Exception as error:  # protobuf's and onnx's, of many kinds
        raise CheckpointError(f"'{path}': not an ONNX model, or a damaged one: {_reason(error)}") from error
    shapes = _shapes(original.graph)
    run = session(path)
    noise = _noise(original.graph, shapes)
    try:
        expected = run(*map(torch.from_numpy, noise.values()))
    except Exception as error:  # onnxruntime's have no base of their own
        raise CheckpointError(f"'{path}': onnxruntime cannot run it: {_reason(error)}") from error
    plain, numbers = _plain(original)
    errors: dict[str, str] = {}
    for model in (_any_batch(plain), plain):
        for name, convert in _CONVERTERS.items():
            try:
                with _quiet():
                    module, nodes = convert(model)
                    got = outputs(_eval(module)(*map(torch.from_numpy, noise.values())))
                _compare(expected, got)
            except Exception as error:  # the converter's, of many kinds
                errors[name] = _reason(error)
                continue
            _as_torchs_own_(module)
            any_batch = _takes_two(module, noise)
            if not any_batch:
                warnings.warn(
                    f"'{path}' takes one input at a time: a size of 1 is written into it. Calibration does with that "
                    "(--batch-size 1); to train with BatchNorm, export the network anew with a dynamic batch",
                    BNSurgeryWarning,
                    stacklevel=2,
                )
            places = _places(module, nodes, plain, numbers)
            digest = hashlib.sha256(content).hexdigest()
            before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
            module.meta = {_KEY: Source(digest, original, places, before, shapes, any_batch)}  # type: ignore[assignment]
            first = next(iter(shapes.values()))
            module.pretrained_cfg = {"input_size": first[1:]}  # type: ignore[assignment]  # as timm says it
            return module
    told = "; ".join(f"{name}: {error}" for name, error in errors.items())
    raise CheckpointError(f"'{path}': no converter makes a network of it that computes the same: {told}")


def find(digest: str, *folders: Path) -> Path | None:
    """The file of that SHA-256 in one of these folders."""
    for folder in folders:
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest:
                return path
    return None


def write(network: nn.Module, origin: Source, temporary: Path, metadata: Mapping[str, str]) -> None:
    """Write the file that `network` was made from with the tensors that it has now, and with this metadata.

    The graph is the file's, and so is every initializer whose tensor has not changed, to the byte. One that several
    nodes share is written anew for those that came to differ, and a layer that got a bias gets an input for it.

    Raises:
        ExportError: a tensor has changed, and its place in the file is not known.
    """
    from onnx import numpy_helper

    model = copy.deepcopy(origin.model)
    graph = model.graph
    users: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            users[name] = users.get(name, 0) + 1
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    for key, tensor in network.state_dict().items():
        if key in origin.before and torch.equal(_bytes(tensor), _bytes(origin.before[key])):
            continue
        if key in origin.before and tensor.shape != origin.before[key].shape:
            was = tuple(origin.before[key].shape)
            raise ExportError(
                f"export: '{key}' is {tuple(tensor.shape)}, and {was} in the ONNX file, whose graph is kept"
            )
        place = origin.places.get(key) or _place_of_bias(key, origin)
        if place is None:
            raise ExportError(f"export: '{key}' has changed, and where it stands in the ONNX file is not known")
        node = graph.node[place.node]
        array = tensor.detach().cpu().numpy()
        name = node.input[place.input] if place.input < len(node.input) else ""
        old = initializers.get(name)
        shape = tuple(old.dims) if old is not None else array.shape
        array = np.ascontiguousarray((array.T if place.transposed else array).reshape(shape))
        if old is not None and users[name] == 1:
            old.CopyFrom(numpy_helper.from_array(array, name))
            continue
        new = f"{key}.bnsurgery"
        graph.initializer.append(numpy_helper.from_array(array, new))
        while len(node.input) <= place.input:
            node.input.append("")
        node.input[place.input] = new
    add_metadata(model, metadata)
    temporary.write_bytes(model.SerializeToString())


def session(path: Path) -> Callable[..., list[Tensor]]:
    """The file in onnxruntime, as a function; one that takes one input at a time is called for each."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of what concerns its own optimizer
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = opened.get_inputs()

    def run(*tensors: Tensor) -> list[Tensor]:
        arrays = [tensor.cpu().numpy() for tensor in tensors]
        samples = len(arrays[0]) if inputs[0].shape[:1] == [1] else 1
        parts = [[a[i : i + 1] for a in arrays] for i in range(samples)] if samples > 1 else [arrays]
        names = [entry.name for entry in inputs]
        results = [opened.run(None, dict(zip(names, part, strict=True))) for part in parts]
        return [torch.from_numpy(np.concatenate(column)) for column in zip(*results, strict=True)]

    return run


def _require(*packages: str) -> None:
    for needed in packages:
        if importlib.util.find_spec(needed) is None:
            raise ExportError(f"ONNX files need {needed}, which is not installed: pip install 'bnsurgery[onnx]'")


_Nodes = dict[str, list[int]]  # by the names of a module's children, the nodes of the graph that each was made of


def _onnx2torch(model: "ModelProto") -> tuple[nn.Module, _Nodes]:
    from onnx2torch import convert

    module: nn.Module = convert(copy.deepcopy(model))
    children = [name for name, _ in module.named_children() if name != "initializers"]
    return module, {name: [at] for at, (name, _) in enumerate(zip(children, model.graph.node, strict=True))}


def _onnx2pytorch(model: "ModelProto") -> tuple[nn.Module, _Nodes]:
    """Its module walks through the file on every call; what it does there, traced once, is a module like any other."""
    from onnx2pytorch import ConvertModel

    module: Any = ConvertModel(copy.deepcopy(model))  # it changes what it is given
    forward = _FORWARDS[len(module.input_names)]
    module.__class__ = type("OnnxNetwork", (ConvertModel,), {"forward": forward(ConvertModel.forward)})
    traced = fx.GraphModule(module, _Children().trace(module.eval()))
    producers = {name: at for at, node in enumerate(model.graph.node) for name in node.output}
    nodes = {}
    for output, name in module.mapping.items():  # of a product and the bias added to it there is one layer
        if isinstance(getattr(module, name), nn.Module):
            at = producers[output]
            before = [producers[i] for i in model.graph.node[at].input if i in producers and i not in module.mapping]
            nodes[name] = [at, *before]
    return traced, {name: at for name, at in nodes.items() if name in traced._modules}


class _Children(fx.Tracer):
    """Follows a module's own code, and none of its children's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Every one is."""
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


def _as_torchs_own_(module: nn.Module) -> None:
    """Let torch.fx, and quantization with it, take the converter's operators as a whole: their code has no trace."""
    for child in module.children():
        if not any(isinstance(inner, LAYERS) for inner in child.modules()):
            child.__module__ = nn.ReLU.__module__


def _plain(original: "ModelProto") -> tuple["ModelProto", list[int]]:
    """A copy in which weights are initializers, whatever gave them, and the numbers that its nodes have in the file."""
    from onnx import numpy_helper

    model = copy.deepcopy(original)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    kept, numbers = [], []
    for number, node in enumerate(model.graph.node):
        value = None
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            value = node.attribute[0].t
        elif node.op_type == "Identity" and node.input[0] in constants:
            value = constants[node.input[0]]
        if value is None or any(node.output[0] == output.name for output in model.graph.output):
            kept.append(copy.deepcopy(node))
            numbers.append(number)
            continue
        tensor = numpy_helper.from_array(numpy_helper.to_array(value), node.output[0])
        model.graph.initializer.append(tensor)
        constants[tensor.name] = tensor
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model, numbers


def _any_batch(plain: "ModelProto") -> "ModelProto":
    """A copy in which a Reshape to (1, ...) takes over the batch of its input, which ONNX writes as 0."""
    from onnx import numpy_helper

    model = copy.deepcopy(plain)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for number, node in enumerate(model.graph.node):
        if node.op_type != "Reshape" or node.input[1] not in constants or node.input[0] in constants:
            continue
        shape = numpy_helper.to_array(constants[node.input[1]]).copy()
        if len(shape) > 1 and shape[0] == 1 and not (shape == 0).any():
            shape[0] = 0
            for attribute in node.attribute:
                attribute.i = 0  # allowzero, the only one: a size of 0 is meant as such
            name = f"{node.input[1]}.{number}.any_batch"
            model.graph.initializer.append(numpy_helper.from_array(shape, name))
            node.input[1] = name
    for value in [*model.graph.input, *model.graph.output]:
        size = value.type.tensor_type.shape.dim
        if size and size[0].dim_value == 1 and value.name not in constants:
            size[0].dim_param = "batch"
    del model.graph.value_info[:]  # it says 1, too
    return model


def _shapes(graph: "GraphProto") -> dict[str, tuple[int, ...]]:
    """Of the inputs, without the weights that old files list among them; 1 for an open batch, 224 for open sides."""
    weights = {tensor.name for tensor in graph.initializer}
    found = {}
    for value in graph.input:
        if value.name not in weights:
            sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            found[value.name] = tuple(size or (_SIDE if at > 1 else 3 if at else 1) for at, size in enumerate(sizes))
    return found


def _noise(graph: "GraphProto", shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Inputs to try a file with: noise where it takes real numbers, zeros elsewhere."""
    from onnx import helper

    generator = np.random.default_rng(0)
    types = {value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) for value in graph.input}
    return {
        name: generator.standard_normal(shape).astype(types[name])
        if types[name].kind == "f"
        else np.zeros(shape, types[name])
        for name, shape in shapes.items()
    }


def _eval(module: nn.Module) -> Callable[..., Any]:
    return torch.no_grad()(module.eval())


def _compare(expected: list[Tensor], got: list[Tensor]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        largest = theirs.abs().max() if theirs.numel() else 0
        if ours.shape != theirs.shape or not (ours - theirs).abs().max() <= _TOLERANCE * largest:
            raise ValueError("what it makes of it computes something else than onnxruntime")


def _takes_two(module: nn.Module, noise: dict[str, np.ndarray]) -> bool:
    """Whether two inputs at a time give what each gives alone."""
    first = [torch.from_numpy(array) for array in noise.values()]
    second = [tensor.flip(-1) for tensor in first]
    try:
        run = _eval(module)
        alone = [outputs(run(*first)), outputs(run(*second))]
        both = outputs(run(*(torch.cat(pair) for pair in zip(first, second, strict=True))))
        _compare([torch.cat(pair) for pair in zip(*alone, strict=True)], both)
    except Exception:  # what an operator says to a shape that does not fit
        return False
    return True


def _places(module: nn.Module, made_of: _Nodes, plain: "ModelProto", numbers: list[int]) -> dict[str, _Place]:
    """Where the module's parameters and buffers stand in the file, by their bytes among the inputs of their node."""
    from onnx import numpy_helper

    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in plain.graph.initializer}
    found = {}
    for name, nodes in made_of.items():
        taken: set[tuple[int, int]] = set()
        for key, tensor in module.get_submodule(name).state_dict(prefix=f"{name}.").items():
            for at in nodes:
                place = _found(tensor, plain.graph.node[at], arrays, at, taken)
                if place is not None:
                    taken.add((at, place.input))
                    found[key] = _Place(numbers[at], place.input, place.transposed)
                    break
    return found


def _found(
    tensor: Tensor, node: "NodeProto", arrays: dict[str, np.ndarray], at: int, taken: set[tuple[int, int]]
) -> _Place | None:
    values = tensor.detach().cpu().numpy()
    # A square one could be taken for its transpose where it is that.
    turned = node.op_type == "MatMul" or (
        node.op_type == "Gemm" and not any(a.name == "transB" and a.i for a in node.attribute)
    )
    for input, name in enumerate(node.input):
        array = arrays.get(name)
        if array is None or array.size != values.size or array.dtype != values.dtype or (at, input) in taken:
            continue
        if turned and values.ndim == 2:
            if array.shape == values.T.shape and array.tobytes() == values.T.tobytes():
                return _Place(at, input, True)
        elif array.tobytes() == values.tobytes():
            return _Place(at, input, False)
    return None


def _place_of_bias(key: str, origin: Source) -> _Place | None:
    """Where the bias goes that a conv or dense layer had none of: the input behind its weight."""
    layer, _, kind = key.rpartition(".")
    weight = origin.places.get(f"{layer}.weight")
    if kind != "bias" or weight is None or weight.input != 1:
        return None
    node = origin.model.graph.node[weight.node]
    free = len(node.input) < 3 or not node.input[2]
    return _Place(weight.node, 2, False) if node.op_type in ("Conv", "ConvTranspose", "Gemm") and free else None


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


@contextmanager
def _quiet() -> Iterator[None]:
    """Converters print and warn of their own insides."""
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        disabled = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
