"""The options of fine-tuning, one for every field of `bnsurgery.finetune.Config`."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from bnsurgery.finetune.config import CHOICES, Config

from .options import CHOICE, COUNT, PREPROCESSING, SEED, Decorator, group, model, option


def rate(text: str) -> float | str:
    """The type of --lr."""
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is neither a number nor auto") from None


_SHARE = click.FloatRange(0, 1, max_open=True)
_PART = click.FloatRange(0, 1, min_open=True, max_open=True)
_POSITIVE = click.FloatRange(min=0)
_DEFAULTS = {field.name: field.default for field in fields(Config)}

# In the order of --help: an option that other commands have too; or the field, its type (None: CHOICES) and the help.
_OPTIONS: tuple[Any, ...] = (
    model,
    ("weights", str, "Weights of ARCH: DEFAULT or another name in torchvision, random, or a file."),
    *CHOICE,
    ("layers", None, "Layers that get a BatchNorm."),
    (
        "head",
        None,
        "Make a new output layer or keep the old one; auto keeps it if it is for these classes, or as many.",
    ),
    ("head_init", None, "How a new head starts: fitted to the network's features on the training images, or random."),
    ("arm", None, "bn: BatchNorm inserted; plain: none; bn-naive: a fresh one, with weight 1 and bias 0."),
    ("dropout", _SHARE, "Probability of every Dropout layer.  [default: at most 0.2]"),
    ("root", str, "Folder of torchvision's datasets."),
    ("download", bool, "Download a torchvision dataset that is missing."),
    ("val_fraction", _PART, "Share of the images to validate on if the folder has no val/."),
    ("limit", click.IntRange(min=2), "Number of training images at most, evenly from the classes."),
    ("skip_bad", bool, "Leave out damaged images, and count them. This first reads every image once."),
    *PREPROCESSING,
    ("augment", None, "Random shifts, flips and zooms; auto chooses them by the data."),
    ("num_workers", click.IntRange(min=0), "Processes that read images.  [default: processors - 1, at most 8]"),
    ("epochs", COUNT, "Passes over the training images."),
    ("batch_size", COUNT, "Images in a step, over all processes."),
    ("lr", rate, "Peak learning rate; auto finds one by a range test of 100 steps.  [default: by batch size]"),
    ("optimizer", None, "SGD (Nesterov, momentum 0.9) or AdamW."),
    ("weight_decay", _POSITIVE, "Weight decay, except of biases and BatchNorm.  [default: 1e-4, AdamW 0.01]"),
    ("warmup", _SHARE, "Share of the steps in which the rate rises; afterwards it falls as a cosine."),
    ("clip", _POSITIVE, "Largest norm of the gradient; 0 for no limit."),
    ("label_smoothing", _SHARE, "Label smoothing of the loss."),
    ("ema", _SHARE, "Decay per step of an average of the weights, which is validated and saved; 0 for none."),
    ("train", None, "Parameters to train."),
    ("statistics", None, "Statistics that BatchNorm normalizes by; auto chooses by batch size and drift."),
    ("recalibrate", click.IntRange(min=2), "Number of images for the population statistics."),
    ("precision", None, "Mixed precision; auto: bf16 on a GPU."),
    ("channels_last", bool, "Memory layout of images and convolutions."),
    ("compile", bool, "Use torch.compile."),
    ("device", str, "Device: cpu, cuda, cuda:1, mps, xpu, ...; auto: a CUDA GPU if there is one, else the CPU."),
    ("evaluations", COUNT, "Validations per epoch."),
    ("save_every", _POSITIVE, "Seconds between checkpoints within an epoch."),
    ("seed", SEED, "Seed of all random numbers."),
    ("log_with", None, "Where the measurements of the validations go, besides metrics.csv."),
)


def recipe_options(*, leave_out: tuple[str, ...] = ()) -> Decorator:
    """An option for every field of Config except source, data, output and `leave_out`: together, as `recipe`."""
    rows = (row for row in _OPTIONS if callable(row) or row[0] not in leave_out)
    return group("recipe", dict, *(row if callable(row) else _option(*row) for row in rows))


def _option(name: str, kind: Any, help: str) -> Decorator:
    flags = [f"--{name}/--no-{name}".replace("_", "-")] if _DEFAULTS[name] is True else []
    return option(name, help, kind or CHOICES[name], *flags, default=_DEFAULTS[name])


def run_name(source: str | None, model: str | None, data: str) -> str:
    """A run's name: the network's and the data's; if a function gives the data, the function's."""
    from bnsurgery.networks.factories import names_code

    task = data.rpartition(":")[2] if names_code(data) else Path(data).name
    return f"{Path(source or str(model)).stem.replace(':', '-')}-{task}"
