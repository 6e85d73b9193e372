"""Name files that are no weights files of PyTorch's by their first bytes, with advice."""

import re
from collections.abc import Sequence
from pathlib import PurePath

_ARRAYS = (
    "Save its arrays as tensors under the network's names: safetensors.torch.save_file({name: tensor, ...}, path)."
)
_CONVERT = "Make a PyTorch network of it with {}, and save its state_dict()."
_UNPACK = "Unpack it, and pass the weights file in it."

_ONNX = "an ONNX model", "It is a network with its weights: bnsurgery insert FILE.onnx."
_CAFFE = "a Caffe model", _CONVERT.format("a converter from Caffe")
_TENSORFLOW = "a TensorFlow model", _CONVERT.format("a converter from TensorFlow")
# Pattern of the first bytes, kind of file, advice.
_STARTS: tuple[tuple[bytes, str, str], ...] = (
    (rb"(\xef\xbb\xbf)?\s*<", "what looks like a web page: the download failed", "Download it again."),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file, such as Keras writes", f"h5py reads it. {_ARRAYS}"),
    (rb"\x93NUMPY", "one NumPy array", _ARRAYS),
    (rb"MATLAB 5\.0", "a MATLAB file", f"scipy.io.loadmat reads it. {_ARRAYS}"),
    (b"GGUF", "a GGUF file", f"The gguf package reads it. {_ARRAYS}"),
    (b"version https://git-lfs", "a Git LFS pointer, which stands for the file", "Fetch that: git lfs pull."),
    # gzip, bzip2, xz, 7-Zip, RAR, Zstandard
    (rb"\x1f\x8b|BZh|\xfd7zXZ\0|7z\xbc\xaf\x27\x1c|Rar!|\x28\xb5\x2f\xfd", "a compressed archive", _UNPACK),
    (rb".{4}TFL3", *_TENSORFLOW),
    (rb"(\xef\xbb\xbf)?\s*[{\[]", "JSON text", "Pass the weights file that belongs to it."),
    # Protocol buffers have no mark: their first fields tell them, here the version and the producer or the graph.
    (rb"\x08[\0-\x1f][\x12\x3a]", *_ONNX),
)
_CAFFE_LAYERS = (b"\xa2\x06", b"\x12")  # tags of their field, new and old, behind the network's name
_SUFFIXES = {".onnx": _ONNX, ".caffemodel": _CAFFE, ".pb": _TENSORFLOW}
_UNKNOWN = "something else", "Pass a .safetensors file or one that torch.save wrote."
# Pattern of a name in a zip archive, kind of archive, advice.
_ENTRIES = (
    (r".*\.(weights\.h5|hdf5)", "a Keras model", f"h5py reads the weights in it. {_ARRAYS}"),
    (r"(.*/)?constants\.pkl", "a TorchScript archive", "Save the state_dict() of the model it was made from."),
    (
        r"(.*/)?(archive_format|serialized_exported_program\.json)",
        "a program of torch.export",
        "Save the state_dict of torch.export.load(path).",
    ),
    (r".*\.(pth|pt|ckpt|bin|safetensors)", "a zip archive", _UNPACK),
)


def kind_of_file(head: bytes, path: PurePath) -> tuple[str, str]:
    """The kind of a file with these first bytes, and advice."""
    for start, kind, advice in _STARTS:
        if re.match(start, head, re.DOTALL):
            return kind, advice
    if head[:1] == b"\x0a" and head[2 + sum(head[1:2]) :].startswith(_CAFFE_LAYERS):
        return _CAFFE
    if path.suffix.lower() == ".py":
        return "Python code", f"Name the function in it that makes the network: `model={path}:FUNCTION`."
    return _SUFFIXES.get(path.suffix.lower(), _UNKNOWN)


def kind_of_archive(names: Sequence[str]) -> tuple[str, str] | None:
    """The kind of a zip archive of files with these names, and advice; None where it may be torch's."""
    if names and all(name.endswith(".npy") for name in names):
        return "NumPy arrays (.npz)", f"numpy.load reads it. {_ARRAYS}"
    for pattern, kind, advice in _ENTRIES:
        if any(re.fullmatch(pattern, name) for name in names):
            return kind, advice
    return None
