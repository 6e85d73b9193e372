"""The summary that `bnsurgery insert` prints: the calibrated statistics, one line a site."""

from typing import Any

from bnsurgery.records.record import SurgeryRecord
from bnsurgery.statistics.moments import ChannelMoments
from bnsurgery.text.tables import table

from .site_statistics import view

_LEGEND = "|μ|, σ: medians over channels, in activation units; σ² < eps: dead, or nearly"


def summarize(record: SurgeryRecord, moments: dict[str, ChannelMoments]) -> tuple[str, list[dict[str, Any]]]:
    """The summary of an insertion, from its record and the moments that it was made from, in words and JSON-ready.

    The JSON has name, norm, channels, mean (the median of |μ|), std (the median of σ) and dead of every site.
    """
    sites = []
    for inserted in record.sites:
        found = moments[inserted.site.name]
        sites.append(view(inserted, found.mean, found.variance, record.options.eps))
    rows = [(s.name, s.norm, s.channels, s.median_mean, s.median_std, s.dead) for s in sites]
    text = table(("site", "channels", "|μ|", "σ", "σ² < eps"), [(name, *numbers) for name, _, *numbers in rows])
    keys = ("name", "norm", "channels", "mean", "std", "dead")
    return f"{text}\n{_LEGEND}", [dict(zip(keys, row, strict=True)) for row in rows]
