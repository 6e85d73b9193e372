"""The fitted head, against scikit-learn's logistic regression and against what the network computes with it."""

import math
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from torchvision import models

import bnsurgery
from bnsurgery import finetune
from bnsurgery.errors import BNSurgeryError, DataError, NonFiniteError
from bnsurgery.finetune import fit_head_, head_fit, setup
from bnsurgery.running.calls import out_of_memory


def batches(count=240, classes=4, size=12, channels=3, seed=0):
    """Noise whose mean and contrast go with the class, so that features tell the classes apart, if not all of them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    images = torch.randn(count, channels, size, size, generator=generator)
    images = images * (1 + 0.2 * labels.view(-1, 1, 1, 1)) + 0.3 * (labels % 2).view(-1, 1, 1, 1)
    return list(zip(images.split(50), labels.split(50), strict=True))


def trunk(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 10, 3, 2), nn.ReLU(), nn.Conv2d(10, 12, 3), nn.ReLU())


class Tokens(nn.Module):
    """A dense head on every position, (N, T, C), and then the mean."""

    def __init__(self):
        super().__init__()
        self.trunk, self.head = trunk(), nn.Linear(12, 4)

    def forward(self, x):
        return self.head(self.trunk(x).flatten(2).transpose(1, 2)).mean(1)


def sequential(*layers):
    return nn.Sequential(OrderedDict([("trunk", trunk()), *((str(i), layer) for i, layer in enumerate(layers))]))


POOL = nn.AdaptiveAvgPool2d(1)
NETWORKS = {
    "dense on pooled features": lambda: sequential(POOL, nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 4)),
    "dense without bias": lambda: sequential(POOL, nn.Flatten(), nn.Linear(12, 4, bias=False)),
    "dense on tokens": Tokens,
    "conv before pooling": lambda: sequential(nn.Conv2d(12, 4, 1), POOL, nn.Flatten()),
    "conv behind pooling": lambda: sequential(POOL, nn.Conv2d(12, 4, 1), nn.Flatten()),
    "conv, ReLU in place, pooling": lambda: sequential(nn.Conv2d(12, 4, 1), nn.ReLU(inplace=True), POOL, nn.Flatten()),
    "log_softmax": lambda: sequential(POOL, nn.Flatten(), nn.Linear(12, 4), nn.LogSoftmax(1)),
}


def head_of(model):
    return [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]


def features(model, loader):
    """As the fit shall see them: of the trunk, averaged over positions, in float64."""
    with torch.inference_mode():
        return torch.cat([model.trunk(images).double().mean((2, 3)) for images, _ in loader]).numpy()


def solution(x, y, intercept=True):
    """Scikit-learn's, folded: its penalty is ½‖V‖² where the losses' sum has the factor C, here 1/10."""
    mean = x.mean(0) if intercept else np.zeros(x.shape[1])
    scale = np.sqrt(((x - mean) ** 2).mean(0))
    scale[scale <= 1e-6 * np.abs(mean)] = math.inf
    model = LogisticRegression(C=0.1, fit_intercept=intercept, tol=1e-10, max_iter=10_000).fit((x - mean) / scale, y)
    weight = model.coef_ / scale
    loss = -model.predict_log_proba((x - mean) / scale)[np.arange(len(y)), y].mean()
    return weight, model.intercept_ - weight @ mean, loss, model.score((x - mean) / scale, y)


def centred(logits):
    return logits - logits.mean(1, keepdims=True)


@pytest.mark.parametrize("kind", NETWORKS)
def test_it_is_logistic_regression_on_the_features(kind):
    """Within the tolerance of L-BFGS, a gradient of 1e-6 in each of 52 numbers.

    The penalty makes the problem 10/240-convex: V is off by 1e-6·√52/0.04 = 2e-4 at most, and logits, for ‖z‖ of 10, by
    2e-3; 2e-5 is what was found.
    """
    model, loader = NETWORKS[kind]().eval(), batches()
    head, y = head_of(model), torch.cat([labels for _, labels in loader]).numpy()
    trunk_before = {name: value.clone() for name, value in model.trunk.state_dict().items()}
    found = fit_head_(model, loader)
    x = features(model, loader)
    weight, bias, loss, accuracy = solution(x, y, intercept=head.bias is not None)
    with torch.inference_mode():
        logits = torch.cat([model(images) for images, _ in loader]).double()
    np.testing.assert_allclose(centred(logits.numpy()), centred(x @ weight.T + bias), atol=2e-3)
    assert (found.refusal, found.images) == (None, 240) and found.seconds > 0
    assert found.loss == pytest.approx(loss, abs=1e-5)
    assert found.accuracy == pytest.approx(accuracy, abs=1.5 / 240)  # one image may be on the fence
    assert F.cross_entropy(logits, torch.from_numpy(y)).item() == pytest.approx(loss, abs=1e-4)
    assert 0.3 < found.accuracy < 1  # above chance, and no task where everything fits
    assert all(torch.equal(value, trunk_before[name]) for name, value in model.trunk.state_dict().items())


def test_two_classes_are_what_the_binary_regression_finds():
    """Its penalty is ½‖w‖² of the difference, ours ½(‖V₀‖² + ‖V₁‖²) = ¼‖w‖²: twice the C."""
    model, loader = sequential(POOL, nn.Flatten(), nn.Linear(12, 2)), batches(classes=2)
    assert fit_head_(model, loader).refusal is None
    x, y = features(model, loader), torch.cat([labels for _, labels in loader]).numpy()
    z = (x - x.mean(0)) / x.std(0)
    expected = LogisticRegression(C=0.2, tol=1e-10, max_iter=10_000).fit(z, y).decision_function(z)
    logits = head_of(model)(torch.from_numpy(x).float()).detach()
    np.testing.assert_allclose((logits[:, 1] - logits[:, 0]).numpy(), expected, atol=2e-3)


@pytest.mark.parametrize("split", [1, 7, 240])
def test_how_the_data_is_split_does_not_matter(split, monkeypatch):
    loader = batches()
    images, labels = (torch.cat(part) for part in zip(*loader, strict=True))
    weights = []
    for parts, numbers in ((loader, 2**22), (list(zip(images.split(split), labels.split(split), strict=True)), 100)):
        monkeypatch.setattr(head_fit, "_NUMBERS", numbers)
        model = sequential(POOL, nn.Flatten(), nn.Linear(12, 4))
        fit_head_(model, parts)
        weights.append(head_of(model).weight)
    torch.testing.assert_close(*weights, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("inserted", [False, True])
def test_squeezenet(inserted):
    """Conv → ReLU → mean: one constant for all biases, so that the ReLU is open at every position of every image."""
    torch.manual_seed(0)
    model = models.squeezenet1_1(weights=None, num_classes=3).eval()
    loader = batches(60, classes=3, size=48)
    found = fit_head_(model, loader)
    weights = [parameter.clone() for parameter in model.classifier[1].parameters()]
    if inserted:
        model = bnsurgery.insert(model, loader)
        nn.init.normal_(model.classifier[1].weight)
        assert fit_head_(model, loader).accuracy == found.accuracy
        assert all(map(torch.equal, weights, model.classifier[1].parameters()))
    lowest, x = [], []
    model.classifier[1].register_forward_hook(lambda module, args, output: lowest.append(output.min().item()))
    model.classifier[1].register_forward_pre_hook(lambda module, args: x.append(args[0].double().mean((2, 3))))
    with torch.inference_mode():
        logits = torch.cat([model(images) for images, _ in loader])
    assert min(lowest) == pytest.approx(1.0, abs=1e-3)  # by no more than it takes, and a margin of 1
    weight, bias, loss, _ = solution(torch.cat(x).numpy(), torch.cat([labels for _, labels in loader]).numpy())
    assert found.loss == pytest.approx(loss, abs=1e-4)
    np.testing.assert_allclose(
        centred(logits.double().numpy()), centred(torch.cat(x).numpy() @ weight.T + bias), atol=5e-3
    )


def test_a_vgg_inserted_or_not_gets_the_same_head():
    torch.manual_seed(0)
    model = models.VGG(models.vgg.make_layers([8, "M", 16, 16, "M", 32, "M"]), num_classes=3)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 3))
    loader = batches(60, classes=3, size=32)
    inserted = bnsurgery.insert(model.eval(), loader)
    for each in (model, inserted):
        each.train()
        assert fit_head_(each, loader).refusal is None and each.training
    assert torch.equal(model.classifier[-1].weight, head_of(inserted).weight)
    assert torch.equal(model.classifier[-1].bias, head_of(inserted).bias)


def test_features_that_are_constant_dead_or_tiny():
    """Constant ones are left out, exactly; tiny ones count as much as any."""
    model, loader = sequential(POOL, nn.Flatten(), nn.Linear(12, 4)), batches()
    last = model.trunk[2]
    with torch.no_grad():
        last.weight[:2] = 0
        last.bias[0], last.bias[1] = -1.0, 3.7  # dead; the same for all images
        last.weight[2:] *= 1e-4
        last.bias[2:] = last.bias[2:] * 1e-4 + 1e-3
    x, y = features(model, loader), torch.cat([labels for _, labels in loader]).numpy()
    assert 1e-6 < x[:, 2:].std(0).max() < 1e-3
    assert fit_head_(model, loader).refusal is None
    head = head_of(model)
    assert not head.weight[:, :2].any() and head.weight[:, 2:].abs().min() > 0
    weight, bias, _, _ = solution(x, y)
    logits = head(torch.from_numpy(x).float()).detach().double().numpy()
    np.testing.assert_allclose(centred(logits), centred(x @ weight.T + bias), atol=5e-3)
    with torch.no_grad():
        last.weight.zero_()
    assert fit_head_(model, loader).loss == pytest.approx(  # nothing to go by but how frequent the classes are
        -(np.bincount(y) / 240 * np.log(np.bincount(y) / 240)).sum(), abs=1e-5
    )


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.head = trunk(), nn.Linear(12, 4)

    def forward(self, x):
        pooled = self.trunk(x).mean((2, 3))
        return self.head(pooled) + self.head(-pooled)


class Tied(nn.Module):
    """Its head's weight is that of a layer in the trunk; or, "read" by the trunk's own code."""

    def __init__(self, name):
        super().__init__()
        self.trunk, self.mix, self.head = trunk(), nn.Linear(12, 12), nn.Linear(12, 12)
        self.read = name == "read"
        if not self.read:
            setattr(self.head, name, getattr(self.mix, name))

    def forward(self, x):
        pooled = self.trunk(x).mean((2, 3))
        return self.head(torch.tanh(F.linear(pooled, self.head.weight) if self.read else self.mix(pooled)))


def labelled(change):
    return [(images, change(labels)) for images, labels in batches()]


UNFIT = {
    "max pooling": (lambda: sequential(nn.Conv2d(12, 4, 1), nn.AdaptiveMaxPool2d(1), nn.Flatten()), None, "averaged"),
    "ReLU, max": (
        lambda: sequential(nn.Conv2d(12, 4, 1), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten()), None, "averaged",
    ),
    "softmax": (lambda: sequential(POOL, nn.Flatten(), nn.Linear(12, 4), nn.Softmax(1)), None, "averaged"),
    "sigmoid": (lambda: sequential(POOL, nn.Flatten(), nn.Linear(12, 4), nn.Sigmoid()), None, "averaged"),
    "clipped": (lambda: sequential(POOL, nn.Flatten(), nn.Linear(12, 4), nn.Hardtanh()), None, "averaged"),
    "a map": (lambda: sequential(nn.Conv2d(12, 4, 1)), None, "averaged"),
    "ReLU without a bias": (
        lambda: sequential(nn.Conv2d(12, 4, 1, bias=False), nn.ReLU(), POOL, nn.Flatten()), None, "averaged",
    ),
    "a 3x3 head": (lambda: sequential(nn.Conv2d(12, 4, 3), POOL, nn.Flatten()), None, "more than one position"),
    "run twice": (Doubled, None, "does not run once"),
    "tied weight": (lambda: Tied("weight"), lambda y: torch.arange(len(y)) % 12, "shares its weights with 'mix'"),
    "tied bias": (lambda: Tied("bias"), lambda y: torch.arange(len(y)) % 12, "shares its weights with 'mix'"),
    "read by the trunk": (lambda: Tied("read"), lambda y: torch.arange(len(y)) % 12, "input depends on the head's"),
    "one output": (lambda: sequential(POOL, nn.Flatten(), nn.Linear(12, 1)), lambda y: y * 0, "one output"),
    "regression": (
        lambda: sequential(POOL, nn.Flatten(), nn.Linear(12, 4)), lambda y: y.float(), "float32 .* are not classes",
    ),
    "a label a pixel": (
        lambda: sequential(POOL, nn.Flatten(), nn.Linear(12, 4)), lambda y: y[:, None].repeat(1, 9), "are not classes",
    ),
    "one class": (
        lambda: sequential(POOL, nn.Flatten(), nn.Linear(12, 4)), lambda y: y * 0, "no sample is of class 1",
    ),
    "other classes": (lambda: sequential(POOL, nn.Flatten(), nn.Linear(12, 4)), lambda y: y + 1, "is a label 4"),
    "negative labels": (lambda: sequential(POOL, nn.Flatten(), nn.Linear(12, 4)), lambda y: y - 1, "is a label -1"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_what_cannot_be_fitted_is_said_and_left_as_it_was(case):
    make, change, reason = UNFIT[case]
    model = make().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = fit_head_(model, labelled(change or (lambda y: y)), head_of(model))
    assert found.refusal is not None and str(found) == f"not fitted: {found.refusal}" and "\n" not in str(found)
    assert re.search(reason, found.refusal)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_features_that_are_not_finite_are_named():
    model, loader = sequential(POOL, nn.Flatten(), nn.Linear(12, 4)), batches()
    before = head_of(model).weight.clone()
    loader[2][0][7, 0, 5, 5] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN or Inf in sample 7 of batch 2"):
        fit_head_(model, loader)
    assert torch.equal(head_of(model).weight, before)


def test_a_loader_that_fails_in_the_second_pass_leaves_the_head_as_it_was():
    class Once(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            if self.passes > 1:
                raise DataError("gone")
            return super().__iter__()

    model = sequential(nn.Conv2d(12, 4, 1), nn.ReLU(), POOL, nn.Flatten())
    before = [parameter.clone() for parameter in head_of(model).parameters()]
    with pytest.raises(DataError, match="gone"):
        fit_head_(model, Once(batches()), head_of(model))
    assert all(map(torch.equal, before, head_of(model).parameters()))


def test_other_bad_input_is_named():
    model, loader = sequential(POOL, nn.Flatten(), nn.Linear(12, 4)), batches()
    x, y = loader[0]
    for given, reason in (
        (iter(loader), "which one pass exhausts"),
        (5, "got an int, expected a DataLoader or a list"),
        ([images for images, _ in loader], "batch 0: got a Tensor, expected a pair of an input and a tensor of labels"),
        ([(x, y), {"pixels": x, "labels": y}], "batch 1: got a dict with the keys 'pixels', 'labels', expected"),
        ([(x, y.tolist())], "batch 0: got a tuple of Tensor, list, expected"),
        ([[x]], "batch 0: got a list of Tensor, expected"),
        ([(x, y), (x[:0], y[:0])], "batch 1: has no sample"),
        ([], "the loader is empty"),
    ):
        for head in (None, head_of(model)):
            with pytest.raises(DataError, match=reason):
                fit_head_(model, given, head)
    with pytest.raises(BNSurgeryError, match="failed on an input of shape"):
        fit_head_(model, [(torch.ones(4, 5), torch.arange(4))], head_of(model))


class Used:
    """An iterable, and no iterator, that gives what is left of one pass."""

    def __init__(self, items):
        self.items = iter(items)

    def __iter__(self):
        return self.items


class UsedDataset(Used, IterableDataset):
    pass


@pytest.mark.parametrize(
    "make",
    [Used, lambda loader: DataLoader(UsedDataset(pair for x, y in loader for pair in zip(x, y, strict=True)), 50)],
    ids=["iterable", "DataLoader"],
)
def test_what_can_be_iterated_once_is_fitted_on_whole_or_refused(make):
    """One pass suffices but for a ReLU behind the head."""
    fitted = []
    for given in (batches(), make(batches())):
        model = sequential(POOL, nn.Flatten(), nn.Linear(12, 4))
        assert fit_head_(model, given).images == 240
        fitted.append(head_of(model).weight)
    assert torch.equal(*fitted)
    model = sequential(nn.Conv2d(12, 4, 1), nn.ReLU(), POOL, nn.Flatten())
    before = [parameter.clone() for parameter in head_of(model).parameters()]
    with pytest.raises(
        DataError, match="240 samples in its first pass and 0 in the second: pass a DataLoader or a list"
    ):
        fit_head_(model, make(batches()))
    assert all(map(torch.equal, before, head_of(model).parameters()))


class Pair(nn.Module):
    """Token ids and a number for each; the code looks at their shape."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(20, 8), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, ids, scale):
        features = torch.relu(self.mix(self.embed(ids) * scale[..., None]))
        return self.head(features.mean(1) if ids.shape[1] > 3 else features[:, 0])


@pytest.mark.parametrize("named", [False, True])
def test_a_head_is_found_whatever_the_inputs_are(named):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (200,), generator=generator)
    ids = torch.randint(0, 5, (200, 7), generator=generator) + 4 * labels[:, None]
    inputs = [{"ids": i, "scale": i / 20} if named else (i, i / 20) for i in ids.split(50)]
    loader = list(zip(inputs, labels.split(50), strict=True))
    weights = []
    for give in (False, True):
        torch.manual_seed(0)
        model = Pair()
        assert fit_head_(model, loader, model.head if give else None).refusal is None
        weights.append(model.head.weight)
    assert torch.equal(*weights)


def test_features_that_do_not_fit_into_memory_are_named_by_their_size(monkeypatch):
    model = sequential(POOL, nn.Flatten(), nn.Linear(12, 4))
    before = head_of(model).weight.clone()

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 19.53 GiB")

    with monkeypatch.context() as patched, pytest.raises(BNSurgeryError) as raised:
        patched.setattr(head_fit, "_solve", full)
        fit_head_(model, batches())
    assert "the features of 240 samples, (240, 12), float32: 0.00 GiB" in str(raised.value)
    assert "`limit`" in str(raised.value) and "`head_init='random'`" in str(raised.value)
    assert not out_of_memory(raised.value.__cause__)  # or `finetune` would advise smaller images instead
    assert torch.equal(head_of(model).weight, before)


def test_little_more_than_the_features_is_held(monkeypatch):
    """They are copied in parts: at a time `_NUMBERS` and the rest of a batch."""
    sizes, solve = [], head_fit._solve

    def spy(parts, *rest):
        sizes.extend(map(len, parts))
        return solve(parts, *rest)

    monkeypatch.setattr(head_fit, "_NUMBERS", 240)
    monkeypatch.setattr(head_fit, "_solve", spy)
    loader = [(images[:7], labels[:7]) for images, labels in batches(500)]
    assert fit_head_(sequential(POOL, nn.Flatten(), nn.Linear(12, 4)), loader).images == 70
    assert sizes == [21, 21, 21, 7]


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["plain", "bn", "bn-naive"])
def test_a_run_starts_with_a_fitted_head(arm, model, data, config, capsys, monkeypatch):
    chosen = config(arm=arm, epochs=1, head="new")
    result = finetune.run(chosen, model=model, data=data, show=True)
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("head  "))
    assert re.match(r"head         new: .*; fitted on 96 samples in ", said) and "training accuracy" in said
    assert said.endswith(result.resolved.head)
    monkeypatch.setattr(setup, "fit_head_", None)  # what is resumed is not fitted again
    assert finetune.resume(chosen.output, model=model, data=data).resolved == result.resolved


@pytest.mark.slow
def test_every_arm_fits_its_own_features_and_a_kept_head_stays(model, data, config):
    images, y = data.train.items.float() / 255, np.array(data.train.labels)
    heads = {}
    for arm in ("plain", "bn", "bn-naive"):
        made = setup.build(config(arm=arm, head="new"), setup.processes(config()), model, data, None, False)
        head = heads[arm] = head_of(made.network)
        seen = []
        head.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].double()))
        with torch.inference_mode():
            logits = made.network.eval()(images).double().numpy()
        x = seen[0].numpy()
        weight, bias, *_ = solution(x, y)
        np.testing.assert_allclose(centred(logits), centred(x @ weight.T + bias), atol=5e-3)
        assert re.match("new: .*; fitted on 96 samples in ", made.resolved.head)
    assert torch.equal(heads["plain"].weight, heads["bn"].weight)
    assert not torch.allclose(heads["bn"].weight, heads["bn-naive"].weight, rtol=0.1)
    kept, random = "kept: as asked", "new: as asked; random"
    for head, head_init, said in (("keep", "fit", kept), ("new", "random", random)):
        made = setup.build(config(head=head, head_init=head_init), setup.processes(config()), model, data, None, False)
        assert made.resolved.head == said
        assert torch.equal(head_of(made.network).weight, model[-1].weight) == (said == kept)
    assert head_of(made.network).weight.std().item() == pytest.approx(0.01, rel=0.3)


@pytest.mark.slow
def test_batchnorm_alone_is_trained_behind_a_fitted_head(model, data, config, tmp_path):
    setup_only = setup.build(config(head="new"), setup.processes(config()), model, data, None, False)
    result = finetune.run(config(head="new", train="bn"), model=model, data=data)
    assert "; fitted on 96 samples in " in result.resolved.head
    trained = bnsurgery.load(result.directory / "best.safetensors", model=model)
    assert torch.equal(head_of(trained).weight, head_of(setup_only.network).weight)
    assert not torch.equal(trained[1].weight, setup_only.network[1].weight)
    with pytest.raises(BNSurgeryError, match=r"would leave the new head random, because it cannot be fitted \(the net"):
        finetune.run(config(output=str(tmp_path / "no"), head="new", train="bn"), model=unfittable(), data=data)
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_checkpoint_fits_its_head_again(model, data, config):
    whole = finetune.run(config(epochs=1, head="new"), model=model, data=data)
    (whole.directory / "last" / "state.pt").unlink()
    again = finetune.resume(whole.directory, model=model, data=data)
    assert [row.train_loss for row in again.rows] == [row.train_loss for row in whole.rows]
    assert again.resolved == whole.resolved


def unfittable():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.AdaptiveMaxPool2d(1), nn.Flatten()
    ).eval()


@pytest.mark.slow
def test_a_run_whose_head_cannot_be_fitted_says_so_and_trains(data, config):
    result = finetune.run(config(epochs=1, head="new"), model=unfittable(), data=data, save=False)
    assert "; random, not fitted: the network's outputs are not the head's" in result.resolved.head
