"""Compare the outputs of two networks, measure the train-mode drift, and choose a statistics mode by it."""

import textwrap
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnsurgery.errors import BNSurgeryWarning, CalibrationError
from bnsurgery.running.batches import Inputs, inputs, join
from bnsurgery.running.calls import equal, outputs, run
from bnsurgery.running.modes import evaluate, observing, training_norms
from bnsurgery.text.tables import WIDTH
from bnsurgery.text.words import counted, percent, thousands

DRIFT_SAMPLES = 64  # drift is measured on the first inputs: 32 pairs, in bounded memory and time
TOLERANCE = 1e-5  # of the largest output: the size of rounding where bit identity is impossible
_TOGETHER = "\0"  # a space at which no line is broken


@dataclass(frozen=True)
class EquivalenceReport:
    """The differences between a candidate network's outputs and the reference's.

    Attributes:
        samples: number of compared inputs, both networks in eval mode.
        bit_identical: whether all outputs are equal, NaN to NaN. A fresh insertion is bit-identical on the CPU and with
            the CUDA kernels; other devices, such as MPS, are not tested.
        max_abs: largest |candidate − reference|, in output units, where the reference is finite.
        max_rel: `max_abs` divided by the largest |reference|.
        top1_agreement: share of samples with the same argmax, 0 to 1; None if outputs are not of shape (N, classes).
        train_drift: by batch size, ‖train − reference‖₂/‖reference‖₂ over the outputs with the candidate's BatchNorm
            layers in train mode and dropout off, by this process's batch or as `set_statistics_` has it. Sizes above
            the number of samples are left out; empty if it could not be measured, see `no_drift`.
        drift_samples: number of inputs on which the drift was measured, the first ones, the same at every batch size.
        worst: the place of `max_abs`: number of the output tensor, sample over all batches, then the index in that
            sample; None without a difference. If an output does not have one row for each sample, the first sample of
            the batch and the index in the whole output.
        no_drift: the reason why the drift of some or all sizes is missing, such as outputs without one row for each
            sample, or a network that only takes batches of one; None if none is missing or none was requested.
        shape: the shape of one input if all are single tensors of real numbers and of one shape, else None.
    """

    samples: int
    bit_identical: bool
    max_abs: float
    max_rel: float
    top1_agreement: float | None
    train_drift: dict[int, float]
    worst: tuple[int, ...] | None = None
    no_drift: str | None = None
    shape: tuple[int, ...] | None = None
    drift_samples: int = 0

    def __str__(self) -> str:
        return self.text("not to the bit")

    def text(self, remark: str) -> str:
        """The report in words; `remark`, such as "as after training", qualifies outputs equal only up to rounding."""
        near = f"equal within 1e-5, {remark}," if self.max_rel <= TOLERANCE else "different"
        same = "bit-identical" if self.bit_identical else near
        evaluated = [f"{same} on {self.inputs}"]
        evaluated.append(f"largest difference {self.max_abs:.3g}, relative {self.max_rel:.3g}")
        if self.worst is not None:
            evaluated.append(f"at {self.place()}")
        if self.top1_agreement is not None:
            evaluated.append(f"top-1 agreement {percent(self.top1_agreement, '.4g')}")
        trained = []
        if self.train_drift:
            pairs = [f"{percent(drift, '.3g')} at {size}" for size, drift in self.train_drift.items()]
            drifts = ", ".join(pair.replace(" ", _TOGETHER) for pair in pairs)
            of = f" on the first {self.drift_samples}" if self.drift_samples < self.samples else ""
            trained += textwrap.wrap(f"drift by batch size{of}: {drifts}", WIDTH - 13)
        if self.no_drift is not None:
            trained += textwrap.wrap(f"drift not measured: {self.no_drift}", WIDTH - 13)
        modes = [("eval mode", evaluated), ("train mode", trained)]
        text = "\n".join(f"{mode:13}" + f"\n{'':13}".join(lines) for mode, lines in modes if lines)
        return text.replace(_TOGETHER, " ")

    @property
    def inputs(self) -> str:
        """The number and size of the compared inputs: "32 images of 3x224x224"."""
        return self._of_size(self.samples)

    @property
    def drift_inputs(self) -> str:
        """The inputs on which the drift was measured: "the first 64 images of 3x224x224"."""
        return ("the first " if self.drift_samples < self.samples else "") + self._of_size(self.drift_samples)

    def _of_size(self, count: int) -> str:
        what = "input" if self.shape is not None and len(self.shape) != 3 else "image"
        return counted(count, what) + (f" of {'x'.join(map(str, self.shape))}" if self.shape is not None else "")

    def place(self) -> str:
        """`worst` in words: "image 3, index [281], counted from 0"; empty without a difference."""
        if self.worst is None:
            return ""
        output, image, *index = self.worst
        which = f" of output tensor {output}" if output else ""
        return f"image {image}, index {list(index)}{which}, counted from 0"

    def within(self, tolerance: float) -> bool:
        """Whether the outputs differ by at most `tolerance` of the largest; 0 requires the same bits."""
        return self.bit_identical or (tolerance > 0 and self.max_rel <= tolerance)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def verify(
    reference: nn.Module | Callable[..., Any],
    candidate: nn.Module,
    batches: Iterable[Any],
    *,
    drift_batch_sizes: Sequence[int] = (2, 8, 32),
) -> EquivalenceReport:
    """Compare `candidate` with `reference` on `batches`, in eval mode, and measure the candidate's train-mode drift.

    Networks, modes, statistics and torch's random state are left as they were.

    Args:
        reference: the original network, or any function with the same outputs.
        batches: as for `insert`.
        drift_batch_sizes: each at least 2. The drift is measured on all inputs, or on the first 64 if there are more
            (or as many as the largest size above 64), in groups of that size, of which the last two may overlap. It
            does not depend on how `batches` are cut, nor on the other sizes up to 64.

    Raises:
        CalibrationError: there is no data; a network does not take a batch; the outputs differ in shape or hold no
            tensors; NaN or Inf is in one network's outputs where the other has a number, or everywhere.
        ValueError: a drift batch size is below 2.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 10)).eval()
        >>> batches = torch.randn(32, 3, 16, 16).split(8)
        >>> report = bnsurgery.verify(model, bnsurgery.insert(model, batches), batches)
        >>> report.bit_identical, report.max_abs, report.train_drift[2] > report.train_drift[32]
        (True, 0.0, True)
    """
    sizes = sorted(set(drift_batch_sizes))
    if sizes and sizes[0] < 2:
        raise ValueError(f"verify: drift batch sizes must be at least 2 (a batch of 1 has no variance), got {sizes[0]}")
    compared = _Comparison(keep=max(DRIFT_SAMPLES, *sizes) if sizes else 0)
    with observing(candidate):
        for batch in inputs(batches):
            compared.add(batch, _outputs(reference, batch), _outputs(candidate, batch))
    if not compared.samples:
        raise CalibrationError("verify: no data. Pass at least one batch.")
    return compared.report(*_drift(candidate, compared, sizes))


def _outputs(model: nn.Module | Callable[..., Any], batch: Inputs) -> list[Tensor]:
    if isinstance(model, nn.Module):
        found = evaluate("verify", model, batch)
    else:
        batch = batch.of_signature(model)
        found = outputs(model(*batch.args, **batch.kwargs))
    return [tensor.detach().cpu() for tensor in found]


class _Comparison:
    """Extremes over the batches so far, and the first samples with their reference outputs."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.kept: list[tuple[Inputs, list[Tensor]]] = []
        self.samples = 0
        self._shapes: set[tuple[int, ...] | None] = set()
        self._equal = True
        self._max_abs = self._scale = 0.0
        self._numbers = self._finite = 0
        self._agreeing: int | None = 0
        self._worst: tuple[int, ...] | None = None
        self.obstacle: str | None = None

    def add(self, batch: Inputs, expected: list[Tensor], got: list[Tensor]) -> None:
        shapes = [tuple(t.shape) for t in expected], [tuple(t.shape) for t in got]
        if shapes[0] != shapes[1]:
            raise CalibrationError(f"verify: the outputs' shapes differ: got {shapes[1]}, expected {shapes[0]}")
        if not expected:
            raise CalibrationError("verify: the networks return no tensors, so there is nothing to compare")
        count = batch.samples
        for number, (want, have) in enumerate(zip(expected, got, strict=True)):
            finite, same = want.isfinite(), equal(want, have)
            for whose, odd in (("reference", ~finite & ~same), ("candidate", finite & ~have.isfinite())):
                if odd.any():
                    raise CalibrationError(
                        f"verify: NaN or Inf in the {whose}'s outputs, not in the other's: look at weights and inputs"
                    )
            self._equal = self._equal and bool(same.all())
            self._numbers += want.numel()
            self._finite += int(finite.sum())
            if finite.any():
                self._scale = max(self._scale, want[finite].double().abs().max().item())
                difference = (have.double() - want.double()).abs().masked_fill(~finite, 0)
                if difference.max() > self._max_abs:
                    self._max_abs = difference.max().item()
                    index = [int(i) for i in torch.unravel_index(difference.argmax(), difference.shape)]
                    first = index.pop(0) if want.shape[:1] == (count,) else 0
                    self._worst = (number, self.samples + first, *index)
        if self._agreeing is not None and len(expected) == 1 and expected[0].ndim == 2 and len(expected[0]) == count:
            self._agreeing += int((expected[0].argmax(1) == got[0].argmax(1)).sum())
        else:
            self._agreeing = None
        self.samples += count
        self._shapes.add(batch.shape)
        room = self.keep - sum(kept.samples for kept, _ in self.kept)
        if room <= 0 or self.obstacle is not None:
            return
        kept, rowless = batch.take(0, room), [tuple(t.shape) for t in expected if t.shape[:1] != (count,)]
        if rowless:
            self.obstacle = f"an output of shape {rowless[0]} does not have one row for each of {count} inputs"
        elif join([*(inputs for inputs, _ in self.kept), kept]) is None:
            self.obstacle = "the inputs of the batches have other shapes, or are no tensors, and cannot be put together"
        else:
            self.kept.append((kept, [t[:room] for t in expected]))

    def report(self, drift: dict[int, float], no_drift: str | None) -> EquivalenceReport:
        if odd := self._numbers - self._finite:
            if not self._finite:
                raise CalibrationError("verify: all outputs of the networks are NaN or Inf: look at weights and inputs")
            warnings.warn(
                f"verify: {thousands(odd)} of {thousands(self._numbers)} numbers in the outputs are NaN or Inf in "
                "both networks: that they are equal says little",
                BNSurgeryWarning,
                stacklevel=3,
            )
        agreement = None if self._agreeing is None else self._agreeing / self.samples
        relative = self._max_abs / self._scale if self._scale else self._max_abs
        shape = self._shapes.pop() if len(self._shapes) == 1 else None
        measured = sum(batch.samples for batch, _ in self.kept) if drift else 0
        return EquivalenceReport(
            self.samples, self._equal, self._max_abs, relative, agreement, drift, self._worst, no_drift, shape, measured
        )


def _drift(candidate: nn.Module, compared: _Comparison, sizes: list[int]) -> tuple[dict[int, float], str | None]:
    """The drift by batch size, and the reason why some or all are missing although there are enough samples."""
    drift: dict[int, float] = {}
    if not sizes:
        return drift, None
    samples = join([batch for batch, _ in compared.kept])
    if samples is None:
        return drift, compared.obstacle
    if samples.samples < sizes[0]:
        return drift, compared.obstacle or f"it takes {counted(sizes[0], 'input')}, got {samples.samples}"
    expected = [torch.cat(parts) for parts in zip(*(outputs for _, outputs in compared.kept), strict=True)]
    with training_norms(candidate, by_batch=False) as restore:
        if restore is None:
            return drift, "the network has no BatchNorm"
        for size in (size for size in sizes if size <= samples.samples):
            squares = [0.0, 0.0]
            last = samples.samples - size
            for start in (*range(0, last, size), last):  # the last group overlaps the one before
                restore()  # every group is a first step
                group, part = slice(start, start + size), samples.take(start, start + size)
                wanted = [tensor[group].double() for tensor in expected]
                try:
                    got = [tensor.cpu().double() for tensor in outputs(run("verify", candidate, part))]
                except CalibrationError as error:  # some networks only take batches of one
                    return drift, str(error)
                if [t.shape for t in got] != [t.shape for t in wanted]:
                    shapes = ", ".join(str(tuple(t.shape)) for t in got)
                    return drift, f"an output of shape {shapes} does not have one row for each of {size} inputs"
                for want, have in zip(wanted, got, strict=True):
                    finite = want.isfinite()
                    squares[0] += (have - want)[finite].square().sum().item()
                    squares[1] += want[finite].square().sum().item()
            if not squares[1]:
                return drift, "the reference's outputs are zero"
            drift[size] = (squares[0] / squares[1]) ** 0.5
    return drift, compared.obstacle if any(samples.samples < size <= compared.samples for size in sizes) else None


def statistics_for(batch_size: int, drift: Callable[[], float]) -> tuple[str, str]:
    """The mode for `set_statistics_` and the reason: "running" below 4 images, "batch" from 32, else by the drift.

    Args:
        batch_size: images a step, over all processes that share their statistics.
        drift: measures ‖train − eval‖₂/‖eval‖₂ of the outputs at that batch size; only called if it decides.

    References: Ioffe 2017, arXiv:1702.03275 (renorm for small batches); Wu & Johnson 2021, arXiv:2105.07576.
    """
    if batch_size < 4:
        return "running", f"a batch of {batch_size} is too small for statistics"
    if batch_size >= 32:
        return "batch", f"a batch of {batch_size} is large enough"
    measured, limit = drift(), 0.2  # above it, a small batch's statistics change the function too much
    text = f"batches of {batch_size} drift by {percent(measured, '.3g')}"
    return ("renorm", f"{text}, above {percent(limit, 'g')}") if measured > limit else ("batch", text)
