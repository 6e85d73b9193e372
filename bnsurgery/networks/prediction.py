"""The classes that a classifier gives to images."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bnsurgery.errors import ArchitectureError
from bnsurgery.images.decoding import load_image
from bnsurgery.images.preprocessing import NOTHING, Wanted
from bnsurgery.records.record import record
from bnsurgery.running.batches import Inputs
from bnsurgery.running.modes import evaluate
from bnsurgery.text.tables import cell_text, table
from bnsurgery.text.words import percent

from .interface import classes_of, preprocessing_of, takes_images


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
    """One line an image: its file, then the likeliest classes, each with its probability in percent.

    The classes go into a line of their own if a path would be wrapped.
    """
    headers = ["image", *(f"class {rank}" for rank in _ranks(predictions))]
    rows = [
        (p.image, *(f"{percent(share, '.1f')} {name}" for name, share in zip(p.classes, p.probabilities, strict=True)))
        for p in predictions
    ]
    text = table(headers, rows)
    if all(cell_text(image) in text for image, *_ in rows):
        return text
    return "\n".join(f"{cell_text(image)}\n  {', '.join(map(cell_text, classes))}" for image, *classes in rows)


def predictions_csv(predictions: Sequence[Prediction]) -> str:
    """CSV with one line an image: image, class_1, probability_1, class_2, ...; probabilities from 0 to 1."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    pairs = (f"{what}_{rank}" for rank in _ranks(predictions) for what in ("class", "probability"))
    writer.writerow(["image", *pairs])
    for p in predictions:
        writer.writerow([p.image, *(value for pair in zip(p.classes, p.probabilities, strict=True) for value in pair)])
    return text.getvalue()


def _ranks(predictions: Sequence[Prediction]) -> range:
    return range(1, 1 + max((len(prediction.classes) for prediction in predictions), default=0))


def predict(
    model: nn.Module, images: Sequence[str | Path], *, top: int = 5, wanted: Wanted = NOTHING
) -> Iterator[Prediction]:
    """Classify image files, one after the other, in eval mode.

    Args:
        model: from `finetune`, `insert` or `load`; its record has the preprocessing and the names of the classes.
        top: how many classes to name.
        wanted: changes to the record's preprocessing.

    Raises:
        DataError: an image cannot be read.
        CalibrationError: the network does not take the input in its record.
        ArchitectureError: its input is no image, or not known: a network of one's own, of which no size was recorded
            or given.
        BNSurgeryError: the model carries no record.

    Examples:
        >>> from PIL import Image
        >>> Image.new("RGB", (64, 64), "green").save("green.png")
        >>> model = torchvision.models.squeezenet1_1(weights=None, num_classes=3).eval()
        >>> bn_model = bnsurgery.insert(model, [torch.randn(4, 3, 64, 64)])
        >>> [found.image for found in bnsurgery.predict(bn_model, ["green.png"], top=1)]
        ['green.png']
    """
    the_record = record(model)
    if not takes_images(the_record, model):
        name = type(model).__name__
        raise ArchitectureError(f"predict: {name} takes other inputs than images: call the network on a batch of them")
    preprocess, names = preprocessing_of(the_record, model, wanted), classes_of(the_record)
    for path in images:
        tensor = preprocess(load_image(path))
        logits = evaluate("predict", model, Inputs((tensor[None],)))[0][0].float()
        probabilities, indices = logits.softmax(0).topk(min(top, len(logits)))
        labels = tuple(names[i] if i < len(names) else str(i) for i in indices.tolist())
        yield Prediction(str(path), labels, tuple(probabilities.tolist()))
