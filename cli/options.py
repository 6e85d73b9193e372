"""Options that several commands share. Those that belong together reach a command as one argument."""

import ast
import functools
import re
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

import bnsurgery
from bnsurgery.errors import CheckpointError, printable
from bnsurgery.machine.system import quote
from bnsurgery.text.words import with_article

if TYPE_CHECKING:
    from torch import nn

    from bnsurgery.images.calibration_images import ImageBatches
    from bnsurgery.images.preprocessing import Preprocessing
    from bnsurgery.images.preprocessing import Wanted as Wanted
    from bnsurgery.networks.fitting import Choice as Choice
    from bnsurgery.networks.own_data import OwnBatches
    from bnsurgery.records.architectures import Architecture

Decorator = Callable[[Any], Any]
Values = dict[str, Any]  # of options that belong together, by name

PATH = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)
SEED = click.IntRange(0, 2**63 - 1)
_FIELD = re.compile(r"(, or [^`,.:;]*)?`(\w+)(?:=([^`]{1,200}))?`")


def option(name: str, help: str, kind: Any = str, *flags: str, **more: Any) -> Decorator:
    """An option whose value the command gets as `name`: --name, unless it has other flags.

    `kind` is bool for a flag, a tuple of choices, the first of which is the default, or a type that click takes.
    """
    if isinstance(kind, tuple):
        more, kind = {"default": kind[0], **more}, click.Choice(kind)
    elif kind is bool:
        more["is_flag"] = True
    flags = flags or ("--" + name.replace("_", "-"),)
    return click.option(*flags, name, type=kind, show_default=True, help=help, **more)


def together(*options: Decorator) -> Decorator:
    """These options, in this order."""
    return lambda function: functools.reduce(lambda inner, decorate: decorate(inner), reversed(options), function)


def group(argument: str, make: Callable[..., Any], *options: Decorator) -> Decorator:
    """These options as one argument of the command: the result of `make`, which gets their values by name."""
    made = together(*options)(functools.partial(make))
    parameters = made.__click_params__

    def decorate(function: Any) -> Any:
        @functools.wraps(function)
        def command(**values: Any) -> Any:
            mine = {parameter.name: values.pop(parameter.name) for parameter in parameters}
            return function(**{argument: made(**mine)}, **values)

        vars(command)["__click_params__"] = [*vars(function).get("__click_params__", []), *parameters]
        return command

    return decorate


def names(text: str) -> tuple[str, ...]:
    """The type of an option that takes one name or more, separated by commas."""
    found = tuple(filter(None, map(str.strip, text.split(","))))
    if not found:
        raise click.BadParameter(f"got {text!r}, expected names, separated by commas")
    return found


def numbers(text: str) -> tuple[float, ...]:
    """As `names`, for numbers."""
    try:
        return tuple(map(float, names(text)))
    except (ValueError, click.BadParameter):
        raise click.BadParameter(f"got {text!r}, expected numbers, separated by commas") from None


def _wanted(**fields: Any) -> "Wanted":
    from bnsurgery.images.preprocessing import Wanted

    return Wanted(**fields)


def _choice(weights_key: str | None, weights_prefix: str | None, partial: bool) -> "Choice":
    from bnsurgery.networks.fitting import Choice

    return Choice(weights_key, weights_prefix, partial)


model = option(
    "model",
    "Function that makes your network, package.module:function or file.py:function; or timm:NAME, a name in "
    "torchvision or an ONNX file. This runs its code, which is never taken from a checkpoint.",
    metavar="MODULE:FUNCTION",
)
image_size = option(
    "image_size", "Input size in pixels: 224 or 240x320.  [default: that of the weights]", metavar="SIDE|HxW"
)
PREPROCESSING = (
    image_size,
    option(
        "normalize",
        "imagenet: by ImageNet's mean and std; none: values from 0 to 1; auto: as the weights require, else imagenet.",
        ("auto", "imagenet", "none"),
    ),
    option(
        "mean",
        "Means of red, green and blue to subtract, or one for all.  [default: --normalize's; 0 with --std or --scale]",
        numbers,
        metavar="R,G,B",
    ),
    option(
        "std",
        "Standard deviations to divide by, like --mean.  [default: --normalize's; 1 with --mean or --scale]",
        numbers,
        metavar="R,G,B",
    ),
    option("scale", "Value of white before mean and std, such as 255.  [default: 1]", float, metavar="WHITE"),
    option("channels", "Order of the colours.  [default: the checkpoint's, else rgb]", ("rgb", "bgr"), default=None),
)
CHOICE = (
    option("weights_key", "Key of the weights in the file, such as state_dict.  [default: best fit]", metavar="KEY"),
    option("weights_prefix", "Prefix of their names, such as backbone.  [default: best fit]", metavar="PREFIX"),
    option("partial", "Load the tensors that fit, and leave the rest of the network as initialized.", bool),
)
preprocessing = group("wanted", _wanted, *PREPROCESSING)
device = option("device", "Device to compute on: cpu, cuda, cuda:1, mps, xpu, ...", default="cpu")
sites = group(
    "sites",
    dict,
    option("layers", "Layers that get a BatchNorm; conv: as in vgg*_bn.", ("all", "conv", "dense")),
    option(
        "placement",
        "Insert BatchNorm before the activation, as in the BN paper, or after it.",
        ("pre-activation", "post-activation"),
    ),
    option("head", "Insert a BatchNorm after the output layer, too.", bool),
)
example = option(
    "example",
    "Function that returns batches of inputs, for networks that take no images. This runs its code.",
    str,
    "--data",
    metavar="FILE.py:FUNCTION",
)
bias = option(
    "bias", "If a layer without a bias needs one: add it, a new key in the state dict, or refuse.", ("add", "refuse")
)


@dataclass(frozen=True)
class Images:
    """The images or other inputs of a command."""

    data: str
    num_images: int
    batch_size: int
    wanted: "Wanted"
    skip_bad: bool
    seed: int
    device: str

    @property
    def are_batches(self) -> bool:
        """Whether `data` names a function that returns batches, and not images."""
        from bnsurgery.networks.factories import names_code

        return names_code(self.data)

    def open(self, preprocessing: "Callable[[], Preprocessing | None]") -> "ImageBatches | OwnBatches":
        """The batches; `preprocessing` is called for images only, which need it."""
        from bnsurgery.images.calibration_images import calibration_batches
        from bnsurgery.networks.own_data import OwnBatches

        if not self.are_batches and (preprocess := preprocessing()) is not None:
            return calibration_batches(
                self.data,
                num_images=self.num_images,
                batch_size=self.batch_size,
                preprocess=preprocess,
                seed=self.seed,
                skip_bad=self.skip_bad,
            )
        if for_images := given("batch_size", "skip_bad", *vars(self.wanted)):
            raise click.UsageError(f"{for_images[0]} is for images: batches of '{self.data}' are taken as they are.")
        return OwnBatches(self.data, num=self.num_images, seed=self.seed)


def first_batch(example: str | None) -> Any:
    """The first batch of the function that --data names, where that is no option for images; None without it."""
    from bnsurgery.networks.own_data import OwnBatches

    return None if example is None else next(iter(OwnBatches(example)))


data = group(
    "images",
    Images,
    option(
        "data",
        "Folder, searched for images of any format that Pillow reads; samples: two built-in photographs; or a function "
        "that returns batches of any input that the network takes. This runs its code.",
        default="samples",
        metavar="DIR|samples|FILE.py:FUNCTION",
    ),
    option("num_images", "Number of images at most.", click.IntRange(1, 1_000_000), default=64),
    option("batch_size", "Images in a batch.", COUNT, default=8),
    preprocessing,
    option("skip_bad", "Leave out damaged images, and count them.", bool),
    option("seed", "Seed of all random numbers.", SEED, default=0),
    device,
)


def weights(help: str, metavar: str = "DEFAULT|NAME|random|PATH", default: str | None = None) -> Decorator:
    """--weights, as `weights`, and --weights-key, --weights-prefix and --partial, as `choice`."""
    return together(option("weights", help, metavar=metavar, default=default), group("choice", _choice, *CHOICE))


@dataclass(frozen=True)
class Network:
    """A network as the command line names it."""

    name: str  # of what makes it, if `own`; else of the architecture, or the path of its weights
    own: bool  # whether it is not torchvision's
    weights: str  # for `pretrained.load` and `own_network`
    choice: "Choice"
    file: Path | None  # ARCH|FILE where that is a file

    @property
    def architecture(self) -> "Architecture":
        """Torchvision's architecture, by its name or recognised from the file."""
        from bnsurgery.networks.pretrained import recognise
        from bnsurgery.records.architectures import architecture

        return architecture(self.name) if self.file is None else recognise(self.file, self.choice)

    @property
    def stem(self) -> str:
        """The beginning of an output file's name."""
        return stem(self.name) if self.own or self.file is None else self.file.stem


def _network(source: str | None, model: str | None, weights: str, choice: "Choice") -> Network:
    from bnsurgery.networks import factories
    from bnsurgery.records import architectures

    is_file = source is not None and source not in architectures.NAMES and Path(source).is_file()
    if is_file and weights != "DEFAULT":
        raise click.UsageError(f"'{source}' is a file of weights: leave --weights {weights} out.")
    if source is not None and model is not None and not is_file:
        raise click.UsageError(f"Name one network: '{source}', or --model {model} with a file of its weights.")
    name = source if model is None else model
    if name is None:
        raise click.UsageError("Name a network: ARCH or FILE, or --model for one of your own.")
    is_onnx = model is None and factories.is_onnx(name)
    own = model is not None or is_onnx or factories.is_timm(name)
    if not own and not is_file and ":" in name:
        raise click.UsageError(f"'{name}': did you mean --model {name}?")
    weights = str(source) if is_file and not is_onnx else weights
    return Network(name, own, weights, choice, Path(str(source)) if is_file else None)


def network(*, weights_help: str) -> Decorator:
    """ARCH|FILE and the options that name a network and its weights, as `network`; --model makes FILE its weights."""
    source = click.argument("source", required=False, metavar="ARCH|FILE")
    return group("network", _network, source, model, weights(weights_help, default="DEFAULT"))


def words(parameter: click.Parameter, value: object) -> list[str]:
    """The words that give a parameter this value on the command line; none if no words can."""
    if not isinstance(parameter, click.Option):
        return [str(value)]
    if value is None or parameter.is_flag != isinstance(value, bool):
        return []
    if parameter.is_flag:
        return (parameter.opts if value else parameter.secondary_opts)[:1]
    return [parameter.opts[0], ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)]


def with_flags(text: str, command: click.Command | None) -> str:
    """The text with the library's fields as options of `command`: `batch_size=8` becomes --batch-size 8.

    Fields that are no options stay in their backquotes, but ", or skip them by `skip_bad=True`" is left out.
    """

    def flag(match: re.Match[str]) -> str:
        lead, field, value = match[1] or "", match[2], match[3]
        for option in command.params if command else ():
            if isinstance(option, click.Option) and field in (option.name, option.opts[0][2:].replace("-", "_")):
                try:
                    given = words(option, ast.literal_eval(value)) if value else option.opts[:1]
                except (ValueError, SyntaxError, TypeError):  # a placeholder, such as FILE.onnx
                    given = [option.opts[0], value]
                return lead + " ".join(map(quote, given)) if given else match[0]
        return "" if lead and value else match[0]

    return _FIELD.sub(flag, text)


def given(*names: str, leave_out: Container[str] = ()) -> list[str]:
    """The words of the command line that set these parameters, or all if no name is given, except `leave_out`."""
    context = click.get_current_context()
    return [
        word
        for parameter in context.command.params
        if (name := str(parameter.name)) in context.params and (not names or name in names) and name not in leave_out
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        for word in words(parameter, context.params[name])
    ]


def typed(*words: str) -> str:
    """A command of bnsurgery, to paste into a shell."""
    return " ".join(["bnsurgery", *map(quote, words)])


def stem(name: str) -> str:
    """For a file's name, from a network's: "net.py:small" gives "small", "timm:vgg16" "vgg16"."""
    return Path(name).stem if name.endswith(".onnx") else name.rpartition(":")[2].replace("/", "-")


@dataclass(frozen=True)
class Checkpoint:
    """FILE, and what makes its network if that is not torchvision's."""

    file: Path
    model: str | None

    @property
    def stem(self) -> str:
        """The beginning of an output file's name: FILE's without -bn, or the run's if FILE is its best checkpoint."""
        if self.file.name == "best.safetensors" and (self.file.parent / "config.json").is_file():
            return self.file.resolve().parent.name
        return self.file.stem.removesuffix("-bn")

    @property
    def words(self) -> list[str]:
        """The words that name it in another command."""
        return [str(self.file), *(["--model", self.model] if self.model else [])]

    def load(self) -> "nn.Module":
        """The network in FILE."""
        from bnsurgery.files.checkpoint import read_record
        from bnsurgery.networks import factories

        file, model, record = self.file, self.model, read_record(self.file)
        if model is None and record is not None:
            model = factories.original(record, file)
            if model is None and record.architecture is None:
                made = printable(str(record.provenance.get("model", "")))
                advice = f"{quote(made)}, as when it was made, if you trust its code" if made else ""
                raise CheckpointError(
                    f"'{file}' holds {with_article(printable(record.model))}, which is not one of torchvision's: pass "
                    f"--model {advice or 'MODULE:FUNCTION, which makes it'}"
                )
        return bnsurgery.load(file, model=factories.build(model) if model else None)


checkpoint = group("checkpoint", Checkpoint, click.argument("file", type=PATH), model)
