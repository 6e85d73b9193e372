"""A run's directory: its configuration, its measurements, and the state to resume from."""

import csv
import io
import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from torch import nn

from bnsurgery.errors import BNSurgeryError, CheckpointError, printable
from bnsurgery.files import checkpoint
from bnsurgery.files.unpickling import load_pickle
from bnsurgery.files.writing import atomic_write, make_folder, only_process_in, read_text
from bnsurgery.pages.style import write as write_figure
from bnsurgery.surgery.copies import sharing_tensors
from bnsurgery.surgery.relu_fusion import unfuse_relu_
from bnsurgery.text.typed_json import loads, parse

from .config import Config
from .datasets import Fingerprint
from .figures import plot_curves, plot_rate_range
from .results import NormRow, RateRange, Resolved, Row

if TYPE_CHECKING:
    from .events import EventFile
    from .trackers import Tracker

_VERSION = 2  # 1 had no norms
_PEAK = "peak_lr"  # a column of metrics.csv
_AnyRow = TypeVar("_AnyRow", Row, NormRow)
_FILES = ("config.json", "*.csv", "*.png", "best.safetensors", "last", "last/state.pt", "tensorboard")


class RunDirectory:
    """Every file but TensorBoard's is written to a temporary name and renamed, so a power failure leaves it whole."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.curves: EventFile | Tracker | None = None  # TensorBoard's from the first validation on

    @property
    def best(self) -> Path:
        """The network with the highest validation accuracy, of equal ones the lowest loss, for `bnsurgery.load`."""
        return self.path / "best.safetensors"

    @property
    def last(self) -> Path:
        """The state to resume from."""
        return self.path / "last" / "state.pt"

    @contextmanager
    def alone(self, *, new: bool) -> Iterator[None]:
        """Make the directory, which must hold no run if it is `new`, and keep other processes out until the block ends.

        This removes the half-written files of a killed run, and at the end a directory in which no run has begun.
        """
        made = not self.path.exists()
        try:
            make_folder(self.last.parent)
            with only_process_in(self.path, "run", _FILES):
                if new and self.begun:
                    raise BNSurgeryError(
                        f"run '{self.path}': a run is there already. Continue it with `resume={str(self.path)!r}`, or "
                        "name another `output`."
                    )
                yield
        finally:
            if made and not self.begun:
                with suppress(OSError):  # it is not empty
                    self.last.parent.rmdir()
                    self.path.rmdir()

    @property
    def begun(self) -> bool:
        """Whether there is a run to resume."""
        return (self.path / "config.json").exists()

    def write_config(self, config: Config, data: Fingerprint, resolved: Resolved) -> None:
        """Write config.json: the configuration, the data's fingerprint, and the values that "auto" stands for."""
        content = {"config": asdict(config), "data": asdict(data), "resolved": asdict(resolved)}
        self._write_text("config.json", json.dumps(content, indent=1) + "\n")

    def read_config(self) -> tuple[Config, Fingerprint, Resolved]:
        """Read what `write_config` wrote."""
        path = self.path / "config.json"
        try:
            content = loads(read_text(path))
        except FileNotFoundError:
            raise CheckpointError(f"run '{self.path}': no config.json: there is no run to resume") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"run '{self.path}': config.json cannot be read: {printable(str(error))}") from error
        if not isinstance(content, dict) or set(content) != {"config", "data", "resolved"}:
            raise CheckpointError(f"run '{self.path}': config.json: expected the fields config, data and resolved")
        try:
            config = Config.from_dict(content["config"], "config")
            resolved = parse(Resolved, content["resolved"], "resolved")
            replace(config, lr=resolved.lr)  # which checks it
            return config, parse(Fingerprint, content["data"], "data"), resolved
        except BNSurgeryError as error:
            raise CheckpointError(f"run '{self.path}': config.json: {error}") from error

    def save_state(self, state: dict[str, Any]) -> None:
        """Write last/state.pt: tensors, numbers and text in one file, so that all are of the same step."""
        with atomic_write(self.last, overwrite=True) as temporary:
            checkpoint.torch_save({**state, "version": _VERSION}, temporary)

    def load_state(self) -> dict[str, Any] | None:
        """Read what `save_state` wrote last; None if nothing was saved."""
        if not os.path.lexists(self.last):
            return None
        if not self.last.is_file():  # opening a pipe would hang
            raise CheckpointError(f"'{self.last}': not a regular file, so this run cannot be resumed")
        try:
            with zipfile.ZipFile(self.last) as archive:  # torch does not check the checksums that it writes
                if archive.testzip() is not None:
                    raise ValueError("the checksum differs")
            state: dict[str, Any] = load_pickle(self.last)
            version = int(state["version"])
        except MemoryError:
            raise
        except Exception as error:  # on damage the unpickler raises anything
            best = f" A new run can start from '{self.best}'." if self.best.exists() else ""
            raise CheckpointError(f"'{self.last}': damaged, so this run cannot be resumed.{best}") from error
        if version != _VERSION:
            raise CheckpointError(
                f"'{self.last}': of version {version}, expected {_VERSION}: finish this run with the version of "
                "bnsurgery that began it, or start a new one with another `output`"
            )
        return state

    def log_rate_range(self, found: RateRange) -> None:
        """Write the losses of a range test to lr_range.csv, and their figure to lr_range.png."""
        columns = ("lr", "loss", "smoothed_loss")
        self._write_table("lr_range.csv", columns, zip(found.rates, found.measured, found.losses, strict=True))
        write_figure(plot_rate_range(found.rates, found.losses, found.chosen), self.path / "lr_range.png")

    def log(self, rows: Sequence[Row], norms: Sequence[NormRow], best: nn.Module | None, resolved: Resolved) -> None:
        """Write the rows to metrics.csv and curves.png, the norms' to norms.csv, `best`, and the last row to `curves`.

        The peak rate is in every line of metrics.csv, beside the rate of that step.
        """
        from .events import EventFile  # needs TensorBoard

        if best is not None:
            kept = sharing_tensors(best)
            unfuse_relu_(kept)  # as other tools expect it
            checkpoint.save(kept, self.best, overwrite=True)
        lines = ((*astuple(row), resolved.lr) for row in rows)
        self._write_table("metrics.csv", (*Row.__dataclass_fields__, _PEAK), lines)
        if norms:  # the arm "plain" has none
            self._write_table("norms.csv", tuple(NormRow.__dataclass_fields__), map(astuple, norms))
        write_figure(plot_curves(rows, start=resolved.start_accuracy), self.path / "curves.png")
        self.curves = self.curves or EventFile(self.path / "tensorboard", rows[-1].step)
        self.curves.add(rows[-1].scalars, rows[-1].step)

    def read_metrics(self) -> tuple[Row, ...]:
        """Read metrics.csv."""
        rows = self._read_table("metrics.csv", Row)
        if not rows:
            raise CheckpointError(f"run '{self.path}': metrics.csv: there was no validation yet")
        return rows

    def read_norms(self) -> tuple[NormRow, ...]:
        """Read norms.csv; empty if there is none, as in the arm "plain"."""
        return self._read_table("norms.csv", NormRow)

    def _read_table(self, name: str, kind: type[_AnyRow]) -> tuple[_AnyRow, ...]:
        """The lines of a table as dataclasses, without the columns that are no field; empty if there is no file."""
        where, types = f"run '{self.path}': {name}", get_type_hints(kind)
        try:
            lines = list(csv.DictReader(io.StringIO(read_text(self.path / name), newline="")))
            rows = [{key: types.get(key, float)(text) for key, text in line.items()} for line in lines]
        except FileNotFoundError:
            return ()
        except (OSError, ValueError, TypeError, csv.Error) as error:
            raise CheckpointError(f"{where} cannot be read: {printable(str(error))}") from error
        for row in rows:
            row.pop(_PEAK, None)
        return tuple(parse(kind, row, f"{where}, line {number}") for number, row in enumerate(rows, start=2))

    def _write_table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([columns, *rows])
        self._write_text(name, text.getvalue())

    def _write_text(self, name: str, text: str) -> None:
        with atomic_write(self.path / name, overwrite=True) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
