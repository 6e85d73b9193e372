"""Which statistics mode goes with a batch size and the drift that was measured there."""

from collections.abc import Callable

from bnsurgery.text.words import percent

_TINY, _SMALL = 4, 32  # batch sizes below which statistics are hopeless, and poor
_DRIFT = 0.2  # relative; above, a small batch's statistics change what the network computes too much


def statistics_for(batch_size: int, drift: Callable[[], float]) -> tuple[str, str]:
    """The mode for `set_statistics_`, and why: "running" below 4 images, "batch" from 32 on, between them by the drift.

    Args:
        batch_size: images a step, over all processes that share their statistics.
        drift: gives ‖train − eval‖₂/‖eval‖₂ of the outputs at that batch size;
            called only where it matters.

    References: Ioffe 2017, arXiv:1702.03275 (renorm for small batches); Wu & Johnson 2021, arXiv:2105.07576.
    """
    if batch_size < _TINY:
        return "running", f"a batch of {batch_size} has no statistics worth the name"
    if batch_size >= _SMALL:
        return "batch", f"a batch of {batch_size} is large enough"
    measured = drift()
    text = f"batches of {batch_size} drift by {percent(measured, '.3g')}"
    return ("renorm", f"{text}, above {percent(_DRIFT, 'g')}") if measured > _DRIFT else ("batch", text)
