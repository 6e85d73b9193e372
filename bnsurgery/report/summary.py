"""What calibration saw at each site, in a few numbers a line."""

from dataclasses import asdict, dataclass
from typing import Any

from bnsurgery.records.record import SurgeryRecord
from bnsurgery.statistics.moments import ChannelMoments
from bnsurgery.text.tables import table


@dataclass(frozen=True)
class SiteSummary:
    """One site's statistics.

    Attributes:
        name: fqn of the layer in the original model.
        norm: fqn of its BatchNorm now.
        channels: C.
        mean: median over the channels of |μ|, in activation units.
        std: median over the channels of σ, in activation units.
        dead: channels whose variance is below eps.
    """

    name: str
    norm: str
    channels: int
    mean: float
    std: float
    dead: int


@dataclass(frozen=True)
class InsertionSummary:
    """All sites of an insertion, in order."""

    sites: tuple[SiteSummary, ...]

    def __str__(self) -> str:
        rows = [(s.name, s.channels, s.mean, s.std, s.dead) for s in self.sites]
        return table(("site", "channels", "|μ|", "σ", "σ² < eps"), rows) + (
            "\n|μ|, σ: medians over channels, in activation units; σ² < eps: dead, or nearly"
        )

    def to_dict(self) -> list[dict[str, Any]]:
        """JSON-ready."""
        return [asdict(site) for site in self.sites]


def summarize(record: SurgeryRecord, moments: dict[str, ChannelMoments]) -> InsertionSummary:
    """The summary of an insertion from its record and the moments it was made from."""
    rows = []
    for inserted in record.sites:
        site = moments[inserted.site.name]
        dead = int((site.variance < record.options.eps).sum())
        mean, std = (values.quantile(0.5).item() for values in (site.mean.abs(), site.variance.sqrt()))
        rows.append(SiteSummary(inserted.site.name, inserted.norm, inserted.site.channels, mean, std, dead))
    return InsertionSummary(tuple(rows))
