"""Networks from ONNX files, and where their tensors stand in the file, so that `export` can give the graph back.

Places are found by comparing bytes, so that no converter is relied on for them.
"""

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from bnsurgery.errors import BNSurgeryWarning, CheckpointError, printable, shown
from bnsurgery.graph.layer_kinds import LAYERS
from bnsurgery.running.batches import Inputs
from bnsurgery.text.words import listed

from .onnx_conversion import Nodes, convert, takes_two, with_initializers
from .third_party import errors_as, require

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto

SUFFIX = ".onnx"
MAX_INPUT = 2**26  # numbers in an input of noise: a quarter of a gigabyte
_KEY, _PRESERVED = "bnsurgery_onnx", "_user_preserved_attributes"  # the latter is torch.fx's
_NEEDED = ("onnx", "onnxruntime", "onnx2torch", "onnx2pytorch")
_SIDE = 224  # pixels: of an input whose size the file leaves open
_WITH_BIAS = ("Conv", "ConvTranspose", "Gemm")  # the third input is a bias, and may be missing


@dataclass(frozen=True)
class _Place:
    """An input of a node in the file; no other node has the same outputs."""

    outputs: tuple[str, ...]
    input: int
    transposed: bool = False  # the module holds the tensor transposed


@dataclass(frozen=True)
class Source:
    """The file that a module was made from; kept with the module and shared by all its copies.

    Attributes:
        digest: SHA-256 of the file, followed by the digests of the files that it keeps tensors in, if any.
        model: its content.
        places: by the names of the module's state dict, for the tensors that were found in the file, and for the
            biases that a layer may get.
        before: the state dict as converted.
        example: inputs of the shapes that the file names, open sizes filled in: two of each where the module takes
            several inputs at a time, else one.
    """

    digest: str
    model: "ModelProto"
    places: dict[str, _Place]
    before: dict[str, Tensor]
    example: tuple[Tensor, ...]

    @property
    def shapes(self) -> list[list[int | str]]:
        """The shapes of the file's inputs, with the names of open sizes."""
        sizes = [value.type.tensor_type.shape.dim for value in _inputs(self.model.graph)]
        return [[dim.dim_value or printable(dim.dim_param) or "any" for dim in dims] for dims in sizes]

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
    require("onnx", *_NEEDED)
    import onnx

    if path.exists() and not (path.is_file() and path.stat().st_size):
        found = "an empty file" if path.is_file() else "no regular file"
        raise CheckpointError(f"'{path}': {found}, expected an ONNX model")
    with errors_as(CheckpointError, f"'{path}': cannot be read as an ONNX model"):
        digest, original = _digest(path), onnx.load(str(path))
        onnx.checker.check_model(original)
    noise = _noise(path, original.graph)
    with errors_as(CheckpointError, f"'{path}': onnxruntime cannot run it"):
        expected = session(path)(*noise)
    plain = with_initializers(original)
    module, nodes = convert(path, plain, noise, expected)
    places, any_batch = _places(module, nodes, plain.graph), takes_two(module, noise)
    limits = _limits(module, nodes, plain.graph, places)
    if not any_batch:
        limits.append(
            "takes one input at a time: a size of 1 is written into it. Calibrate it with `batch_size=1`; to train "
            "with BatchNorm, export the network anew with a dynamic batch"
        )
    for limit in limits:
        warnings.warn(f"'{path}': {limit}", BNSurgeryWarning, stacklevel=2)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    example = tuple(tensor.repeat(2, *[1] * (tensor.ndim - 1)) for tensor in noise) if any_batch else noise
    made_from = Source(digest, original, places, before, example)
    # Pickles of a torch.fx.GraphModule keep its attributes; its copies keep those in `meta`.
    setattr(module, _KEY, made_from)
    module.meta = {_PRESERVED: {_KEY: made_from}}  # type: ignore[assignment]
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
    require("onnx", *_NEEDED)
    for path in (path for folder in folders for path in sorted(folder.glob(f"*{SUFFIX}")) if path.is_file()):
        with suppress(Exception):  # another file, which is no ONNX model, or a damaged one
            if _digest(path) == digest:
                return path
    return None


def _digest(path: Path) -> str:
    """See `Source`.

    Raises:
        OSError: a file of tensors is missing, or outside the folder.
    """
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    content = path.read_bytes()
    found = hashlib.sha256(content)
    tensors = _tensors(onnx.load_model_from_string(content).graph)
    for name in sorted({str(ExternalDataInfo(tensor).location) for tensor in tensors if uses_external_data(tensor)}):
        data, outside = path.parent / name, Path(name).is_absolute() or ".." in Path(name).parts
        if outside or not data.is_file():
            raise FileNotFoundError(f"its tensors are in {shown(name)}, and its folder has no such file")
        found.update(hashlib.sha256(data.read_bytes()).digest())
    return found.hexdigest()


def _tensors(graph: "GraphProto") -> Iterator["TensorProto"]:
    yield from graph.initializer
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for inner in (attribute.g, *attribute.graphs):
            yield from _tensors(inner)


def session(path: Path) -> Callable[..., list[Tensor]]:
    """The file in onnxruntime, as a function; one that takes one input at a time is called for each."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: its warnings are about its own optimizer
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = opened.get_inputs()

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        arrays = {entry.name: t.cpu().numpy() for entry, t in zip(inputs, Inputs(args, kwargs).tensors, strict=True)}
        samples = len(arrays[inputs[0].name]) if inputs[0].shape[:1] == [1] else 1
        if samples == 1:
            return [torch.from_numpy(found) for found in opened.run(None, arrays)]
        parts = (opened.run(None, {name: a[i : i + 1] for name, a in arrays.items()}) for i in range(samples))
        return [torch.from_numpy(np.concatenate(found)) for found in zip(*parts, strict=True)]

    return run


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
        where, kind = f"'{path}': input {shown(value.name)}", value.type.tensor_type
        sizes = [dim.dim_value for dim in kind.shape.dim]
        channels = 3 if channels_last(sizes) else 1
        shape = [size or (1 if not at else 3 if at == channels else _SIDE) for at, size in enumerate(sizes)]
        if min(shape, default=1) < 0 or math.prod(shape) > MAX_INPUT:
            raise CheckpointError(f"{where}: a shape of {shown(tuple(shape))} cannot be tried")
        # Others are sequences, strings, and kinds of numbers that numpy does not have.
        with errors_as(CheckpointError, f"{where}: expected a tensor of numbers"):
            dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
            array = generator.standard_normal(shape) if dtype.kind == "f" else np.zeros(shape)
            noise.append(torch.from_numpy(array.astype(dtype)))
    if not noise:
        raise CheckpointError(f"'{path}': a network without inputs")
    return tuple(noise)


def _places(module: nn.Module, nodes: Nodes, graph: "GraphProto") -> dict[str, _Place]:
    """See `Source`: by their bytes among the inputs of the nodes that the module's children were made of."""
    from onnx import numpy_helper

    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    places, biases = {}, {}
    for child, made_of in nodes.items():
        inputs = [(node, at, name) for node in made_of for at, name in enumerate(node.input) if name in arrays]
        for key, tensor in module.get_submodule(child).state_dict(prefix=f"{child}.").items():
            values = tensor.detach().cpu().numpy()
            for number, (node, at, name) in enumerate(inputs):
                turned = node.op_type == "Gemm" and not any(a.name == "transB" and a.i for a in node.attribute)
                transposed = values.ndim == 2 and (turned or node.op_type == "MatMul")
                array, stored = arrays[name], values.T if transposed else values
                alike = array.dtype == stored.dtype and array.size == stored.size
                # The bytes of a symmetric matrix are the same either way round.
                if alike and (array.shape == stored.shape or not transposed) and array.tobytes() == stored.tobytes():
                    places[key] = _Place(tuple(node.output), at, transposed)
                    if key.endswith(".weight") and at == 1 and node.op_type in _WITH_BIAS and not any(node.input[2:]):
                        biases[f"{key.removesuffix('weight')}bias"] = _Place(tuple(node.output), 2)
                    del inputs[number]
                    break
    return biases | places


def _limits(module: nn.Module, nodes: Nodes, graph: "GraphProto", places: dict[str, _Place]) -> list[str]:
    """The layers that get no BatchNorm, and those that cannot go back into the file, in words."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, LAYERS)}
    lost = [name for name, layer in layers.items() if not layer.state_dict(prefix=f"{name}.").keys() <= places.keys()]
    made = {output for name, made_of in nodes.items() if name in layers for node in made_of for output in node.output}
    weights = {tensor.name for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMul" and weights.intersection(node.input)]
    constant = [node.name or node.output[0] for node in products if node.output[0] not in made]
    problems = {
        "cannot be exported to ONNX once trained: the file does not hold their weights as they are": lost,
        "are no layers for the converter: they get no BatchNorm, and their weights do not change": constant,
    }
    return [f"{listed(map(repr, names))} {problem}" for problem, names in problems.items() if names]
