"""Decide where BatchNorm goes: the sites of a model, and for every other layer the reason why it has none."""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.padding import _ReflectionPadNd, _ReplicationPadNd

from bnsurgery.errors import NoSitesError
from bnsurgery.nn import Normed
from bnsurgery.running.batches import Inputs
from bnsurgery.text.tables import table
from bnsurgery.text.words import counted

from .layer_kinds import (
    ACTIVATION_FUNCTIONS,
    LAYER_FUNCTIONS,
    LAYERS,
    TRANSPOSED,
    batched_ndim,
    find_lrn,
    is_activation,
)
from .tracing import Trace, is_norm

Placement = Literal["pre-activation", "post-activation"]
Layers = Literal["all", "conv", "dense"] | Callable[[str, nn.Module], bool]
PLACEMENTS = ("pre-activation", "post-activation")
LAYER_CHOICES = ("all", "conv", "dense")
_NORMALIZED = "normalized already"
_DENSE = 2  # dimensions of a dense layer's output for a batch of vectors
_SHIFT_TRANSPARENT = (nn.Identity, nn.Flatten, _DropoutNd, _ReflectionPadNd, _ReplicationPadNd)


@dataclass(frozen=True)
class Site:
    """One place for a BatchNorm, named by its layer.

    Attributes:
        name: fqn of the conv or dense layer in the original model.
        layer: the layer's class name.
        kind: "conv" or "dense".
        channels: output channels or features, C.
        ndim: dimensions of the layer's output: 2 for (N, C), 4 for (N, C, H, W).
        channel_dim: the dimension of C: 1, or -1 behind a dense layer on (N, *, C).
        anchor: fqn of the module behind which the norm goes: the layer, or its activation (post-activation).
        in_sequential: whether the norm becomes the anchor's next sibling; else it becomes its child `norm`.
        activation: class of the activation module that alone consumes the layer's output, or name of the function.
        relu: fqn of the `nn.ReLU` that the norm can apply (pre-activation only).
        next_layer: fqn of the layer that a post-activation norm folds into; None if there is none.
    """

    name: str
    layer: str
    kind: str
    channels: int
    ndim: int
    channel_dim: int
    anchor: str
    in_sequential: bool
    activation: str | None = None
    relu: str | None = None
    next_layer: str | None = None


@dataclass(frozen=True)
class Skip:
    """A layer that gets no BatchNorm: its fqn, its class name, and the reason."""

    name: str
    layer: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """Where BatchNorm goes (`sites`, in order of definition) and where not (`skipped`).

    Attributes:
        lrn: fqns of the LocalResponseNorm layers, which stay unless `insert` has `drop_lrn=True`.
    """

    model: str
    sites: tuple[Site, ...]
    skipped: tuple[Skip, ...]
    placement: str
    layers: str
    head: bool
    lrn: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [
            (site.name, site.layer, site.channels, site.activation, "sibling" if site.in_sequential else "child")
            for site in self.sites
        ]
        text = table(("site", "layer", "channels", "activation", "BatchNorm as"), rows)
        if self.skipped:
            text += "\n\n" + table(("skipped", "layer", "reason"), [(s.name, s.layer, s.reason) for s in self.skipped])
        if self.lrn:
            names = ", ".join(self.lrn)
            text += f"\n\nLocalResponseNorm stays: {names}. `drop_lrn=True` removes it and changes the function."
        counts = f"{counted(len(self.sites), 'site')}, {len(self.skipped)} skipped"
        return f"{text}\n\n{self.model}: {counts}, {self.placement}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def plan(
    model: nn.Module,
    example: Any,
    *,
    placement: Placement = "pre-activation",
    layers: Layers = "all",
    head: bool = False,
) -> Plan:
    """Find the sites of `model` without changing it.

    torch.fx traces the forward pass to find what follows each layer, and one run on `example` gives the number of
    dimensions of each output.

    Args:
        model: any network of conv, dense, activation, pooling, reshaping and arithmetic.
        example: a batch, as for `insert`; one sample is enough.
        placement: "pre-activation" puts the norm between layer and activation, as in the BN paper; "post-activation"
            puts it behind the activation, from where it folds back only into a dense layer or a conv without padding.
        layers: "all", "conv", "dense", or a predicate (fqn, module) -> bool.
        head: include the layers with no other layer between them and the output (the logits).

    Raises:
        UntraceableModelError: the forward pass cannot be followed.
        NoSitesError: there is no site; the message gives the reasons.
        CalibrationError: the model does not take `example`.
        ValueError: `placement` or `layers` is not one of the above.

    References: Ioffe & Szegedy 2015, arXiv:1502.03167, section 3.2 (placement).

    Examples:
        >>> model = torchvision.models.vgg11(weights=None)
        >>> plan = bnsurgery.plan(model, torch.zeros(1, 3, 64, 64), layers="conv")
        >>> len(plan.sites), plan.sites[0].name, plan.sites[0].relu
        (8, 'features.0', 'features.1')
        >>> plan.skipped[0].name, plan.skipped[0].reason
        ('classifier.0', "left out by `layers='conv'`")
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"plan: placement must be one of {PLACEMENTS}, got {placement!r}")
    if not callable(layers) and layers not in LAYER_CHOICES:
        raise ValueError(f"plan: layers must be one of {LAYER_CHOICES} or a predicate, got {layers!r}")
    trace = Trace(model, Inputs.of(example))
    considered = {module: _consider(trace, module, placement, layers, head) for module in trace.layers()}
    sites = tuple(found for found in considered.values() if isinstance(found, Site))
    opaque = {m: why for m, why in trace.opaque.items() if any(isinstance(inner, LAYERS) for inner in m.modules())}
    reasons = {module: f"cannot be followed: {why}" for module, why in opaque.items()}
    reasons |= {module: found for module, found in considered.items() if isinstance(found, str)}
    skipped = [Skip(trace.names[m] or type(m).__name__, type(m).__name__, reason) for m, reason in reasons.items()]
    for node in trace.nodes:
        if node.target in LAYER_FUNCTIONS and "module" not in node.meta:
            where = f"called in the middle of {trace.called(node.meta['caller'])}'s forward"
            reason = f"{where}: BatchNorm goes behind a module; make this call a module"
            skipped.append(Skip(node.name, cast(Any, node.target).__name__, reason))
    chosen = layers if isinstance(layers, str) else getattr(layers, "__name__", "custom")
    result = Plan(type(model).__name__, sites, tuple(skipped), placement, chosen, head, find_lrn(model))
    _check(result)
    return result


def _consider(trace: Trace, module: nn.Module, placement: str, layers: Layers, head: bool) -> Site | str:
    """The site at `module`, or the reason why it is none."""
    name = trace.names[module]
    if isinstance(module, Normed):
        return f"{_NORMALIZED} by '{name}.norm' ({type(module.norm).__name__})"
    if not trace.calls[module]:
        return trace.obstacle(module) or "never called in the forward pass"
    following = list(trace.next_layers(module))
    for node in following:
        if is_norm(node):
            norm = node.meta.get("module")
            by, kind = (trace.names[norm], type(norm).__name__) if norm else (node.name, "function")
            return f"{_NORMALIZED} by '{by}' ({kind})"
    function: Any = trace.calls[module][0].target  # of a custom layer: F.conv2d or the like
    expected = batched_ndim(module) if isinstance(module, LAYERS) else LAYER_FUNCTIONS[function]
    kind = "dense" if expected == _DENSE else "conv"
    if not (layers(name, module) if callable(layers) else layers in ("all", kind)):
        return f"left out by `layers={layers!r}`" if isinstance(layers, str) else "left out by the layers predicate"
    if not following and not head:
        part = trace.part(module)
        what = f"output of {part}, whose further way cannot be followed" if part else "output layer"
        return f"{what} (`head=True` takes it, too)"
    shapes = trace.shapes[module]
    ndims = {len(shape) for shape in shapes}
    if not ndims or (min(ndims) < _DENSE if kind == "dense" else ndims != {expected}):
        seen = " or ".join(map(str, sorted(ndims))) or "unknown"
        return f"its output has {seen} dimensions; BatchNorm needs {expected}, with the channels second"
    channel_dim = 1 if ndims == {expected} else -1
    user, post = trace.only_user(module), placement == "post-activation"
    if post and user is None:
        return "no activation module of its own to put the norm behind (a function, or shared with other layers)"
    activation = user if is_activation(user) else None
    function = trace.activation_function(module)
    anchor = activation if post and activation is not None else module
    in_sequential = _in_sequential(trace, anchor)
    if not in_sequential and hasattr(anchor, "norm"):
        return "has an attribute 'norm' already, where the BatchNorm would go"
    if not in_sequential and "forward" in vars(anchor):
        return "its forward was replaced on the object (a wrapper, an adapter), which would bypass its BatchNorm"
    # The hooks of a layer with its norm inside run behind the norm: they must not see the ReLU's output.
    fusible = not post and (in_sequential or not is_hooked(anchor))
    relu = activation if fusible and _can_take_over(trace, activation) else None
    next_layer = _folds_into(trace, anchor, flat=kind == "dense", channel_dim=channel_dim) if post else None
    return Site(
        name=name,
        layer=type(module).__name__,
        kind=kind,
        channels=next(iter(shapes))[channel_dim],
        ndim=max(ndims),
        channel_dim=channel_dim,
        anchor=trace.names[anchor],
        in_sequential=in_sequential,
        activation=type(activation).__name__ if activation else function if function in ACTIVATION_FUNCTIONS else None,
        relu=trace.names[relu] if relu else None,
        next_layer=trace.names[next_layer] if next_layer else None,
    )


def _can_take_over(trace: Trace, activation: nn.Module | None) -> bool:
    """Whether the norm may apply this ReLU and leave an Identity in its place: no other code may see it.

    Code that branches could call it on something else for other inputs.
    """
    if type(activation) is not nn.ReLU or is_hooked(activation) or activation in trace.uncertain:
        return False
    return not trace.callers(activation) & trace.shaped


def is_hooked(module: nn.Module) -> bool:
    """Whether `module` has hooks on its inputs, outputs or gradients."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def _folds_into(trace: Trace, anchor: nn.Module, flat: bool, channel_dim: int) -> nn.Module | None:
    """The one layer that consumes `anchor`, if all between them passes a constant shift on.

    Zero padding does not: a shifted input would need a shifted border. A dense layer needs the channels in the last
    dimension; `flat` says whether they are there already.
    """
    user = trace.only_user(anchor)
    while isinstance(user, _SHIFT_TRANSPARENT):
        if isinstance(user, nn.Flatten):
            if (user.start_dim, user.end_dim) != (1, -1) or channel_dim != 1:
                return None
            flat = True
        user = trace.only_user(user)
    if not isinstance(user, LAYERS) or isinstance(user, TRANSPOSED):  # a transposed conv has fewer taps at the border
        return None
    if isinstance(user, nn.Linear):
        return user if flat else None
    if user.padding_mode != "zeros" or not any(user._reversed_padding_repeated_twice):
        return user
    return None


def _in_sequential(trace: Trace, anchor: nn.Module) -> bool:
    """Whether the norm can be the anchor's next sibling in a `nn.Sequential`, which renumbers those behind it.

    The Sequential's own forward must make every call: code that picks children or weights by index would get others.
    The anchor must be registered once: elsewhere it would run without its norm.
    """
    parents = [parent for parent in trace.names for child in parent._modules.values() if child is anchor]
    if len(parents) != 1 or type(parents[0]).forward is not nn.Sequential.forward:
        return False
    children = list(parents[0].children())
    callers = set().union(*(trace.callers(child) for child in children))
    return callers == {parents[0]} and not (trace.read | trace.uncertain).intersection(children)


def _check(result: Plan) -> None:
    """Raise NoSitesError if there is no site, or if the network has BatchNorm already."""
    normalized = [skip for skip in result.skipped if skip.reason.startswith(_NORMALIZED)]
    conv_sites = [site for site in result.sites if site.kind == "conv"]
    if normalized and (not result.sites or (result.layers == "all" and not conv_sites)):
        first = normalized[0]
        others = ", ".join(f"'{site.name}'" for site in result.sites)
        advice = (
            f"Its dense layers without one ({others}) get one with `layers='dense'`."
            if others
            else "Nothing to insert."
        )
        raise NoSitesError(
            f"plan: {result.model} has normalization layers already: {len(normalized)} of its layers are followed by "
            f"one, such as '{first.name}': {first.reason}. {advice}"
        )
    if not result.sites:
        examples = {skip.reason: skip for skip in reversed(result.skipped)}
        counts = Counter(skip.reason for skip in result.skipped)
        reasons = "; ".join(f"{counts[r]} × {r}, such as '{examples[r].name}' ({examples[r].layer})" for r in counts)
        raise NoSitesError(f"plan: {result.model} has no place for a BatchNorm: {reasons or 'no conv or dense layer'}.")
