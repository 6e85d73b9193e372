"""Fit a new head before the first step: multinomial logistic regression on the network's features."""

import copy
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnsurgery.errors import BNSurgeryError, DataError, NonFiniteError
from bnsurgery.machine.devices import CPU, takes_float64
from bnsurgery.running.batches import Inputs
from bnsurgery.running.calls import out_of_memory, outputs, run
from bnsurgery.running.modes import observing
from bnsurgery.surgery.heads import find_head, outputs_of
from bnsurgery.text.words import percent, thousands, with_article

# Times ½‖V‖², against the sum over the images (scikit-learn's C is 1/10): the best or within its noise of 0.1 to 1000,
# by cross-validation within the training part, for SqueezeNet and a VGG on 100, 500 and 2,022 photographs.
_PENALTY = 10.0
_CONSTANT = 1e-6  # a deviation that is rounding noise, relative to the mean and to the largest of all features
_ROUNDING = 1 / 256  # of logits, relative to the root of their summed squared terms: ten times TF32's
_OPEN = 1.0  # the lowest input of an activation behind the head, over the training data
_NUMBERS = 2**22  # converted to float64 at a time


@dataclass(frozen=True)
class HeadFit:
    """The result of `fit_head_`.

    Attributes:
        refusal: why the head was left unchanged; None if it was fitted.
        images: the number it was fitted on.
        loss: mean cross entropy of the fit on these images.
        accuracy: of the fit on these images, 0 to 1.
        seconds: the time it took, reading the images included.

    Examples:
        >>> print(bnsurgery.finetune.HeadFit(None, images=500, loss=0.21, accuracy=0.95, seconds=2.5))
        fitted on 500 samples in 2.5 s, training accuracy 95.00 %
    """

    refusal: str | None
    images: int = 0
    loss: float = float("nan")
    accuracy: float = float("nan")
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.refusal is not None:
            return f"not fitted: {self.refusal}"
        return f"fitted on {self.images} samples in {self.seconds:.1f} s, training accuracy {percent(self.accuracy)}"


class _Refused(Exception):
    """The head stays unchanged, for the given reason."""


def fit_head_(model: nn.Module, loader: Iterable[Any], head: nn.Module | None = None) -> HeadFit:
    """Fit a classifier's output layer to the network's features, in place, before fine-tuning.

    With f the head's input, averaged over positions if it has any, and z = (f − m)/s its standardized form (a constant
    feature has z = 0), this minimizes over V, of shape (classes, features), and c

        mean over the images of cross_entropy(V·z + c, label)  +  (10/N)·½‖V‖²

    by L-BFGS in float64, and writes W = V/s and b = c − W·m. A head without a bias gets m = 0 and c = 0. The features
    are those of eval mode, and kept as float32, (N, features). The first batch then checks that the logits are W·f + b,
    up to a constant per image, which softmax ignores. If an activation stands between head and averaging, such as
    SqueezeNet's ReLU, a second pass finds the constant, the same for all biases, that keeps it open at every position
    of every image.

    Args:
        model: its modes, statistics and random numbers stay as they were.
        loader: the training data without augmentation: pairs of an input, as for `bnsurgery.insert`, and labels (N,).
            It may be iterated twice: a DataLoader or a list, no generator.
        head: dense or a 1×1 convolution; None to find it.

    Returns:
        The fit; or, with the head left unchanged, a `refusal`: the head is no such layer or shares its weights, the
        logits do not depend on its input in that way, the labels are not classes, or a class has no image.

    Raises:
        NonFiniteError: a feature is NaN or infinite.
        BNSurgeryError: the loader is empty, has no labels, or cannot be iterated twice; the model fails on its inputs;
            no head is found; the features do not fit into memory.

    References: Kumar et al. 2022, "Fine-tuning can distort pretrained features", arXiv:2202.10054 (first the head, then
    all); Liu & Nocedal 1989 (L-BFGS).

    Examples:
        >>> features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> model = nn.Sequential(features, nn.Linear(8, 2))
        >>> images, labels = torch.randn(64, 3, 8, 8), torch.arange(64) % 2
        >>> images[labels == 1] *= 2
        >>> bnsurgery.finetune.fit_head_(model, list(zip(images.split(16), labels.split(16)))).accuracy > 0.8
        True
    """
    begun = time.perf_counter()
    if isinstance(loader, Iterator):
        raise DataError("fit_head_: got a generator, which one pass exhausts: pass a DataLoader or a list")
    features: list[Tensor] = []
    try:
        samples = _labelled(loader)
        first = next(samples, None)
        if first is None:
            raise DataError("fit_head_: the loader is empty, expected at least one batch")
        if head is None:
            head = model.get_submodule(find_head(model, first[0]))
        layer = _fittable(model, head)
        labels, seen = _collect(model, layer, itertools.chain([first], samples), features)
        weight, bias, loss, accuracy = _solve(features, labels, outputs_of(layer), layer.bias is not None)
        with _undone_on_error(layer):
            _write_(layer, weight, bias)
            if layer.bias is not None and not _is_linear(model, layer, first[0], seen):
                _write_(layer, weight, bias + _OPEN - _lowest(model, layer, loader, len(labels)))
            if not _is_linear(model, layer, first[0], seen):
                raise _Refused("the network's outputs are not the head's, averaged over positions")
    except _Refused as error:
        return HeadFit(str(error))
    except Exception as error:
        if not features or not (out_of_memory(error) or out_of_memory(error.__cause__)):
            raise
        shape = sum(map(len, features)), features[0].shape[1]
        raise BNSurgeryError(
            f"fit_head_: out of memory with the features of {thousands(shape[0])} samples, {shape}, float32: "
            f"{4 * math.prod(shape) / 2**30:.2f} GiB. Fit on fewer samples, in `finetune` with `limit`, or leave the "
            "head random, with `head_init='random'`."
        ) from None
    return HeadFit(None, len(labels), loss, accuracy, time.perf_counter() - begun)


def _labelled(loader: Iterable[Any]) -> Iterator[tuple[Inputs, Tensor]]:
    """One pass over the inputs and labels."""
    if not isinstance(loader, Iterable):
        raise DataError(f"fit_head_: got {_told(loader)}, expected a DataLoader or a list of (input, labels)")
    for number, item in enumerate(loader):
        where = f"fit_head_: batch {number}"
        if not isinstance(item, (tuple, list)) or len(item) < 2 or not isinstance(item[1], Tensor):
            raise DataError(f"{where}: got {_told(item)}, expected a pair of an input and a tensor of labels, (N,)")
        batch, labels = Inputs.of(item), item[1]
        if not batch.samples:
            raise DataError(f"{where}: has no sample: leave it out")
        if labels.is_floating_point() or labels.shape != (batch.samples,):
            shape = tuple(labels.shape)
            raise _Refused(f"labels of {labels.dtype} and shape {shape} are not classes, one per sample")
        yield batch, labels


def _told(item: Any) -> str:
    """What `item` is, for messages: with its keys if it is a dict, or the types in it if it is a pair or the like."""
    if isinstance(item, Mapping):
        return f"{with_article(type(item).__name__)} with the keys {', '.join(map(repr, list(item)[:8]))}"
    inside = item[:4] if isinstance(item, (tuple, list)) else ()
    named = with_article(type(item).__name__)
    return f"{named} of {', '.join(type(part).__name__ for part in inside)}" if inside else named


def _fittable(model: nn.Module, head: nn.Module) -> Any:
    if not isinstance(head, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise _Refused(f"the head is a {type(head).__name__}, neither dense nor a convolution")
    if not isinstance(head, nn.Linear) and (set(head.kernel_size) != {1} or head.groups != 1):
        raise _Refused("the head is a convolution over more than one position, or in groups")
    if not all(isinstance(tensor, nn.Parameter | None) for tensor in (head.weight, head.bias)):
        raise _Refused("the head's weights are computed from others")
    own = {id(tensor) for tensor in head.parameters()}
    for name, module in model.named_modules():
        if module is not head and any(id(tensor) in own for tensor in module.parameters(recurse=False)):
            raise _Refused(f"the head shares its weights with '{name}'")
    if outputs_of(head) < 2:
        raise _Refused("the head has one output")
    return head


@contextmanager
def _undone_on_error(layer: nn.Module) -> Iterator[None]:
    before = copy.deepcopy(layer.state_dict())
    try:
        yield
    except BaseException:
        layer.load_state_dict(before)
        raise


def _call(model: nn.Module, layer: nn.Module, batch: Inputs) -> tuple[Tensor, Tensor, Any]:
    """The head's input, averaged over positions, (N, features); its lowest output; the network's output."""
    seen: list[tuple[Tensor, Tensor]] = []

    def look(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        given = args[0].float()
        positions = tuple(range(1, given.ndim - 1) if isinstance(layer, nn.Linear) else range(2, given.ndim))
        seen.append((given.mean(positions) if positions else given, output.amin()))

    handle = layer.register_forward_hook(look, prepend=True)  # before other hooks change the output in place
    try:
        result = run("fit_head_", model, batch)
    finally:
        handle.remove()
    if len(seen) != 1 or len(seen[0][0]) != batch.samples:
        raise _Refused("the head does not run once a batch, on all of its samples")
    return *seen[0], result


def _collect(
    model: nn.Module, layer: Any, samples: Iterable[tuple[Inputs, Tensor]], features: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Append all features to `features`, float32 (N, features) in parts of about `_NUMBERS`, on a device with float64.

    Returns:
        the labels (N,) there; the features of the first batch.
    """
    place = layer.weight.device if takes_float64(layer.weight.device) else CPU
    labels, seen, done = [], None, 0  # `done` parts are as large as they get
    with observing(model):
        for number, (batch, target) in enumerate(samples):
            found = _call(model, layer, batch)[0].to(place)
            if bad := found.isfinite().all(1).logical_not().nonzero().flatten().tolist():
                raise NonFiniteError(
                    f"fit_head_: the head's input is NaN or Inf in sample {', '.join(map(str, bad[:8]))} of batch "
                    f"{number} (both counted from 0). Leave these samples out, or look for non-finite weights."
                )
            seen = found if seen is None else seen
            features.append(found)
            labels.append(target)
            if sum(part.numel() for part in features[done:]) >= _NUMBERS:
                _join_(features, done)
                done += 1
    if features[done:]:
        _join_(features, done)
    assert seen is not None
    return torch.cat(labels).to(place, torch.long), seen


def _join_(parts: list[Tensor], start: int) -> None:
    """Make one part of those from `start` on, outside of inference mode: little is ever held twice."""
    with torch.inference_mode(False):
        parts[start:] = [torch.cat(parts[start:])]


def _lowest(model: nn.Module, layer: nn.Module, loader: Iterable[Any], expected: int) -> float:
    """The lowest output of the head in another pass, which must have the `expected` number of samples."""
    lowest, count = math.inf, 0
    with observing(model):
        for batch, _ in _labelled(loader):
            lowest = min(lowest, _call(model, layer, batch)[1].item())
            count += batch.samples
    if count != expected:
        raise DataError(
            f"fit_head_: the loader gave {expected} samples in its first pass and {count} in the second: pass a "
            "DataLoader or a list, which gives the same ones every time"
        )
    return lowest


def _solve(parts: list[Tensor], labels: Tensor, classes: int, intercept: bool) -> tuple[Tensor, Tensor, float, float]:
    """W, b, and mean cross entropy and accuracy. The features are standardized in place, to float32's rounding."""
    present, expected = set(labels.unique().tolist()), set(range(classes))
    if present != expected:
        odd, missing = present - expected, expected - present
        what = f"there is a label {min(odd)}" if odd else f"no sample is of class {min(missing)}"
        raise _Refused(f"{what}, and the head has outputs for classes 0 to {classes - 1}")
    count, size, place = len(labels), parts[0].shape[1], labels.device
    targets = labels.split(list(map(len, parts)))
    mean = torch.stack([part.double().sum(0) for part in parts]).sum(0) / count
    mean = mean.float() if intercept else torch.zeros_like(parts[0][0])
    squares = torch.stack([(part.double() - mean).square().sum(0) for part in parts])
    deviation = (squares.sum(0) / count).sqrt().float()
    scale = deviation.masked_fill(deviation <= _CONSTANT * torch.maximum(mean.abs(), deviation.max()), torch.inf)
    for part in parts:
        part.sub_(mean).div_(scale)
    weight = torch.zeros(classes, size, dtype=torch.float64, device=place, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, device=place, requires_grad=intercept)
    fit: dict[str, float] = {}

    def objective() -> Tensor:
        optimizer.zero_grad()
        penalty = 0.5 * _PENALTY / count * weight.square().sum()
        penalty.backward()
        entropy, right = torch.zeros_like(penalty), torch.zeros_like(labels[0])
        for part, target in zip(parts, targets, strict=True):
            logits = part.double() @ weight.T + bias
            loss = F.cross_entropy(logits, target, reduction="sum") / count
            loss.backward()
            entropy += loss.detach()
            right += (logits.argmax(1) == target).sum()
        fit.update(loss=entropy.item(), accuracy=right.item() / count)
        return penalty + entropy

    optimizer = torch.optim.LBFGS(
        [weight, bias] if intercept else [weight],
        max_iter=2000,
        history_size=50,
        tolerance_grad=1e-6,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(objective)
    with torch.enable_grad():
        objective()  # the last evaluated point need not be the accepted one
    weight, bias = weight.detach() / scale, bias.detach()
    return weight, bias - weight @ mean.double(), fit["loss"], fit["accuracy"]


@torch.no_grad()
def _write_(layer: Any, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight.view_as(layer.weight))
    if layer.bias is not None:
        layer.bias.copy_(bias)


def _is_linear(model: nn.Module, layer: Any, batch: Inputs, before: Tensor) -> bool:
    """Whether the network returns W·f + b, up to rounding and a constant per image; f must be what it was `before`."""
    with observing(model):
        features, _, result = _call(model, layer, batch)
        if (features.to(before.device) - before).abs().max() > _ROUNDING * before.abs().max():
            raise _Refused("the head's input depends on the head's weights")
        weight = layer.weight.float().flatten(1)
        bias = torch.zeros_like(weight[:, 0]) if layer.bias is None else layer.bias.float()
        expected = features @ weight.T + bias - bias.mean()
        found = [tensor.float() for tensor in outputs(result) if tensor.shape == expected.shape]
        if len(found) != 1:
            return False
        size = (features.square() @ weight.square().T + (bias - bias.mean()).square()).sqrt().max()
        difference = found[0] - expected
        return bool((difference - difference.mean(1, keepdim=True)).abs().max() <= _ROUNDING * size)
