"""The task of a network: its preprocessing and its classes, kept in its checkpoint."""

from dataclasses import dataclass

from bnsurgery.errors import CheckpointError
from bnsurgery.images.preprocessing import Preprocessing


@dataclass(frozen=True)
class Task:
    """The preprocessing of images for a network, and the classes it was fine-tuned to.

    Attributes:
        classes: their names, in the order of the outputs; empty if it was not fine-tuned.
        head: fqn of the output layer in the original network if it was replaced for these classes, else None.
        preprocessing: from an image to the input; None if the inputs are not images.
    """

    classes: tuple[str, ...]
    head: str | None
    preprocessing: Preprocessing | None

    def __post_init__(self) -> None:
        if self.head is not None and not self.classes:
            raise CheckpointError("task: a new head, but no classes for it")
