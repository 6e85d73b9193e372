"""The trials of a comparison as an Optuna study, which any number of processes and machines share."""

import importlib.util
import itertools
import json
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bnsurgery.errors import BNSurgeryError, BNSurgeryWarning, CheckpointError, printable, shown
from bnsurgery.files.locks import LockedError, locked
from bnsurgery.text.typed_json import loads, parse

from .comparison import ARMS, Trial
from .grid import Key
from .results import Row
from .stopping import Interrupted, StopRequest
from .storages import DRIVERS, RETRY, lost_errors, opened, place, reason

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

T = TypeVar("T")
BEAT = 10.0  # seconds between two signs of life of a worker
GRACE = 60.0  # seconds without one, after which its trial is taken up again
_FORMAT = 1
_PATIENCE = 300.0  # seconds to wait for a storage that is lost
_PIECE = 30_000  # characters: twice as many with escapes, of the 65,535 that MySQL keeps
_GONE = LookupError, ValueError  # Optuna's if the study was deleted, json's if a journal is damaged
_OVER = RuntimeError, *_GONE  # Optuna's if the trial does not run any more: it is finished, or its worker given up


def require_optuna() -> None:
    """Raise an error that names the pip command if Optuna is missing."""
    if importlib.util.find_spec("optuna") is None:
        raise BNSurgeryError("compare: needs optuna, which is not installed: pip install 'bnsurgery[compare]'")


@dataclass
class _Heard:
    """The last beat of a worker, the time when it was seen first, and whether a long silence has been told of."""

    beat: Any
    since: float
    told: bool = False


class Study:
    """The trials of one comparison.

    A trial is an arm, a rate, a seed and the share of the run that it trains. It is COMPLETE at the end of a run, and
    PRUNED if it diverged or paused; its user attributes `result`, `result 2`, ... then hold the `Trial` in pieces. It
    is FAIL if its worker gave it back or died; then the next worker enqueues it anew.

    The worker of a trial keeps counting in the user attribute `beat`. If others see the same number for `GRACE`
    seconds, by their own clocks, they give the worker up. This needs no more of a storage than that all see one state.

    Args:
        storage: a URL of SQLite, PostgreSQL or MySQL, or the path of a journal (*.journal) or of an SQLite database.
        name: of the study.
        shared: what its trials have in common, JSON-ready.
        stop: ends waiting.

    Raises:
        BNSurgeryError: the storage cannot be used or holds another comparison.
    """

    def __init__(self, storage: str | Path, name: str, shared: dict[str, Any], stop: StopRequest) -> None:
        import optuna

        self._stop = stop
        self._file, self._where = place(storage)
        self._heard: dict[int, _Heard] = {}  # by a trial's number
        self._results: dict[int, Trial] = {}
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            with self._exclusive_file():
                self._storage = opened(storage, self._file)
            try:
                self._study = optuna.create_study(storage=self._storage, study_name=name, direction="maximize")
                self._describe(shared)
            except optuna.exceptions.DuplicatedStudyError:
                self._study = optuna.load_study(study_name=name, storage=self._storage)
            self._id = self._storage.get_study_id_from_name(name)
            self._check(shared)
        except ImportError as error:
            missing = getattr(error.__cause__, "name", None) or error.name or "a driver"
            command = f"pip install '{DRIVERS.get(missing, missing)}'"
            raise BNSurgeryError(
                f"compare: {self._where} needs {missing}, which is not installed: {command}"
            ) from error
        except lost_errors(*_OVER) as error:  # RuntimeError: of another version of Optuna
            raise BNSurgeryError(f"compare: {self._where} cannot be used: {reason(error)}") from error
        finally:
            optuna.logging.set_verbosity(verbosity)

    def results(self) -> dict[Key, Trial]:
        """The results so far, whoever trained them."""
        trials = self._patiently(self._trials)
        now = time.monotonic()
        for trial in trials:
            self._listen(trial, now)
        finished = (trial for trial in trials if trial.state.name in ("COMPLETE", "PRUNED"))
        return {self._key(trial): self._result(trial) for trial in finished}

    def under_way(self) -> dict[Key, Row]:
        """The last validation of each running trial that has had one, whoever trains it."""
        with suppress(*lost_errors()):  # a trial does not wait for its bar
            return {
                self._key(trial): parse(Row, trial.user_attrs["row"], f"compare: {self._where}: trial {trial.number}")
                for trial in self._trials()
                if trial.state.name == "RUNNING" and "row" in trial.user_attrs
            }
        return {}

    def head(self, key: Key) -> str:
        """What became of the head in a finished trial, in words."""
        found = (trial for trial in self._patiently(self._trials) if self._key(trial) == key)
        return next(
            (printable(str(trial.user_attrs["head"]), 1000) for trial in found if "head" in trial.user_attrs), ""
        )

    def take(self, keys: Sequence[Key]) -> tuple[Key, int] | None:
        """Take the first of these trials that is waiting, and enqueue those that nobody has.

        Returns:
            The trial and its id; None if others have them all.
        """
        return self._patiently(lambda: self._take(keys))

    @contextmanager
    def running(self, trial_id: int) -> Iterator[None]:
        """Inside, show that the worker of a trial lives. Without a result at the end, the trial is given back."""
        ended = threading.Event()
        thread = threading.Thread(target=self._keep_beating, args=(trial_id, ended), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with suppress(*lost_errors(*_OVER)):
                self._set_state(trial_id, "FAIL")

    def report(self, trial_id: int, row: Row) -> None:
        """Note a validation of a running trial, for those who look on."""
        with suppress(*lost_errors(*_OVER)):
            self._storage.set_trial_intermediate_value(trial_id, row.step, row.val_accuracy)
            self._storage.set_trial_user_attr(trial_id, "row", asdict(row))

    def finish(self, trial_id: int, trial: Trial, head: str) -> None:
        """Keep the result of a running trial, unless others have given its worker up."""
        ended = not (trial.diverged or trial.raced_out)
        accuracy = None if trial.diverged else trial.rows[-1].val_accuracy

        text = json.dumps(asdict(trial))

        def keep() -> None:
            self._storage.set_trial_user_attr(trial_id, "head", head)
            for name, start in zip(_names(), range(0, len(text), _PIECE), strict=False):
                self._storage.set_trial_user_attr(trial_id, name, text[start : start + _PIECE])
            self._set_state(trial_id, "COMPLETE" if ended else "PRUNED", accuracy)

        with suppress(*_OVER):
            self._patiently(keep)

    def _take(self, keys: Sequence[Key]) -> tuple[Key, int] | None:
        with self._exclusive():
            live = self._live()
            for key in keys:
                if key not in live:
                    self._enqueue(key)
            live = self._live()
            for key in keys:
                trial = live.get(key)  # None if its worker has been given up since
                if trial and trial.state.name == "WAITING" and self._set_state(self._id_of(trial), "RUNNING"):
                    return key, self._id_of(trial)
        return None

    def _live(self) -> "dict[Key, FrozenTrial]":
        """The trials that are waiting, running or finished; those whose worker died fail."""
        live: dict[Key, FrozenTrial] = {}
        now = time.monotonic()
        for trial in self._trials():
            if self._listen(trial, now) > GRACE:
                with suppress(RuntimeError):  # it has finished just now
                    self._set_state(self._id_of(trial), "FAIL")
            elif trial.state.name != "FAIL":
                live.setdefault(self._key(trial), trial)
        return live

    def _listen(self, trial: "FrozenTrial", now: float) -> float:
        """The seconds since the worker of a running trial has been heard of; warns once when they become many."""
        if trial.state.name != "RUNNING":
            return 0.0
        beat = trial.user_attrs.get("beat")
        heard = self._heard.get(trial.number)
        if heard is None or heard.beat != beat:
            heard = self._heard[trial.number] = _Heard(beat, now)
        silent = now - heard.since
        if GRACE / 3 < silent < GRACE and not heard.told:
            heard.told = True
            arm, rate, seed, _ = self._key(trial)
            until = datetime.now() + timedelta(seconds=GRACE - silent)
            warnings.warn(
                f"compare: no sign of life for {silent:.0f} s from the worker of {arm}, rate {rate:g}, seed {seed}. If "
                f"there is none until {until:%H:%M:%S}, the trial starts again",
                BNSurgeryWarning,
                stacklevel=2,
            )
        return silent

    def _enqueue(self, key: Key) -> None:
        from optuna import distributions
        from optuna.trial import TrialState, create_trial

        kinds = {
            "arm": distributions.CategoricalDistribution(ARMS),
            "rate": distributions.FloatDistribution(5e-324, 1000.0, log=True),
            "seed": distributions.IntDistribution(0, 1000),
            "share": distributions.FloatDistribution(0.0, 1.0),
        }
        params = dict(zip(kinds, key, strict=True))
        self._study.add_trial(create_trial(state=TrialState.WAITING, params=params, distributions=kinds))

    def _set_state(self, trial_id: int, state: str, value: float | None = None) -> bool:
        from optuna.trial import TrialState

        return self._storage.set_trial_state_values(trial_id, TrialState[state], None if value is None else [value])

    def _id_of(self, trial: "FrozenTrial") -> int:
        """In the storage; its number counts within the study."""
        return self._storage.get_trial_id_from_study_id_trial_number(self._id, trial.number)

    def _trials(self) -> "list[FrozenTrial]":
        try:
            return self._study.get_trials(deepcopy=False)
        except _GONE as error:
            raise CheckpointError(
                f"compare: {self._where}: the study was deleted or damaged: {reason(error)}"
            ) from error

    def _key(self, trial: "FrozenTrial") -> Key:
        params = trial.params
        try:
            return str(params["arm"]), float(params["rate"]), int(params["seed"]), float(params["share"])
        except LookupError:
            raise CheckpointError(f"compare: {self._where}: trial {trial.number} is none of a comparison") from None

    def _result(self, trial: "FrozenTrial") -> Trial:
        if trial.number not in self._results:
            where = f"{self._where}: trial {trial.number}"
            pieces = itertools.takewhile(trial.user_attrs.__contains__, _names())
            found = read_trial("".join(str(trial.user_attrs[name]) for name in pieces), where)
            if (found.arm, found.lr, found.seed) != self._key(trial)[:3]:
                raise CheckpointError(f"{where}: the result is of another trial")
            self._results[trial.number] = found
        return self._results[trial.number]

    def _describe(self, shared: dict[str, Any]) -> None:
        self._study.set_user_attr("shared", shared)
        self._study.set_user_attr("format", _FORMAT)

    def _check(self, shared: dict[str, Any]) -> None:
        """Raise an error if the study is of another comparison."""
        end = time.monotonic() + 20 * RETRY
        while "format" not in (found := self._study.user_attrs):  # the process that made it writes it now
            if self._study.trials:
                raise BNSurgeryError(f"compare: {self._where} holds a study of this name that is no comparison's")
            if time.monotonic() > end:  # or died before
                self._describe(shared)
            time.sleep(RETRY)
        if found["format"] != _FORMAT:
            raise BNSurgeryError(
                f"compare: {self._where} is of another version of bnsurgery, with format {shown(found['format'])} "
                f"instead of {_FORMAT}: name another `output` or `storage`"
            )
        refuse_other(found.get("shared"), shared, self._where, "name another `output` or `storage`")

    def _keep_beating(self, trial_id: int, ended: threading.Event) -> None:
        beat = 0
        while not ended.is_set():
            beat += 1
            try:
                self._storage.set_trial_user_attr(trial_id, "beat", beat)
            except lost_errors():  # a later one may succeed; the others are not heard of either
                self._heard.clear()
            except _OVER:
                pass
            ended.wait(BEAT)
        self._storage.remove_session()

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Keep the other workers from taking trials, by a lock that ends with this process."""
        if self._file is not None:
            with self._exclusive_file():
                yield
            return
        import sqlalchemy as sql

        table = sql.table("study_user_attributes", sql.column("study_id"), sql.column("value_json"))
        rows = sql.select(table.c.value_json).where(table.c.study_id == self._id).with_for_update()
        with self._storage.engine.begin() as connection:  # type: ignore[attr-defined]
            connection.execute(rows)
            yield

    @contextmanager
    def _exclusive_file(self) -> Iterator[None]:
        """The same with a lock file, for SQLite locks only to write; Optuna has one of a journal's name and .lock."""
        with ExitStack() as stack:
            while self._file is not None:
                try:
                    stack.enter_context(locked(self._file.with_name(f".bnsurgery-{self._file.name}.lock")))
                    break
                except LockedError as error:
                    if self._stop.signum:
                        text = f"compare: stopped while {self._where} was locked by {error}"
                        raise Interrupted(f"{text}; the same command again goes on", self._stop.signum) from error
                    time.sleep(0.02)
            yield

    def _patiently(self, call: Callable[[], T]) -> T:
        """Call a function again and again while the storage is lost."""
        lost = None
        while True:
            try:
                return call()
            except lost_errors() as error:
                self._heard.clear()  # the silence is the storage's
                text = f"compare: {self._where} is lost: {reason(error)}"
                if lost is None:
                    lost = time.monotonic()
                    warnings.warn(f"{text}. Waiting for it", BNSurgeryWarning, stacklevel=2)
                if self._stop.signum:
                    raise Interrupted(f"{text}. Stopped; the same command again goes on", self._stop.signum) from error
                if time.monotonic() - lost > _PATIENCE:
                    raise BNSurgeryError(f"{text}. The same command again goes on with what is finished") from error
            time.sleep(RETRY)


def _names() -> Iterator[str]:
    """The attributes that hold a result, piece by piece."""
    return itertools.chain(["result"], map("result {}".format, itertools.count(2)))


def read_trial(text: str, where: str) -> Trial:
    """A finished trial from the JSON in a study, which is not trusted.

    Raises:
        CheckpointError: it is none.
    """
    try:
        trial: Trial = parse(Trial, loads(text), where)
    except ValueError as error:
        raise CheckpointError(f"{where}: the result cannot be read: {error}") from error
    return trial


def refuse_other(before: Any, mine: dict[str, Any], where: str, advice: str) -> None:
    """Raise an error that names the first difference between two comparisons: groups of named values."""
    try:
        theirs = {name: value for group in mine for name, value in before[group].items()}
    except (TypeError, LookupError, AttributeError):
        raise CheckpointError(f"compare: {where}: damaged. Remove it to start anew.") from None
    for name, value in ((name, value) for group in mine.values() for name, value in group.items()):
        if theirs.get(name) != value:
            raise BNSurgeryError(
                f"compare: {where} holds another comparison, with {name} {shown(theirs.get(name))} instead of "
                f"{shown(value)}: {advice}"
            )
