"""What a run finds: at its start, and at each validation."""

from dataclasses import dataclass

from bnsurgery.text.words import percent, thousands


@dataclass(frozen=True)
class Row:
    """One line of metrics.csv, written at each validation.

    Attributes:
        epoch: passes over the training images done, as a fraction.
        step: training steps done.
        lr: learning rate of the last step.
        train_loss, train_accuracy: means over the steps since the last validation; accuracies are 0 to 1.
        val_loss, val_accuracy: of the network as it would be kept.
        images_per_second: in training, over all processes.
    """

    epoch: float
    step: int
    lr: float
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    images_per_second: float

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch:<6.4g} training loss {self.train_loss:.4f}, {percent(self.train_accuracy)}   "
            f"validation loss {self.val_loss:.4f}, {percent(self.val_accuracy)}   "
            f"{thousands(self.images_per_second)} img/s"
        )


@dataclass(frozen=True)
class Resolved:
    """What "auto" and the defaults came to: found once, at the start of a run, and kept when it is resumed.

    Attributes:
        head: what the run began with, in words: "kept" or "new", why, and how a new one was made.
    """

    lr: float
    statistics: str
    reason: str
    lr_reason: str
    head: str
