"""Refuse models that cannot be edited, and name what to pass instead."""

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from bnsurgery.errors import UntraceableModelError
from bnsurgery.text.words import with_article

from .layer_kinds import LAYERS

_QUANTIZED_PACKAGES = ("torch.ao.nn.", "torchao.", "bitsandbytes.")


def refuse(model: nn.Module) -> None:
    """Raise UntraceableModelError if `model` is a wrapper, compiled, exported, quantized or not initialized yet."""
    name = type(model).__name__
    advice = _obstacle(model)
    if advice:
        raise UntraceableModelError(f"plan: {name} is not the network itself: {advice}")
    wrapped = [(fqn, inside) for fqn, module in model.named_modules() if fqn and (inside := _inside(module))]
    if wrapped:
        lines = "; ".join(f"{_expression(fqn)} = {_expression(fqn)}.{inside}" for fqn, inside in wrapped)
        kind = type(model.get_submodule(wrapped[0][0])).__name__
        raise UntraceableModelError(
            f"plan: {name}: '{wrapped[0][0]}' is {with_article(kind)}, around the layers themselves. Unwrap it, and "
            f"wrap the result anew: {lines}"
        )
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


def _inside(module: nn.Module) -> str | None:
    """The attribute in which a wrapper keeps the module itself; None if `module` is no wrapper."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "module"
    return "_orig_mod" if "_orig_mod" in module._modules else None


def _expression(fqn: str) -> str:
    """A Python expression for a submodule of `model`."""
    return "model" + "".join(f".{part}" if part.isidentifier() else f"[{part}]" for part in fqn.split("."))


def _obstacle(model: object) -> str | None:
    exported = isinstance(model, torch.export.ExportedProgram) or (
        isinstance(model, fx.GraphModule)
        and any(isinstance(n.target, torch._ops.OpOverload) for n in model.graph.nodes)
    )
    if exported or isinstance(model, torch.jit.ScriptModule):
        kind = "an exported program" if exported else "compiled TorchScript"
        return f"it is {kind}: pass the Python module it was made from"
    if not isinstance(model, nn.Module):
        return "expected a torch.nn.Module"
    if (inside := _inside(model)) is not None:
        how = "it is compiled by torch.compile: " if inside == "_orig_mod" else ""
        return f"{how}pass model.{inside}, and wrap the result anew"
    return None


def _is_quantized(module: nn.Module) -> bool:
    parameters = list(module.parameters(recurse=False))
    home, *homes = (type(item).__module__ for item in (module, *parameters))
    if home.startswith(_QUANTIZED_PACKAGES) and "quantized" in home:
        return True
    if any(home.startswith(_QUANTIZED_PACKAGES) for home in homes):
        return True
    return isinstance(module, LAYERS) and any(not (p.is_floating_point() or p.is_complex()) for p in parameters)
