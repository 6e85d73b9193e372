"""The record of an insertion, kept with the model and as JSON in its checkpoint."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from numbers import Real
from typing import Any

import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnsurgery._version import __version__
from bnsurgery.errors import BNSurgeryError, CheckpointError, shown
from bnsurgery.graph.planning import Plan, Site
from bnsurgery.images.preprocessing import Preprocessing
from bnsurgery.text.tables import table
from bnsurgery.text.typed_json import loads, parse
from bnsurgery.text.words import counted

from .architectures import Architecture

# 1 named a ReLU only if it was fused; 1 and 2 had no frozen parameters, and preprocessing only of fine-tuned networks;
# 3 had those frozen at the insertion. All three had the fields of plan and options in the record itself.
FORMAT_VERSION = 4
_VERSIONS = {"bnsurgery": __version__, "torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}
_ATTRIBUTE = "_bnsurgery_record"


@dataclass(frozen=True)
class Task:
    """The preprocessing of images for a network, and the classes it was fine-tuned to.

    Attributes:
        classes: their names, in the order of the outputs; empty if it was not fine-tuned.
        head: fqn of the output layer in the original network if it was replaced for these classes, else None.
        preprocessing: from an image to the input; None if the inputs are not images.
    """

    classes: tuple[str, ...]
    head: str | None
    preprocessing: Preprocessing | None

    def __post_init__(self) -> None:
        if self.head is not None and not self.classes:
            raise CheckpointError("task: a new head, but no classes for it")


@dataclass(frozen=True)
class Options:
    """The options of the norms, see `insert`. In a record, `fuse_relu` says whether they apply their ReLUs now."""

    absorb_bias: bool = False
    fuse_relu: bool = False
    eps: float = 1e-5
    momentum: float | None = 0.1

    def __post_init__(self) -> None:
        if not (isinstance(self.eps, Real) and 0 < self.eps <= 1):
            raise ValueError(f"insert: eps must be a number above 0 and at most 1, got {self.eps!r}")
        if self.momentum is not None and not (isinstance(self.momentum, Real) and 0 <= self.momentum <= 1):
            raise ValueError(f"insert: momentum must be None or between 0 and 1, got {self.momentum!r}")
        for name in ("eps", "momentum"):  # NumPy's numbers have no place in a file
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else float(value))

    def check(self, placement: str) -> None:
        """Raise ValueError if these options do not go with `placement`."""
        if self.absorb_bias and placement != "pre-activation":
            raise ValueError("insert: absorbing biases needs `placement='pre-activation'`: shifts pass no activation")


@dataclass(frozen=True)
class InsertedSite:
    """A site and the names of its modules in the BN model.

    Attributes:
        site: the site as planned, named as in the original model.
        layer: fqn of the conv or dense layer now.
        norm: fqn of its BatchNorm.
        relu: fqn of the ReLU that the norm can apply, if any; an Identity takes its place while it is fused.
        relu_inplace: whether that ReLU worked in place.
        next_layer: fqn of the layer that a post-activation norm folds into now.
        absorbed_bias: whether the layer's bias was dropped.
    """

    site: Site
    layer: str
    norm: str
    relu: str | None
    relu_inplace: bool
    next_layer: str | None
    absorbed_bias: bool


@dataclass(frozen=True)
class SurgeryRecord:
    """How a BN model was made.

    Attributes:
        plan: where BatchNorm went, and why not elsewhere, by the original's names.
        options: the options of the norms.
        architecture: the torchvision architecture, if it is one.
        weights_digest: `state_digest` of the original's state dict.
        sites: those of the plan, in its order, by the BN model's names.
        calibration_digest: SHA-256 of the calibration's moments, see `moments.digest`.
        provenance: the sources of weights and images, as given by the caller.
        versions: the versions of the libraries.
        task: preprocessing and classes, if known.
        dropped_lrn: fqns of the LocalResponseNorm layers that were removed first.
        input_shape: of one calibration sample, if the input is one tensor of real numbers.
        frozen: the original's parameters without gradient at the insertion.
        frozen_at_save: in a file, the names in the BN model of the parameters without gradient and of the norms that
            also kept their running statistics; `load` freezes them again.
    """

    plan: Plan
    options: Options
    architecture: Architecture | None
    weights_digest: str
    sites: tuple[InsertedSite, ...]
    calibration_digest: str
    provenance: dict[str, str | int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=_VERSIONS.copy)
    task: Task | None = None
    dropped_lrn: tuple[str, ...] = ()
    input_shape: tuple[int, ...] | None = None
    frozen: tuple[str, ...] = ()
    frozen_at_save: tuple[str, ...] | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.input_shape is not None and min(self.input_shape, default=1) < 1:
            raise ValueError(f"input_shape: got {shown(self.input_shape)}, expected sizes of 1 or more")

    def __str__(self) -> str:
        rows = [(s.site.name, s.norm, s.site.channels, s.site.activation) for s in self.sites]
        text = table(("site", "BatchNorm", "channels", "activation"), rows)
        frozen = f", {counted(len(self.frozen), 'parameter')} frozen at the insertion" if self.frozen else ""
        layers = f"{counted(len(self.sites), 'BatchNorm layer')}, {self.plan.placement}, layers={self.plan.layers}"
        return f"{text}\n\n{self.model}: {layers}{frozen}"

    @property
    def model(self) -> str:
        """Class name of the original model."""
        return self.plan.model

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready. The planned sites are only in the plan, in the same order."""
        found = asdict(self)
        for inserted in found["sites"]:
            del inserted["site"]
        return found

    def to_json(self) -> str:
        """One line, keys sorted: equal records give equal text."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "SurgeryRecord":
        """Read the text of `to_json`, which is not trusted.

        Raises:
            CheckpointError: the text is not JSON or of a newer format, or a field is missing, unknown, of the wrong
                type or out of range.
        """
        try:
            data = loads(text)
        except ValueError as error:
            raise CheckpointError(f"record: not JSON: {error}") from None
        version = data.get("format_version") if isinstance(data, dict) else None
        if type(version) is not int or version < 1:
            raise CheckpointError(f"record: got format version {shown(version)}, expected {FORMAT_VERSION}")
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"record: got format version {shown(version)}, above {FORMAT_VERSION}: upgrade bnsurgery"
            )
        if version < 3:
            data = {**data, "task": _upgraded_task(data.get("task")), "frozen": []}
        if version < 4:
            data = _upgraded_to_format_4(data)
        plan = parse(Plan, data.get("plan"), "record.plan")
        sites = data.get("sites")
        if not isinstance(sites, list) or len(sites) != len(plan.sites) or not all(isinstance(s, dict) for s in sites):
            raise CheckpointError(f"record.sites: got {shown(sites)}, expected an object for every site of the plan")
        planned = data["plan"]["sites"]
        data = {**data, "sites": [{**now, "site": site} for now, site in zip(sites, planned, strict=True)]}
        found: SurgeryRecord = parse(cls, data, "record")  # `load` compares it with the network and its tensors
        return found


def _upgraded_to_format_4(data: dict[str, Any]) -> dict[str, Any]:
    """Convert a record of formats 1 to 3, which had these fields in itself and each site in full."""
    data, sites = dict(data), data.get("sites", [])
    sound = isinstance(sites, list) and all(isinstance(site, dict) for site in sites)
    sites = [dict(site) for site in sites] if sound else []
    plan = {name: data.pop(name, None) for name in ("model", "placement", "layers", "head")}
    plan |= {"sites": [site.pop("site", None) for site in sites], "skipped": [], "lrn": []}
    options = {option.name: data.pop(option.name, None) for option in fields(Options)}
    return {**data, "plan": plan, "options": options, "sites": sites, "frozen_at_save": None}


def _upgraded_task(task: Any) -> Any:
    """Convert a task of format 1 or 2, in which images were square, scaled to 0 to 1, and RGB or grey."""
    if not isinstance(task, dict):
        return task
    names = {"image_size": "height", "resize_size": "resize", "mean": "mean", "std": "std"}
    found = {new: task[old] for old, new in names.items() if old in task}
    found |= {"width": found.get("height"), "scale": 1.0, "interpolation": "bilinear"}
    found["channels"] = "grey" if isinstance(task.get("mean"), list) and len(task["mean"]) == 1 else "rgb"
    return {**{name: value for name, value in task.items() if name not in names}, "preprocessing": found}


def record(bn_model: nn.Module) -> SurgeryRecord:
    """The record of the insertion into this model.

    Raises:
        BNSurgeryError: the model was not made by `insert` or `load`.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 10)).eval()
        >>> record = bnsurgery.record(bnsurgery.insert(model, [torch.randn(8, 3, 16, 16)]))
        >>> record.plan.placement, record.options.eps, [site.norm for site in record.sites]
        ('pre-activation', 1e-05, ['1'])
    """
    # Not getattr: a wrapper may delegate it, but names its layers differently.
    found = vars(bn_model).get(_ATTRIBUTE) or _meta(bn_model).get(_ATTRIBUTE)
    if isinstance(found, SurgeryRecord):
        return found
    name = type(bn_model).__name__
    norms = {fqn: type(norm) for fqn, norm in bn_model.named_modules() if isinstance(norm, _BatchNorm)}
    if norms and all(kind.__module__.startswith("torch.") for kind in norms.values()):
        raise BNSurgeryError(
            f"{name} carries no record of bnsurgery.insert: its norm '{next(iter(norms))}' is its own. "
            "bnsurgery.fold(model) folds it into the layers; the other functions need an inserted network"
        )
    raise BNSurgeryError(
        f"record: {name} carries no record: it was not made by bnsurgery.insert or .load "
        "(a wrapped model carries it inside: pass model.module, or model._orig_mod)"
    )


def carries_record(model: nn.Module) -> bool:
    """Whether `model` was made by `insert` or `load`."""
    return isinstance(getattr(model, _ATTRIBUTE, None) or _meta(model).get(_ATTRIBUTE), SurgeryRecord)


def attach_record(model: nn.Module, record: SurgeryRecord) -> None:
    """Make `record(model)` return this."""
    setattr(model, _ATTRIBUTE, record)
    _meta(model)[_ATTRIBUTE] = record


def detach_record(model: nn.Module) -> None:
    """Undo `attach_record`."""
    vars(model).pop(_ATTRIBUTE, None)
    _meta(model).pop(_ATTRIBUTE, None)


def _meta(model: nn.Module) -> dict[str, Any]:
    """The part of a `torch.fx.GraphModule` that copies of it keep; its other attributes are kept by pickling alone."""
    return model.meta if isinstance(model, torch.fx.GraphModule) else {}


def state_digest(state_dict: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of every entry's key, dtype, shape and bytes, in key order."""
    sha = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().resolve_conj().resolve_neg().contiguous()
        sha.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()
