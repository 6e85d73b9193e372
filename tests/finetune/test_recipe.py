"""The recipe's parts, against what they are said to be."""

import math

import pytest
import torch
from tiny_task import tiny
from torch import nn
from torch.nn import functional as F

import bnsurgery
from bnsurgery import finetune
from bnsurgery.finetune import Config, loop, recipe


def parts(**changes):
    return Config(source="x", data="x", output="x", **changes)


def test_the_rate_rises_linearly_and_falls_as_a_cosine():
    factors = [recipe.rate_factor(step, 110, 0.1) for step in range(110)]
    assert factors[:11] == pytest.approx([(i + 1) / 12 for i in range(11)])
    assert factors[11] == 1
    assert factors[11:] == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 99)) for i in range(99)])
    assert recipe.rate_factor(0, 5, 0.0) == 1


def test_biases_and_batchnorm_do_not_decay():
    model = bnsurgery.insert(tiny(), [torch.rand(8, 1, 8, 8)])
    optimizer = recipe.optimizer(parts(), model, 0.1)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_weight = name == "weight" and isinstance(module, (nn.Conv2d, nn.Linear))
            assert decay[id(parameter)] == (1e-4 if is_weight else 0.0), (module, name)


@pytest.mark.parametrize("train", ["all", "bn", "head", "bn+head"])
def test_only_the_chosen_parameters_are_trained(train):
    model = bnsurgery.insert(tiny(), [torch.rand(8, 1, 8, 8)])
    head = model[-1]
    recipe.choose_parameters_(model, train, head)
    for module in model:
        expected = train == "all" or (module is head and "head" in train)
        expected = expected or (isinstance(module, nn.modules.batchnorm._BatchNorm) and "bn" in train)
        assert all(p.requires_grad == expected for p in module.parameters())


def test_dropout_is_lowered_unless_it_is_told():
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout2d(0.1))
    recipe.set_dropout_(model, None)
    assert [module.p for module in model] == [0.2, 0.1]
    recipe.set_dropout_(model, 0.4)
    assert [module.p for module in model] == [0.4, 0.4]


@pytest.mark.parametrize("kernel", [None, 1, 3])
def test_the_conditioner_is_sgd_on_a_standardized_input(kernel):
    """Against SGD with momentum on V and c themselves, in float64: equal up to rounding, 1e-12 after ten steps."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 6, *([] if kernel is None else [5, 5]), generator=generator, dtype=torch.float64) * 3 + 7
    y = torch.randint(0, 4, (32,), generator=generator)
    head = nn.Linear(6, 4) if kernel is None else nn.Conv2d(6, 4, kernel)
    head.double()
    dims = [0, *range(2, x.ndim)]
    mean, variance = x.mean(dims), x.var(dims).mean()
    shape = (1, -1, *[1] * (x.ndim - 2))

    def logits(weight, bias, inputs):
        out = F.linear(inputs, weight, bias) if kernel is None else F.conv2d(inputs, weight, bias).mean((2, 3))
        return F.cross_entropy(out, y)

    s = variance.sqrt()
    v = (head.weight.detach() * s).requires_grad_()
    c = (head.bias.detach() + (head.weight.detach() * mean.view(shape)).flatten(1).sum(1)).requires_grad_()
    standardized = (x - mean.view(shape)) / s
    reference = torch.optim.SGD([v, c], lr=0.1, momentum=0.9, nesterov=True)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    conditioner = recipe.HeadConditioner(head, mean, variance)
    for _ in range(10):
        reference.zero_grad()
        logits(v, c, standardized).backward()
        reference.step()
        optimizer.zero_grad()
        logits(head.weight, head.bias, x).backward()
        conditioner.apply_()
        optimizer.step()
    torch.testing.assert_close(head.weight * s, v, rtol=1e-11, atol=1e-12)
    bias = head.bias + (head.weight * mean.view(shape)).flatten(1).sum(1)
    torch.testing.assert_close(bias, c, rtol=1e-11, atol=1e-12)


def test_the_conditioner_never_raises_the_rate():
    head = nn.Linear(3, 2)
    conditioner = recipe.HeadConditioner(head, torch.zeros(3), torch.tensor(1e-4))
    head.weight.grad, head.bias.grad = torch.ones(2, 3), torch.ones(2)
    conditioner.apply_()
    assert torch.equal(head.weight.grad, torch.ones(2, 3))


def test_the_average_is_exponential(model, data, config, monkeypatch):
    """From the weights before the first step on, in float64: equal up to float32's rounding."""
    expected, averages = [], []

    def step(trainer, *args, original=loop.Trainer.train_step):
        expected[:] = expected or [p.detach().double() for p in trainer.trained]
        original(trainer, *args)
        expected[:] = [0.7 * a + 0.3 * p.detach() for a, p in zip(expected, trainer.trained, strict=True)]
        averages[:] = trainer.average

    monkeypatch.setattr(loop.Trainer, "train_step", step)
    finetune.run(config(epochs=1, ema=0.7), model=model, data=data, save=False)
    for average, value in zip(averages, expected, strict=True):
        torch.testing.assert_close(average.double(), value, rtol=1e-5, atol=1e-6)


def test_it_learns(model, data, config):
    result = finetune.run(config(epochs=6, lr=0.3), model=model, data=data, save=False)
    assert result.final.val_accuracy > 0.9  # 0.25 by chance
    assert [row.epoch for row in result.rows] == [1, 2, 3, 4, 5, 6]
