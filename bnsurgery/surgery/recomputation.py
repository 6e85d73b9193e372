"""Train with less memory: the outputs of the BatchNorm layers are not kept but recomputed in the backward.

Autograd keeps a norm's input x for the norm, and y = relu(norm(x)) for the layers behind: as many numbers twice. Hooks
for saved tensors see everything that autograd keeps; a y, recognised by its storage and version, is replaced by x,
which is kept anyway, and a copy of the norm. A norm needs no more than an input, an output and `forward` for that.
"""

import copy
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from bnsurgery.errors import BNSurgeryError
from bnsurgery.nn.batchnorm import Insertable
from bnsurgery.running.modes import is_sharded


def recompute_activations_(bn_model: nn.Module, enabled: bool = True) -> None:
    """Let `bn_model` train in about the memory of the network without BatchNorm, for a second forward of the norms.

    In train mode autograd keeps the input of each BatchNorm of `bnsurgery.nn`, but not its output, nor that of an
    `nn.ReLU` behind it: the backward recomputes them with the statistics of that forward, and frees them. Outputs,
    gradients (of any order) and running statistics are the same bits.

    It works in calls of `bn_model` or its wrapper. Outputs of functions such as `F.relu` are kept as usual, and so is
    everything in eval mode, under `torch.no_grad`, `torch.compile` (which chooses itself), `torch.func` and inside a
    gradient checkpoint. Other hooks for saved tensors around the whole network, such as those of a non-reentrant
    checkpoint, have no effect. Norms with a process group exchange their statistics again in the backward. Copies and
    pickles keep the setting; `save`, `fold` and `to_torch` do not. Not run on a GPU yet.

    Args:
        bn_model: a network with layers of `bnsurgery.nn`. Layers that are added later need another call. Call
            `fuse_relu_` before this: it refuses ReLUs with hooks.
        enabled: False ends it.

    Raises:
        BNSurgeryError: the model has no layer of `bnsurgery.nn`. In the forward: FSDP2 shards the parameters. In the
            backward: a tensor that the gradient needs was changed in place after the forward.

    References: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174, section 4.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 10)).eval()
        >>> bn_model = bnsurgery.insert(model, [torch.randn(8, 3, 16, 16)]).train()
        >>> bnsurgery.recompute_activations_(bn_model)
        >>> bn_model(torch.randn(8, 3, 16, 16)).sum().backward()
    """
    norms = [module for module in bn_model.modules() if isinstance(module, Insertable)]
    if not norms:
        raise BNSurgeryError(
            f"recompute_activations_: {type(bn_model).__name__} has no BatchNorm of bnsurgery.nn: insert some first"
        )
    keep_activations_(bn_model)
    if not enabled:
        return
    bn_model.register_forward_pre_hook(_enter)
    bn_model.register_forward_hook(_exit, always_call=True)
    for norm in norms:
        norm.register_forward_pre_hook(_before_norm)
        norm.register_forward_hook(_after_norm, prepend=True)  # before hooks that may change the output
    for module in bn_model.modules():
        if type(module) is nn.ReLU:
            module.register_forward_hook(_after_relu, prepend=True)


def keep_activations_(model: nn.Module) -> None:
    """Undo `recompute_activations_`, in any network."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in _HOOKS]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)


def recomputes(model: nn.Module) -> bool:
    """Whether `recompute_activations_` is active in `model`."""
    return any(hook in _HOOKS for module in model.modules() for hook in module._forward_hooks.values())


class _Kept:
    """A tensor that autograd keeps, or a function that recomputes it."""

    again: Callable[[], Tensor] | None = None

    def __init__(self, tensor: Tensor) -> None:
        self.key, self.version = _key(tensor), tensor._version
        self.tensor: Any = tensor.detach()

    def unpack(self) -> Tensor:
        if self.again:
            return self.again()
        if self.tensor._version != self.version:  # torch checks it only without hooks
            raise BNSurgeryError(
                f"backward: a tensor of shape {tuple(self.tensor.shape)}, which the gradient needs, was changed in "
                "place after the forward: change it after the backward, or change a copy"
            )
        return self.tensor


class _Output:
    """An output of `norm`, which is recomputed from its input, which autograd keeps in `source`."""

    value: Tensor | None = None
    uses = left = 0

    def __init__(self, norm: Any, input: Tensor, source: _Kept, output: Tensor) -> None:
        self.norm, self.source, self.input_layout = norm, weakref.ref(source), _layout(input)
        self.parameters = [_Kept(parameter) for parameter in norm._parameters.values() if parameter is not None]
        device = output.device.type
        self.autocast: AbstractContextManager[Any] = nullcontext()
        if torch.amp.is_autocast_available(device):  # as it is set now
            self.autocast = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        self.layout, self.storage = _layout(output), StorageWeakRef(output.untyped_storage())

    def with_relu(self, output: Tensor) -> "_Output":
        """The `_Output` of a ReLU on this one."""
        new = copy.copy(self)
        new.norm, new.uses, new.storage = copy.copy(self.norm), 0, StorageWeakRef(output.untyped_storage())
        new.norm.activation = "relu"
        return new

    def stand_in(self, kept: _Kept) -> bool:
        """Recompute `kept`, this output or a view of it, on use; False if autograd no longer keeps the input."""
        source, layout = self.source(), _layout(kept.tensor)
        if source is None:
            return False
        kept.again, kept.tensor = lambda: self._compute(source).as_strided(*layout), None
        self.uses += 1
        return True

    @torch.no_grad()
    def _compute(self, source: _Kept) -> Tensor:
        """The recomputed output, which is kept from its first use to its last."""
        if self.value is None:
            for parameter in self.parameters:
                parameter.unpack()
            with self.autocast:
                self.value = _as_it_is(self.norm).forward(source.unpack().as_strided(*self.input_layout))
            self.left = self.uses
        value, self.left = self.value, self.left - 1
        if not self.left:
            self.value = None
        return value


class _Forward(saved_tensors_hooks):
    """One call of a network: the outputs that can be recomputed, and the tensors kept since the last of them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(self._pack, _Kept.unpack)
        self.model = model
        self.module: nn.Module | None = None  # the norm that is being called, and its copy from before
        self.norm: nn.Module | None = None
        self.outputs: dict[Any, _Output] = {}
        self.kept: list[_Kept] = []

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        vars(self).clear()

    def _pack(self, tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        output = self.outputs.get(kept.key)
        if output is None or not output.stand_in(kept):
            self.kept.append(kept)
        return kept

    def add(self, tensor: Tensor, output: _Output) -> None:
        """Recompute `tensor` from now on, also where its own layer kept it."""
        key = _key(tensor)
        self.outputs[key] = output
        for kept in self.kept:
            if kept.key == key:
                output.stand_in(kept)
        self.kept.clear()


def _enter(model: nn.Module, args: Any) -> None:
    if model.training and torch.is_grad_enabled() and not _elsewhere():
        if any(is_sharded(module) for module in model.modules()):
            raise BNSurgeryError(
                f"recompute_activations_: the parameters of {type(model).__name__} are sharded (fully_shard), and the "
                "norms' may be gone when the backward computes: call recompute_activations_(model, enabled=False)"
            )
        forward = _Forward(model)
        forward.__enter__()
        vars(_threads).setdefault("forwards", []).append(forward)


def _exit(model: nn.Module, *args: Any) -> None:
    while _current() and any(forward.model is model for forward in _threads.forwards):  # also after Ctrl-C
        _threads.forwards.pop().__exit__()


def _before_norm(norm: nn.Module, args: Any) -> None:
    forward = _current()
    if forward:
        forward.module, forward.norm, forward.kept = norm, _as_it_is(norm), []


def _after_norm(norm: nn.Module, args: Any, output: Any) -> None:
    forward = _current()
    key = _key(args[0]) if forward and args else None
    if forward and forward.module is norm and key and _key(output) not in (None, key):
        source = next((kept for kept in forward.kept if kept.key == key), None)
        if source:
            forward.add(output, _Output(forward.norm, args[0], source, output))


def _after_relu(relu: nn.Module, args: Any, output: Any) -> None:
    forward = _current()
    key = _key(args[0]) if forward and args else None
    if forward and key and _key(output):
        storage, version, dtype = key
        found = forward.outputs.get((storage, version - (output is args[0]), dtype))
        if found and found.layout == _layout(args[0]) == _layout(output):
            forward.add(output, found.with_relu(output))


_HOOKS = (_enter, _exit, _before_norm, _after_norm, _after_relu)
_threads = threading.local()


def _current() -> _Forward | None:
    """The innermost call of a network in this thread, if any."""
    forwards = None if _elsewhere() else vars(_threads).get("forwards")
    return forwards[-1] if forwards else None


def _elsewhere() -> bool:
    """Whether a compiler, a tracer or a torch.func transform is active: they do not support these hooks."""
    compiling = torch.compiler.is_compiling() or torch._C._is_tracing()
    return compiling or torch._C._functorch.peek_interpreter_stack() is not None


def _key(tensor: Any) -> tuple[int, int, torch.dtype] | None:
    """A key that is equal only for the same values in the same storage; None for a tensor without storage.

    Addresses are reused, but not while a `StorageWeakRef` exists.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_inference():
        return None
    return tensor.untyped_storage()._cdata, tensor._version, tensor.dtype


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.size(), tensor.stride(), tensor.storage_offset()


def _as_it_is(norm: Any) -> Any:
    """A copy that computes the same output, with copies of those buffers that the output needs."""
    ghost, by_batch = copy.copy(norm), norm.training and norm.statistics == "batch"
    ghost._parameters = dict(norm._parameters)
    ghost._buffers = {k: None if by_batch or v is None else v.clone() for k, v in norm._buffers.items()}
    return ghost
