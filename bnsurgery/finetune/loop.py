"""The training loop: steps, validations, checkpoints, and the reaction to a signal or a NaN."""

import math
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from bnsurgery.errors import BNSurgeryError, CheckpointError, DataError, NonFiniteError, printable
from bnsurgery.machine.devices import CPU, failed, random_state, set_random_state, widest
from bnsurgery.networks import factories
from bnsurgery.records.record import record
from bnsurgery.running.batches import Inputs
from bnsurgery.running.calls import out_of_memory
from bnsurgery.running.modes import evaluating
from bnsurgery.statistics.calibration import recalibrate_
from bnsurgery.text.typed_json import parse
from bnsurgery.text.words import counted, percent

from . import recipe
from .config import Config
from .grid import validations_until
from .loading import moved
from .results import NormRow, Row, norm_rows
from .run_directory import RunDirectory
from .setup import Setup
from .stopping import Interrupted, StopRequest

_LOOK_EVERY = 10  # steps between two reads of the loss, if a read makes the device or other processes wait


class DivergedError(BNSurgeryError):
    """The loss, a weight or a statistic became NaN or infinite, after `seconds` of training, for a `reason`.

    Examples:
        >>> bnsurgery.finetune.DivergedError("finetune: diverged at step 8").seconds
        0.0
    """

    seconds = 0.0
    reason = ""


class Trainer:
    """One run, from its current step to its end.

    Args:
        directory: where to save it; None to save nothing.
        share: of the run, after which `fit` pauses: at the nearest validation.
        report: called with each validation.
    """

    def __init__(
        self,
        setup: Setup,
        directory: RunDirectory | None,
        show: bool,
        share: float = 1.0,
        report: Callable[[Row], object] | None = None,
    ) -> None:
        self.setup, self.directory = setup, directory
        self.config, self.accelerator, self.network = setup.config, setup.accelerator, setup.network
        self.show = show and self.accelerator.is_main_process
        self.objective = self.accelerator.prepare_model(recipe.Objective(self.network, self.config.label_smoothing))
        optimizer = recipe.optimizer(self.config, self.network, setup.resolved.lr)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.trained = [p for p in self.network.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.trained] if self.config.ema else []
        self.steps_per_epoch = setup.batches.per_epoch
        self.steps = self.config.epochs * self.steps_per_epoch
        self.step = 0
        self.rows: list[Row] = []
        self.norms: list[NormRow] = []  # of every validation, each norm's
        self._report = report
        validations = self.config.epochs * min(self.config.evaluations, self.steps_per_epoch)
        self._last = validations_until(share, validations)  # in `rows`, of this `fit`
        self.losses: list[float] = []  # since the last validation, like the accuracies
        self.accuracies: list[float] = []
        self._unread: list[tuple[Tensor, Tensor]] = []  # losses and accuracies of the last steps, still on the device
        alone_on_cpu = self.accelerator.device.type == "cpu" and self.accelerator.num_processes == 1
        self._look_every = 1 if alone_on_cpu else _LOOK_EVERY
        self._saved = time.monotonic()
        self._saved_step: int | None = None
        self.seconds = 0.0  # of `fit`, and of those before a pause
        self._clock, self._timed = time.perf_counter(), 0  # since the last validation, and the images trained on

    def fit(self, stop: StopRequest) -> None:
        """Train from the current step to the last, with validations and checkpoints.

        Interrupted, and a DataError in training on one process, leave the run saved at the last step; other errors
        leave the last checkpoint.
        """
        begun = self._clock = time.perf_counter()
        self.objective.train()
        try:
            with self._bar() as bar:
                while self.step < self.steps and len(self.rows) < self._last:
                    self.setup.batches.epoch, self.setup.batches.start = divmod(self.step, self.steps_per_epoch)
                    bar.set_description(f"epoch {self.setup.batches.epoch + 1}/{self.config.epochs}", refresh=False)
                    self._train_epoch(bar, stop)
        except DivergedError as error:
            error.seconds = self.seconds + time.perf_counter() - begun
            raise
        except (CheckpointError, DataError) as error:
            raise type(error)(f"{str(error).rstrip('.')}.{self._resumable()}") from error
        except RuntimeError as error:
            if not failed(error):
                raise
            reason = str(error).strip().splitlines()[0]
            raise BNSurgeryError(f"finetune: the device failed: {reason}.{self._resumable()}") from error
        self.seconds += time.perf_counter() - begun

    def _train_epoch(self, bar: Any, stop: StopRequest) -> None:
        for images, labels in self._batches(bar, stop):
            self.train_step(images, labels)
            bar.update(len(labels) * self.accelerator.num_processes)
            validate = self._validation_is_due()
            if validate or self.step % self._look_every == 0:
                self._look(bar)
                if validate:
                    self._validate()  # if it fails, nothing is saved: the resumed run repeats it
                self._save_if_due(stop, validate)
                if self.step < self.steps and len(self.rows) == self._last:  # the rest of the epoch comes later
                    return

    def _batches(self, bar: Any, stop: StopRequest) -> Iterator[tuple[Any, Tensor]]:
        """The rest of the epoch. If it cannot be read, the run is saved."""
        try:
            yield from self.setup.train
        except DataError:
            self._look(bar)
            if stop.signum:  # which also killed the processes that read images
                self._save_if_due(stop, validated=False)
            if self.accelerator.num_processes == 1:  # otherwise the other ranks do not save with this one
                self.save()
            raise

    def train_step(self, images: Any, labels: Tensor) -> None:
        """One optimizer step on this rank's share of a batch."""
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        inputs, labels = moved(self.network, (images, labels), self.accelerator.device, layout)
        for group in self.optimizer.param_groups:
            group["lr"] = self.setup.resolved.lr * recipe.rate_factor(self.step, self.steps, self.config.warmup)
        try:
            with self._naming_inputs(inputs):
                loss, accuracy = self.objective(labels, *inputs.args, **inputs.kwargs)
            self.accelerator.backward(loss)
        except Exception as error:
            if not self.config.compile or out_of_memory(error) or failed(error):
                raise  # a compiler raises anything; eager code has run once by now
            reason = (str(error).strip().splitlines() or [""])[0]
            raise BNSurgeryError(
                f"finetune: `compile=True`: {type(error).__name__}: {reason}. Try without it."
            ) from error
        if self.setup.conditioner is not None:
            self.setup.conditioner.apply_()
        if self.config.clip:
            self.accelerator.clip_grad_norm_(self.trained, self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            get_ema_multi_avg_fn(self.config.ema)(self.average, self.trained, self.step)
        self._unread.append((loss.detach(), accuracy))
        self.step += 1
        self._timed += len(labels) * self.accelerator.num_processes

    @contextmanager
    def _naming_inputs(self, inputs: Inputs) -> Iterator[None]:
        """Inside, let an error of the network name the inputs, if they come from a user's function."""
        try:
            yield
        except (RuntimeError, ValueError, TypeError, LookupError) as error:
            own = factories.names_code(self.config.data) and not self.config.compile
            if not own or out_of_memory(error) or failed(error):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            raise DataError(
                f"data '{self.config.data}': {type(self.network).__name__} failed on an input of shape "
                f"{inputs.shapes()}: {reason}."
            ) from error

    def _validation_is_due(self) -> bool:
        """Whether the last step ends one of the `Config.evaluations` equal parts of the epoch."""
        parts, length = self.config.evaluations, self.steps_per_epoch
        done = self.step % length or length
        return done * parts // length > (done - 1) * parts // length

    def _bar(self) -> Any:
        """A bar of the whole run: time left, images per second and, by `_look`, loss, accuracy and rate."""
        epoch, step = divmod(self.step, self.steps_per_epoch)
        images = self.setup.batches.images
        thing = "sample" if factories.names_code(self.config.data) else "image"
        return tqdm(
            total=self.config.epochs * images,
            initial=epoch * images + step * self.config.batch_size,
            unit=f" {thing}s",
            bar_format="{desc}{bar}{percentage:3.0f} %, {remaining} left, {rate_noinv_fmt}{postfix}",
            disable=None if self.show else True,  # None: unless stderr is a terminal
            leave=False,
        )

    def _look(self, bar: Any) -> None:
        """Read the losses of the steps since the last read, over all ranks; raise at the first that is not finite."""
        if not self._unread:
            return
        values = torch.stack([torch.stack(pair) for pair in self._unread]).to(widest(self.accelerator.device))
        values = self.accelerator.reduce(values, "mean").cpu()
        first = self.step - len(self._unread) + 1
        self._unread.clear()
        finite = values[:, 0].isfinite()
        if not finite.all():
            raise self._diverged(first + int(finite.logical_not().nonzero()[0]), "the loss is not finite")
        self.losses += values[:, 0].tolist()
        self.accuracies += values[:, 1].tolist()
        loss, accuracy = (statistics.fmean(recent[-_LOOK_EVERY:]) for recent in (self.losses, self.accuracies))
        rate = self.optimizer.param_groups[0]["lr"]
        bar.set_postfix_str(f"loss {loss:.3f}, accuracy {percent(accuracy, '.1f')}, rate {rate:.2g}", refresh=False)

    @torch.no_grad()
    def _validate(self) -> None:
        """Measure the network as it would be kept, log the result, and keep the network if it is the best so far."""
        seconds = time.perf_counter() - self._clock
        with self._as_kept():
            loss, accuracy = self.evaluate()
            row = Row(
                epoch=self.step / self.steps_per_epoch,
                step=self.step,
                lr=self.optimizer.param_groups[0]["lr"],
                train_loss=statistics.fmean(self.losses),
                train_accuracy=statistics.fmean(self.accuracies),
                val_loss=loss,
                val_accuracy=accuracy,
                images_per_second=self._timed / seconds,
            )
            is_best = all((accuracy, -loss) > (earlier.val_accuracy, -earlier.val_loss) for earlier in self.rows)
            self.rows.append(row)
            self.norms += norm_rows(self.network, self.step)
            if self.directory is not None and self.accelerator.is_main_process:
                best = self.network if is_best else None
                self.directory.log(self.rows, self.norms, best, self.setup.resolved)
        if self.show:
            tqdm.write(str(row))
        if self._report is not None:
            self._report(row)
        self.losses.clear()
        self.accuracies.clear()
        self._clock, self._timed = time.perf_counter(), 0

    @contextmanager
    def _as_kept(self) -> Iterator[None]:
        """Inside, give the network the weights and statistics it would be kept with: averaged, and the population's."""
        replaced = self.trained if self.average else []
        changed = [(tensor, tensor.detach().clone()) for tensor in [*replaced, *self.network.buffers()]]
        try:
            for parameter, average in zip(replaced, self.average, strict=True):
                parameter.copy_(average)
            if self.config.arm != "plain" and self.setup.resolved.statistics != "running":  # trained with, these stay
                with self.accelerator.autocast():
                    recalibrate_(self.network, self.setup.calibration)
            yield
        except NonFiniteError as error:
            raise self._diverged(self.step, str(error)) from error
        finally:
            for tensor, trained in changed:
                tensor.copy_(trained)

    def test(self) -> float | None:
        """The accuracy on the test part as the network would be kept now; None without such a part."""
        if self.setup.test is None:
            return None
        with torch.no_grad(), self._as_kept():
            return self.evaluate(self.setup.test)[1]

    @torch.no_grad()
    def evaluate(self, part: Iterable[Any] | None = None) -> tuple[float, float]:
        """Mean loss, without smoothing, and accuracy on `part`, in eval mode, over all ranks.

        Args:
            part: this rank's share; None for the validation part.
        """
        device = self.accelerator.device
        totals = torch.zeros(3, dtype=widest(device), device=device)
        with evaluating(self.network), self.accelerator.autocast():
            for batch in self.setup.val if part is None else part:
                inputs, labels = moved(self.network, batch, device)
                with self._naming_inputs(inputs):
                    logits = self.network(*inputs.args, **inputs.kwargs).float()
                totals[0] += F.cross_entropy(logits, labels, reduction="sum")
                totals[1] += (logits.argmax(1) == labels).sum()
                totals[2] += len(labels)
        loss, right, count = self.accelerator.reduce(totals, "sum").cpu().tolist()
        if not math.isfinite(loss):
            raise self._diverged(self.step, f"the {'validation' if part is None else 'test'} loss is not finite")
        return loss / count, right / count

    def _save_if_due(self, stop: StopRequest, validated: bool) -> None:
        """Save after a validation, when `save_every` seconds have passed, and on a stop request."""
        wanted = torch.tensor([stop.signum, time.monotonic() - self._saved > self.config.save_every])
        if self.accelerator.num_processes > 1:  # all ranks must do the same: what any one wants
            wanted = self.accelerator.gather(wanted.to(self.accelerator.device)).view(-1, 2).amax(0)
        signum, due = wanted.tolist()
        if validated or due or signum:
            self.save()
        if signum and self.step < self.steps:
            saved = self._resumable() or f" Nothing is saved of its {counted(self.step, 'step')}"
            raise Interrupted(f"finetune: stopped by {signal.Signals(signum).name}.{saved}", signum)

    def save(self) -> None:
        """Write the state that `resume` continues from."""
        if self.directory is None:
            return
        if not all(p.detach().isfinite().all() for p in self.trained):
            raise self._diverged(self.step, "a weight is not finite")
        state = self.state_dict()
        if self.accelerator.is_main_process:
            self.directory.save_state(state)
        self.accelerator.wait_for_everyone()
        self._saved, self._saved_step = time.monotonic(), self.step

    def state_dict(self) -> dict[str, Any]:
        """The run's state, of tensors, numbers and text, for `RunDirectory.save_state`. All ranks must call it."""
        scaler, conditioner = self.accelerator.scaler, self.setup.conditioner
        return {
            "step": self.step,
            "seconds": self.seconds,
            "started_from": record(self.network).weights_digest,
            "rows": [asdict(row) for row in self.rows],
            "norms": [asdict(row) for row in self.norms],
            "losses": self.losses,
            "accuracies": self.accuracies,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.optimizer.state_dict(),
            "average": self.average,
            "scaler": scaler.state_dict() if scaler is not None else {},
            "conditioner": conditioner and [conditioner.mean, conditioner.variance],
            "random": gather_object([{kind: random_state(place) for kind, place in self._generators().items()}]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state that `state_dict` returned, which is not trusted."""
        try:
            if state["started_from"] != record(self.network).weights_digest:
                raise ValueError("the weights that it started from have changed")
            self.step = self._saved_step = parse(int, state["step"], "step")
            if not 0 <= self.step <= self.steps:
                raise ValueError(f"step {self.step} of {self.steps}")
            self.seconds = parse(float, state["seconds"], "seconds")
            self.rows = list(parse(tuple[Row, ...], state["rows"], "rows"))
            self.norms = list(parse(tuple[NormRow, ...], state["norms"], "norms"))
            self.losses, self.accuracies = (
                list(parse(tuple[float, ...], state[name], name)) for name in ("losses", "accuracies")
            )
            self.network.load_state_dict(state["network"])
            self.optimizer.optimizer.load_state_dict(state["optimizer"])
            conditioner = self.setup.conditioner
            current = [*self.average, *([conditioner.mean, conditioner.variance] if conditioner else [])]
            for tensor, saved in zip(current, [*state["average"], *(state["conditioner"] or [])], strict=True):
                tensor.copy_(saved)
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            for kind, place in self._generators().items():
                set_random_state(place, state["random"][self.accelerator.process_index][kind])
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, CheckpointError) as error:
            raise CheckpointError(
                f"resume: the saved state does not fit this run: {printable(str(error))}. Was another put in its place?"
            ) from error

    def _generators(self) -> dict[str, torch.device]:
        """The devices that dropout draws random numbers on, by kind."""
        return {place.type: place for place in (CPU, self.accelerator.device)}

    def _diverged(self, step: int, what: str) -> DivergedError:
        kept = ""
        if self.directory is not None and self.directory.last.exists():
            kept = f" Kept: {self.directory.last}" + (f" and {self.directory.best}" if self.rows else "") + "."
        rate, default, clip = self.setup.resolved.lr, recipe.default_rate(self.config), self.config.clip
        lower = default if rate > 10 * default else float(f"{rate / 3:.1g}")
        first, last = "" if clip else f"`clip={Config.clip:g}`, then ", " or `clip=1`" if clip > 1 else ""
        epoch = math.ceil(step / self.steps_per_epoch)
        reason = f"finetune: diverged at step {step} (epoch {epoch}), peak learning rate {rate:.3g}: {what}."
        error = DivergedError(f"{reason}{kept} Try {first}`lr={lower:g}`{last}, with another `output`.")
        error.reason = reason
        return error

    def _resumable(self) -> str:
        """How far the run is saved, and how to resume it; empty if there is no run."""
        if self.directory is None or not self.directory.begun:
            return ""
        step = self._saved_step
        saved = "No step is saved yet" if step is None else f"Saved at step {step} of {self.steps}"
        code = {"model": self.config.model, "data": factories.names_code(self.config.data) and self.config.data}
        again = "".join(f" `{field}={name!r}`" for field, name in code.items() if name)
        return f" {saved}. Continue with `resume={str(self.directory.path)!r}`{again}"
