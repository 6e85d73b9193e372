"""Save an inserted model to one safetensors file, and load it without the original weights."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .copies import on_meta
from .errors import BNSurgeryError, CheckpointError, printable
from .files import atomic_write
from .folding import strip_
from .heads import replace_head_
from .insertion import Options, edit_
from .lrn import drop_lrn_
from .models import identify_model
from .relu_fusion import is_fused, take_over_
from .surgery_record import FORMAT_VERSION, SurgeryRecord, attach_record, record
from .weights import describe_mismatch, is_safetensors, read_state_dict

# One metadata entry, since safetensors writes several in random order: the record's SHA-256, a space, the record. The
# digest is there because a flipped bit in the JSON could still parse.
_KEY = "bnsurgery"


def save(bn_model: nn.Module, path: str | PathLike[str], *, overwrite: bool = False) -> None:
    """Write `bn_model` and its record to one safetensors file: to a temporary name first, then renamed.

    The tensors are the state dict, under its keys; any safetensors reader can open the file. Equal models give equal
    bytes. The architecture noted is what the model is now, so a head replaced after the insertion is in it. ReLUs that
    are fused are so after `load`.

    Raises:
        CheckpointError: the file exists and `overwrite` is False, or it cannot be written; an old file is intact.
        BNSurgeryError: the model carries no record, or its norms apply other ReLUs than that says.
    """
    state, the_record = bn_model.state_dict(), current_record(bn_model)
    for site in the_record.sites:
        if site.relu is not None and is_fused(bn_model, site) != the_record.fuse_relu:
            raise BNSurgeryError(
                f"save: '{site.norm}' was changed by hand: call bnsurgery.fuse_relu_ or unfuse_relu_, which "
                "make all ReLUs alike"
            )
    write_tensors(state, path, {_KEY: _sealed(the_record.to_json())}, overwrite)


def current_record(bn_model: nn.Module) -> SurgeryRecord:
    """The record, with the architecture that the model is now: its head may have been replaced since.

    Raises:
        BNSurgeryError: the model carries no record.
    """
    the_record = record(bn_model)
    if the_record.architecture is None:
        return the_record
    original = on_meta(bn_model)
    strip_(original, the_record.sites)
    return replace(the_record, architecture=identify_model(original))


def load(
    path: str | PathLike[str], *, model: nn.Module | None = None, map_location: torch.device | str = "cpu"
) -> nn.Module:
    """The model that `save` wrote, in eval mode, with its record.

    Built on the meta device and filled from the file: no random initialization, no unpickling, no original weights.
    Every parameter comes back contiguous and trainable; ties between parameters are not kept.

    Args:
        path: a file that `save` wrote.
        model: the original network, for one that is not torchvision's; used as the skeleton, not changed.
        map_location: the device to put it on.

    Raises:
        CheckpointError: not such a file, damaged, of a newer format, or it does not fit the architecture or `model`.
    """
    path = Path(path)
    the_record = read_record(path)
    if the_record is None:
        read_state_dict(path)  # a missing or damaged file says so itself
        raise CheckpointError(f"load: '{path}': not a bnsurgery checkpoint: its metadata holds no record")
    skeleton = _skeleton(path, the_record, model)
    state = read_state_dict(path)
    mismatch = describe_mismatch(
        {name: tensor.shape for name, tensor in skeleton.state_dict().items()},
        {name: tensor.shape for name, tensor in state.items()},
    )
    if mismatch:
        raise CheckpointError(f"load: '{path}': the tensors do not fit its record: {mismatch}")
    skeleton.load_state_dict(state, assign=True)
    return skeleton.to(map_location).eval()


def read_record(path: str | PathLike[str]) -> SurgeryRecord | None:
    """The record in a safetensors file's metadata; None where there is none, or the file is of another kind.

    Raises:
        CheckpointError: it is no file that can be read, or there is a record and it is damaged, or of a newer format.
    """
    if not is_safetensors(path):  # also keeps safe_open from waiting for a pipe to be written
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return None
    if _KEY not in metadata:
        return None
    text = metadata[_KEY].partition(" ")[2]
    if metadata[_KEY] != _sealed(text):
        raise CheckpointError(f"'{path}': the record in its metadata is damaged (its SHA-256 differs)")
    return SurgeryRecord.from_json(text)


def write_tensors(
    state: Mapping[str, Tensor], path: str | PathLike[str], metadata: dict[str, str], overwrite: bool
) -> None:
    """Write a state dict as safetensors, atomically.

    Raises:
        CheckpointError: the file exists and `overwrite` is False, or it cannot be written.
    """
    tensors, seen = {}, set()
    for name, tensor in state.items():  # safetensors takes no two names for one storage: a shared module has them
        shared = tensor.data_ptr() in seen
        seen.add(tensor.data_ptr())
        tensors[name] = (
            tensor.detach().clone(memory_format=torch.contiguous_format) if shared else tensor.detach().contiguous()
        )
    with atomic_write(path, overwrite=overwrite) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def torch_save(state: Mapping[str, Any], temporary: Path) -> None:
    """`torch.save` into the file that `atomic_write` gave.

    Not by its name, which torch would write into the file: equal states give equal bytes.

    Raises:
        OSError: it cannot be written.
    """
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:  # how torch reports that a write failed, the last ones when it tidies up
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise OSError(str(error).splitlines()[0]) from error


def _skeleton(path: Path, the_record: SurgeryRecord, model: nn.Module | None) -> nn.Module:
    if model is None and the_record.architecture is None:
        raise CheckpointError(
            f"load: '{path}' holds a {printable(the_record.model)}, which is not one of torchvision's: pass model=, "
            "the original network (its weights do not matter)"
        )
    try:
        if model is not None:
            skeleton = on_meta(model)
            task = the_record.task
            if task is not None and task.head is not None:  # the head that was made anew for other classes
                replace_head_(skeleton, task.head, len(task.classes))
        else:
            assert the_record.architecture is not None
            skeleton = the_record.architecture.build()
        if the_record.dropped_lrn:
            drop_lrn_(skeleton, the_record.dropped_lrn)
        _set_relus_(skeleton, the_record)
        options = Options(the_record.absorb_bias, the_record.fuse_relu, the_record.eps, the_record.momentum)
        sites = edit_(skeleton, [inserted.site for inserted in the_record.sites], options)
        named = the_record.sites
        if the_record.format_version == 1 and not the_record.fuse_relu:  # it named fused ReLUs alone
            pairs = zip(named, sites, strict=True)
            named = tuple(replace(old, relu=new.relu, relu_inplace=new.relu_inplace) for old, new in pairs)
        attach_record(skeleton, replace(the_record, sites=sites, format_version=FORMAT_VERSION))
        if the_record.fuse_relu:
            take_over_(skeleton, sites)
    except (AttributeError, KeyError, ValueError, TypeError, RuntimeError, StopIteration, BNSurgeryError) as error:
        name = printable(the_record.model)
        what = name if model is None else f"the {type(model).__name__} given: it is of a {name}"
        reason = printable(str(error))
        raise CheckpointError(f"load: '{path}': its record does not fit {what}: {reason}") from error
    if sites != named:
        raise CheckpointError(
            f"load: '{path}': its record names other layers than the {printable(the_record.model)} has"
        )
    return skeleton.eval()


def _set_relus_(skeleton: nn.Module, the_record: SurgeryRecord) -> None:
    """Whether they work in place, as in the network that was saved."""
    for inserted in the_record.sites:
        if inserted.relu is not None:
            relu = skeleton.get_submodule(str(inserted.site.relu))
            if type(relu) is not nn.ReLU:
                raise ValueError(
                    f"'{inserted.site.relu}' is a {type(relu).__name__}, expected the nn.ReLU that was there"
                )
            relu.inplace = inserted.relu_inplace


def _sealed(text: str) -> str:
    return f"{hashlib.sha256(text.encode()).hexdigest()} {text}"
