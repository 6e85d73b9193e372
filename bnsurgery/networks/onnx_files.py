"""Networks from ONNX files, and back into the same graph with new weights.

onnx2torch or onnx2pytorch makes the module: the first whose module computes what onnxruntime computes. Which
initializer became which tensor is found by comparing bytes, so that neither converter is relied on for it.
"""

import copy
import hashlib
import importlib.util
import math
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from bnsurgery.errors import BNSurgeryWarning, CheckpointError, ExportError, printable, shown
from bnsurgery.files.checkpoint import same_bits
from bnsurgery.graph.layer_kinds import LAYERS
from bnsurgery.running.batches import Inputs
from bnsurgery.running.calls import outputs

from .third_party import quiet, reason

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

SUFFIX = ".onnx"
_KEY, _PRESERVED = "bnsurgery_onnx", "_user_preserved_attributes"  # the latter is torch.fx's
_NEEDED = ("onnx", "onnxruntime", "onnx2torch", "onnx2pytorch")
_OUTPUTS = 64  # of one node, at most
MAX_INPUT = 2**26  # numbers in an input of noise: a quarter of a gigabyte
_NAMED = 3  # layers in a warning
_SIDE = 224  # pixels: of an input whose size the file leaves open
# Of the largest output: the float32 rounding of a deep network in two runtimes stays below.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the module stands in the file: an input of a node.

    Attributes:
        outputs: of the node; no other node has them.
        input: its number.
        transposed: whether the module holds it transposed.
    """

    outputs: tuple[str, ...]
    input: int
    transposed: bool = False


@dataclass(frozen=True)
class Source:
    """The file that a module was made from; kept with the module and shared by all its copies.

    Attributes:
        digest: SHA-256 of the file, followed by the digests of the files that it keeps tensors in, if any.
        model: its content.
        places: by the names of the module's state dict, for the tensors that were found in the file.
        before: the state dict as converted.
        example: inputs of the shapes that the file names, open sizes filled in: two of each where the module takes
            several inputs at a time, else one.
        any_batch: whether it does.
    """

    digest: str
    model: "ModelProto"
    places: dict[str, _Place]
    before: dict[str, Tensor]
    example: tuple[Tensor, ...]
    any_batch: bool

    @property
    def shapes(self) -> list[str]:
        """The shapes of the file's inputs, with the names of open sizes."""
        sizes = [value.type.tensor_type.shape.dim for value in _inputs(self.model.graph)]
        return [
            f"({', '.join(str(dim.dim_value or printable(dim.dim_param) or 'any') for dim in dims)})" for dims in sizes
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Source":
        return self  # nothing in it changes


def source(model: nn.Module) -> Source | None:
    """The ONNX file that `model`, or the model it was copied from, was made from; None for other networks."""
    meta = model.meta if isinstance(model, fx.GraphModule) else {}
    return getattr(model, _KEY, None) or meta.get(_PRESERVED, {}).get(_KEY)


def from_onnx(path: str | PathLike[str]) -> nn.Module:
    """The network in an ONNX file, in eval mode, ready for `insert`; `export(to="onnx")` gives the same graph back.

    onnx2torch or onnx2pytorch makes it: the first whose module computes what onnxruntime computes, to 1e-4 of the
    largest output. A Reshape to a batch of 1 is changed to take any batch. If the module still takes only one input at
    a time, there is a warning.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
        >>> bn_model = bnsurgery.insert(model, [torch.randn(8, 3, 16, 16)])
        >>> exported = bnsurgery.export(bn_model, "net.onnx", to="onnx", overwrite=True)
        >>> bnsurgery.from_onnx("net.onnx")(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 4, 12, 12])

    Raises:
        CheckpointError: there is no such file, it is no ONNX model, or no converter makes the same network of it; the
            message has the error of each.
        ExportError: a package is missing.
    """
    path = Path(path)
    _require_packages()
    import onnx

    if path.exists() and not path.is_file() and not path.is_dir():
        raise CheckpointError(f"'{path}': no regular file, expected an ONNX model")
    try:
        if not path.stat().st_size:
            raise CheckpointError(f"'{path}': an empty file, expected an ONNX model")
        digest = _digest(path)
        original = onnx.load(str(path))
        onnx.checker.check_model(original)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"'{path}': cannot be read: {error.strerror or error}") from error
    except Exception as error:  # protobuf's and onnx's, of many kinds
        raise CheckpointError(f"'{path}': not an ONNX model, or a damaged one: {reason(error)}") from error
    noise = _noise(path, original.graph)
    try:
        expected = session(path)(*noise)
    except Exception as error:  # onnxruntime's have no common base
        raise CheckpointError(f"'{path}': onnxruntime cannot run it: {reason(error)}") from error
    plain = _plain(original)
    module, nodes = _convert(path, plain, noise, expected)
    any_batch = _takes_two(module, noise)
    if not any_batch:
        warnings.warn(
            f"'{path}' takes one input at a time: a size of 1 is written into it. Calibrate it with `batch_size=1`; to "
            "train with BatchNorm, export the network anew with a dynamic batch",
            BNSurgeryWarning,
            stacklevel=2,
        )
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    example = tuple(tensor.repeat(2, *[1] * (tensor.ndim - 1)) for tensor in noise) if any_batch else noise
    found = Source(digest, original, _places(module, nodes, plain), before, example, any_batch)
    # Pickles of a torch.fx.GraphModule keep its attributes; its copies keep those in `meta`.
    setattr(module, _KEY, found)
    _warn_of_limits(path, module, nodes, plain, found)
    module.meta = {_PRESERVED: {_KEY: found}}  # type: ignore[assignment]
    if not channels_last(noise[0].shape):
        module.pretrained_cfg = {"input_size": tuple(noise[0].shape[1:])}  # type: ignore[assignment]  # timm's
    return module


def channels_last(sizes: Sequence[int]) -> bool:
    """Whether these are the sizes of images (N, H, W, C), as TensorFlow has them; 0 stands for an open size."""
    return len(sizes) == 4 and sizes[1] not in (1, 3) and sizes[3] in (1, 3)


def find(digest: str, *folders: Path) -> Path | None:
    """The ONNX file of that SHA-256, see `Source`, in one of these folders.

    Raises:
        ExportError: a package is missing.
    """
    _require_packages()
    for path in (path for folder in folders for path in sorted(folder.glob(f"*{SUFFIX}")) if path.is_file()):
        with suppress(Exception):  # another file, which is no ONNX model, or a damaged one
            if _digest(path) == digest:
                return path
    return None


def _require_packages() -> None:
    for needed in _NEEDED:
        if importlib.util.find_spec(needed) is None:
            raise ExportError(f"ONNX files need {needed}, which is not installed: pip install 'bnsurgery[onnx]'")


def _digest(path: Path) -> str:
    """See `Source`.

    Raises:
        CheckpointError: a file of tensors is missing, or outside the folder.
    """
    import onnx

    content = path.read_bytes()
    found = hashlib.sha256(content)
    for name in _external(onnx.load_model_from_string(content).graph):
        data, outside = path.parent / name, Path(name).is_absolute() or ".." in Path(name).parts
        if outside or not data.is_file():
            raise CheckpointError(f"'{path}': its tensors are in {shown(name)}, and its folder has no such file")
        found.update(hashlib.sha256(data.read_bytes()).digest())
    return found.hexdigest()


def _external(graph: "GraphProto") -> list[str]:
    """The names of the files beside it that an ONNX file keeps tensors in."""
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    return sorted({str(ExternalDataInfo(tensor).location) for tensor in _tensors(graph) if uses_external_data(tensor)})


def _tensors(graph: "GraphProto") -> Iterator["TensorProto"]:
    yield from graph.initializer
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for inner in (attribute.g, *attribute.graphs):
            yield from _tensors(inner)


def write(network: nn.Module, origin: Source, temporary: Path, metadata: Mapping[str, str]) -> None:
    """Write the file that `network` was made from with the tensors that it has now, and with this metadata.

    The graph is the file's, and so is every initializer whose tensor has not changed, to the byte. An initializer that
    several nodes share is written anew for those whose tensor changed, and a layer that got a bias gets an input for
    it.

    Raises:
        ExportError: a tensor has another shape or type, or has changed, and its place in the file is not known.
    """
    from onnx import helper, numpy_helper

    model = copy.deepcopy(origin.model)
    graph = model.graph
    nodes = {tuple(node.output): node for node in graph.node}
    users = Counter(name for node in graph.node for name in node.input)
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    for key, tensor in network.state_dict().items():
        was = origin.before.get(key)
        if was is not None and same_bits(tensor, was):
            continue
        if was is not None and tensor.shape != was.shape:
            raise ExportError(
                f"export: '{key}' is {tuple(tensor.shape)}, and {tuple(was.shape)} in the ONNX file, whose graph is "
                "kept"
            )
        if was is not None and tensor.dtype != was.dtype:
            raise ExportError(
                f"export: '{key}' is {tensor.dtype}, and {was.dtype} in the ONNX file: export model.to({was.dtype})"
            )
        place = origin.places.get(key) or _place_of_bias(key, origin, nodes)
        if place is None:
            raise ExportError(f"export: '{key}' has changed, and where it stands in the ONNX file is not known")
        node = nodes[place.outputs]
        node.input.extend([""] * (place.input + 1 - len(node.input)))
        name = node.input[place.input]
        old = initializers.get(name)
        array = tensor.detach().cpu().numpy()
        array = array.T if place.transposed else array
        array = np.ascontiguousarray(array.reshape(array.shape if old is None else tuple(old.dims)))
        if old is not None and users[name] == 1:
            old.CopyFrom(numpy_helper.from_array(array, name))
        else:
            node.input[place.input] = f"{key}.bnsurgery"
            graph.initializer.append(numpy_helper.from_array(array, node.input[place.input]))
    helper.set_model_props(model, {entry.key: entry.value for entry in model.metadata_props} | dict(metadata))
    temporary.write_bytes(model.SerializeToString())


def session(path: Path) -> Callable[..., list[Tensor]]:
    """The file in onnxruntime, as a function; one that takes one input at a time is called for each."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: its warnings are about its own optimizer
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = opened.get_inputs()

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        arrays = [tensor.cpu().numpy() for tensor in Inputs(args, kwargs).tensors]
        samples = len(arrays[0]) if inputs[0].shape[:1] == [1] else 1
        parts = [[a[i : i + 1] for a in arrays] for i in range(samples)] if samples > 1 else [arrays]
        names = [entry.name for entry in inputs]
        columns = zip(*(opened.run(None, dict(zip(names, part, strict=True))) for part in parts), strict=True)
        return [torch.from_numpy(np.concatenate(c) if samples > 1 else c[0]) for c in columns]

    return run


_Nodes = dict[str, "list[NodeProto]"]  # by the names of a module's children, the nodes that each was made of


def _convert(
    path: Path, plain: "ModelProto", noise: tuple[Tensor, ...], expected: list[Tensor]
) -> tuple[nn.Module, _Nodes]:
    """The first module that computes what is expected of the noise, in eval mode: if possible one for any batch."""
    errors: dict[str, str] = {}
    for model in (_any_batch(plain), plain):
        for name, convert in _CONVERTERS.items():
            try:
                with quiet(), torch.no_grad():
                    module, nodes = convert(model)
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


def _onnx2torch(model: "ModelProto") -> tuple[nn.Module, _Nodes]:
    from onnx2torch import convert

    module: nn.Module = convert(copy.deepcopy(model))
    children = [name for name, _ in module.named_children() if name != "initializers"]
    return module, {name: [node] for name, node in zip(children, model.graph.node, strict=True)}


def _onnx2pytorch(model: "ModelProto") -> tuple[nn.Module, _Nodes]:
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
        """Every module is a leaf."""
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


def _plain(original: "ModelProto") -> "ModelProto":
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


def _inputs(graph: "GraphProto") -> list["ValueInfoProto"]:
    weights = {tensor.name for tensor in graph.initializer}  # old files list them among the inputs
    return [value for value in graph.input if value.name not in weights]


def _noise(path: Path, graph: "GraphProto") -> tuple[Tensor, ...]:
    """Inputs to try a file with: noise where it takes real numbers, zeros elsewhere.

    An open batch is 1, open channels are 3, open sides 224. Where the last size is 1 or 3, that is the channels.

    Raises:
        CheckpointError: there is no input, or one is no tensor of numbers, or too large to try.
    """
    from onnx import helper

    generator = np.random.default_rng(0)
    noise = []
    for value in _inputs(graph):
        kind = value.type.tensor_type
        sizes = [dim.dim_value for dim in kind.shape.dim]
        channels = 3 if channels_last(sizes) else 1
        shape = [size or (1 if not at else 3 if at == channels else _SIDE) for at, size in enumerate(sizes)]
        if min(shape, default=1) < 0 or math.prod(shape) > MAX_INPUT:
            raise CheckpointError(
                f"'{path}': input {shown(value.name)}: a shape of {shown(tuple(shape))} cannot be tried"
            )
        try:
            dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
            array = generator.standard_normal(shape) if dtype.kind == "f" else np.zeros(shape)
            noise.append(torch.from_numpy(array.astype(dtype)))
        except (KeyError, TypeError) as error:  # a sequence, strings, or a kind of number that numpy does not have
            raise CheckpointError(
                f"'{path}': input {shown(value.name)}: expected a tensor of numbers such as float32: {reason(error)}"
            ) from error
    if not noise:
        raise CheckpointError(f"'{path}': a network without inputs")
    return tuple(noise)


def _compare(expected: list[Tensor], got: list[Tensor]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        largest = theirs.abs().max() if theirs.numel() else 0
        if ours.shape != theirs.shape or not (ours - theirs).abs().max() <= _TOLERANCE * largest:
            raise ValueError("its network computes something else than onnxruntime")


@torch.no_grad()
def _takes_two(module: nn.Module, first: tuple[Tensor, ...]) -> bool:
    """Whether two inputs at a time give what each gives alone."""
    second = [tensor.flip(-1) for tensor in first]
    try:
        alone = [outputs(module(*first)), outputs(module(*second))]
        both = outputs(module(*(torch.cat(pair) for pair in zip(first, second, strict=True))))
        _compare([torch.cat(pair) for pair in zip(*alone, strict=True)], both)
    except Exception:  # an operator's, for a shape that does not fit
        return False
    return True


def _places(module: nn.Module, nodes: _Nodes, plain: "ModelProto") -> dict[str, _Place]:
    """Where the module's parameters and buffers stand in the file, by their bytes among the inputs of their nodes."""
    from onnx import numpy_helper

    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in plain.graph.initializer}
    places = {}
    for child, made_of in nodes.items():
        inputs = [(node, at, name) for node in made_of for at, name in enumerate(node.input) if name in arrays]
        for key, tensor in module.get_submodule(child).state_dict(prefix=f"{child}.").items():
            values = tensor.detach().cpu().numpy()
            for number, (node, at, name) in enumerate(inputs):
                transposed = values.ndim == 2 and _is_transposed(node)  # bytes cannot tell for a symmetric matrix
                if _same_values(arrays[name], values.T if transposed else values, transposed):
                    places[key] = _Place(tuple(node.output), at, transposed)
                    del inputs[number]
                    break
    return places


def _warn_of_limits(path: Path, module: nn.Module, nodes: _Nodes, plain: "ModelProto", found: Source) -> None:
    """Tell which layers get no BatchNorm, and which cannot go back into the file, before anyone trains them."""
    in_file = {tuple(node.output): node for node in found.model.graph.node}
    layers = {name: inner for name, inner in module.named_modules() if isinstance(inner, LAYERS)}
    lost = dict.fromkeys(
        name
        for name, layer in layers.items()
        for key in layer.state_dict(prefix=f"{name}.")
        if key not in found.places and _place_of_bias(key, found, in_file) is None
    )
    made = {output for name, made_of in nodes.items() if name in layers for node in made_of for output in node.output}
    weights = {tensor.name for tensor in plain.graph.initializer}
    products = [node for node in plain.graph.node if node.op_type == "MatMul" and weights.intersection(node.input)]
    constant = [node.name or node.output[0] for node in products if node.output[0] not in made]
    for names, problem in (
        (lost, "cannot be exported to ONNX once trained: the file does not hold their weights as they are"),
        (constant, "are no layers for the converter: they get no BatchNorm, and their weights do not change"),
    ):
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            listed = ", ".join(f"'{printable(name)}'" for name in list(names)[:_NAMED]) + more
            warnings.warn(f"'{path}': {listed} {problem}", BNSurgeryWarning, stacklevel=3)


def _is_transposed(node: "NodeProto") -> bool:
    """Whether the node's weight is the transpose of a dense layer's."""
    return node.op_type == "MatMul" or (
        node.op_type == "Gemm" and not any(a.name == "transB" and a.i for a in node.attribute)
    )


def _same_values(array: np.ndarray, values: np.ndarray, of_one_shape: bool) -> bool:
    alike = array.dtype == values.dtype and array.size == values.size
    return alike and (array.shape == values.shape or not of_one_shape) and array.tobytes() == values.tobytes()


def _place_of_bias(key: str, origin: Source, nodes: Mapping[tuple[str, ...], "NodeProto"]) -> _Place | None:
    """Where the bias goes that a conv or dense layer had none of: the input after its weight."""
    layer, _, kind = key.rpartition(".")
    weight = origin.places.get(f"{layer}.weight")
    if kind != "bias" or weight is None or weight.input != 1:
        return None
    node = nodes[weight.outputs]
    free = len(node.input) < 3 or not node.input[2]
    return _Place(weight.outputs, 2) if node.op_type in ("Conv", "ConvTranspose", "Gemm") and free else None
