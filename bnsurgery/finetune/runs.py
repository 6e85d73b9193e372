"""Start a run, or go on with one."""

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bnsurgery.errors import BNSurgeryError, DataError
from bnsurgery.machine.system import quote
from bnsurgery.networks import factories
from bnsurgery.pages.style import write as write_figure
from bnsurgery.running.calls import out_of_memory
from bnsurgery.text.words import counted, percent

from .config import Config
from .datasets import Data, Fingerprint
from .figures import plot_rate_range
from .own_data import in_its_batches
from .results import Resolved, Row
from .run_directory import RunDirectory
from .setup import EVALUATED_TOGETHER, build, forked_random, load_data, processes
from .stopping import listening

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        directory: where it was written, None where nothing was.
        rows: what was measured, one a validation.
        resolved: the learning rate and statistics mode it ran with.
        seconds: that this process spent on training and validating it, setting up left out; None where it was read.
    """

    directory: Path | None
    rows: tuple[Row, ...]
    resolved: Resolved
    seconds: float | None = None

    @classmethod
    def read(cls, directory: str | Path) -> "Result":
        """What the run in `directory` came to, so far.

        Raises:
            CheckpointError: there was no validation yet, or a file is damaged.
        """
        place = RunDirectory(directory)
        return cls(Path(directory), place.read_metrics(), place.read_config()[2])

    @property
    def best(self) -> Row:
        """The validation with the highest accuracy, of equal ones the lowest loss: what best.safetensors holds."""
        return max(self.rows, key=lambda row: (row.val_accuracy, -row.val_loss))

    @property
    def final(self) -> Row:
        """The last validation."""
        return self.rows[-1]

    def __str__(self) -> str:
        best = self.best
        return (
            f"best         {percent(best.val_accuracy)} of the validation images right, in epoch {best.epoch:.4g}\n"
            f"last         {percent(self.final.val_accuracy)}, after {counted(self.final.step, 'step')}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        rows = [asdict(row) for row in self.rows]
        return {"directory": str(self.directory or ""), "resolved": asdict(self.resolved), "rows": rows}


def run(
    config: Config, *, model: nn.Module | None = None, data: Data | None = None, save: bool = True, show: bool = False
) -> Result:
    """Fine-tune as `config` says, into the directory `config.output`.

    Under `torchrun` or `accelerate launch` every process calls this; each takes its share of every batch, statistics
    are those of the whole batch, and process 0 writes.

    Args:
        model: the network, instead of `config.source`; it is copied.
        data: the images, instead of `config.data`.
        save: whether to write anything.
        show: print what happens, with progress bars on stderr.

    Raises:
        DataError: the images cannot be used.
        DivergedError: the loss is no number any more; what was saved before is kept.
        Interrupted: SIGINT or SIGTERM; everything was saved for `resume`.
        BNSurgeryError: anything else that is refused: see `bnsurgery.insert`.
    """
    directory = RunDirectory(config.output) if save else None
    return _train(config, directory, model, data, None, show)


def resume(
    directory: str | Path,
    *,
    model: nn.Module | str | None = None,
    data: Data | str | None = None,
    show: bool = False,
) -> Result:
    """Go on with a run that was stopped or killed; its result is what it would have been, on the CPU bit for bit.

    Args:
        directory: of the run.
        model: the network as it was passed to `run`, if it was; or, where `Config.model` named a function, that name
            again: no code is run because a file says so.
        data: as it was passed to `run`, if it was; or, where `Config.data` named a function, that name again.

    Raises:
        CheckpointError: there is no run, or its files are damaged.
        DataError: the data is not what it was.
        BNSurgeryError: as `run`.
    """
    place = RunDirectory(directory)
    config, fingerprint, resolved = place.read_config()
    if config.model and model != config.model and not isinstance(model, nn.Module):
        raise _name_again(directory, "network is made", config.model, "model")
    if factories.names_code(config.data) and data != config.data and not isinstance(data, Data):
        raise _name_again(directory, "data comes", config.data, "data")
    model = None if isinstance(model, str) else model
    data = None if isinstance(data, str) else data
    return _train(replace(config, output=str(directory)), place, model, data, (fingerprint, resolved), show)


def _name_again(directory: str | Path, what: str, code: str, option: str) -> BNSurgeryError:
    return BNSurgeryError(
        f"resume: '{directory}': its {what} by running '{code}': name it again, with --{option} / {option}=, if you "
        "trust it"
    )


def _train(
    config: Config,
    directory: RunDirectory | None,
    model: nn.Module | None,
    data: Data | None,
    before: tuple[Fingerprint, Resolved] | None,
    show: bool,
) -> Result:
    accelerator = processes(config)
    show = show and accelerator.is_main_process
    with ExitStack() as stack:
        refusal = None
        if directory is not None and accelerator.is_main_process:
            try:
                stack.enter_context(directory.alone(new=before is None))
            except BNSurgeryError as error:
                refusal = error
        _raise_on_all(accelerator, refusal)
        try:
            return _train_alone(config, accelerator, directory, model, data, before, show)
        except Exception as error:
            if not out_of_memory(error) and not out_of_memory(error.__cause__):
                raise
            raise _less_memory(config, directory) from error


def _raise_on_all(accelerator: "Accelerator", refusal: BNSurgeryError | None) -> None:
    """Raise what process 0 found, everywhere: the others would wait for it."""
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        (refusal,) = broadcast_object_list([refusal])
        accelerator.wait_for_everyone()  # or process 0 is gone before the others have heard it
    if refusal is not None:
        raise refusal


def _less_memory(config: Config, directory: RunDirectory | None) -> BNSurgeryError:
    if factories.names_code(config.data):
        advice = f"make the batches or inputs of '{config.data}' smaller; of a Dataset the batches by --batch-size"
    elif config.batch_size > EVALUATED_TOGETHER:
        advice = f"use a smaller --batch-size, for instance of {config.batch_size // 2}, or a smaller --image-size"
    elif config.batch_size > 1:
        advice = (
            "use a smaller --image-size or --batch-size; "
            f"validation takes {EVALUATED_TOGETHER} images at a time whatever that is"
        )
    else:
        advice = "use a smaller --image-size"
    if directory is not None and directory.last.exists():
        advice = (
            f"make room and go on with --resume {quote(str(directory.path))}, which keeps its sizes; or start another "
            f"run with another --output: {advice}"
        )
    return BNSurgeryError(f"finetune: out of memory: {advice}.")


def _train_alone(
    config: Config,
    accelerator: "Accelerator",
    directory: RunDirectory | None,
    model: nn.Module | None,
    data: Data | None,
    before: tuple[Fingerprint, Resolved] | None,
    show: bool,
) -> Result:
    from .loop import Trainer  # these need accelerate, whose absence has been reported by now
    from .rate_range import find_rate

    state = None
    data = data or load_data(config, show)
    config = in_its_batches(config, data)
    resolved = None
    if before is not None:
        fingerprint, resolved = before
        _refuse_other_data(fingerprint, data.fingerprint)
        assert directory is not None
        state = directory.load_state()
    with forked_random(accelerator):
        torch.manual_seed(config.seed)  # all ranks must build the same network
        setup = build(config, accelerator, model, data, resolved, show)
        if show:
            print("\n".join(setup.facts), flush=True)
        if config.lr == "auto" and resolved is None:
            found = find_rate(setup, show)
            setup.resolved = replace(setup.resolved, lr=found.chosen, lr_reason=found.reason)
            if directory is not None and accelerator.is_main_process:
                figure = plot_rate_range(found.rates, found.losses, found.chosen)
                write_figure(figure, directory.path / "lr_range.png")
        if directory is not None and before is None and accelerator.is_main_process:
            # Not before: a refused start leaves no run behind.
            directory.write_config(config, data.fingerprint, setup.resolved)
        torch.manual_seed(config.seed + accelerator.process_index)  # but each draws its own dropout
        trainer = Trainer(setup, directory, show)
        if state is not None:
            trainer.load_state_dict(state)
        if show:
            if before is not None and state is None:
                print("resume       no checkpoint was saved yet: from the beginning")
            print(f"peak rate    {setup.resolved.lr:.3g}: {setup.resolved.lr_reason}", flush=True)
        with listening() as stop:
            trainer.fit(stop)
    return Result(directory.path if directory else None, tuple(trainer.rows), setup.resolved, trainer.seconds)


def _refuse_other_data(before: Fingerprint, now: Fingerprint) -> None:
    old, new = asdict(before), asdict(now)
    changed = [f"{name}: {_short(old[name])} then, {_short(new[name])} now" for name in old if old[name] != new[name]]
    if changed:
        raise DataError(
            "resume: the data is not what the run was started with: " + "; ".join(changed) + ". Put it back, or start "
            "a new run from last or best weights with another --output."
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
