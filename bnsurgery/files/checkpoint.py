"""Save an inserted model to one safetensors file, and load it without the original weights."""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from safetensors.torch import save_file
from torch import Tensor, nn

from bnsurgery.errors import BNSurgeryError, CheckpointError, printable, shown
from bnsurgery.nn.batchnorm import Insertable
from bnsurgery.nn.settings import is_frozen
from bnsurgery.records.architectures import Architecture, identify_model, state_shapes
from bnsurgery.records.record import FORMAT_VERSION, InsertedSite, SurgeryRecord, attach_record
from bnsurgery.records.record import record as record_of
from bnsurgery.surgery.copies import on_meta, refuse_sharded
from bnsurgery.surgery.folding import strip_
from bnsurgery.surgery.heads import replace_head_
from bnsurgery.surgery.insertion import edit_
from bnsurgery.surgery.module_tree import drop_lrn_
from bnsurgery.surgery.relu_fusion import is_fused, take_over_
from bnsurgery.text.words import with_article

from .weights import check_kinds, describe_mismatch, read_metadata, read_tensors
from .writing import atomic_write

# One metadata entry, since safetensors writes several in random order: the record's SHA-256, a space, the record.
# Without the digest a flipped bit could go unseen: the JSON can still parse.
_KEY = "bnsurgery"
_REAL_PARTS = (torch.float16, torch.float32, torch.float64)  # of torch's complex numbers


def save(bn_model: nn.Module, path: str | PathLike[str], *, overwrite: bool = False) -> None:
    """Write `bn_model` and its record to one safetensors file: to a temporary name, read back, then renamed.

    The tensors are the state dict; a complex one is stored as pairs of real numbers, in a last dimension of 2. Equal
    models give equal bytes. The record gets the architecture that the model has now, with a head that was replaced
    after the insertion. `load` restores which ReLUs are fused, and which layers and norms take no gradient.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
        >>> bn_model = bnsurgery.insert(model, [torch.randn(8, 3, 16, 16)])
        >>> bnsurgery.save(bn_model, "net-bn.safetensors", overwrite=True)

    Raises:
        CheckpointError: the file exists and `overwrite` is False, it cannot be written, or it comes back as something
            else; an old file stays intact.
        BNSurgeryError: the model carries no record, or its norms apply other ReLUs than the record says.
    """
    refuse_sharded("save", bn_model)
    record = current_record(bn_model)
    for site in record.sites:
        if site.relu is not None and is_fused(bn_model, site) != record.options.fuse_relu:
            advice = "call bnsurgery.fuse_relu_ or unfuse_relu_, which treat all ReLUs alike"
            raise BNSurgeryError(f"save: '{site.norm}' was changed by hand: {advice}")
    frozen = [name for name, p in bn_model.named_parameters(remove_duplicate=False) if not p.requires_grad]
    frozen += [site.norm for site in record.sites if is_frozen(bn_model.get_submodule(site.norm))]
    record = replace(record, frozen_at_save=tuple(frozen))
    tensors = _storable(bn_model.state_dict())
    with atomic_write(path, overwrite=overwrite) as temporary:
        save_file(tensors, temporary, metadata={_KEY: _sealed(record.to_json())})
        if read_record(temporary) != record:
            raise CheckpointError(f"save: '{path}': the record did not come back as it was written")
        with safe_open(temporary, framework="pt") as file:
            for name, tensor in tensors.items():  # one at a time, so that not all are in memory twice
                if not same_bits(file.get_tensor(name), tensor):
                    raise CheckpointError(f"save: '{path}': {shown(name)} came back from the disk as something else")


def current_record(bn_model: nn.Module) -> SurgeryRecord:
    """The record, as `bnsurgery.record`, with the architecture that the model has now: its head may be another."""
    record = record_of(bn_model)
    if record.architecture is None:
        return record
    original = on_meta(bn_model)
    strip_(original, record.sites)
    return replace(record, architecture=identify_model(original))


def load(
    path: str | PathLike[str], *, model: nn.Module | None = None, map_location: torch.device | str = "cpu"
) -> nn.Module:
    """The model that `save` wrote, in eval mode, with its record.

    It is built on the meta device and filled from the file: no random initialization, no unpickling, no original
    weights. Parameters come back contiguous, ties between them are not kept. Parameters and norms that were frozen when
    the model was saved are frozen again: such norms normalize by their running statistics in train mode.

    Args:
        path: a file that `save` wrote.
        model: the original network, for one that is not torchvision's; used as the skeleton, not changed.
        map_location: the device to put it on.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
        >>> bnsurgery.save(bnsurgery.insert(model, [torch.randn(8, 3, 16, 16)]), "net-bn.safetensors", overwrite=True)
        >>> loaded = bnsurgery.load("net-bn.safetensors", model=model)
        >>> [site.norm for site in bnsurgery.record(loaded).sites]
        ['1']

    Raises:
        CheckpointError: `save` did not write the file, it is damaged or of a newer format, or it does not fit the
            architecture or `model`.
    """
    path = Path(path)
    record, state = read_record(path), read_tensors(path)
    if record is None:
        raise CheckpointError(
            f"load: '{path}': not a bnsurgery checkpoint: its metadata holds no record. A file that `bnsurgery fold` "
            "wrote is a plain state dict: load it with load_state_dict"
        )
    skeleton = _skeleton(path, record, model)
    expected = skeleton.state_dict()
    for name in state.keys() & expected.keys():
        is_pairs = state[name].dtype in _REAL_PARTS and state[name].shape[-1:] == (2,)
        if is_pairs and expected[name].is_complex():
            state[name] = torch.view_as_complex(state[name])
    mismatch = describe_mismatch(state_shapes(skeleton), {name: tensor.shape for name, tensor in state.items()})
    if mismatch:
        raise CheckpointError(f"load: '{path}': the tensors do not fit its record: {mismatch}")
    check_kinds(state, expected, path)
    skeleton.load_state_dict(state, assign=True)
    return skeleton.to(map_location).eval()


def read_record(path: str | PathLike[str]) -> SurgeryRecord | None:
    """The record in a safetensors file's metadata; None where there is none, or the file is of another kind.

    Raises:
        CheckpointError: the file cannot be read, or its record is damaged or of a newer format.
    """
    sealed = read_metadata(path).get(_KEY)
    if sealed is None:
        return None
    text = sealed.partition(" ")[2]
    if sealed != _sealed(text):
        raise CheckpointError(f"'{path}': the record in its metadata is damaged (its SHA-256 differs)")
    try:
        return SurgeryRecord.from_json(text)
    except CheckpointError as error:
        raise CheckpointError(f"'{path}': {error}") from error


def _storable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict as safetensors takes it: contiguous, complex numbers as pairs, no two names for one storage."""
    tensors, seen = {}, set()
    for name, tensor in state.items():
        tensor = tensor.detach()
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.resolve_conj())
        dense = tensor.layout == torch.strided
        if not dense or not has_place_for(tensor.dtype):
            kind = tensor.dtype if dense else tensor.layout
            raise CheckpointError(
                f"save: {shown(name)} is {kind}, which safetensors has no place for. Keep it as another type, or leave "
                "it out of the state dict: register_buffer(..., persistent=False)"
            )
        storage = tensor.untyped_storage().data_ptr()
        copy = tensor.clone(memory_format=torch.contiguous_format) if storage in seen else tensor.contiguous()
        seen.add(storage)
        tensors[name] = copy.resolve_neg()
    return tensors


@cache
def has_place_for(dtype: torch.dtype) -> bool:
    """Whether safetensors can hold numbers of this type."""
    try:
        serialize({"": torch.empty(0, dtype=dtype)})
    except Exception:  # of many kinds, from version to version
        return False
    return True


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, wherever they are, have the same dtype, shape and bytes."""
    one, other = (tensor.detach().cpu().contiguous() for tensor in (one, other))
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)))


def torch_save(state: Mapping[str, Any], temporary: Path) -> None:
    """`torch.save` into the file that `atomic_write` gave: equal states give equal bytes, a failed write an OSError."""
    try:
        with temporary.open("wb") as file:  # given its name, torch would write that into the file
            torch.save(state, file)
    except RuntimeError as error:  # torch's for a failed write, also of what it writes on closing
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise OSError(str(error).splitlines()[0]) from error


def _skeleton(path: Path, record: SurgeryRecord, model: nn.Module | None) -> nn.Module:
    if model is None and record.architecture is None:
        raise CheckpointError(
            f"load: '{path}' holds {with_article(printable(record.model))}, which is not one of torchvision's: "
            "pass `model`, the original network (its weights do not matter)"
        )
    try:
        if model is not None:
            skeleton = on_meta(model)
            task = record.task
            if task is not None and task.head is not None:  # a new head, for other classes
                replace_head_(skeleton, task.head, len(task.classes))
        else:
            skeleton = cast(Architecture, record.architecture).build()
        if record.dropped_lrn:
            drop_lrn_(skeleton, record.dropped_lrn)
        _set_relus_(skeleton, record)
        _freeze_(skeleton, record.frozen)
        sites = edit_(skeleton, record.plan.sites, record.options)
        named = record.sites
        if record.format_version == 1 and not record.options.fuse_relu:  # it names only fused ReLUs
            pairs = zip(named, sites, strict=True)
            named = tuple(replace(old, relu=new.relu, relu_inplace=new.relu_inplace) for old, new in pairs)
        if record.frozen_at_save is not None:
            _freeze_(skeleton, record.frozen_at_save, sites)
        attach_record(skeleton, replace(record, sites=sites, frozen_at_save=None, format_version=FORMAT_VERSION))
        if record.options.fuse_relu:
            take_over_(skeleton, sites)
    except (AttributeError, KeyError, ValueError, TypeError, RuntimeError, StopIteration, BNSurgeryError) as error:
        name = printable(record.model)
        given = name if model is None else f"the {type(model).__name__} given: it is of {with_article(name)}"
        raise CheckpointError(f"load: '{path}': its record does not fit {given}: {printable(str(error))}") from error
    if sites != named:
        raise CheckpointError(f"load: '{path}': its record names other layers than the {printable(record.model)} has")
    return skeleton.eval()


def _freeze_(skeleton: nn.Module, names: Collection[str], sites: Iterable[InsertedSite] = ()) -> None:
    """Freeze the parameters and the norms of `sites` that have these names, no others; ValueError if one is missing."""
    norms = {site.norm: cast(Insertable, skeleton.get_submodule(site.norm)) for site in sites}
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    missing = set(names) - parameters.keys() - norms.keys()
    if missing:
        raise ValueError(f"{shown(min(missing))} was frozen, and is not there")
    for name, norm in norms.items():
        norm.statistics = "running" if name in names else "batch"
    for name, parameter in parameters.items():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(name not in names)


def _set_relus_(skeleton: nn.Module, record: SurgeryRecord) -> None:
    """Let the ReLUs work in place where they did in the network that was saved."""
    for inserted in record.sites:
        if inserted.relu is not None:
            relu = skeleton.get_submodule(str(inserted.site.relu))
            if type(relu) is not nn.ReLU:
                raise ValueError(f"'{inserted.site.relu}' is {with_article(type(relu).__name__)}, expected nn.ReLU")
            relu.inplace = inserted.relu_inplace


def _sealed(text: str) -> str:
    return f"{hashlib.sha256(text.encode()).hexdigest()} {text}"
