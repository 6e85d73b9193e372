"""What goes into a network and what its outputs are called: kept in its checkpoint."""

from dataclasses import dataclass

from bnsurgery.errors import CheckpointError
from bnsurgery.images.preprocessing import Preprocessing


@dataclass(frozen=True)
class Task:
    """How images become the network's input, and what it was fine-tuned to tell apart.

    Attributes:
        classes: names, in the order of the outputs; empty where it was not fine-tuned.
        head: fqn of the output layer in the original network, made anew for these classes; None where it was kept.
        preprocessing: from an image to the input; None where it takes other things than images.
    """

    classes: tuple[str, ...]
    head: str | None
    preprocessing: Preprocessing | None

    def __post_init__(self) -> None:
        if self.head is not None and not self.classes:
            raise CheckpointError("task: a new head, but no classes for it")
