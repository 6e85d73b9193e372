"""The BatchNorms of an inserted network: their statistics, and what reaches them on a few images."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnsurgery.errors import CalibrationError
from bnsurgery.nn import LastDimBatchNorm1d
from bnsurgery.records.record import InsertedSite, record
from bnsurgery.running.batches import inputs
from bnsurgery.running.calls import run
from bnsurgery.running.modes import observing
from bnsurgery.statistics.dead_channels import is_dead

IMAGES = 16  # for the histograms, which change little with more; a histogram takes longer than a convolution
_BINS = 80
_REACH = 5  # standard deviations to either side
_NEAR = 10  # times eps


@dataclass
class Histogram:
    """Counts of values in equal bins between `low` and `high`; `total` also counts the values outside of the bins."""

    low: float
    high: float
    total: int = 0
    counts: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.float64))

    def add(self, values: Tensor) -> None:
        """Count `values`, of any shape."""
        self.total += values.numel()
        self.counts += torch.histc(values.float(), _BINS, self.low, self.high).cpu().double()

    @property
    def outside(self) -> float:
        """Share of the values that lie outside of the bins."""
        return 1 - self.counts.sum().item() / max(1, self.total)

    @property
    def edges(self) -> Tensor:
        """Edges of the bins, one more than there are bins."""
        return torch.linspace(self.low, self.high, _BINS + 1, dtype=torch.float64)

    @property
    def density(self) -> Tensor:
        """Share of the counted values per unit."""
        return self.counts / (self.counts.sum().clamp(min=1) * self.edges.diff())


@dataclass
class SiteView:
    """One BatchNorm, its statistics and its inputs.

    Attributes:
        name: fqn of the layer in the original network.
        layer: class of the layer.
        norm: fqn of the BatchNorm.
        activation: class name of the activation that follows, if one does.
        mean: running mean μ per channel, float64 on the CPU, in activation units; without the layer's bias where that
            was absorbed.
        std: √running_var = σ per channel, as `mean`.
        eps: eps of the BatchNorm.
        before: histogram of the BatchNorm's input x; None if no images were given.
        after: histogram of (x − μ)/√(σ² + eps), as `before`.
        largest: the largest x per channel, as `before`.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)).eval()
        >>> bn_model = bnsurgery.insert(model, torch.randn(64, 3, 16, 16).split(16))
        >>> [(view.name, view.channels, view.dead) for view in bnsurgery.report.view_sites(bn_model)]
        [('0', 8, 0)]
    """

    name: str
    layer: str
    norm: str
    activation: str | None
    mean: Tensor
    std: Tensor
    eps: float
    before: Histogram | None = None
    after: Histogram | None = None
    largest: Tensor | None = None

    @property
    def channels(self) -> int:
        """The number of channels, C."""
        return len(self.mean)

    @property
    def median_mean(self) -> float:
        """Median of |μ| over the channels."""
        return self.mean.abs().quantile(0.5).item()

    @property
    def median_std(self) -> float:
        """Median of σ over the channels."""
        return self.std.quantile(0.5).item()

    @property
    def is_dead(self) -> Tensor:
        """By channel: σ² < eps."""
        return is_dead(self.std.square(), self.eps)

    @property
    def is_near_eps(self) -> Tensor:
        """By channel: eps ≤ σ² < 10·eps."""
        return (self.std.square() < _NEAR * self.eps) & ~self.is_dead

    @property
    def is_silent(self) -> Tensor | None:
        """By channel: never above 0, where a ReLU follows; None if that is not known."""
        if self.largest is None or self.activation not in ("ReLU", "relu", "relu_"):
            return None
        return self.largest <= 0

    @property
    def dead(self) -> int:
        """Number of dead channels."""
        return int(self.is_dead.sum())

    @property
    def near_eps(self) -> int:
        """Number of channels near eps."""
        return int(self.is_near_eps.sum())

    @property
    def silent(self) -> int | None:
        """Number of silent channels; None if that is not known."""
        return None if self.is_silent is None else int(self.is_silent.sum())


def view_sites(bn_model: nn.Module, batches: Iterable[Any] = ()) -> tuple[SiteView, ...]:
    """All inserted BatchNorms, in order, with histograms over the first 16 images of `batches`, if any.

    Raises:
        BNSurgeryError: the model was not made by `insert` or `load`.
        CalibrationError: the model does not take a batch, or running statistics are not finite.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)).eval()
        >>> batches = torch.randn(64, 3, 16, 16).split(16)
        >>> (view,) = bnsurgery.report.view_sites(bnsurgery.insert(model, batches), batches)
        >>> view.before.total == 16 * 8 * 14 * 14
        True
    """
    views, images = [], 0
    with ExitStack() as hooks:
        for inserted in record(bn_model).sites:
            norm: Any = bn_model.get_submodule(inserted.norm)
            views.append(view(inserted, norm.running_mean, norm.running_var, norm.eps))
            hooks.enter_context(norm.register_forward_pre_hook(partial(_look, views[-1])))
        with observing(bn_model):
            for batch in inputs(batches):
                run("report", bn_model, batch.take(0, IMAGES - images))
                images += batch.samples
                if images >= IMAGES:
                    break
    unseen = next((view.name for view in views if view.largest is None), None)
    if images and unseen is not None:
        raise CalibrationError(f"report: '{unseen}' saw no data. Pass batches that reach it.")
    return tuple(views)


def channel_counts(views: Sequence[SiteView]) -> tuple[int, int, int, int]:
    """Channels of all sites together: all of them, dead, near eps, silent."""
    counts = [(view.channels, view.dead, view.near_eps, view.silent or 0) for view in views]
    channels, dead, near_eps, silent = map(sum, zip(*counts, strict=True))
    return channels, dead, near_eps, silent


def view(inserted: InsertedSite, mean: Tensor, variance: Tensor, eps: float) -> SiteView:
    """The view of a site with these statistics, without histograms."""
    if not (mean.isfinite() & variance.isfinite()).all():
        raise CalibrationError(f"report: '{inserted.norm}': NaN or Inf in its running statistics")
    site, mean, std = inserted.site, mean.cpu().double(), variance.cpu().double().sqrt()
    return SiteView(site.name, site.layer, inserted.norm, site.activation, mean, std, eps)


def _look(view: SiteView, norm: Any, args: tuple[Tensor, ...]) -> None:
    """Add the input of one call to the view; a layer that is called twice adds both."""
    x = args[0].flatten(0, -2) if isinstance(norm, LastDimBatchNorm1d) else args[0]
    if view.before is None or view.after is None:
        middle = view.mean.mean().item()
        reach = _REACH * ((view.std.square().mean() + view.mean.var(correction=0)).sqrt().item() or 1.0)
        view.before, view.after = Histogram(middle - reach, middle + reach), Histogram(-_REACH, _REACH)
    view.before.add(x)
    view.after.add(F.batch_norm(x, norm.running_mean, norm.running_var, eps=view.eps))
    top = x.transpose(0, 1).flatten(1).amax(1).cpu().double()
    view.largest = top if view.largest is None else torch.maximum(view.largest, top)
