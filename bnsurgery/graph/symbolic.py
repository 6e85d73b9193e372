"""torch.fx's symbolic tracing with an example: code that asks for shapes gets them, but never values."""

import inspect
import operator
import threading
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.fx.proxy import Attribute
from torch.utils._pytree import tree_map

from bnsurgery.nn import Normed
from bnsurgery.running.batches import Inputs

from .layer_kinds import LAYER_FUNCTIONS, LAYERS, NORMS

# Properties of a tensor that do not depend on its numbers. They are symbolic at first; code that needs a value, such as
# `if x.shape[1] == 3`, gets the example's. Numbers stay symbolic, and control flow that depends on them fails.
_METHODS = {"size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "is_floating_point"}
_METHODS |= {"is_complex", "element_size", "get_device"}
_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_cuda", "is_meta", "is_quantized"}
_UNREGISTERED = "<unregistered>"
_CONSTANT = "<constant>"
# While it traces, fx replaces nn.Module's __call__ and __getattr__ for the whole process: one trace at a time.
_TRACING = threading.RLock()
_UNKNOWN: Any = object()  # the value of a proxy without an example, or whose computation failed


class ValueProxy(fx.Proxy):
    """A proxy that knows its value on the example.

    Attributes:
        value: that value, or `_UNKNOWN`.
        is_shape: whether it depends on nothing but shapes, types and the like.
    """

    value: Any = _UNKNOWN
    is_shape = False
    tracer: "Tracer"
    __getitem__: Callable[[Any, Any], Any]  # fx adds it

    def __getattr__(self, k: str) -> Any:
        if k in _ATTRIBUTES and isinstance(self.value, Tensor):
            return self.tracer.create_proxy("call_function", getattr, (self, k), {})
        return super().__getattr__(k)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __bool__(self) -> bool:
        return bool(self.value) if self.is_shape and self.tracer.tells_shapes() else super().__bool__()

    def __index__(self) -> int:
        if self.is_shape and self.tracer.tells_shapes():
            return operator.index(self.value)
        raise TypeError("symbolically traced variables have no value")

    def __len__(self) -> int:
        if isinstance(self.value, (tuple, list)) or (isinstance(self.value, Tensor) and self.tracer.tells_shapes()):
            return len(self.value)
        return super().__len__()

    def __iter__(self) -> Any:
        if isinstance(self.value, (Tensor, tuple, list)):
            return iter([self[i] for i in range(len(self))])
        return super().__iter__()


class Tracer(fx.Tracer):
    """fx's tracer that also records who called each module, and where tracing failed.

    It traces the thread that made it: code in other threads runs as usual.

    Attributes:
        callers: by module, the registered modules whose forward called it.
        read: the modules whose parameters are read by the code of another.
        broke: after a failure, the innermost module whose forward could not be followed.
    """

    def __init__(self, root: nn.Module, opaque: set[nn.Module], shaped: set[nn.Module]) -> None:
        super().__init__()
        self._opaque = opaque
        self._shaped = shaped
        self._callers: list[nn.Module] = [root]
        self._example: Inputs | None = None
        self._evaluating = False
        self._thread = threading.get_ident()
        self._owners = {parameter: module for module in root.modules() for parameter in module._parameters.values()}
        self.callers: dict[nn.Module, set[nn.Module]] = defaultdict(set)
        self.read: set[nn.Module] = set()
        self.broke: nn.Module | None = None

    def follow(self, model: nn.Module, example: Inputs | None) -> fx.Graph:
        """The graph of `model`'s forward pass; with an example, of the branches that it takes."""
        self._example = example
        with _TRACING:
            return self.trace(model)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        # Only tensors become symbolic. Python control flow depends on containers, flags and missing arguments.
        signature = inspect.signature(self.root.forward)
        if self._example is not None:
            bound = signature.bind(*self._example.args, **self._example.kwargs)
        else:
            stars: dict[Any, Any] = {inspect.Parameter.VAR_POSITIONAL: (_UNKNOWN,), inspect.Parameter.VAR_KEYWORD: {}}
            required = [p for p in signature.parameters.values() if p.default is inspect.Parameter.empty]
            bound = inspect.BoundArguments(signature, {p.name: stars.get(p.kind, _UNKNOWN) for p in required})
        for name, argument in bound.arguments.items():
            bound.arguments[name] = tree_map(partial(self._symbolic, name), argument)
        return lambda: root_fn(self.root, *bound.args, **bound.kwargs), []

    def _symbolic(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) and value is not _UNKNOWN:
            return value
        proxy = self.create_proxy("placeholder", name, (), {})
        proxy.value = value
        return proxy

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name == _UNREGISTERED:
            return False
        if m in self._opaque or isinstance(m, (*LAYERS, *NORMS, Normed)):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def path_of_module(self, mod: nn.Module) -> str:
        # A slice such as `self.features[:5]` is a new, unregistered Sequential: step into it.
        try:
            return super().path_of_module(mod)
        except NameError:
            return _UNREGISTERED

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._follows():
            return forward(*args, **kwargs)
        registered, caller = self.path_of_module(m) != _UNREGISTERED, self._callers[-1]
        self.callers[m].add(caller)
        self._callers.append(m if registered else caller)
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception:
            self.broke = self.broke or (m if registered else None)
            raise
        finally:
            self._callers.pop()
        if not isinstance(result, ValueProxy):
            return result
        node = result.node
        if self.is_leaf_module(m, self.path_of_module(m)):
            node.meta["module"] = m
            result.value = self._evaluate(forward, args, kwargs)
        elif node.target in LAYER_FUNCTIONS and node.meta.get("caller") is m:
            node.meta["module"] = m  # a layer of the user's own: what F.conv2d gives is what it returns
        return _opened(result)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        proxy: Any = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        proxy.node.meta["caller"] = self._callers[-1]
        if kind == "get_attr":
            proxy.value = self._evaluate(self.root.get_parameter, (target,), {})
        elif kind == "call_function":
            proxy.value = self._evaluate(target, args, kwargs)
            proxy.is_shape = (target is getattr and args[1] in _ATTRIBUTES) or _follow_from_shapes(args, kwargs)
        elif kind == "call_method":
            proxy.value = self._evaluate(lambda first, *more, **kw: getattr(first, target)(*more, **kw), args, kwargs)
            proxy.is_shape = target in _METHODS or _follow_from_shapes(args, kwargs)
        known = proxy.is_shape and proxy.value is not _UNKNOWN and self.tells_shapes()
        return proxy.value if known else _opened(proxy)

    def tells_shapes(self) -> bool:
        """Whether the running code gets the example's shapes."""
        return self._callers[-1] in self._shaped

    def create_arg(self, a: Any) -> Any:
        # fx would register a tensor that the code made as an attribute of the user's model.
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            return self.create_node("get_attr", _CONSTANT, (), {})
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return ValueProxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if not self._follows():
            return attr_val
        owner = self._owners.get(attr_val) if isinstance(attr_val, nn.Parameter) else None
        if owner is not None and owner is not self._callers[-1]:
            self.read.add(owner)
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def _follows(self) -> bool:
        """Whether the running code is being traced."""
        return threading.get_ident() == self._thread and not self._evaluating

    def _evaluate(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._evaluating = True
        try:
            values: Any = map_aggregate((args, kwargs), _value)
            return function(*values[0], **values[1])
        except Exception:  # an unknown value, or such as reading a number from an example on the meta device
            return _UNKNOWN
        finally:
            self._evaluating = False


def _opened(proxy: Any) -> Any:
    """A dict of symbolic entries if the value is a dict, which code may search; else the proxy."""
    return {key: proxy[key] for key in proxy.value} if isinstance(proxy.value, dict) else proxy


def _value(item: Any) -> Any:
    if isinstance(item, Attribute):
        return getattr(_value(item.root), item.attr)
    value = item.value if isinstance(item, ValueProxy) else item
    if value is _UNKNOWN:
        raise LookupError
    return value


def _follow_from_shapes(args: Any, kwargs: Any) -> bool:
    proxies: list[Any] = []
    map_aggregate((args, kwargs), lambda item: proxies.append(item) if isinstance(item, fx.Proxy) else None)
    return bool(proxies) and all(isinstance(proxy, ValueProxy) and proxy.is_shape for proxy in proxies)
