"""Follow a model's forward pass symbolically: which module feeds which, and who calls it."""

import inspect
import traceback
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from .errors import UntraceableModelError
from .modes import evaluating
from .nn import Normed

Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    FrozenBatchNorm2d,
)
NORM_FUNCTIONS = {F.batch_norm, F.instance_norm, F.layer_norm, F.group_norm, F.rms_norm}
LAYER_FUNCTIONS = {F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d}
_WRAPPERS = {
    nn.DataParallel: "pass model.module",
    nn.parallel.DistributedDataParallel: "pass model.module",
    torch.jit.ScriptModule: "it is compiled TorchScript: pass the Python module it was made from",
}


class _Tracer(fx.Tracer):
    """fx's tracer, noting for every module those whose forward called it."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self._callers: list[nn.Module] = [root]
        self.callers: dict[nn.Module, set[nn.Module]] = defaultdict(set)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name == _UNREGISTERED:
            return False
        return isinstance(m, (*LAYERS, *NORMS, Normed)) or super().is_leaf_module(m, module_qualified_name)

    def path_of_module(self, mod: nn.Module) -> str:
        # A slice such as `self.features[:5]` is a new Sequential that is registered nowhere: step into it.
        try:
            return super().path_of_module(mod)
        except NameError:
            return _UNREGISTERED

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.callers[m].add(self._callers[-1])
        self._callers.append(m)
        try:
            result = super().call_module(m, forward, args, kwargs)
        finally:
            self._callers.pop()
        if isinstance(result, fx.Proxy) and self.is_leaf_module(m, self.path_of_module(m)):
            result.node.meta["module"] = m
        return result


_UNREGISTERED = "<unregistered>"


class Trace:
    """The calls of a model's forward pass, by module.

    Attributes:
        names: first fully qualified name of every module, by module.
        callers: the modules whose forward called it, by module.
        read: the modules whose parameters or buffers the code reads by itself.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self._calls: dict[nn.Module, list[fx.Node]] = defaultdict(list)
        self.graph, self.callers = _trace(model)
        for node in self.graph.nodes:
            if "module" in node.meta:
                self._calls[node.meta["module"]].append(node)
        owners = [node.target.rpartition(".")[0] for node in self.graph.nodes if node.op == "get_attr"]
        self.read = {model.get_submodule(owner) for owner in owners}

    def calls(self, module: nn.Module) -> list[fx.Node]:
        """Every call of `module`, in order; empty where the forward pass never reaches it."""
        return self._calls.get(module, [])

    def only_user(self, module: nn.Module) -> nn.Module | None:
        """The module that alone consumes every call of `module`, and nothing but those; else None."""
        users = {user.meta.get("module") for node in self.calls(module) for user in node.users}
        if len(users) != 1 or any(len(node.users) != 1 for node in self.calls(module)):
            return None
        user = users.pop()
        return user if user is not None and len(self.calls(user)) == len(self.calls(module)) else None

    def next_layers(self, module: nn.Module) -> Iterator[fx.Node]:
        """The first layers and norms that the outputs of `module` run into, looking through everything else."""
        waiting, seen = [user for node in self.calls(module) for user in node.users], set()
        while waiting:
            node = waiting.pop(0)
            if node in seen:
                continue
            seen.add(node)
            if is_norm(node) or is_layer(node):
                yield node
            else:
                waiting.extend(node.users)


def is_norm(node: fx.Node) -> bool:
    """Whether `node` normalizes: a norm module, a layer that carries one, or a functional norm."""
    return isinstance(node.meta.get("module"), (*NORMS, Normed)) or node.target in NORM_FUNCTIONS


def is_activation(module: nn.Module | None) -> bool:
    """Whether `module` is one of torch's activation modules."""
    return type(module).__module__ == nn.ReLU.__module__ and not isinstance(module, (nn.MultiheadAttention, nn.GLU))


def is_layer(node: fx.Node) -> bool:
    """Whether `node` applies weights: a module with parameters, neither norm nor activation, or F.conv2d and kin."""
    module = node.meta.get("module")
    if module is None:
        return node.target in LAYER_FUNCTIONS
    return not is_norm(node) and not is_activation(module) and any(True for _ in module.parameters())


def _trace(model: nn.Module) -> tuple[fx.Graph, dict[nn.Module, set[nn.Module]]]:
    name = type(model).__name__
    for wrapper, advice in _WRAPPERS.items():
        if isinstance(model, wrapper):
            raise UntraceableModelError(f"plan: {name} is not the network itself: {advice}")
    # Arguments with defaults (`return_features=False`) steer Python control flow: keep their defaults.
    parameters = list(inspect.signature(model.forward).parameters.values())
    defaults = {p.name: p.default for p in parameters[1:] if p.default is not inspect.Parameter.empty}
    try:
        with evaluating(model):
            tracer = _Tracer(model)
            return tracer.trace(model, concrete_args=defaults), tracer.callers
    except Exception as error:
        raise UntraceableModelError(
            f"plan: {name}: cannot follow the forward pass {_where(error)}: {_first_line(error)}. "
            "Control flow that depends on the input's values or shape cannot be traced: "
            "move it out of the model that you pass, or pass the submodule that is free of it."
        ) from error


def _where(error: Exception) -> str:
    """The innermost line of the traceback that is the user's: not torch's, not ours."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    if not frames:
        return "of its modules"
    return f"at {Path(frames[-1].filename).name}:{frames[-1].lineno} ({frames[-1].line})"


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0].rstrip(".") if text else type(error).__name__
