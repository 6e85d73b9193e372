"""Models that cannot be edited, whatever their layers: refused by name, with what to pass instead."""

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from .errors import UntraceableModelError
from .layer_kinds import LAYERS

_WRAPPERS = {
    nn.DataParallel: "pass model.module",
    nn.parallel.DistributedDataParallel: "pass model.module",
    torch.jit.ScriptModule: "it is compiled TorchScript: pass the Python module it was made from",
}
_QUANTIZED_PACKAGES = ("torch.ao.nn.", "torchao.", "bitsandbytes.")


def refuse(model: nn.Module) -> None:
    """Raise for what is no network of ordinary layers.

    Raises:
        UntraceableModelError: a wrapper, compiled, exported or quantized, or not initialized yet.
    """
    name = type(model).__name__
    advice = _obstacle(model)
    if advice:
        raise UntraceableModelError(f"plan: {name} is not the network itself: {advice}")
    for fqn, module in model.named_modules():
        kind = type(module).__name__
        if _is_quantized(module):
            raise UntraceableModelError(
                f"plan: {name} is quantized: '{fqn}' is a {kind} with integer weights. Insert into the floating-point "
                "network it was made from, and quantize that"
            )
        if any(is_lazy(p) for p in module.parameters(recurse=False)):
            raise UntraceableModelError(
                f"plan: '{fqn}' ({kind}) has no weights yet: run {name} once on a batch, or load its state dict, first"
            )


def _obstacle(model: object) -> str | None:
    for wrapper, advice in _WRAPPERS.items():
        if isinstance(model, wrapper):
            return advice
    if isinstance(model, torch.export.ExportedProgram):
        return "it is an exported program: pass the Python module it was made from"
    if not isinstance(model, nn.Module):
        return "expected a torch.nn.Module"
    if "_orig_mod" in model._modules:
        return "it is compiled by torch.compile: pass model._orig_mod, and compile the result"
    if isinstance(model, fx.GraphModule) and any(
        isinstance(n.target, torch._ops.OpOverload) for n in model.graph.nodes
    ):
        return "it is an exported program's graph of operators: pass the Python module it was made from"
    return None


def _is_quantized(module: nn.Module) -> bool:
    if type(module).__module__.startswith(_QUANTIZED_PACKAGES) and "quantized" in type(module).__module__:
        return True
    parameters = list(module.parameters(recurse=False))
    if any(type(p).__module__.startswith(_QUANTIZED_PACKAGES) for p in parameters):
        return True
    return isinstance(module, LAYERS) and any(not (p.is_floating_point() or p.is_complex()) for p in parameters)
