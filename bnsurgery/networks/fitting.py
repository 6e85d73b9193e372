"""Find the tensors of a network in a weights file, by its keys and shapes, whatever training put around them."""

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from bnsurgery.errors import BNSurgeryWarning, CheckpointError, printable, shown
from bnsurgery.files.weights import WeightsFile, check_finite, check_kinds, check_plain, describe_mismatch
from bnsurgery.text.words import listed

# Names of the modules that wrap others: of DataParallel, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_USUAL = ("", "state_dict.", "model.", "model_state_dict.")  # the first of these, where several places fit


@dataclass(frozen=True)
class Choice:
    """Which tensors of a weights file to take; by default those that fit the network.

    Attributes:
        key: the keys of the dicts that lead to them, joined by "."; None to search.
        prefix: before the network's own names there, such as "backbone."; None to search.
        partial: take the tensors that fit, and leave the rest of the network as it is initialized.
    """

    key: str | None = None
    prefix: str | None = None
    partial: bool = False


BEST_FIT = Choice()


@dataclass(frozen=True)
class Fit:
    """The tensors of a file that have a network's names, of whatever shape.

    Attributes:
        names: their names in the file, by the network's keys.
        left_out: by the names of the file's other tensors, the keys that they would have in the network; empty for
            those in another place.
        rivals: other places, where all of the network's tensors are as well.
    """

    file: WeightsFile
    names: dict[str, str]
    left_out: dict[str, str]
    rivals: tuple[str, ...]

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shapes in the file, by the network's keys."""
        return {key: self.file.tensors[name].shape for key, name in self.names.items()}

    @property
    def norm(self) -> str | None:
        """The first BatchNorm among the tensors in the network's place for which the network has no key."""
        return next((name for name, key in self.left_out.items() if key.endswith("running_mean")), None)


def find(file: WeightsFile, expected: Mapping[str, torch.Size], choice: Choice) -> Fit:
    """Find a network's tensors in the place where most have its names and shapes.

    Args:
        file: from `read_weights`.
        expected: shapes by the network's state-dict keys.

    Raises:
        CheckpointError: there is nothing in the place that `choice` names, or several places fit equally well.
    """
    start = f"{choice.key}." if choice.key else ""
    ours, theirs = _plain_names(expected), _plain_names(name for name in file.tensors if name.startswith(start))
    if not theirs:
        raise _absent(file, f"nothing under {shown(start[:-1])}")
    first, longest = len(_plain(start)), max(map(len, ours), default=0)
    inner = {
        root: {name[len(root) :]: ours[name] for name in ours if name.startswith(root)} for root in _roots(ours, choice)
    }
    # By the beginnings of the names in the file and in the network: how many names fit with their shapes, and at all.
    scores: dict[tuple[str, str], list[int]] = {}
    for plain, name in theirs.items():
        for cut in _cuts(plain, longest):
            for root, keys in inner.items() if cut >= first else ():
                if plain[cut:] in keys and not _same_end(plain[:cut], root):
                    score = scores.setdefault((plain[:cut], root), [0, 0])
                    score[0] += file.tensors[name].shape == expected[keys[plain[cut:]]]
                    score[1] += 1
    if choice.prefix is not None:
        prefix = _plain(f"{choice.prefix.rstrip('.')}." if choice.prefix else "")
        chosen = {_plain(place) + prefix for place in file.places}
        scores = {pair: score for pair, score in scores.items() if pair[0] in chosen}
        if not scores:
            raise _absent(file, f"no name begins with {shown(choice.prefix)}")
    best = max(scores.values(), default=[0, 0])
    fitting = [pair for pair, score in scores.items() if score == best] or [(_plain(start), "")]
    usual = [pair for place in _USUAL for pair in fitting if (pair[0][first:], pair[1]) == (place, "")]
    if len(fitting) > 1 and not usual and (best[0] == len(ours) or choice.partial):
        raise CheckpointError(
            f"weights '{file.path}': {len(fitting)} places fit equally well: {listed([at for at, _ in fitting])}. "
            "Choose one by `weights_key` or `weights_prefix`"
        )
    at, root = (usual or fitting)[0]
    names = {key: theirs[at + plain] for plain, key in inner[root].items() if at + plain in theirs}
    taken = set(names.values())
    left_out = {
        name: plain[len(at) :] if plain.startswith(at) else "" for plain, name in theirs.items() if name not in taken
    }
    rivals = tuple(sorted({place[:-1] for place, _ in fitting} - {at[:-1], ""})) if best[0] == len(ours) else ()
    return Fit(file, names, left_out, rivals)


def fill_(model: nn.Module, name: str, file: WeightsFile, choice: Choice) -> None:
    """Give `model`, which is called `name`, its tensors from `file`; warn where the file has other names, or more.

    Raises:
        CheckpointError: tensors are missing or of another shape, and `choice` is not `partial`; or one is not plain,
            not finite or of another type; or `find` finds none.
    """
    expected = model.state_dict()
    shapes = {key: tensor.shape for key, tensor in expected.items()}
    fit = find(file, shapes, choice)
    if fit.norm is not None and not choice.partial:
        raise CheckpointError(
            f"'{file.path}' holds a network that has BatchNorm already ('{printable(fit.norm)}'), and {name} has none: "
            "nothing to insert. To leave it out all the same, pass `partial=True`"
        )
    tensors = {key: file.tensors[found] for key, found in fit.names.items() if fit.shapes[key] == shapes[key]}
    absent = [key for key in expected if key not in tensors and not key.endswith("num_batches_tracked")]
    if absent and not (choice.partial and tensors):
        beside = {key: file.tensors[found].shape for found, key in fit.left_out.items() if key}
        mismatch = describe_mismatch(shapes, {**beside, **fit.shapes})
        some = f". {len(tensors)} of {len(expected)} fit: `partial=True` takes these alone" if tensors else ""
        raise CheckpointError(f"weights '{file.path}' are not those of {name}: {mismatch}{some}")
    tensors = check_plain(tensors, file.path)
    check_kinds(tensors, expected, file.path)
    check_finite(tensors, file.path, masks={key for key, _ in model.named_buffers()})
    if absent:  # all in one precision, that of the initialized ones
        tensors = {key: tensor.to(expected[key].dtype) for key, tensor in tensors.items()}
    model.load_state_dict(tensors, strict=False, assign=True)
    notes = [f"its {shown(found)} is taken for '{key}'" for key, found in fit.names.items() if key != found][:1]
    lists = {
        "left out": fit.left_out,
        "other places that fit (`weights_key` or `weights_prefix` chooses)": fit.rivals,
        "not in it, and left as they were made": absent,
    }
    notes += [f"{what}: {listed(names)}" for what, names in lists.items() if names]
    if notes:
        warnings.warn(f"weights '{file.path}': {'; '.join(notes)}", BNSurgeryWarning, stacklevel=2)


def _plain(name: str) -> str:
    """`name` without the names of wrapping modules in it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _plain_names(names: Iterable[str]) -> dict[str, str]:
    """The names by `_plain`, or by themselves where two would be the same."""
    names = list(names)
    plain = {_plain(name): name for name in names}
    return plain if len(plain) == len(names) else {name: name for name in names}


def _roots(names: Collection[str], choice: Choice) -> list[str]:
    """Beginnings of the network's names that the file may lack: of all names, or, for a part of it, of some."""
    name = next(iter(names), "")
    shared = [name[:cut] for cut in reversed(_cuts(name, len(name))) if all(n.startswith(name[:cut]) for n in names)]
    parts = {f"{name.partition('.')[0]}." for name in names if "." in name} if choice.partial else set()
    return shared + sorted(parts - set(shared))


def _same_end(at: str, root: str) -> bool:
    """Whether both end with the same part of a name, so that a shorter pair means the same."""
    return bool(at and root) and at.split(".")[-2] == root.split(".")[-2]


def _cuts(name: str, longest: int) -> list[int]:
    """Where a name of up to `longest` characters can begin in `name`: behind a dot, the last first, or in front."""
    starts = [0, *(dot + 1 for dot, character in enumerate(name) if character == ".")]
    return [start for start in reversed(starts) if len(name) - start <= longest]


def _absent(file: WeightsFile, problem: str) -> CheckpointError:
    tops = dict.fromkeys(name.partition(".")[0] for name in file.tensors)
    return CheckpointError(f"weights '{file.path}': {problem}. The file has names that begin with {listed(tops)}")
