"""Start a run, or resume one."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bnsurgery.errors import BNSurgeryError, CheckpointError, DataError
from bnsurgery.files.writing import make_folder
from bnsurgery.machine.devices import keeping_random
from bnsurgery.networks import factories
from bnsurgery.running.calls import out_of_memory
from bnsurgery.text.words import counted, percent

from .config import Config
from .datasets import Data, Fingerprint
from .own_data import in_its_batches
from .results import NormRow, Resolved, Row
from .run_directory import RunDirectory
from .setup import EVALUATED_TOGETHER, build, load_data, processes
from .stopping import listening
from .task_kind import TaskKind

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        directory: of the run; None if nothing was written.
        rows: the measurements, one per validation.
        resolved: the learning rate, statistics mode and head it ran with.
        seconds: that this process spent on training and validation, without the setup; None if read from a directory.
        test_accuracy: on the test part at the end, 0 to 1; None without such a part or if read from a directory.
        norms: the statistics of every BatchNorm, one row per norm and validation; empty in the arm "plain".
        thing: the word for what is classified: "image" or "sample".

    Examples:
        >>> first = bnsurgery.finetune.Row(1.0, 5, 0.1, 0.7, 0.5, 0.6, 0.75, 99.0)
        >>> rows = (first, bnsurgery.finetune.Row(2.0, 10, 0.0, 0.5, 0.6, 0.7, 0.5, 99.0))
        >>> resolved = bnsurgery.finetune.Resolved(0.1, "batch", *["as asked"] * 2, "kept", "crop", "as asked", 64)
        >>> print(bnsurgery.finetune.Result(None, rows, resolved))
        best         75.00 % of the validation images right, in epoch 1
        last         50.00 %, after 10 steps
    """

    directory: Path | None
    rows: tuple[Row, ...]
    resolved: Resolved
    seconds: float | None = None
    thing: str = "image"
    test_accuracy: float | None = None
    norms: tuple[NormRow, ...] = ()

    @classmethod
    def read(cls, directory: str | Path) -> "Result":
        """The result so far of the run in `directory`.

        Raises:
            CheckpointError: there was no validation yet, or a file is damaged.
        """
        place = RunDirectory(directory)
        config, _, resolved = place.read_config()
        thing = "sample" if factories.names_code(config.data) else "image"
        return cls(place.path, place.read_metrics(), resolved, thing=thing, norms=place.read_norms())

    @property
    def best(self) -> Row:
        """The validation with the highest accuracy, of equal ones the lowest loss: best.safetensors."""
        return max(self.rows, key=lambda row: (row.val_accuracy, -row.val_loss))

    @property
    def final(self) -> Row:
        """The last validation."""
        return self.rows[-1]

    def __str__(self) -> str:
        best = self.best
        right = f"{percent(best.val_accuracy)} of the validation {self.thing}s right"
        tested = "" if self.test_accuracy is None else f"; {percent(self.test_accuracy)} of the test {self.thing}s"
        return (
            f"best         {right}, in epoch {best.epoch:.4g}\n"
            f"last         {percent(self.final.val_accuracy)}, after {counted(self.final.step, 'step')}{tested}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        rows = [asdict(row) for row in self.rows]
        return {"directory": str(self.directory or ""), "resolved": asdict(self.resolved), "rows": rows}


def run(
    config: Config, *, model: nn.Module | None = None, data: Data | None = None, save: bool = True, show: bool = False
) -> Result:
    """Fine-tune as `config` says, and write the run into the directory `config.output`.

    Under `torchrun` or `accelerate launch` every process calls this. Each takes its share of every batch, statistics
    are those of the whole batch, and process 0 writes.

    Args:
        model: the network, instead of `config.source`; it is copied.
        data: the images, instead of `config.data`.
        save: whether to write anything.
        show: print what is chosen and measured, with progress bars on stderr.

    Raises:
        DataError: the images cannot be used.
        DivergedError: the loss is not finite any more; the last checkpoint stays.
        Interrupted: SIGINT or SIGTERM; the run is saved and `resume` continues it.
        BNSurgeryError: any other refusal: see `bnsurgery.insert`.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
        >>> images, labels = torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8), torch.arange(32) % 2
        >>> data = bnsurgery.finetune.from_tensors((images, labels), (images, labels), ["even", "odd"])
        >>> config = bnsurgery.finetune.Config(output="run", image_size=8, epochs=2, batch_size=8, num_workers=0)
        >>> bnsurgery.finetune.run(config, model=model, data=data).final.step
        8
    """
    return train(config, RunDirectory(config.output) if save else None, model, data, show=show, measures_kind=save)


def resume(
    directory: str | Path,
    *,
    model: nn.Module | str | None = None,
    data: Data | str | None = None,
    show: bool = False,
) -> Result:
    """Continue a run that was stopped or killed; on the CPU the result is that of an uninterrupted run bit for bit.

    Args:
        directory: of the run.
        model: the network, if `run` was given one; or, if `Config.model` names a function, that name again: no code
            runs because a file names it.
        data: the data, if `run` was given it; or, if `Config.data` names a function, that name again.

    Raises:
        CheckpointError: there is no run, or its files are damaged.
        DataError: the data has changed.
        BNSurgeryError: as `run`.

    Examples:
        >>> bnsurgery.finetune.resume("no-run")
        Traceback (most recent call last):
        bnsurgery.errors.CheckpointError: run 'no-run': no config.json: there is no run to resume
    """
    place = RunDirectory(directory)
    config, fingerprint, resolved = place.read_config()
    require_code_again(config, f"resume: '{directory}'", model, data)
    model = None if isinstance(model, str) else model
    data = None if isinstance(data, str) else data
    return train(replace(config, output=str(directory)), place, model, data, (fingerprint, resolved), show=show)


def require_code_again(config: Config, what: str, model: nn.Module | str | None, data: Data | str | None) -> None:
    """Raise an error if a file names code that makes the network or the data, and the caller did not name it again."""
    for field, code, given, kind in (
        ("model", config.model, model, nn.Module),
        ("data", factories.names_code(config.data) and config.data, data, Data),
    ):
        if code and given != code and not isinstance(given, kind):
            raise BNSurgeryError(
                f"{what}: its {field} is made by running '{code}': pass `{field}={code!r}` again if you trust it"
            )


@contextmanager
def _alone(accelerator: "Accelerator", config: Config, directory: RunDirectory | None, *, new: bool) -> Iterator[None]:
    """Keep other processes out of the directory. Every rank raises the refusal of process 0."""
    from accelerate.utils import broadcast_object_list

    with ExitStack() as stack:
        refusal = None
        if directory is not None and accelerator.is_main_process:
            try:
                stack.enter_context(directory.alone(new=new))
            except BNSurgeryError as error:
                refusal = error
        (refusal,) = broadcast_object_list([refusal])  # or the others would wait for process 0
        accelerator.wait_for_everyone()  # or process 0 is gone before the others have received it
        if refusal is not None:
            raise refusal
        try:
            yield
        except Exception as error:
            if not out_of_memory(error) and not out_of_memory(error.__cause__):
                raise
            raise _less_memory(config, directory) from error


def _less_memory(config: Config, directory: RunDirectory | None) -> BNSurgeryError:
    if factories.names_code(config.data):
        advice = f"make the batches or inputs of '{config.data}' smaller; for a Dataset lower `batch_size`"
    elif config.batch_size > EVALUATED_TOGETHER:
        advice = f"use a smaller batch, such as `batch_size={config.batch_size // 2}`, or a smaller `image_size`"
    else:
        advice = f"use a smaller `image_size` or `batch_size`; validation takes {EVALUATED_TOGETHER} images at a time"
    if directory is not None and directory.last.exists():
        advice = (
            f"free memory and continue with `resume={str(directory.path)!r}`, which keeps its sizes; or start another "
            f"run with another `output`: {advice}"
        )
    return BNSurgeryError(f"finetune: out of memory: {advice}.")


def train(
    config: Config,
    directory: RunDirectory | None,
    model: nn.Module | None,
    data: Data | None,
    before: tuple[Fingerprint, Resolved] | None = None,
    *,
    show: bool = False,
    measures_kind: bool = False,
    share: float = 1.0,
    paused: RunDirectory | None = None,
    report: Callable[[Row], object] | None = None,
) -> Result:
    """Run from the start, or from the state in `directory` if `before` says what it started with.

    Args:
        measures_kind: whether a new run with inserted BatchNorm measures the kind of its task.
        share: of the run, after which it pauses.
        paused: where a paused run is saved, and continues from if it was.
        report: called with each validation.
    """
    accelerator = processes(config)
    show = show and accelerator.is_main_process
    from .kind_measurement import measure  # these need accelerate, whose absence has been reported by now
    from .loop import Trainer
    from .rate_range import find_rate
    from .trackers import Tracker

    with _alone(accelerator, config, directory, new=before is None), keeping_random(accelerator.device):
        data = data or load_data(config, show)
        config = in_its_batches(config, data)
        resolved = state = None
        if before is not None and directory is not None:
            fingerprint, resolved = before
            _refuse_other_data(fingerprint, data.fingerprint)
            state = directory.load_state()
        torch.manual_seed(config.seed)  # all ranks must build the same network
        setup = build(config, accelerator, model, data, resolved, show, state is not None)
        writes = directory if accelerator.is_main_process else None
        if show:
            print("\n".join(setup.facts), flush=True)
        if measures_kind and before is None and config.arm == "bn":
            kind = measure(setup)
            if isinstance(kind, TaskKind):
                setup.resolved = replace(setup.resolved, kind=kind)
            if show:
                print(_told(kind), flush=True)
        if config.lr == "auto" and resolved is None:
            found = find_rate(setup, show)
            setup.resolved = replace(setup.resolved, lr=found.chosen, lr_reason=found.reason)
            if writes is not None:
                writes.log_rate_range(found)
        trainer = Trainer(setup, directory, show, share, report)
        if before is None:
            setup.resolved = replace(setup.resolved, start_accuracy=trainer.evaluate()[1])
            if show:
                print(f"start        {percent(setup.resolved.start_accuracy)} of the validation {data.thing}s right")
        torch.manual_seed(config.seed + accelerator.process_index)  # each rank draws its own dropout
        if paused is not None:
            with suppress(CheckpointError):  # damaged, or of another version: from the start
                state = paused.load_state()
        if state is not None:
            trainer.load_state_dict(state)
        if show:
            if before is not None and state is None:
                print("resume       no checkpoint was saved yet: from the beginning")
            print(f"peak rate    {setup.resolved.lr:.3g}: {setup.resolved.lr_reason}", flush=True)
        with ExitStack() as ending:
            if writes is not None and config.log_with != "tensorboard" and trainer.step < trainer.steps:
                tracker = ending.enter_context(Tracker(config, setup.resolved, accelerator, trainer.step))
                for row in trainer.rows:  # of a resumed run
                    tracker.add(row.scalars, row.step)
                writes.curves = tracker
            if writes is not None and before is None:  # not earlier: a refused start leaves no run behind
                writes.write_config(config, data.fingerprint, setup.resolved)
            with listening() as stop:
                trainer.fit(stop)
        ended = trainer.step == trainer.steps
        tested = trainer.test() if ended else None
        if not ended and paused is not None:
            make_folder(paused.last.parent)
            paused.save_state(trainer.state_dict())
    path = directory.path if directory else None
    rows, norms = tuple(trainer.rows), tuple(trainer.norms)
    return Result(path, rows, setup.resolved, trainer.seconds, data.thing, tested, norms)


def _told(kind: TaskKind | str) -> str:
    if isinstance(kind, str):
        return f"task         not measured: {kind}"
    advice = {
        "near": "",
        "far": ". A fresh BatchNorm may do as well or better: `arm='bn-naive'`, or compare",
        "not clear": ". The limit of 10 points is within two standard errors: compare, or take more validation images",
    }
    return f"task         {kind}{advice[kind.verdict]}"


def _refuse_other_data(before: Fingerprint, now: Fingerprint) -> None:
    pairs = {name: (old, getattr(now, name)) for name, old in vars(before).items()}
    changed = [f"{name}: {old!s:.60} then, {new!s:.60} now" for name, (old, new) in pairs.items() if old != new]
    if changed:
        raise DataError(
            f"resume: the data has changed since the start: {'; '.join(changed)}. Put it back, or start a new run from "
            "best.safetensors with another `output`."
        )
