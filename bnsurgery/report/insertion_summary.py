"""The summary that `bnsurgery insert` prints: the calibrated statistics, one line a site."""

from dataclasses import dataclass
from typing import Any

from bnsurgery.records.record import SurgeryRecord
from bnsurgery.statistics.moments import ChannelMoments
from bnsurgery.text.tables import table

from .site_statistics import SiteView


@dataclass(frozen=True)
class InsertionSummary:
    """All sites of an insertion, in order."""

    sites: tuple[SiteView, ...]

    def __str__(self) -> str:
        rows = [(s.name, s.channels, s.median_mean, s.median_std, s.dead) for s in self.sites]
        return table(("site", "channels", "|μ|", "σ", "σ² < eps"), rows) + (
            "\n|μ|, σ: medians over channels, in activation units; σ² < eps: dead, or nearly"
        )

    def to_dict(self) -> list[dict[str, Any]]:
        """JSON-ready: name, norm, channels, mean (the median of |μ|), std (the median of σ) and dead of every site."""
        names = {"mean": "median_mean", "std": "median_std"}
        keys = "name", "norm", "channels", "mean", "std", "dead"
        return [{key: getattr(site, names.get(key, key)) for key in keys} for site in self.sites]


def summarize(record: SurgeryRecord, moments: dict[str, ChannelMoments]) -> InsertionSummary:
    """The summary of an insertion from its record and the moments it was made from."""
    views = []
    for inserted in record.sites:
        site, found = inserted.site, moments[inserted.site.name]
        deviations, eps = found.variance.sqrt(), record.options.eps
        views.append(SiteView(site.name, site.layer, inserted.norm, site.activation, found.mean, deviations, eps))
    return InsertionSummary(tuple(views))
