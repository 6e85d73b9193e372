"""`recompute_activations_`: the same bits, in the memory of the network without BatchNorm.

The oracle is the same network without it. Memory is counted by looking at every tensor that an operator makes.
"""

import copy
import functools
import pickle
import threading

import pytest
import torch
from small_network import Fire
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torchvision import models
from torchvision.models import vgg
from unchanged import assert_unchanged, snapshot

import bnsurgery
from bnsurgery.errors import BNSurgeryError
from bnsurgery.nn import BatchNorm2d, LastDimBatchNorm1d
from bnsurgery.nn.batchnorm import Insertable
from bnsurgery.surgery import recomputation


class Residual(nn.Module):
    """One activated output for a convolution, a pool and a sum; a module that is called twice, and one ReLU for all."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1), BatchNorm2d(8)
        self.body, self.body_norm = nn.Conv2d(8, 8, 3, padding=1), BatchNorm2d(8)
        self.side, self.pool = nn.Conv2d(8, 8, 1), nn.MaxPool2d(3, 1, 1)
        self.head = nn.Linear(8 * 32 * 32, 3)

    def forward(self, x):
        x = self.relu(self.stem_norm(self.stem(x)))
        for _ in range(2):
            x = self.relu(self.body_norm(self.body(x)) + self.side(x) + self.pool(x))
            x = self.relu(self.body_norm(self.body(x)))
        return self.head(x.flatten(1))


@functools.cache
def small_vgg():
    """VGG-16's layers, an eighth as wide, with a small head; not to be changed."""
    config = [width if width == "M" else width // 8 for width in vgg.cfgs["D"]]
    model = vgg.VGG(vgg.make_layers(config), num_classes=10)
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.classifier = nn.Sequential(nn.Linear(64 * 4, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 10))
    return model.eval()


def behind():
    """Convolutions whose norms go behind the ReLU."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(True), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()


def squeezenet():
    return models.squeezenet1_1(weights=None, num_classes=2).eval()


def inserted(model, fuse=False, **options):
    return bnsurgery.insert(model, [torch.randn(8, 3, 32, 32)], fuse_relu=fuse, **options).train()


@functools.cache
def inserted_vgg():
    return inserted(small_vgg())


NETWORKS = {
    "vgg": lambda fuse: inserted(small_vgg(), fuse),
    "behind": lambda fuse: inserted(behind(), fuse, placement="post-activation"),
    "squeezenet": lambda fuse: inserted(squeezenet(), fuse),
    "residual": lambda fuse: Residual().train(),
    "fire": lambda fuse: inserted(Fire().eval(), fuse),
}


@pytest.fixture
def pair():
    """A network and its twin that recomputes."""
    model, twin = copy.deepcopy(inserted_vgg()), copy.deepcopy(inserted_vgg())
    bnsurgery.recompute_activations_(twin)
    return model, twin


def images(layout=torch.contiguous_format, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 3, size, size, generator=generator).to(memory_format=layout)


def step(model, x, seed=0):
    """Outputs, gradients, running statistics after one pass, with the same dropout for all."""
    torch.manual_seed(seed)
    model.zero_grad()
    x = x.clone().requires_grad_()
    output = model(x)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    found = [output.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]
    return [tensor for tensor in found if tensor is not None]


def assert_same(model, twin, x):
    for got, want in zip(step(twin, x), step(model, x), strict=True):
        assert torch.equal(got, want)


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operators made and that are still there, beside the model's and x."""

    def __init__(self, model, x):
        super().__init__()
        self.before = {t.untyped_storage()._cdata for t in [x, *model.parameters(), *model.buffers()]}
        self.made, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.before:
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.bytes())
        return result

    def bytes(self):
        self.made = {key: value for key, value in self.made.items() if not value[0].expired()}
        return sum(size for _, size in self.made.values())


def kept_and_peak(model, x):
    """Bytes alive after the forward, and at most in a step."""
    model.zero_grad()
    with Live(model, x) as live:
        loss = model(x).square().mean()
        kept = live.bytes()
        loss.backward()
    return kept, live.peak


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("fuse", [False, True], ids=["relu", "fused"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_bits(name, fuse, layout):
    model = NETWORKS[name](fuse).to(memory_format=layout)
    twin = copy.deepcopy(model)
    bnsurgery.recompute_activations_(twin)
    x = images(layout)
    for seed in range(2):
        assert_same(model, twin, x + seed)
        for network in (model, twin):
            torch.optim.SGD(network.parameters(), 1e-3).step()


@pytest.mark.parametrize("fuse", [False, True], ids=["relu", "fused"])
@pytest.mark.parametrize("build", [small_vgg, squeezenet])
def test_the_memory_of_the_plain_network(build, fuse):
    plain, x = copy.deepcopy(build()).train(), images(size=64)
    model = inserted(build(), fuse, layers="conv")
    kept, peak = kept_and_peak(plain, x)
    kept_with_bn, peak_with_bn = kept_and_peak(model, x)
    assert kept_with_bn > 1.4 * kept and peak_with_bn > 1.2 * peak
    bnsurgery.recompute_activations_(model)
    kept_now, peak_now = kept_and_peak(model, x)
    assert kept_now <= 1.1 * kept and peak_now <= 1.1 * peak


def test_what_was_computed_again_is_freed(pair):
    """Nothing is alive after the backward but the gradients, and after a forward whose output is dropped nothing."""
    model, x = pair[1], images()
    model.zero_grad()
    with Live(model, x) as live:
        loss = model(x).square().mean()
        loss.backward()
        del loss
        assert live.bytes() == sum(p.grad.nbytes for p in model.parameters())
        model.zero_grad()
        model(x)
        assert live.bytes() == 0


def test_each_output_is_computed_again_once(pair, monkeypatch):
    """For the ReLU, the pool and the convolution together; and not at all where nothing needs it."""
    calls, forward = [], Insertable.forward
    monkeypatch.setattr(Insertable, "forward", lambda self, input: calls.append(input) or forward(self, input))
    loss = pair[1](images()).sum()
    before = len(calls)
    assert before == sum(isinstance(module, Insertable) for module in pair[1].modules())
    loss.backward()
    assert len(calls) == 2 * before - 1  # nobody kept the output of one of them


@pytest.mark.parametrize("mode", ["running", "renorm"])
def test_statistics_modes(mode, pair):
    """What the norms normalize by then moves on in the forward itself, and between two of them."""
    for model in pair:
        step(model, images(seed=1))
        bnsurgery.set_statistics_(model, mode, renorm_steps=5)
    assert_same(*pair, images())
    losses = [[model(images(seed=seed)).sum() for seed in (2, 3)] for model in map(without_dropout, pair)]
    gradients = [torch.autograd.grad(sum(two), list(m.parameters())) for m, two in zip(pair, losses, strict=True)]
    assert all(map(torch.equal, *gradients))


def without_dropout(model):
    model.classifier[-2].p = 0.0
    return model


def test_norms_in_eval_mode_and_frozen_layers(pair):
    for model in pair:
        for module in model.modules():
            if isinstance(module, BatchNorm2d):
                module.eval()
        for parameter in list(model.parameters())[:20]:
            parameter.requires_grad_(False)
    assert_same(*pair, images())


def test_cumulative_momentum_and_half_precision(pair):
    for model in pair:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = None
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(*pair, images())
    results = []
    for model in map(without_dropout, pair):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images()).square().mean()
        results.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(map(torch.equal, *results))


class Mixed(BatchNorm2d):
    """A norm that somebody derived, with something in it that autocast changes."""

    def forward(self, input):
        return nn.functional.conv2d(super().forward(input), torch.eye(4).view(4, 4, 1, 1))


def test_a_norm_is_computed_again_under_the_autocast_of_its_forward():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Mixed(4), nn.Conv2d(4, 2, 3)).train()
    twin = copy.deepcopy(model)
    bnsurgery.recompute_activations_(twin)
    results = []
    for network in (model, twin):
        with torch.autocast("cpu", torch.bfloat16):
            loss = network(images()).float().square().sum()
        results.append(torch.autograd.grad(loss, list(network.parameters())))
    assert all(map(torch.equal, *results))


class Flat(BatchNorm2d):
    """A norm that keeps a view of its input, and computes something else on that."""

    def forward(self, input):
        n, c, h, w = input.shape
        return super().forward(input.reshape(n, c, h * w, 1)).view(n, c, h, w) * w


def test_norms_that_keep_a_view_of_their_input():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Flat(4), nn.ReLU(), nn.Conv2d(4, 8, 30), nn.Flatten(2), nn.Linear(1, 6))
    model.extend([LastDimBatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)])
    twin = copy.deepcopy(model.train())
    bnsurgery.recompute_activations_(twin)
    assert_same(model, twin, images())


def test_backward_twice_and_gradients_of_gradients(pair):
    results = []
    for model in map(without_dropout, pair):
        model.double()
        x = images().double().requires_grad_()
        loss = model(x).square().sum()
        first = torch.autograd.grad(loss, x, retain_graph=True)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        results.append([*first, gradient, *torch.autograd.grad(gradient.square().sum(), list(model.parameters()))])
    assert all(map(torch.equal, *results))


def test_eval_mode_and_no_grad_are_left_alone(pair, monkeypatch):
    (model, twin), x = map(without_dropout, pair), images()
    with monkeypatch.context() as patch:
        patch.setattr(recomputation, "_Forward", None)
        assert kept_and_peak(model.eval(), x) == kept_and_peak(twin.eval(), x)
        with torch.no_grad():
            assert torch.equal(model.train()(x), twin.train()(x))
        with pytest.raises(TypeError):
            twin(x)
    model(x)  # running statistics move before an error, too


def change_weight(model, seen):
    model.features[1].weight.mul_(2)


def change_input(model, seen):
    seen[-1].mul_(2)


def change_kept(model, seen):
    model.features[0].weight.mul_(2)


@pytest.mark.parametrize("change", [change_weight, change_input, change_kept])
def test_a_change_in_place_is_an_error_and_no_wrong_gradient(change, pair):
    """Of a norm's weight, of what a norm got, of what no norm has to do with: torch refuses the same."""
    for model, error in zip(pair, (RuntimeError, BNSurgeryError), strict=True):
        seen = []
        model.features[1].register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        loss = model(images().requires_grad_()).sum()
        with torch.no_grad():
            change(model, seen)
        with pytest.raises(error, match="in.?place"):
            loss.backward(retain_graph=True)
    if change is not change_kept:  # torch has kept what this needs, and here it cannot be computed again
        with pytest.raises(BNSurgeryError, match="was changed in place after the forward"):
            torch.autograd.grad(loss, model.features[3].weight)


class Between(nn.Module):
    """What people's hooks and code do between a norm and its ReLU, and behind it."""

    def __init__(self, where, inplace):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 4, 3), BatchNorm2d(4), nn.Conv2d(4, 2, 3)
        self.relu, self.where = nn.ReLU(inplace), where
        mask = torch.tensor([1.0, 0, 2, 1]).view(4, 1, 1)
        if where == "a hook's own output":
            self.norm.register_forward_hook(lambda module, args, output: output * mask)
        elif where == "a hook in place":
            self.norm.register_forward_hook(lambda module, args, output: output.mul_(mask))
        self.mask = mask

    def forward(self, x):
        y = self.norm(self.first(x))
        if self.where == "before":
            y.detach().mul_(self.mask)
        elif self.where == "a part":
            self.relu(y[:, :2])
            return self.second(y)
        y = self.relu(y)
        if self.where == "behind":
            y = y * self.mask
        elif self.where == "a view":
            y = y.transpose(2, 3)[..., 1:]
        elif self.where == "detached":
            y = y.detach()
        elif self.where == "two":
            return self.second(y).flatten() + (self.second(y.flip(0)) * y[:, :2, 1:-1, 1:-1]).flatten()
        return self.second(y)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "where", ["a hook's own output", "a hook in place", "before", "a part", "behind", "a view", "detached", "two"]
)
def test_only_what_really_is_the_output_is_computed_again(where, inplace):
    model = Between(where, inplace).train()
    twin = copy.deepcopy(model)
    bnsurgery.recompute_activations_(twin)
    assert_same(model, twin, images())


def hook_counts(model):
    return [len(hooks) for both in snapshot(model)["hooks"].values() for hooks in both]


def test_it_ends_and_leaves_nothing_behind(pair, tmp_path):
    model, twin = pair
    before = snapshot(model)
    for _ in range(2):
        bnsurgery.recompute_activations_(model)
        assert hook_counts(model) == hook_counts(twin)
    bnsurgery.save(model, tmp_path / "model.safetensors")
    loaded = bnsurgery.load(tmp_path / "model.safetensors", model=small_vgg())
    for other in (loaded, bnsurgery.fold(model), bnsurgery.to_torch(model)):
        assert not any(hook_counts(other))
    bnsurgery.recompute_activations_(model, enabled=False)
    assert_unchanged(model, before)


def test_copies_and_pickles_keep_it(pair):
    (model, twin), x = pair, images()
    copies = [copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))]
    want = kept_and_peak(twin, x)
    assert want[0] < 0.75 * kept_and_peak(model, x)[0]
    for other in copies:
        assert kept_and_peak(other, x) == want


def test_a_network_without_norms_is_refused():
    model = small_vgg()
    before = snapshot(model)
    with pytest.raises(BNSurgeryError, match="recompute_activations_: VGG has no BatchNorm of bnsurgery.nn"):
        bnsurgery.recompute_activations_(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_that_fails(error, pair):
    """What it kept is freed, at the latest by the next forward, and hooks for tensors of others end with it."""

    def fail(module, args):
        raise error

    (model, twin), x = pair, images()
    handle = twin.classifier.register_forward_pre_hook(fail)
    with Live(twin, x) as live:
        with pytest.raises(error):
            twin(x)
        handle.remove()
        if error is KeyboardInterrupt:  # of which modules tell their hooks nothing
            twin(x)
        assert live.bytes() == 0
    number = torch.ones(3, requires_grad=True)
    square = number * number
    with torch.no_grad():
        number.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # torch's own words
        square.sum().backward()
    model.load_state_dict(twin.state_dict())
    assert_same(model, twin, x)


def test_threads(pair):
    """Each has hooks of its own: what one of them keeps is none of the others' business."""
    models, twins = ([copy.deepcopy(without_dropout(model)) for _ in range(3)] for model in pair)
    batches, got = [images(seed=seed) for seed in range(3)], {}

    def run(index):
        got[index] = step(twins[index], batches[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, model in enumerate(models):
        assert all(map(torch.equal, got[index], step(model, batches[index])))


class Checkpointed(nn.Module):
    """Two stages of a VGG, the second of which is a gradient checkpoint."""

    def __init__(self, model, use_reentrant):
        super().__init__()
        self.first, self.second = model.features[:14], nn.Sequential(model.features[14:], model.avgpool)
        self.head = model.classifier
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return self.head(checkpoint(self.second, self.first(x), use_reentrant=self.use_reentrant).flatten(1))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpoints(use_reentrant, pair):
    """Inside of a network they stay what they are, and around it gradients do."""
    x = images()
    model = Checkpointed(without_dropout(pair[0]), use_reentrant)
    twin = copy.deepcopy(model)
    bnsurgery.recompute_activations_(twin)
    assert_same(model, twin, x)
    assert kept_and_peak(twin, x)[0] < 0.75 * kept_and_peak(model, x)[0]
    model, twin = map(without_dropout, pair)
    for network in pair:
        network.zero_grad()
        checkpoint(network, x.requires_grad_(), use_reentrant=use_reentrant).sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_transforms(pair):
    x, results = images(), []
    for model in map(without_dropout, pair):
        state = dict(model.named_parameters())

        def loss(state, model=model):
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            return torch.func.functional_call(model, {**state, **buffers}, (x,)).square().sum()

        results.append(torch.func.grad(loss)(state))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_parameters_and_statistics_that_are_there_for_one_call_only(pair):
    """They are gone when the backward begins."""
    x, results = images(), []
    for model in map(without_dropout, pair):
        bnsurgery.set_statistics_(model, "running")
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        parameters = [state[name].mul_(1.5).requires_grad_() for name, _ in model.named_parameters()]
        loss = torch.func.functional_call(model, state, (x,)).square().sum()
        results.append(torch.autograd.grad(loss, parameters))
    assert all(map(torch.equal, *results))


@pytest.mark.slow
@pytest.mark.parametrize("part", [False, True], ids=["whole", "part"])
def test_compiled(part, pair):
    """A compiled network is compiled as ever, and a compiled part of an eager one stays what it is."""
    x, results = images(), []
    for model in map(without_dropout, pair):
        if part:
            model.features = torch.compile(model.features, backend="aot_eager", fullgraph=True)
            run = model
        else:
            run = torch.compile(model, backend="aot_eager", fullgraph=True)
        results.append(step(run, x))
    assert all(map(torch.equal, *results))
