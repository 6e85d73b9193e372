"""What a run needs to go on from where it stands, and back."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from bnsurgery.devices import CPU, random_state, set_random_state
from bnsurgery.errors import CheckpointError, printable
from bnsurgery.surgery_record import record
from bnsurgery.typed_json import parse

from .run_directory import Row

if TYPE_CHECKING:
    from .loop import Trainer


def captured(trainer: "Trainer") -> dict[str, Any]:
    """Tensors, numbers and text, for `RunDirectory.save_state`; all ranks call it together."""
    scaler, conditioner = trainer.accelerator.scaler, trainer.setup.conditioner
    return {
        "step": trainer.step,
        "started_from": _started_from(trainer),
        "rows": [asdict(row) for row in trainer.rows],
        "losses": trainer.losses,
        "accuracies": trainer.accuracies,
        "network": trainer.network.state_dict(),
        "optimizer": trainer.optimizer.optimizer.state_dict(),
        "average": trainer.average,
        "scaler": scaler.state_dict() if scaler is not None else {},
        "conditioner": conditioner and [conditioner.mean, conditioner.variance],
        "random": gather_object([{kind: random_state(place) for kind, place in _generators(trainer).items()}]),
    }


def restore_(trainer: "Trainer", state: dict[str, Any]) -> None:
    """Put the trainer back where `captured` was called, believing nothing.

    Raises:
        CheckpointError: the state is not this run's.
    """
    try:
        if state["started_from"] != _started_from(trainer):
            raise ValueError("the weights that it started from have changed")
        trainer.step = parse(int, state["step"], "step")
        if not 0 <= trainer.step <= trainer.steps:
            raise ValueError(f"step {trainer.step} of {trainer.steps}")
        trainer.rows = list(parse(tuple[Row, ...], state["rows"], "rows"))
        trainer.losses, trainer.accuracies = (
            list(parse(tuple[float, ...], state[name], name)) for name in ("losses", "accuracies")
        )
        trainer.network.load_state_dict(state["network"])
        trainer.optimizer.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for average, saved in zip(trainer.average, state["average"], strict=True):
                average.copy_(saved)
        conditioner = trainer.setup.conditioner
        if conditioner is not None:
            for current, saved in zip((conditioner.mean, conditioner.variance), state["conditioner"], strict=True):
                current.copy_(saved)
        if trainer.accelerator.scaler is not None:
            trainer.accelerator.scaler.load_state_dict(state["scaler"])
        for kind, place in _generators(trainer).items():
            set_random_state(place, state["random"][trainer.accelerator.process_index][kind])
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, CheckpointError) as error:
        raise CheckpointError(
            f"resume: the saved state does not fit this run: {printable(str(error))}. Was another put in its place?"
        ) from error


def _started_from(trainer: "Trainer") -> str:
    """Digest of the network before the insertion."""
    return record(trainer.network).weights_digest


def _generators(trainer: "Trainer") -> dict[str, torch.device]:
    """Where dropout draws from, by kind of device."""
    return {place.type: place for place in (CPU, trainer.accelerator.device)}
