"""The formats of `export`, without torch: the command line lists them."""

from typing import Literal, get_args

Format = Literal["torchvision-bn", "torchvision", "state-dict", "onnx", "exported-program"]
PROGRAMS = {"onnx": ".onnx", "exported-program": ".pt2"}
SUFFIXES = dict.fromkeys(get_args(Format), ".safetensors") | PROGRAMS
PICKLES = (".pth", ".pt")  # suffixes with which a state dict gets `torch.save`'s format
AXES = ("batch", "height", "width")  # sizes of the input that may vary in a program
