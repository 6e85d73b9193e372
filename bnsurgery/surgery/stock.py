"""An inserted network in torch.nn's own layers, for tools that look at types."""

from collections.abc import Callable
from typing import Any

from torch import nn

from bnsurgery.errors import BNSurgeryError
from bnsurgery.nn import LastDimBatchNorm1d, Normed
from bnsurgery.nn.normed import detach_
from bnsurgery.nn.settings import OURS
from bnsurgery.records.record import InsertedSite, detach_record, record

from .copies import independent, refuse_sharded
from .folding import fold_, zero_bias
from .module_tree import replace
from .recomputation import keep_activations_
from .relu_fusion import give_back_


def to_torch(bn_model: nn.Module, *, keep: Callable[[InsertedSite], bool] = lambda site: True) -> nn.Module:
    """A copy of `bn_model` whose BatchNorm and ReLU layers are torch.nn's own classes, with the same parameters.

    For tools that recognise layers by their exact type: quantization-aware training with torch.ao, `torch.fx`'s fusion,
    `SyncBatchNorm.convert_sync_batchnorm`. A ReLU that a norm applies becomes an `nn.ReLU` again; a layer with its norm
    inside (outside a `nn.Sequential`) becomes `nn.Sequential(layer, norm)`, where its keys gain a `0.` and its norm's
    have `1.` instead of `norm.`. Norms over the last dimension, for which torch has no class, are folded. Statistics
    modes, process groups and the record are dropped.

    Args:
        bn_model: from `insert` or `load`, trained since or not; not changed.
        keep: whether the norm of a site stays; else it is folded.

    Raises:
        FoldError: a norm that has to be folded cannot be.
        BNSurgeryError: the model carries no record, a fused ReLU is lost, or a layer with its norm inside has forward
            hooks.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 10)).eval()
        >>> stock = bnsurgery.to_torch(bnsurgery.insert(model, [torch.randn(8, 3, 16, 16)]))
        >>> type(stock[1]) is nn.BatchNorm2d
        True
    """
    refuse_sharded("to_torch", bn_model)
    sites, model = record(bn_model).sites, independent(bn_model)
    keep_activations_(model)
    give_back_(model, sites)
    kept = [site for site in sites if keep(site) and not isinstance(model.get_submodule(site.norm), LastDimBatchNorm1d)]
    # Modules, not names: folding renumbers those behind.
    found: list[Any] = [
        (site, *map(model.get_submodule, (site.norm, site.norm.rpartition(".")[0], site.layer))) for site in kept
    ]
    fold_(model, [site for site in sites if site not in kept])
    for site, norm, carrier, layer in found:
        if isinstance(carrier, Normed):
            if carrier._forward_hooks:
                hooked = f"'{site.layer}' has forward hooks, which run behind its norm"
                raise BNSurgeryError(f"to_torch: {hooked}: remove them first")
            detach_(carrier)
            replace(model, carrier, nn.Sequential(carrier, norm).train(carrier.training))
        if site.absorbed_bias and layer.bias is None:  # torch's own networks have one
            layer.bias = zero_bias(layer)
    for norm in [module for module in model.modules() if type(module) in OURS.values()]:
        replace(model, norm, _stock(norm))
    detach_record(model)
    return model


def _stock(norm: nn.Module) -> nn.Module:
    cls: Any = next(cls for cls in type(norm).__mro__ if cls in OURS)
    new = cls(vars(norm)["num_features"], norm.eps, norm.momentum, device="meta")
    new._parameters.update(norm._parameters)
    new._buffers.update({name: norm._buffers[name] for name in new._buffers})
    return new.train(norm.training)
