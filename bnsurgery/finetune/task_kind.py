"""Near, far or not clear: how much the pretrained function helps a task, and how sure that is."""

from dataclasses import dataclass
from typing import Literal

from bnsurgery.text.words import counted, percent

_LIMIT = 0.10  # see docs/evidence.md: the tasks with a smaller difference are those where a fresh BatchNorm keeps up


@dataclass(frozen=True)
class TaskKind:
    """How much the pretrained function helps a task before any training.

    Two heads are fitted by `fit_head_` on the same training images: one on the features of the network as inserted, one
    on those of a copy with fresh BatchNorms (weight 1, bias 0, population statistics), which has the same convolutions
    but does not compute the same function.

    Attributes:
        kept: accuracy of the first on held-out images, 0 to 1.
        fresh: accuracy of the second on the same images.
        images: the number of these images.
        error: standard error of `kept` − `fresh`, over the choice of these images. `finetune` measures it on pairs:
            with n images, k more right in the first than in the second, and m right in one alone,
            √(m + 1 − k²/(n + 2)) / (n + 2).

    References: Agresti & Min 2005 (the 1 and the 2, half an image for each of the four outcomes: with few images, or no
    difference, the error is not underestimated).

    Examples:
        >>> kind = bnsurgery.finetune.TaskKind(kept=0.67, fresh=0.54, images=300, error=0.029)
        >>> kind.verdict
        'not clear'
        >>> print(str(kind).partition("function, ")[2])
        on 54.00 % without it: 13.0 points, standard error 2.9
    """

    kept: float
    fresh: float
    images: int
    error: float

    @property
    def verdict(self) -> Literal["near", "far", "not clear"]:
        """Whether the function is worth 10 points or more, or "not clear" where that is within two standard errors.

        On a far task a fresh BatchNorm may do as well or better.
        """
        beyond = round(self.kept - self.fresh - _LIMIT, 9)  # 0.7 − 0.6 is 0.1
        if abs(beyond) <= 2 * self.error:
            return "not clear"
        return "near" if beyond > 0 else "far"

    def __str__(self) -> str:
        named = "not clearly near or far" if self.verdict == "not clear" else self.verdict
        return (
            f"{named}: before training, a fitted head is right on {percent(self.kept)} of "
            f"{counted(self.images, 'sample')} with the pretrained function, on {percent(self.fresh)} without it: "
            f"{100 * (self.kept - self.fresh):.1f} points, standard error {100 * self.error:.1f}"
        )
