"""The results of a run: the values chosen at its start, its range test, and its validations."""

import math
from dataclasses import asdict, dataclass

from torch import nn

from bnsurgery.errors import NonFiniteError
from bnsurgery.statistics.dead_channels import is_dead
from bnsurgery.text.words import percent, thousands

from .task_kind import TaskKind


@dataclass(frozen=True)
class Row:
    """One line of metrics.csv, written at each validation. Accuracies are 0 to 1.

    Attributes:
        epoch: passes over the training images so far, as a fraction.
        step: training steps so far.
        lr: learning rate of the last step.
        train_loss, train_accuracy: means over the steps since the last validation.
        val_loss, val_accuracy: of the network as it would be kept.
        images_per_second: in training, over all processes.

    Examples:
        >>> print(bnsurgery.finetune.Row(1.0, 8, 0.1, 0.7, 0.5, 0.6, 0.75, 99.0))
        epoch 1      training loss 0.7000, 50.00 %   validation loss 0.6000, 75.00 %   99 samples/s
    """

    epoch: float
    step: int
    lr: float
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    images_per_second: float

    @property
    def scalars(self) -> dict[str, float]:
        """The measurements under their names in TensorBoard and other trackers, such as "val/loss"."""
        values = {name.replace("_", "/", 1): value for name, value in asdict(self).items()}
        return {name: value for name, value in values.items() if name not in ("epoch", "step")}

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch:<6.4g} training loss {self.train_loss:.4f}, {percent(self.train_accuracy)}   "
            f"validation loss {self.val_loss:.4f}, {percent(self.val_accuracy)}   "
            f"{thousands(self.images_per_second)} samples/s"
        )


@dataclass(frozen=True)
class NormRow:
    """One line of norms.csv: the statistics of one norm at a validation, as the network would be kept.

    Attributes:
        step: training steps so far.
        norm: fqn of the BatchNorm.
        channels: C.
        dead: number of channels with σ² < eps.
        smallest, median, largest: σ = √running_var over the channels, in activation units.

    Raises:
        ValueError: there are no channels, more dead ones than channels, or σ is not finite or not in this order.

    Examples:
        >>> bnsurgery.finetune.NormRow(8, "features.1", 64, dead=0, smallest=0.2, median=0.5, largest=1.5).dead
        0
    """

    step: int
    norm: str
    channels: int
    dead: int
    smallest: float
    median: float
    largest: float

    def __post_init__(self) -> None:
        if not (0 <= self.dead <= self.channels > 0 and 0 <= self.smallest <= self.median <= self.largest < math.inf):
            raise ValueError(
                f"got {self.dead} dead of {self.channels} channels, and σ from {self.smallest} by {self.median} to "
                f"{self.largest}, expected finite values in ascending order"
            )


def norm_rows(network: nn.Module, step: int) -> list[NormRow]:
    """A row for every BatchNorm with running statistics, in order of definition."""
    norms = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None
    }
    rows = []
    for name, norm in norms.items():
        variance = norm.running_var.detach().cpu().double()  # type: ignore[union-attr]
        if not variance.isfinite().all():
            raise NonFiniteError(f"the running variance of '{name}' is not finite")
        sigma, dead = variance.sqrt(), int(is_dead(variance, norm.eps).sum())
        rows.append(NormRow(step, name, len(sigma), dead, *(sigma.quantile(q).item() for q in (0.0, 0.5, 1.0))))
    return rows


@dataclass(frozen=True)
class Resolved:
    """The values that "auto" and the defaults stand for, chosen at the start of a run and kept when it is resumed.

    Attributes:
        lr: the peak learning rate, for the reason `lr_reason`.
        statistics: mode of the BatchNorm layers, for the reason `reason`.
        head: "kept" or "new", why, and how a new one was initialized.
        augment: the augmentation, for the reason `augment_reason`.
        batch_size: samples per step, over all processes; the size of the largest batch if a function makes the batches.
        start_accuracy: on the validation part before the first step, 0 to 1.
        kind: of a run with inserted BatchNorm, how much the pretrained function helps; None where that is not measured.

    Examples:
        >>> reasons = ("as asked", "the default for a batch of 64", "kept: as asked")
        >>> bnsurgery.finetune.Resolved(0.05, "batch", *reasons, "crop", "as asked", 64).lr
        0.05
    """

    lr: float
    statistics: str
    reason: str
    lr_reason: str
    head: str
    augment: str
    augment_reason: str
    batch_size: int
    start_accuracy: float | None = None
    kind: TaskKind | None = None


@dataclass(frozen=True)
class RateRange:
    """Losses of single batches and smoothed ones by rate, the peak rate chosen from them, and the reason."""

    rates: tuple[float, ...]
    measured: tuple[float, ...]
    losses: tuple[float, ...]
    chosen: float
    reason: str
