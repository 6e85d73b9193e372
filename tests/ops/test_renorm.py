"""Batch Renormalization: when a step begins, what it shares, and the same numbers from the kernels as from ATen."""

import copy

import pytest
import torch
from torch import nn

import bnsurgery
from bnsurgery.nn import BatchNorm2d


@pytest.fixture
def norm():
    """A layer with statistics of its own that normalizes by "renorm", at its first step."""
    layer = BatchNorm2d(6).train()
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.normal_()
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 4)
    bnsurgery.set_statistics_(layer, "renorm", renorm_steps=10)
    return layer


def end_step(layer):
    """As an optimizer does."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.01)


def by_hand(layer, x, mean, var, step, steps=10):
    """Weight·(r·x̂ + d) + bias in float64, with the running statistics `mean` and `var`, at a step of the schedule."""
    dims, view = (0, 2, 3), (1, -1, 1, 1)
    x, mean, var = x.double(), mean.double(), var.double()
    p = min(step / steps, 1)
    r_max, d_max = (3 ** ((1 - p) / p), 5 * (1 - p) / p) if p else (torch.inf, torch.inf)
    sigma, std = (x.var(dims, correction=0) + layer.eps).sqrt(), (var + layer.eps).sqrt()
    r = (sigma / std).clamp(1 / r_max, r_max)
    d = ((x.mean(dims) - mean) / std).clamp(-d_max, d_max)
    normalized = (x - x.mean(dims).view(view)) / sigma.view(view) * r.view(view) + d.view(view)
    return normalized * layer.weight.double().view(view) + layer.bias.double().view(view)


def agree(got, want):
    """Up to a few roundings of numbers of the size of the largest."""
    assert (got.double() - want).abs().max() <= 16 * torch.finfo(got.dtype).eps * want.abs().max()


@pytest.mark.parametrize("step", [0, 1, 4, 9, 10, 30])
def test_the_formula_at_every_step(norm, step):
    norm.start_renorm_(step, 10)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    x = torch.randn(4, 6, 5, 5) * 3 + 1
    agree(norm(x), by_hand(norm, x, mean, var, step))


def test_calls_of_one_step_share_counter_and_statistics(norm):
    """A siamese network, or gradients accumulated: until the weights change, every call is of the same step."""
    for step in range(3):
        mean, var = norm.running_mean.clone(), norm.running_var.clone()
        for number in range(3):
            x = torch.randn(4, 6, 5, 5) * (number + 1) + step
            agree(norm(x), by_hand(norm, x, mean, var, step))
        assert not torch.equal(norm.running_mean, mean)
        assert norm.renorm_state[2].tolist() == [step] * 6
        end_step(norm)
    assert norm.num_batches_tracked == 3


def test_a_backward_ends_no_step_and_gives_the_formulas_gradients(norm):
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    norm.start_renorm_(8, 10)
    tensors = [torch.randn(4, 6, 5, 5) * 2 + 1 for _ in range(2)]
    for x in tensors:
        x.requires_grad_()
        grad = torch.randn_like(x)
        got = torch.autograd.grad(norm(x), (x, norm.weight, norm.bias), grad)
        with torch.no_grad():
            dims = (0, 2, 3)
            sigma, std = (x.var(dims, correction=0) + norm.eps).sqrt(), (var + norm.eps).sqrt()
            r = (sigma / std).clamp(3**-0.25, 3**0.25)
            d = ((x.mean(dims) - mean) / std).clamp(-1.25, 1.25)
        double = [t.detach().double().requires_grad_() for t in (x, norm.weight, norm.bias)]
        xhat = nn.functional.batch_norm(double[0], None, None, training=True, eps=norm.eps)
        affine = double[1].view(1, -1, 1, 1), double[2].view(1, -1, 1, 1)
        want = affine[0] * (xhat * r.view(1, -1, 1, 1) + d.view(1, -1, 1, 1)) + affine[1]
        for mine, theirs in zip(got, torch.autograd.grad(want, double, grad.double()), strict=True):
            assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp_min(1)


def test_frozen_weights_end_no_step(norm):
    """What nothing trains keeps the function it had."""
    norm.requires_grad_(False)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    for _ in range(3):
        x = torch.randn(4, 6, 5, 5)
        agree(norm(x), by_hand(norm, x, mean, var, 0))


def test_without_weights_every_call_is_a_step():
    layer = BatchNorm2d(6, affine=False).train()
    bnsurgery.set_statistics_(layer, "renorm", renorm_steps=10)
    for _ in range(3):
        layer(torch.randn(4, 6, 5, 5) + 1)
    assert layer.num_batches_tracked == 3


def test_weights_replaced_rather_than_changed_end_a_step(norm):
    """As functional optimizers do: new tensors at every step."""
    for step in range(3):
        mean, var = norm.running_mean.clone(), norm.running_var.clone()
        state = {"weight": norm.weight.detach() + step, "bias": norm.bias.detach().clone()}
        x = torch.randn(4, 6, 5, 5)
        got = torch.func.functional_call(norm, state, (x,))
        twin = copy.deepcopy(norm)
        twin.load_state_dict({**norm.state_dict(), **state})
        agree(got, by_hand(twin, x, mean, var, step))


def test_a_call_that_fails_begins_no_step(norm):
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(torch.randn(1, 6, 1, 1))
    x = torch.randn(4, 6, 5, 5)
    agree(norm(x), by_hand(norm, x, mean, var, 0))


def test_gradient_checkpointing_repeats_the_step(norm):
    """The second run of a layer is of the same step, so that its gradients are those of the first."""
    twin = copy.deepcopy(norm)
    x = torch.randn(4, 6, 5, 5, requires_grad=True)
    grad = torch.randn_like(x)
    got = torch.autograd.grad(torch.utils.checkpoint.checkpoint(norm, x, use_reentrant=False), x, grad)
    torch.testing.assert_close(got, torch.autograd.grad(twin(x), x, grad))


def test_a_resumed_schedule_goes_on(norm):
    """From num_batches_tracked, which counts steps, however often the layer ran in each."""
    for step in range(4):
        for _ in range(step):
            norm(torch.randn(4, 6, 5, 5))
        end_step(norm)
    assert norm.num_batches_tracked == 3
    twin = BatchNorm2d(6).train()
    bnsurgery.set_statistics_(twin, "renorm", renorm_steps=10)
    twin.load_state_dict(norm.state_dict())
    x = torch.randn(4, 6, 5, 5)
    assert torch.equal(twin(x), norm(x))
    assert torch.equal(twin.renorm_state, norm.renorm_state)
    assert norm.state_dict().keys() == nn.BatchNorm2d(6).state_dict().keys()
