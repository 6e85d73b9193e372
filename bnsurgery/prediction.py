"""What a classifier says of images."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from . import pretrained
from .batches import Inputs, run
from .data import load_image
from .modes import observing
from .preprocessing import NOTHING, Wanted
from .surgery_record import record


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image, with their probabilities (softmax), in falling order."""

    image: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]

    def __str__(self) -> str:
        pairs = zip(self.classes, self.probabilities, strict=True)
        return "\n".join([self.image, *(f"  {100 * share:5.1f} %  {name}" for name, share in pairs)])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def predict(
    model: nn.Module, images: Sequence[str | Path], *, top: int = 5, wanted: Wanted = NOTHING
) -> Iterator[Prediction]:
    """Classify image files, one after the other, in eval mode.

    Args:
        model: from `finetune`, `insert` or `load`; its record says what goes in and what the classes are called.
        top: how many classes to name.
        wanted: what of the preprocessing shall be otherwise than its record says.

    Raises:
        DataError: an image cannot be read.
        CalibrationError: the network does not take what its record says.
        ArchitectureError: its input is not known: a network of one's own, of which no size was recorded or given.
        BNSurgeryError: the model carries no record.
    """
    done = record(model)
    preprocess, names = pretrained.preprocessing_of(done, model, wanted), pretrained.classes_of(done)
    for path in images:
        tensor = preprocess(load_image(path))
        with observing(model):
            logits = run("predict", model, Inputs((tensor[None],)))[0].float()  # says so where the size does not fit
        probabilities, indices = logits.softmax(0).topk(min(top, len(logits)))
        labels = tuple(names[i] if i < len(names) else str(i) for i in indices.tolist())
        yield Prediction(str(path), labels, tuple(probabilities.tolist()))
