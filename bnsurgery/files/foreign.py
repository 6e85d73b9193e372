"""Name files that are no weights files of PyTorch's by their first bytes, with advice."""

from collections.abc import Sequence
from pathlib import PurePath

_ARRAYS = (
    "Save its arrays as tensors under the network's names: safetensors.torch.save_file({name: tensor, ...}, path)."
)
_CONVERT = "Make a PyTorch network of it with {}, and save its state_dict()."
_UNPACK = "Unpack it, and pass the weights file in it."

# First bytes, kind of file, advice.
_STARTS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, such as Keras writes", f"h5py reads it. {_ARRAYS}"),
    (b"\x93NUMPY", "one NumPy array", _ARRAYS),
    (b"MATLAB 5.0", "a MATLAB file", f"scipy.io.loadmat reads it. {_ARRAYS}"),
    (b"GGUF", "a GGUF file", f"The gguf package reads it. {_ARRAYS}"),
    (b"version https://git-lfs", "a Git LFS pointer, which stands for the file", "Fetch that: git lfs pull."),
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\xfd7zXZ\0", "an xz archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (b"Rar!", "a RAR archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive", _UNPACK),
)
# Protocol buffers have no mark: they are told by their first fields, or by the file's name.
_ONNX = "an ONNX model", "It is a network with its weights: bnsurgery insert FILE.onnx."
_CAFFE = "a Caffe model", _CONVERT.format("a converter from Caffe")
_TENSORFLOW = "a TensorFlow model", _CONVERT.format("a converter from TensorFlow")
_SUFFIXES = {".onnx": _ONNX, ".caffemodel": _CAFFE, ".pb": _TENSORFLOW}
_CAFFE_LAYERS = (b"\xa2\x06", b"\x12")  # tags of their field, new and old, behind the network's name


def kind_of_file(head: bytes, path: PurePath) -> tuple[str, str] | None:
    """The kind of a file with these first bytes, and advice; None where it cannot be told."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith(b"<"):
        return "what looks like a web page: the download failed", "Download it again."
    for start, what, advice in _STARTS:
        if head.startswith(start):
            return what, advice
    if head[4:8] == b"TFL3":
        return _TENSORFLOW
    if text[:1] in (b"{", b"["):
        return "JSON text", "Pass the weights file that belongs to it."
    if head[:1] == b"\x08" and head[1:2] < b"\x20" and head[2:3] in (b"\x12", b"\x3a"):  # version, producer or graph
        return _ONNX
    if head[:1] == b"\x0a" and head[2 + head[1] :].startswith(_CAFFE_LAYERS):
        return _CAFFE
    if path.suffix.lower() == ".py":
        return "Python code", f"Name the function in it that makes the network: `model={path}:FUNCTION`."
    return _SUFFIXES.get(path.suffix.lower())


def kind_of_archive(names: Sequence[str]) -> tuple[str, str] | None:
    """The kind of a zip archive of files with these names, and advice; None where it may be torch's."""
    suffixes = {PurePath(name).suffix for name in names}
    if suffixes == {".npy"}:
        return "NumPy arrays (.npz)", f"numpy.load reads it. {_ARRAYS}"
    if any(name.endswith((".weights.h5", ".hdf5")) for name in names):
        return "a Keras model", f"h5py reads the weights in it. {_ARRAYS}"
    if any(PurePath(name).name == "constants.pkl" for name in names):
        return "a TorchScript archive", "Save the state_dict() of the model it was made from."
    if any(PurePath(name).name in ("archive_format", "serialized_exported_program.json") for name in names):
        return "a program of torch.export", "Save the state_dict of torch.export.load(path)."
    if suffixes & {".pth", ".pt", ".ckpt", ".bin", ".safetensors"}:
        return "a zip archive", _UNPACK
    return None
