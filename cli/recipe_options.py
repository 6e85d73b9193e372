"""The options of fine-tuning, one for every field of `bnsurgery.finetune.Config`."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from bnsurgery.finetune.config import CHOICES, Config

from .options import PREPROCESSING

F = TypeVar("F", bound=Callable[..., Any])


class _Rate(click.ParamType):
    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        if value == "auto" or isinstance(value, float):
            return value
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor auto", param, ctx)


_COUNT, _SHARE = click.IntRange(min=1), click.FloatRange(0, 1, max_open=True)
_DEFAULTS = {field.name: field.default for field in fields(Config)}

# In the order of --help: name of the field, type (None: its CHOICES; a dict: all that click is to know), help text.
_OPTIONS: tuple[tuple[str, Any, str], ...] = (
    (
        "model",
        str,
        "package.module:function or file.py:function that makes a network of your own. This runs its code; never taken "
        "from a checkpoint.",
    ),
    ("weights", str, "Of ARCH: DEFAULT or another name of torchvision's, random, or a file."),
    ("weights_key", str, "Where in the file the weights are, such as state_dict.  [default: where they fit]"),
    ("weights_prefix", str, "What stands there before the network's names, such as backbone.  [default: what fits]"),
    ("partial", bool, "Take from the file what fits, and leave the rest as it is made."),
    ("layers", None, "Which layers get a BatchNorm."),
    (
        "head",
        None,
        "Replace the output layer, or keep it; auto keeps it for its own classes, or as many of unknown names.",
    ),
    ("head_init", None, "Of a new head: fit it to the network's features on the training images first, or not."),
    ("arm", None, "bn, or what compare sets beside it: plain, without BatchNorm; bn-naive, with weight 1 and bias 0."),
    ("dropout", _SHARE, "Of every Dropout layer.  [default: 0.2 where it is above]"),
    ("root", str, "Where torchvision's datasets are."),
    ("download", bool, "Download a torchvision dataset that is not there."),
    ("val_fraction", click.FloatRange(0, 1, min_open=True, max_open=True), "Held out where there is no val/."),
    ("limit", click.IntRange(min=2), "Train on so many images, evenly over the classes."),
    ("skip_bad", bool, "Leave out damaged images, and count them; reads every image once first."),
    *((name, said, "") for name, said in PREPROCESSING.items()),
    ("augment", None, "Random shifts, flips, zooms; auto chooses by the data."),
    ("num_workers", click.IntRange(min=0), "Processes that read images.  [default: processors - 1, at most 8]"),
    ("epochs", _COUNT, "Passes over the training images."),
    ("batch_size", _COUNT, "Images a step, over all processes."),
    ("lr", _Rate(), "Peak learning rate; auto finds one by a range test of 100 steps.  [default: by batch size]"),
    ("optimizer", None, "SGD (Nesterov, momentum 0.9) or AdamW."),
    ("weight_decay", click.FloatRange(min=0), "Not of biases and BatchNorm.  [default: 1e-4, AdamW 0.01]"),
    ("warmup", _SHARE, "Share of the steps in which the rate rises; then it falls as a cosine."),
    ("clip", click.FloatRange(min=0), "Largest norm of the gradient; 0: any."),
    ("label_smoothing", _SHARE, "Of the loss."),
    ("ema", _SHARE, "Keep an average of the weights, with this decay a step, such as 0.99."),
    ("train", None, "Which parameters to train."),
    ("statistics", None, "What BatchNorm normalizes by; auto chooses by batch size and drift."),
    ("recalibrate", click.IntRange(min=2), "Images for the population statistics."),
    ("precision", None, "Mixed precision; auto: bf16 on a GPU."),
    ("channels_last", bool, "Memory layout of images and convolutions."),
    ("compile", bool, "Use torch.compile."),
    ("device", str, "cpu, cuda, cuda:1, mps, xpu, ...; auto: a CUDA GPU where there is one, else the CPU."),
    ("evaluations", _COUNT, "Validations an epoch."),
    ("save_every", click.FloatRange(min=0), "Seconds between checkpoints within an epoch."),
)


def run_name(source: str | None, model: str | None, data: str) -> str:
    """What to call a run: by its network and data, of functions of the user's by the data's function."""
    from bnsurgery.networks.factories import names_code

    task = data.rpartition(":")[2] if names_code(data) else Path(data).name
    return f"{Path(source or str(model)).stem.replace(':', '-')}-{task}"


def recipe_options(*, leave_out: tuple[str, ...] = ()) -> Callable[[F], F]:
    """One option for every field of Config but for source, data, output and seed, and those in `leave_out`."""

    def decorate(function: F) -> F:
        for name, kind, text in reversed(_OPTIONS):
            if name not in leave_out:
                function = _option(name, kind, text)(function)
        return function

    return decorate


def _option(name: str, kind: Any, text: str) -> Callable[[F], F]:
    flag, default = "--" + name.replace("_", "-"), _DEFAULTS[name]
    if isinstance(kind, dict):
        return click.option(flag, name, **kind)
    if kind is bool:
        flag = f"{flag}/--no-{flag[2:]}" if default else flag
        return click.option(flag, name, is_flag=True, default=default, show_default=bool(default), help=text)
    kind = click.Choice(CHOICES[name]) if kind is None else kind
    return click.option(flag, name, type=kind, default=default, show_default=default is not None, help=text)
