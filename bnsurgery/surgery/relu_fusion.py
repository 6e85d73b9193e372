"""Let the norms apply the ReLUs behind them, and undo it."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from bnsurgery.errors import BNSurgeryError
from bnsurgery.graph.planning import is_hooked
from bnsurgery.nn import Normed
from bnsurgery.nn.batchnorm import Insertable
from bnsurgery.records.record import InsertedSite, attach_record, record
from bnsurgery.text.words import with_article

from .recomputation import recomputes


def fuse_relu_(bn_model: nn.Module) -> None:
    """Let the BatchNorm layers of `bn_model` apply the ReLUs behind them, which become `nn.Identity`.

    y = max(BN(x), 0) takes one pass over the tensor, which is faster on a GPU. The outputs, all names and the state
    dict stay as they are, and `unfuse_relu_` undoes it. Fused are the ReLUs that `record(bn_model)` names, each used
    once, right behind its norm; where they are fused already, nothing happens. All functions of this package work in
    both states. Tools that rebuild norms by their type would drop such a ReLU: call `unfuse_relu_` first.

    Args:
        bn_model: from `insert` or `load`, trained since or not.

    Raises:
        BNSurgeryError: the model carries no record, or a norm or its ReLU was changed since the insertion or has hooks,
            which would see other tensors; nothing is changed then.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 10)).eval()
        >>> bn_model = bnsurgery.insert(model, [torch.randn(8, 3, 16, 16)])
        >>> bnsurgery.fuse_relu_(bn_model)
        >>> bn_model[1].activation, bn_model[2]
        ('relu', Identity())
    """
    take_over_(bn_model, _checked(bn_model, "fuse_relu_", fused=False))
    _note(bn_model, fused=True)


def unfuse_relu_(bn_model: nn.Module) -> None:
    """Undo `fuse_relu_`, or `insert(..., fuse_relu=True)`: every `nn.ReLU` is in its place again, as it was.

    For tools that look at layers: converters that freeze or replace norms, hooks on pre-activations. Without fused
    ReLUs nothing happens.

    Args:
        bn_model: from `insert` or `load`, trained since or not.

    Raises:
        BNSurgeryError: as `fuse_relu_`.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 10)).eval()
        >>> bn_model = bnsurgery.insert(model, [torch.randn(8, 3, 16, 16)], fuse_relu=True)
        >>> bnsurgery.unfuse_relu_(bn_model)
        >>> bn_model[1].activation, bn_model[2]
        (None, ReLU())
    """
    give_back_(bn_model, _checked(bn_model, "unfuse_relu_", fused=True))
    _note(bn_model, fused=False)


def _note(bn_model: nn.Module, *, fused: bool) -> None:
    old = record(bn_model)
    attach_record(bn_model, replace(old, options=replace(old.options, fuse_relu=fused)))


def take_over_(model: nn.Module, sites: Iterable[InsertedSite]) -> None:
    """`fuse_relu_` at those of `sites` that are not fused, with its errors; hooks and the record stay as they are."""
    found = _pairs(model, sites, fused=False)
    for site, norm, relu in found:
        for name, module, expected, sound in (
            (site.norm, norm, "a BatchNorm of bnsurgery.nn", isinstance(norm, Insertable)),
            (site.relu, relu, "an nn.ReLU", type(relu) is nn.ReLU),
        ):
            if not sound:
                got = with_article(type(module).__name__)
                raise BNSurgeryError(f"fuse_relu_: '{name}' is {got} now, expected {expected}")
    for _, norm, relu in found:
        norm.activation = "relu"
        relu.__class__ = nn.Identity  # the same object keeps its settings, names, mode and hooks


def give_back_(model: nn.Module, sites: Iterable[InsertedSite]) -> None:
    """`unfuse_relu_` at those of `sites` that are fused, with its errors; hooks and the record stay as they are."""
    for _, norm, relu in _pairs(model, sites, fused=True):
        norm.activation = None
        relu.__class__ = nn.ReLU


def is_fused(model: nn.Module, site: InsertedSite) -> bool:
    """Whether the norm of `site` applies its ReLU now.

    Raises:
        BNSurgeryError: the norm and the ReLU's place do not match: another tool changed one of them.
    """
    if site.relu is None:
        return False
    try:
        norm, place = model.get_submodule(site.norm), model.get_submodule(site.relu)
    except AttributeError as error:
        raise BNSurgeryError(f"the model was changed since the insertion: {error}") from None
    applied, gone = getattr(norm, "activation", None) == "relu", type(place) is nn.Identity
    if gone and not applied:
        raise BNSurgeryError(
            f"'{site.norm}' ({type(norm).__name__}) does not apply the ReLU that '{site.relu}' stands for: did another "
            "tool convert it? Put an nn.ReLU there; the next time call bnsurgery.unfuse_relu_ first"
        )
    if applied and not gone:
        raise BNSurgeryError(
            f"'{site.norm}' applies a ReLU, and {with_article(type(place).__name__)} was put into its place "
            f"'{site.relu}': set the norm's activation to None"
        )
    return applied


def _checked(model: nn.Module, caller: str, fused: bool) -> list[InsertedSite]:
    """The sites whose ReLU is `fused` or not, after a check that none of their modules has hooks."""
    try:
        sites = [site for site, _, _ in _pairs(model, record(model).sites, fused)]
    except BNSurgeryError as error:
        raise BNSurgeryError(f"{caller}: {error}") from None
    if sites and recomputes(model):
        raise BNSurgeryError(
            f"{caller}: recompute_activations_ is active in this network, with hooks on norms and ReLUs. Call "
            f"recompute_activations_(model, False), then {caller}(model), then recompute_activations_(model)"
        )
    for site in sites:
        carrier = site.norm.rpartition(".")[0]
        names = [site.norm, str(site.relu), *([carrier] if isinstance(model.get_submodule(carrier), Normed) else [])]
        hooked = next((name for name in names if is_hooked(model.get_submodule(name))), None)
        if hooked is not None:
            raise BNSurgeryError(f"{caller}: '{hooked}' has hooks, which would see other tensors: remove them first")
    return sites


def _pairs(model: nn.Module, sites: Iterable[InsertedSite], fused: bool) -> list[tuple[InsertedSite, Any, Any]]:
    """The norms and their ReLUs at those of `sites` that are `fused` or not."""
    found = [site for site in sites if site.relu is not None and is_fused(model, site) == fused]
    return [(site, model.get_submodule(site.norm), model.get_submodule(str(site.relu))) for site in found]
