"""The options of a fine-tuning run, with the defaults that the literature on BatchNorm recommends."""

import math
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bnsurgery.errors import BNSurgeryError, is_utf8, shown
from bnsurgery.text.typed_json import parse

if TYPE_CHECKING:
    from bnsurgery.images.preprocessing import Wanted

RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # that `compare` tries
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
    "log_with": ("tensorboard", "wandb", "mlflow", "trackio"),
}
_RANGES = {  # lowest value, the first that is too large, both in words
    **dict.fromkeys(("epochs", "batch_size", "evaluations"), (1, 2**31, "1 or more, and below 2^31")),
    **dict.fromkeys(("clip", "save_every", "weight_decay"), (0, math.inf, "0 or more")),
    **dict.fromkeys(("warmup", "label_smoothing", "ema", "dropout"), (0, 1, "0 or more, and below 1")),
    "limit": (2, math.inf, "2 or more"),
    "recalibrate": (2, 2**31, "2 or more images, and below 2^31"),
    "num_workers": (0, 1025, "0 to 1024"),
    "seed": (0, 2**63, "0 or more, and below 2^63"),
}


@dataclass(frozen=True)
class Config:
    """One run of `bnsurgery.finetune.run`.

    Attributes: The network
        source: an architecture's name, or a file with plain weights or a bnsurgery checkpoint. May be empty with
            `model`.
        model: "package.module:factory" or "file.py:factory", a function without arguments that returns the network.
        weights: of an architecture: "DEFAULT" or another name in torchvision's enum, "random", or a file.
        weights_key: where the tensors are in a weights file: the keys that lead to them, joined by "."; None to search.
        weights_prefix: the prefix of the network's names in the file, such as "backbone."; None to search.
        partial: load the tensors of a weights file that fit, and leave the other parameters as initialized.
        layers: which layers get a BatchNorm: "all", "conv" or "dense".
        head: "new" replaces the output layer, "keep" keeps it. "auto" keeps it if it is for the data's classes: the
            same names in the same order or, if a file has no names, the same number.
        head_init: how a new head is initialized: "fit" by logistic regression on the network's features where that is
            possible, see `fit_head_`; or "random".
        dropout: probability of every Dropout module; None lowers those above 0.2 to 0.2.
        arm: "bn"; or, for comparison, "plain" without BatchNorm, or "bn-naive" with a fresh one (weight 1, bias 0),
            which discards the pretrained function.

    Attributes: The data
        data: a folder (train/, val/ and test/ with one folder per class, of which the last two may be missing, or one
            folder per class), "digits", a torchvision dataset such as "CIFAR10", or "file.py:function" or
            "package.module:function", a function that returns training and validation data of any kind: see
            `bnsurgery.finetune.own_data.open_own`. "Images" below then means its samples, and the options from `root`
            to `augment` are refused.
        root: where torchvision's datasets are kept.
        download: download a missing torchvision dataset.
        val_fraction: share of each class that is held out if the data has no validation split.
        limit: number of training images, drawn evenly over the classes; None for all.
        skip_bad: leave damaged images out; this reads every file once beforehand.
        image_size: side of the input in pixels, or height and width as "240x320"; None for the size of the weights.
        normalize: "imagenet" for its mean and standard deviation, "none" for values from 0 to 1. "auto" follows the
            checkpoint or the weights; without these it is ImageNet's for colour images, and 0 to 1 for grey ones.
        mean, std, scale, channels: instead of `normalize`, see `bnsurgery.images.preprocessing.Preprocessing`.
        augment: "none"; "crop" (shifts), "crop-flip", "resized-crop" (also flips), "trivial" (also TrivialAugment);
            "auto" is "crop" for a folder of images below 64 pixels a side, "resized-crop" for one of larger images,
            and depends on the data set otherwise.
        num_workers: processes that read images; None for one less than the processors, at most 8. On macOS and Windows
            they import the main module: a script must start its run under `if __name__ == "__main__":`.

    Attributes: The recipe
        epochs: passes over the training images.
        batch_size: images per step, over all processes.
        lr: peak learning rate; None for a default by batch size, "auto" for a range test.
        optimizer: "sgd" (Nesterov, momentum 0.9) or "adamw".
        weight_decay: of the weights of convolutions and dense layers; biases and BatchNorm do not decay. None: 1e-4
            (SGD) or 0.01 (AdamW).
        warmup: share of the steps in which the rate rises linearly; it then falls to 0 as a half cosine.
        clip: largest norm of the gradient; 0 for no limit.
        label_smoothing: of the cross entropy, 0 to 1.
        ema: decay per step of an exponential average of the weights, which is then validated and kept; 0 for none.
        train: the trained parameters: "all", "bn", "head" or "bn+head". This overrides what is frozen in the network:
            layers, their norms and statistics are unfrozen together.
        statistics: the statistics that BatchNorm normalizes by in training, see `bnsurgery.set_statistics_`; "auto"
            depends on batch size and measured drift.
        recalibrate: number of images whose population statistics replace the running ones before each validation.

    Attributes: The machine
        precision: "bf16" or "fp16" for mixed precision, "no"; "auto" is bf16 on a GPU that supports it.
        channels_last: memory format of images and convolutions.
        compile: use torch.compile.
        device: "auto" for a CUDA GPU if there is one, else the CPU; or a name such as "cpu", "cuda:1", "mps" or "xpu".
            With several processes, each uses its own GPU.
        seed: of all random numbers.

    Attributes: The run
        output: the run's directory.
        evaluations: validations per epoch.
        save_every: seconds between checkpoints within an epoch.
        log_with: where the measurements go besides metrics.csv: "tensorboard", into the run's directory; or "wandb",
            "mlflow" or "trackio", where its settings say.

    Raises:
        BNSurgeryError: a value has the wrong type or is out of range.

    Examples:
        >>> config = bnsurgery.finetune.Config(source="vgg16", data="photos", output="runs/photos", epochs=5)
        >>> config.batch_size, config.arm
        (64, 'bn')
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
    log_with: str = "tensorboard"

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(Config).items():
            _check(_is_a(hint, getattr(self, name)), name, getattr(self, name), getattr(hint, "__name__", str(hint)))
        for name, allowed in CHOICES.items():
            _check(getattr(self, name) in allowed, name, getattr(self, name), " | ".join(allowed))
        for name, (low, high, expected) in _RANGES.items():
            value = getattr(self, name)
            _check(value is None or low <= value < high, name, value, expected)
        _check(0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "between 0 and 1")
        sound = self.lr in (None, "auto") or (not isinstance(self.lr, str) and 0 < self.lr < 1e3)
        _check(sound, "lr", self.lr, "above 0 and below 1000, or auto")
        # safetensors writes no file of another name, and would fail after the first epoch.
        _check(self.output != "" and is_utf8(self.output), "output", self.output, "the run's directory, in UTF-8")
        try:
            _ = self.wanted  # which checks its fields
        except BNSurgeryError as error:
            raise BNSurgeryError(f"finetune: {error}") from None

    @property
    def wanted(self) -> "Wanted":
        """The fields about preprocessing."""
        from bnsurgery.images.preprocessing import Wanted  # imports torchvision, which --help does not need

        return Wanted(self.image_size, self.normalize, self.mean, self.std, self.scale, self.channels)

    @classmethod
    def from_dict(cls, data: Any, where: str) -> "Config":
        """Read the output of `dataclasses.asdict`, which is not trusted.

        Raises:
            CheckpointError: a field is missing, unknown or of the wrong type.
            BNSurgeryError: a value is out of range.
        """
        result: Config = parse(cls, data, where)
        return result


def _check(sound: bool, name: str, got: Any, expected: str) -> None:
    if not sound:
        raise BNSurgeryError(f"finetune: `{name}`: got {shown(got)}, expected {expected}")


def _is_a(hint: Any, value: object) -> bool:
    """Whether `value` has the annotated type. An int is accepted as a float, a bool is not accepted as a number."""
    kinds = tuple(typing.get_origin(kind) or kind for kind in typing.get_args(hint) or (hint,))
    if isinstance(value, tuple):
        return tuple in kinds and all(_is_a(float, item) for item in value)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, (*kinds, int) if float in kinds else kinds)
