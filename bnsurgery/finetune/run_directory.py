"""A run's directory: what it was told, what it measured, and what it needs to go on."""

import csv
import io
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from bnsurgery.errors import BNSurgeryError, CheckpointError, printable
from bnsurgery.files import checkpoint
from bnsurgery.files.unpickling import load_pickle
from bnsurgery.files.writing import atomic_write, make_folder, only_process_in, read_text
from bnsurgery.machine.system import quote
from bnsurgery.pages.style import write as write_figure
from bnsurgery.surgery.copies import sharing_tensors
from bnsurgery.surgery.relu_fusion import unfuse_relu_
from bnsurgery.text.typed_json import loads, parse

from .config import Config
from .datasets import Fingerprint
from .figures import plot_curves
from .results import Resolved, Row

if TYPE_CHECKING:
    from .events import EventFile

_VERSION = 1
_PEAK = "peak_lr"  # a column of metrics.csv
_FILES = ("config.json", "metrics.csv", "*.png", "best.safetensors", "last", "last/state.pt", "tensorboard")


class RunDirectory:
    """Every file in it but TensorBoard's is written to a temporary name and renamed: whole whenever the power fails."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._events: EventFile | None = None  # from the first on

    @property
    def best(self) -> Path:
        """The network with the highest validation accuracy, of equal ones the lowest loss, for `bnsurgery.load`."""
        return self.path / "best.safetensors"

    @property
    def last(self) -> Path:
        """Everything that is needed to go on."""
        return self.path / "last" / "state.pt"

    @contextmanager
    def alone(self, *, new: bool) -> Iterator[None]:
        """Make the directory, and keep other processes from it until the block ends.

        What a killed run left half-written is removed, and the directory where a new run did not get to begin.

        Raises:
            BNSurgeryError: a run is in it already, or another process is, or it cannot be made.
        """
        made = not self.path.exists()
        try:
            make_folder(self.last.parent)
            with only_process_in(self.path, "run", _FILES):
                if new and self.begun:
                    raise BNSurgeryError(
                        f"run '{self.path}': a run is there already. Go on with it (--resume {quote(str(self.path))}) "
                        "or name another --output."
                    )
                yield
        finally:
            if made and not self.begun:
                with suppress(OSError):  # there is something in it
                    self.last.parent.rmdir()
                    self.path.rmdir()

    @property
    def begun(self) -> bool:
        """Whether there is a run to go on with."""
        return (self.path / "config.json").exists()

    def write_config(self, config: Config, data: Fingerprint, resolved: Resolved) -> None:
        """config.json: the configuration, what the data is known by, and what was found for the rest."""
        content = {"config": asdict(config), "data": asdict(data), "resolved": asdict(resolved)}
        self._write_text("config.json", json.dumps(content, indent=1) + "\n")

    def read_config(self) -> tuple[Config, Fingerprint, Resolved]:
        """What `write_config` wrote.

        Raises:
            CheckpointError: there is no run, or the file is damaged.
        """
        path = self.path / "config.json"
        try:
            content = loads(read_text(path))
        except FileNotFoundError:
            raise CheckpointError(f"run '{self.path}': no config.json: there is no run to resume") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"run '{self.path}': config.json cannot be read: {printable(str(error))}") from error
        if not isinstance(content, dict) or set(content) != {"config", "data", "resolved"}:
            raise CheckpointError(f"run '{self.path}': config.json holds something else than config, data and resolved")
        try:
            config = Config.from_dict(content["config"], "config")
            resolved = parse(Resolved, content["resolved"], "resolved")
            replace(config, lr=resolved.lr)  # which checks it
            return config, parse(Fingerprint, content["data"], "data"), resolved
        except BNSurgeryError as error:
            raise CheckpointError(f"run '{self.path}': config.json: {error}") from error

    def save_state(self, state: dict[str, Any]) -> None:
        """last/state.pt: tensors, numbers and text in one file, so that it is always of one moment."""
        with atomic_write(self.last, overwrite=True) as temporary:
            checkpoint.torch_save({**state, "version": _VERSION}, temporary)

    def load_state(self) -> dict[str, Any] | None:
        """What `save_state` wrote last; None where the run did not get that far.

        Raises:
            CheckpointError: the file is damaged, or of another version.
        """
        if not os.path.lexists(self.last):
            return None
        if not self.last.is_file():  # opening a pipe would hang
            raise CheckpointError(f"'{self.last}': not a regular file, so this run cannot go on")
        try:
            with zipfile.ZipFile(self.last) as archive:  # torch does not compare the checksums that it writes
                if archive.testzip() is not None:
                    raise ValueError("other bits than were written")
            state: dict[str, Any] = load_pickle(self.last)
            version = int(state["version"])
        except MemoryError:
            raise
        except Exception as error:  # damage makes the unpickler raise just about anything
            best = f" '{self.best}' is a file of its own: a new run can start from it." if self.best.exists() else ""
            raise CheckpointError(f"'{self.last}': damaged, so this run cannot go on.{best}") from error
        if version != _VERSION:
            raise CheckpointError(f"'{self.last}': of version {version}, expected {_VERSION}")
        return state

    def log(self, rows: Sequence[Row], best: nn.Module | None, peak: float) -> None:
        """Write what a validation found: metrics.csv, curves.png, TensorBoard's events; `best` to best.safetensors.

        `peak`, the highest rate of the run, stands in every line of metrics.csv beside the rate of that step.
        """
        if best is not None:
            kept = sharing_tensors(best)
            unfuse_relu_(kept)  # as other people's tools expect it
            checkpoint.save(kept, self.best, overwrite=True)
        self._write_metrics(rows, peak)
        write_figure(plot_curves(rows), self.path / "curves.png")
        self._write_events(rows[-1])

    def _write_events(self, row: Row) -> None:
        from .events import EventFile  # needs TensorBoard

        if self._events is None:
            self._events = EventFile(self.path / "tensorboard", row.step)
        scalars = {name.replace("_", "/", 1): value for name, value in asdict(row).items()}
        self._events.add({name: value for name, value in scalars.items() if name not in ("epoch", "step")}, row.step)

    def _write_metrics(self, rows: Sequence[Row], peak: float) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, [*Row.__dataclass_fields__, _PEAK], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**asdict(row), _PEAK: peak} for row in rows)
        self._write_text("metrics.csv", text.getvalue())

    def read_metrics(self) -> tuple[Row, ...]:
        """What metrics.csv holds.

        Raises:
            CheckpointError: there was no validation yet, or the file is damaged.
        """
        path = self.path / "metrics.csv"
        try:
            lines = csv.DictReader(io.StringIO(read_text(path), newline=""))
            found = [{name: (int if name == "step" else float)(text) for name, text in line.items()} for line in lines]
            found = [{name: value for name, value in line.items() if name != _PEAK} for line in found]
        except FileNotFoundError:
            raise CheckpointError(f"run '{self.path}': no metrics.csv: there was no validation yet") from None
        except (OSError, ValueError, TypeError, csv.Error) as error:
            raise CheckpointError(f"run '{self.path}': metrics.csv cannot be read: {printable(str(error))}") from error
        if not found:
            raise CheckpointError(f"run '{self.path}': metrics.csv is empty: there was no validation yet")
        where = f"run '{self.path}': {path.name}, line"
        return tuple(parse(Row, line, f"{where} {number}") for number, line in enumerate(found, start=2))

    def _write_text(self, name: str, text: str) -> None:
        with atomic_write(self.path / name, overwrite=True) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
