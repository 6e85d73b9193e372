"""Everything that a fine-tuning run can be told, with the defaults that the literature on BN asks for."""

import math
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bnsurgery.errors import BNSurgeryError, is_utf8, shown
from bnsurgery.text.typed_json import parse

if TYPE_CHECKING:
    from bnsurgery.images.preprocessing import Wanted

RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # what `compare` tries
CHOICES: dict[str, tuple[str, ...]] = {
    "normalize": ("auto", "imagenet", "none"),
    "augment": ("auto", "none", "crop", "crop-flip", "resized-crop", "trivial"),
    "layers": ("all", "conv", "dense"),
    "head": ("auto", "new", "keep"),
    "head_init": ("fit", "random"),
    "optimizer": ("sgd", "adamw"),
    "train": ("all", "bn", "head", "bn+head"),
    "statistics": ("auto", "batch", "running", "renorm"),
    "precision": ("auto", "no", "bf16", "fp16"),
    "arm": ("bn", "plain", "bn-naive"),
}
_MANY = 2**31
_MOST_WORKERS = 1024


@dataclass(frozen=True)
class Config:
    """One run of `bnsurgery.finetune.run`.

    Attributes: The network
        source: name of an architecture, or a file: plain weights or a bnsurgery checkpoint. May be empty with `model`.
        model: "package.module:factory" or "file.py:factory", a function without arguments that makes the network.
        weights: of an architecture: "DEFAULT" or another name in torchvision's enum, "random", or a file.
        weights_key: where the tensors are in a weights file: the keys that lead to them, joined by "."; None to search.
        weights_prefix: what stands there before the network's own names, such as "backbone."; None to search.
        partial: take from a weights file what fits, and leave the rest of the network as it is made.
        layers: which layers get a BatchNorm: "all", "conv" or "dense".
        head: "new" replaces the output layer, "keep" keeps it; "auto" keeps one that is for these classes: of the same
            names in the same order, where a file notes them, else of as many.
        head_init: what a new head starts with: "fit" for the weights that suit the network's features best, see
            `fit_head_`, where that can be; or "random".
        dropout: probability that every Dropout module is set to; None lowers those above 0.2 to 0.2.
        arm: "bn"; or, as `compare` sets beside it, "plain" without BatchNorm, or "bn-naive" with a fresh one (weight 1,
            bias 0), which forgets what the network computed.

    Attributes: The data
        data: a folder (train/ and val/ with one folder a class, or one folder a class), "digits", a torchvision
            dataset such as "CIFAR10", or "file.py:function" or "package.module:function", a function that returns
            training and validation data of any kind: see `bnsurgery.finetune.own_data.open_own`. What is said below of
            images is then for its samples; the options from `root` to `augment`, but for `num_workers`, are refused.
        root: where torchvision's datasets are kept.
        download: fetch a torchvision dataset that is not there.
        val_fraction: share of each class that is held out where the data has no validation split of its own.
        limit: train on so many images, drawn evenly over the classes; None for all.
        skip_bad: leave damaged images out; every file is read once beforehand.
        image_size: side of the input in pixels, or height and width as "240x320"; None for the weights' own.
        normalize: "imagenet" for its mean and standard deviation, "none" for values from 0 to 1; "auto" for what the
            checkpoint or the weights say, else ImageNet's for colour and 0 to 1 for grey.
        mean, std, scale, channels: instead of `normalize`, see `bnsurgery.images.preprocessing.Preprocessing`.
        augment: "none"; "crop" (shifts), "crop-flip", "resized-crop" (also flips), "trivial" (also TrivialAugment);
            "auto" chooses by the data.
        num_workers: processes that read images; None for one less than the processors, at most 8. On macOS and Windows
            they import the main module: a script must start its run under `if __name__ == "__main__":`.

    Attributes: The recipe
        epochs: passes over the training images.
        batch_size: images a step, over all processes.
        lr: peak learning rate, None for a default by batch size, or "auto" for a range test.
        optimizer: "sgd" (Nesterov, momentum 0.9) or "adamw".
        weight_decay: of weights of convolutions and dense layers; biases and BatchNorm have none. None: 1e-4 (SGD) or
            0.01 (AdamW).
        warmup: share of the steps in which the rate rises linearly; it then falls to 0 as a half cosine.
        clip: largest norm of the gradient; 0 for no limit.
        label_smoothing: 0 to 1, of the cross entropy.
        ema: decay a step of an average of the weights, which is then what is validated and kept; 0 for none.
        train: which parameters: "all", "bn", "head" or "bn+head". It goes before what is frozen in the network: layers,
            their norms and statistics are unfrozen together.
        statistics: what BatchNorm normalizes by in training, see `bnsurgery.set_statistics_`; "auto" chooses by batch
            size and measured drift.
        recalibrate: images whose population statistics replace the running ones before a validation.

    Attributes: The machine
        precision: "bf16" or "fp16" mixed precision, "no"; "auto" is bf16 where a GPU says that it has it.
        channels_last: memory layout of images and convolutions.
        compile: use torch.compile.
        device: "auto" for a CUDA GPU where there is one, else the CPU; or the name of one, such as "cpu", "cuda:1",
            "mps" or "xpu". With several processes each takes a GPU of its own.
        seed: of everything random.

    Attributes: The run
        output: its directory.
        evaluations: validations an epoch.
        save_every: seconds between checkpoints within an epoch.
    """

    source: str = ""
    data: str = ""
    output: str = ""
    model: str | None = None
    weights: str = "DEFAULT"
    weights_key: str | None = None
    weights_prefix: str | None = None
    partial: bool = False
    layers: str = "all"
    head: str = "auto"
    head_init: str = "fit"
    dropout: float | None = None
    arm: str = "bn"
    root: str = "data"
    download: bool = False
    val_fraction: float = 0.2
    limit: int | None = None
    skip_bad: bool = False
    image_size: int | str | None = None
    normalize: str = "auto"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float | None = None
    channels: str | None = None
    augment: str = "auto"
    num_workers: int | None = None
    epochs: int = 10
    batch_size: int = 64
    lr: float | str | None = None
    optimizer: str = "sgd"
    weight_decay: float | None = None
    warmup: float = 0.1
    clip: float = 5.0
    label_smoothing: float = 0.0
    ema: float = 0.0
    train: str = "all"
    statistics: str = "auto"
    recalibrate: int = 1024
    precision: str = "auto"
    channels_last: bool = True
    compile: bool = False
    device: str = "auto"
    seed: int = 0
    evaluations: int = 1
    save_every: float = 300.0

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(Config).items():
            _check(_is_a(hint, getattr(self, name)), name, getattr(self, name), getattr(hint, "__name__", str(hint)))
        for name, allowed in CHOICES.items():
            _check(getattr(self, name) in allowed, name, getattr(self, name), " | ".join(allowed))
        for name in ("epochs", "batch_size", "evaluations"):
            _check(1 <= getattr(self, name) < _MANY, name, getattr(self, name), "1 or more, and below 2^31")
        for name in ("clip", "save_every", "weight_decay"):
            value = getattr(self, name)
            _check(value is None or 0 <= value < math.inf, name, value, "0 or more")
        for name in ("warmup", "label_smoothing", "ema", "dropout"):
            value = getattr(self, name)
            _check(value is None or 0 <= value < 1, name, value, "0 or more, and below 1")
        _check(0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "between 0 and 1")
        _check(self.limit is None or self.limit >= 2, "limit", self.limit, "2 or more")
        _check(2 <= self.recalibrate < _MANY, "recalibrate", self.recalibrate, "2 or more images, and below 2^31")
        workers = self.num_workers
        _check(workers is None or 0 <= workers <= _MOST_WORKERS, "num_workers", workers, f"0 to {_MOST_WORKERS}")
        try:
            assert self.wanted  # which checks what it is made of
        except BNSurgeryError as error:
            raise BNSurgeryError(f"finetune: {error}") from None
        lr = self.lr
        is_rate = isinstance(lr, (int, float)) and 0 < lr < 1e3
        _check(lr is None or lr == "auto" or is_rate, "lr", lr, "above 0 and below 1000, or auto")
        _check(0 <= self.seed < 2**63, "seed", self.seed, "0 or more, and below 2^63")
        _check(bool(self.output), "output", self.output, "the run's directory")
        # safetensors writes no file of another name, and would say so after the first epoch.
        _check(is_utf8(self.output), "output", self.output, "a name in UTF-8")

    @property
    def wanted(self) -> "Wanted":
        """What it says of the preprocessing."""
        from bnsurgery.images.preprocessing import Wanted  # with torchvision, which --help does without

        return Wanted(self.image_size, self.normalize, self.mean, self.std, self.scale, self.channels)

    @classmethod
    def from_dict(cls, data: Any, where: str) -> "Config":
        """Read what `asdict` gave, believing nothing.

        Raises:
            CheckpointError: a field is missing, unknown or of the wrong type.
            BNSurgeryError: a value is out of range.
        """
        result: Config = parse(cls, data, where)
        return result


def _check(sound: bool, name: str, got: Any, expected: str) -> None:
    if not sound:
        raise BNSurgeryError(f"finetune: {name}: got {shown(got)}, expected {expected}")


def _is_a(hint: Any, value: object) -> bool:
    """Whether `value` is what a field's annotation says; an int will do for a float, a bool for no number."""
    kinds = tuple(typing.get_origin(kind) or kind for kind in typing.get_args(hint) or (hint,))
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, (*kinds, int) if float in kinds else kinds)
