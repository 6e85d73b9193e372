"""Look at every BatchNorm of an inserted network: its statistics, and what reaches it on a few images."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnsurgery.errors import CalibrationError
from bnsurgery.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, LastDimBatchNorm1d
from bnsurgery.records.record import InsertedSite, record
from bnsurgery.running.batches import Inputs, inputs
from bnsurgery.running.calls import run
from bnsurgery.running.modes import observing

IMAGES = 16  # for the histograms: they settle early, and a histogram takes longer than a convolution
_BINS = 80
_REACH = 5  # standard deviations to either side
_NEAR = 10  # times eps


@dataclass
class Histogram:
    """How often values fall into equal bins between `low` and `high`, in the units of the values.

    Attributes:
        total: how many values were looked at, those outside of the bins included.
    """

    low: float
    high: float
    total: int = 0
    counts: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.float64))

    def add(self, values: Tensor) -> None:
        """Count these."""
        self.total += values.numel()
        found = torch.histc(values.float(), _BINS, self.low, self.high)
        self.counts += found.cpu().double()

    @property
    def outside(self) -> float:
        """Share of the values that lie outside of the bins."""
        return 1 - self.counts.sum().item() / max(1, self.total)

    @property
    def centers(self) -> Tensor:
        """Middles of the bins."""
        width = (self.high - self.low) / _BINS
        return self.low + width * (torch.arange(_BINS, dtype=torch.float64) + 0.5)

    @property
    def density(self) -> Tensor:
        """Share of the counted values per unit."""
        width = (self.high - self.low) / _BINS
        return self.counts / (self.counts.sum().clamp(min=1) * width)


@dataclass(frozen=True)
class SiteView:
    """What is to be seen of one BatchNorm.

    Attributes:
        name: fqn of the layer in the original network.
        layer, norm: class of the layer; fqn of the BatchNorm.
        activation: what follows, by class name, if it is an activation.
        mean, std: running mean μ and √running_var = σ per channel, float64 on the CPU, in activation units. Where the
            layer's bias was absorbed, μ is without it.
        eps: the BatchNorm's.
        before, after: histograms of its input x, and of (x − μ)/√(σ² + eps); None where no images were looked at.
        largest: of x per channel over the images looked at; None as well.
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
        """C."""
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
        return self.std.square() < self.eps

    @property
    def is_near_eps(self) -> Tensor:
        """By channel: eps ≤ σ² < 10·eps."""
        return (self.std.square() < _NEAR * self.eps) & ~self.is_dead

    @property
    def is_silent(self) -> Tensor | None:
        """By channel: never above 0, where a ReLU follows; None where that is not known."""
        if self.largest is None or self.activation not in ("ReLU", "relu", "relu_"):
            return None
        return self.largest <= 0

    @property
    def dead(self) -> int:
        """How many channels are."""
        return int(self.is_dead.sum())

    @property
    def near_eps(self) -> int:
        """How many channels are."""
        return int(self.is_near_eps.sum())

    @property
    def silent(self) -> int | None:
        """How many channels are; None where that is not known."""
        return int(self.is_silent.sum()) if self.is_silent is not None else None


def view_sites(bn_model: nn.Module, batches: Iterable[Any] = ()) -> tuple[SiteView, ...]:
    """All BatchNorms that `insert` put in, in order; with histograms over the first 16 images of `batches`, if any.

    Raises:
        BNSurgeryError: the model was not made by `insert` or `load`.
        CalibrationError: a batch that the model does not take, or running statistics that are not finite.
    """
    views = {site.norm: _view(bn_model, site) for site in record(bn_model).sites}
    # A pooled site is called more than once, and adds up: so the histograms are there before the first call.
    seen: dict[str, list[Any]] = {name: [*_histograms(view), None] for name, view in views.items()}

    def watcher(name: str, norm: BatchNorm1d | BatchNorm2d | BatchNorm3d) -> Callable[..., None]:
        def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2) if isinstance(norm, LastDimBatchNorm1d) else args[0]
            before, after, largest = seen[name]
            before.add(x)
            after.add(F.batch_norm(x, norm.running_mean, norm.running_var, eps=views[name].eps))
            top = x.transpose(0, 1).flatten(1).amax(1).cpu().double()
            seen[name][2] = top if largest is None else torch.maximum(largest, top)

        return watch

    handles = []
    looked = 0
    try:
        for name in views:
            norm = _norm(bn_model, name)
            handles.append(norm.register_forward_pre_hook(watcher(name, norm)))
        with observing(bn_model):
            for batch in _first(batches, IMAGES):
                run("report", bn_model, batch)
                looked += batch.samples
    finally:
        for handle in handles:
            handle.remove()
    if not looked:
        return tuple(views.values())
    for name, view in views.items():
        before, after, largest = seen[name]
        if largest is None:
            raise CalibrationError(f"report: '{view.name}' saw no data. Pass batches that reach it.")
        views[name] = SiteView(**{**vars(view), "before": before, "after": after, "largest": largest})
    return tuple(views.values())


def _first(batches: Iterable[Any], count: int) -> Iterator[Inputs]:
    for batch in inputs(batches):
        yield batch.take(0, count)
        count -= batch.samples
        if count <= 0:
            return


def _norm(bn_model: nn.Module, name: str) -> BatchNorm1d | BatchNorm2d | BatchNorm3d:
    return cast(BatchNorm1d, bn_model.get_submodule(name))


def _view(bn_model: nn.Module, inserted: InsertedSite) -> SiteView:
    norm, site = _norm(bn_model, inserted.norm), inserted.site
    assert norm.running_mean is not None and norm.running_var is not None  # `insert` makes them so
    mean, std = norm.running_mean.cpu().double(), norm.running_var.cpu().double().sqrt()
    if not (mean.isfinite() & std.isfinite()).all():
        raise CalibrationError(f"report: '{inserted.norm}': NaN or Inf in its running statistics")
    return SiteView(site.name, site.layer, inserted.norm, site.activation, mean, std, norm.eps)


def _histograms(view: SiteView) -> tuple[Histogram, Histogram]:
    """Before: around the mean of all channels together; after: around 0."""
    middle = view.mean.mean().item()
    spread = (view.std.square().mean() + view.mean.var(correction=0)).sqrt().item() or 1.0
    return Histogram(middle - _REACH * spread, middle + _REACH * spread), Histogram(-_REACH, _REACH)
