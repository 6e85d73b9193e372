"""Trace a model's forward pass: the graph of its calls, as far as the code can be followed."""

import inspect
import traceback
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnsurgery.errors import UntraceableModelError
from bnsurgery.nn import Normed
from bnsurgery.running.batches import Inputs
from bnsurgery.running.calls import placed
from bnsurgery.running.modes import evaluate, observing

from .layer_kinds import LAYER_FUNCTIONS, LAYERS, NORM_FUNCTIONS, NORMS, is_activation
from .symbolic import Tracer
from .unsupported import refuse


class Trace:
    """The calls of a model's forward pass, by module.

    torch.fx follows the code. A submodule that it cannot follow (control flow that depends on the numbers) is one call
    of unknown content; if that is the model itself, its submodules are followed separately. With an example, its first
    sample gives the shapes, and the calls that ran are compared with those that were followed.

    Attributes:
        names: first fully qualified name of every module, by module.
        example: the first sample, if an example was given.
        nodes: the nodes of all graphs.
        calls: every call that was followed, in order, by module.
        shapes: the shapes of a module's outputs on the example.
        opaque: the modules whose forward cannot be followed, and the reasons.
        shaped: the modules whose forward was followed with the example's shapes, and may branch differently on others.
        uncertain: the modules inside those two, which may be used differently on other inputs, shapes or flags.
        read: the modules whose parameters are read by the code of another.

    Raises:
        UntraceableModelError: no layer at all can be followed, or the model is of a kind that cannot be edited.
        CalibrationError: the model does not take the example.
    """

    def __init__(self, model: nn.Module, example: Inputs | None = None) -> None:
        refuse(model)
        self.names = {module: name for name, module in model.named_modules()}
        scripts = [module for module in self.names if isinstance(module, torch.jit.ScriptModule)]
        self.opaque: dict[nn.Module, str] = dict.fromkeys(scripts, "compiled TorchScript")
        self.example = None if example is None else example.take(0, 1)
        self.nodes: list[fx.Node] = []
        self.calls: dict[nn.Module, list[fx.Node]] = defaultdict(list)
        self.shapes: dict[nn.Module, set[torch.Size]] = defaultdict(set)
        self.shaped: set[nn.Module] = set()
        self.read: set[nn.Module] = set()
        self._followed: set[nn.Module] = set()
        self._callers: dict[nn.Module, set[nn.Module]] = defaultdict(set)  # as followed
        self._really: dict[nn.Module, set[nn.Module]] = defaultdict(set)  # on the example
        self._inputs: dict[nn.Module, Inputs] = {}  # of the first call on the example, for modules with children
        if self.example is not None:
            self._observe(model, self.example)
        with observing(model):
            self._follow(model, None if self.example is None else placed(model, self.example))
            self._descend()
        self.uncertain = {inner for outer in [*self.opaque, *self.shaped] for inner in outer.modules()}
        if not self._has_layers() and self.opaque and any(isinstance(module, LAYERS) for module in self.names):
            culprit, reason = next(iter(self.opaque.items()))
            raise UntraceableModelError(
                f"plan: {type(model).__name__}: cannot follow the forward pass: {self.called(culprit)}: {reason}. "
                "Control flow that depends on the input's values cannot be traced: move it out of the model that you "
                "pass, or into a separate submodule, or pass a submodule without it."
            )

    def layers(self) -> Iterator[nn.Module]:
        """Conv and dense modules in order of definition: torch's, and custom ones that call F.conv2d or the like."""
        own = {node.meta.get("module") for node in self.nodes if node.target in LAYER_FUNCTIONS}
        return (module for module in self.names if isinstance(module, LAYERS) or module in own)

    def callers(self, module: nn.Module) -> set[nn.Module]:
        """The modules whose forward called `module`, as followed and on the example."""
        return self._callers[module] | self._really[module]

    def only_user(self, module: nn.Module) -> nn.Module | None:
        """The one module that consumes every call of `module` and nothing else, or None."""
        users = {user.meta.get("module") for user in self._sole_users(module)}
        user = users.pop() if len(users) == 1 else None
        if user is None or len(self.calls[user]) != len(self.calls[module]):
            return None
        # All calls that ran on the example were followed.
        return user if all(self._really[m] <= self._callers[m] for m in (module, user)) else None

    def activation_function(self, module: nn.Module) -> str | None:
        """The name of the one function or method that consumes every call of `module`, or None."""
        users = {user.target for user in self._sole_users(module) if "module" not in user.meta}
        user = users.pop() if len(users) == 1 else None
        return user if isinstance(user, str) else getattr(user, "__name__", None)

    def _sole_users(self, module: nn.Module) -> list[fx.Node]:
        """The nodes that consume the calls of `module`; none if a call has several users, or none."""
        users = [list(node.users) for node in self.calls[module]]
        return [user for (user,) in users] if all(len(nodes) == 1 for nodes in users) else []

    def next_layers(self, module: nn.Module) -> Iterator[fx.Node]:
        """The first layers and norms behind `module`, looking through everything else."""
        waiting, seen = [user for node in self.calls[module] for user in node.users], set()
        for node in waiting:  # the list grows meanwhile
            if node not in seen and (is_norm(node) or is_layer(node)):
                yield node
            elif node not in seen:
                waiting += node.users
            seen.add(node)

    def obstacle(self, module: nn.Module) -> str | None:
        """The module around `module` that was not traced, in words, or None."""
        untraced = (m for m in self.names if m is not module and (m in self.opaque or self.calls[m]))
        innermost = self._innermost(module, untraced)
        if innermost is None:
            return None
        why = "whose forward cannot be followed" if innermost in self.opaque else "which is taken as one"
        return f"inside {self.called(innermost)}, {why}"

    def part(self, module: nn.Module) -> str | None:
        """The part of an opaque model in which `module` was followed; None if the whole was followed."""
        root = self._innermost(module, self._followed)
        return f"'{self.names[root]}'" if root is not None and self.names[root] else None

    def _innermost(self, module: nn.Module, among: Iterable[nn.Module]) -> nn.Module | None:
        """The innermost of these modules that is or contains `module`."""
        name = f"{self.names[module]}."
        around = [m for m in among if not self.names[m] or name.startswith(f"{self.names[m]}.")]
        return max(around, key=lambda m: len(self.names[m]), default=None)

    def called(self, module: nn.Module) -> str:
        """The module's name and class for messages."""
        return f"'{self.names[module]}' ({type(module).__name__})" if self.names[module] else type(module).__name__

    def _has_layers(self) -> bool:
        return any(isinstance(node.meta.get("module"), LAYERS) or node.target in LAYER_FUNCTIONS for node in self.nodes)

    def _observe(self, model: nn.Module, example: Inputs) -> None:
        """Run the example, and record callers, shapes and inputs."""
        running: list[nn.Module] = []

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._really[module].update(running[-1:])
            running.append(module)
            if next(module.children(), None) is not None:
                self._inputs.setdefault(module, Inputs(args, kwargs))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            running.pop()
            if isinstance(output, Tensor):
                self.shapes[module].add(output.shape)

        with ExitStack() as hooks:
            for module in model.modules():
                if not isinstance(module, torch.jit.ScriptModule):  # does not support these hooks
                    hooks.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
                    hooks.enter_context(module.register_forward_hook(leave))
            evaluate("plan", model, example)

    def _follow(self, root: nn.Module, example: Inputs | None) -> None:
        """Add the graph of `root`, with submodules that cannot be followed as leaves, or record `root` as opaque."""
        if any(isinstance(p.default, bool) for p in inspect.signature(root.forward).parameters.values()):
            self.shaped.add(root)  # another value of the flag may lead to other calls
        while root not in self.opaque:
            tracer = Tracer(root, set(self.opaque), self.shaped)
            try:
                graph = tracer.follow(root, example)
            except Exception as error:  # the user's code can fail in any way on a proxy
                culprit = root if tracer.broke is None or tracer.broke in self.opaque else tracer.broke
                if culprit not in self.shaped and example is not None:
                    self.shaped.add(culprit)
                else:
                    text = str(error).strip() or type(error).__name__
                    self.opaque[culprit] = f"{_where(error)}: {text.splitlines()[0].rstrip('.')}"
                continue
            self._followed.add(root)
            self.nodes += graph.nodes
            self.read |= tracer.read
            for node in graph.nodes:
                if "module" in node.meta:
                    self.calls[node.meta["module"]].append(node)
            for module, callers in tracer.callers.items():
                self._callers[module] |= callers
            return

    def _descend(self) -> None:
        """If no layer was followed, follow the submodules of the opaque modules separately."""
        descended: set[nn.Module] = set()
        while not self._has_layers() and (tops := [module for module in self.opaque if module not in descended]):
            descended.update(tops)
            for child in (child for top in tops for child in _parts(top)):
                if self.example is None or child in self._inputs:
                    self._follow(child, self._inputs.get(child))


def is_norm(node: fx.Node) -> bool:
    """Whether `node` normalizes: a norm module, a layer with one inside, or a functional norm."""
    return isinstance(node.meta.get("module"), (*NORMS, Normed)) or node.target in NORM_FUNCTIONS


def is_layer(node: fx.Node) -> bool:
    """Whether `node` applies weights: a module with parameters, not a norm or activation, or F.conv2d or the like."""
    module = node.meta.get("module")
    if module is None:
        return node.target in LAYER_FUNCTIONS
    return not is_norm(node) and not is_activation(module) and next(module.parameters(), None) is not None


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The children that contain layers; of a list or dict of modules, which is never called, the items that do."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _parts(child)
        elif not isinstance(child, LAYERS) and any(isinstance(inner, LAYERS) for inner in child.modules()):
            yield child


def _where(error: Exception) -> str:
    """The innermost line of the traceback in the user's code, neither torch's nor this package's."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    if not frames:
        return "in its modules"
    return f"at {Path(frames[-1].filename).name}:{frames[-1].lineno} ({frames[-1].line})"
