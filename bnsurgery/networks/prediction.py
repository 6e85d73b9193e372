"""What a classifier says of images."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bnsurgery.images.decoding import load_image
from bnsurgery.images.preprocessing import NOTHING, Wanted
from bnsurgery.records.record import record
from bnsurgery.running.batches import Inputs
from bnsurgery.running.modes import evaluate
from bnsurgery.text.tables import table
from bnsurgery.text.words import percent

from . import pretrained


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image, with their probabilities (softmax), in falling order."""

    image: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]

    def __str__(self) -> str:
        return predictions_table([self])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def predictions_table(predictions: Sequence[Prediction]) -> str:
    """One line an image: its file, then the likeliest classes, each with its probability in percent."""
    most = max((len(prediction.classes) for prediction in predictions), default=0)
    headers = ["image", *(f"class {rank}" for rank in range(1, most + 1))]
    rows = [
        (p.image, *(f"{percent(share, '.1f')} {name}" for name, share in zip(p.classes, p.probabilities, strict=True)))
        for p in predictions
    ]
    return table(headers, rows)


def predictions_csv(predictions: Sequence[Prediction]) -> str:
    """A header and one line an image: image, class_1, probability_1, class_2, ...; probabilities from 0 to 1."""
    most = max((len(prediction.classes) for prediction in predictions), default=0)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", *(f"{what}_{rank}" for rank in range(1, most + 1) for what in ("class", "probability"))])
    for p in predictions:
        pairs = zip(p.classes, p.probabilities, strict=True)
        writer.writerow([p.image, *(value for pair in pairs for value in pair)])
    return text.getvalue()


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
        logits = evaluate("predict", model, Inputs((tensor[None],)))[0][0].float()
        probabilities, indices = logits.softmax(0).topk(min(top, len(logits)))
        labels = tuple(names[i] if i < len(names) else str(i) for i in indices.tolist())
        yield Prediction(str(path), labels, tuple(probabilities.tolist()))
