"""Fit a new head before the first step: multinomial logistic regression on the network's features."""

import copy
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnsurgery.errors import DataError, NonFiniteError
from bnsurgery.machine.devices import CPU, takes_float64
from bnsurgery.running.batches import Inputs, peek
from bnsurgery.running.calls import outputs, run
from bnsurgery.running.modes import observing
from bnsurgery.surgery.heads import find_head, outputs_of
from bnsurgery.text.words import percent

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
        loader: the training data without augmentation: tuples of an input, as for `bnsurgery.insert`, and labels (N,).
            It may be iterated twice: a DataLoader or a list, no generator.
        head: dense or a 1×1 convolution; None to find it.

    Returns:
        The fit; or, with the head left unchanged, a `refusal`: the head is no such layer, the logits do not depend on
        its input in that way, the labels are not classes, or a class has no image.

    Raises:
        NonFiniteError: a feature is NaN or infinite.
        BNSurgeryError: the loader is empty, has no labels, or is a generator; the model fails on its inputs; no head is
            found.

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
    if head is None:
        head = model.get_submodule(find_head(model, peek(loader)[0].shape))
    before = copy.deepcopy(head.state_dict())
    try:
        layer = _fittable(head)
        features, labels, first = _features(model, layer, loader)
        weight, bias, loss, accuracy = _solve(features, labels, outputs_of(layer), layer.bias is not None)
        _write_(layer, weight, bias)
        if layer.bias is not None and not _is_linear(model, layer, first):
            with observing(model):
                lowest = min(_call(model, layer, Inputs.of(item))[1].item() for item in loader)
            _write_(layer, weight, bias + _OPEN - lowest)
        if not _is_linear(model, layer, first):
            raise _Refused("the network's outputs are not the head's, averaged over positions")
    except BaseException as error:
        head.load_state_dict(before)
        if isinstance(error, _Refused):
            return HeadFit(str(error))
        raise
    return HeadFit(None, len(labels), loss, accuracy, time.perf_counter() - begun)


def _fittable(head: nn.Module) -> Any:
    if not isinstance(head, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise _Refused(f"the head is a {type(head).__name__}, neither dense nor a convolution")
    if not isinstance(head, nn.Linear) and (set(head.kernel_size) != {1} or head.groups != 1):
        raise _Refused("the head is a convolution over more than one position, or in groups")
    if not all(isinstance(tensor, nn.Parameter | None) for tensor in (head.weight, head.bias)):
        raise _Refused("the head's weights are computed from others")
    if outputs_of(head) < 2:
        raise _Refused("the head has one output")
    return head


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


def _features(model: nn.Module, layer: Any, loader: Iterable[Any]) -> tuple[Tensor, Tensor, Inputs]:
    """All features, float32 (N, features), and labels (N,), on a device with float64; and the first input."""
    place = layer.weight.device if takes_float64(layer.weight.device) else CPU
    features, labels, first = [], [], None
    with observing(model):
        for number, item in enumerate(loader):
            if not isinstance(item, (tuple, list)) or len(item) < 2 or not isinstance(item[1], Tensor):
                raise DataError(f"fit_head_: batch {number}: expected a tuple of an input and labels, (N,)")
            batch, target = Inputs.of(item), item[1]
            first = first or batch
            if target.is_floating_point() or target.shape != (batch.samples,):
                shape = tuple(target.shape)
                raise _Refused(f"labels of {target.dtype} and shape {shape} are not classes, one per sample")
            found = _call(model, layer, batch)[0].to(place)
            if bad := found.isfinite().all(1).logical_not().nonzero().flatten().tolist():
                raise NonFiniteError(
                    f"fit_head_: the head's input is NaN or Inf in sample {', '.join(map(str, bad[:8]))} of batch "
                    f"{number} (both counted from 0). Leave these samples out, or look for non-finite weights."
                )
            features.append(found)
            labels.append(target.to(place, torch.long))
    if first is None:
        raise DataError("fit_head_: the loader is empty, expected at least one batch")
    return torch.cat(features), torch.cat(labels), first  # outside of inference mode


def _solve(features: Tensor, labels: Tensor, classes: int, intercept: bool) -> tuple[Tensor, Tensor, float, float]:
    """W, b, and mean cross entropy and accuracy. `features` is standardized in place, to float32's rounding."""
    present, expected = set(labels.unique().tolist()), set(range(classes))
    if present != expected:
        odd, missing = present - expected, expected - present
        what = f"there is a label {min(odd)}" if odd else f"no sample is of class {min(missing)}"
        raise _Refused(f"{what}, and the head has outputs for classes 0 to {classes - 1}")
    count, size = features.shape
    parts = features.split(max(1, _NUMBERS // size))
    mean = torch.stack([part.double().sum(0) for part in parts]).sum(0) / count
    mean = mean.float() if intercept else torch.zeros_like(features[0])
    squares = torch.stack([(part.double() - mean).square().sum(0) for part in parts])
    deviation = (squares.sum(0) / count).sqrt().float()
    scale = deviation.masked_fill(deviation <= _CONSTANT * torch.maximum(mean.abs(), deviation.max()), torch.inf)
    features.sub_(mean).div_(scale)
    weight = torch.zeros(classes, size, dtype=torch.float64, device=features.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, device=features.device, requires_grad=intercept)
    fit: dict[str, float] = {}

    def objective() -> Tensor:
        optimizer.zero_grad()
        penalty = 0.5 * _PENALTY / count * weight.square().sum()
        penalty.backward()
        entropy, right = torch.zeros_like(penalty), torch.zeros_like(labels[0])
        for part, target in zip(parts, labels.split(len(parts[0])), strict=True):
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


def _is_linear(model: nn.Module, layer: Any, batch: Inputs) -> bool:
    """Whether the network returns W·f + b, up to rounding and a constant per image."""
    with observing(model):
        features, _, result = _call(model, layer, batch)
        weight = layer.weight.float().flatten(1)
        bias = torch.zeros_like(weight[:, 0]) if layer.bias is None else layer.bias.float()
        expected = features @ weight.T + bias - bias.mean()
        found = [tensor.float() for tensor in outputs(result) if tensor.shape == expected.shape]
        if len(found) != 1:
            return False
        size = (features.square() @ weight.square().T + (bias - bias.mean()).square()).sqrt().max()
        difference = found[0] - expected
        return bool((difference - difference.mean(1, keepdim=True)).abs().max() <= _ROUNDING * size)
