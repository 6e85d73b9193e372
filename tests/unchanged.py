"""Everything about a model that a failed or read-only call must leave as it was, and that a fold must bring back."""

import torch
from torch import nn


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything that a failed or read-only call must leave as it was."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "hooks": {
            name: (list(module._forward_hooks), list(module._forward_pre_hooks))
            for name, module in model.named_modules()
        },
        "grads": {name: p.grad if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "rng": torch.get_rng_state(),
    }


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    after = snapshot(model)
    for part in ("modes", "classes", "hooks"):
        assert after[part] == before[part], part
    assert list(after["state"]) == list(before["state"])
    for name, tensor in before["state"].items():
        assert torch.equal(after["state"][name], tensor), name
    for name, grad in before["grads"].items():
        same = after["grads"][name] is None if grad is None else torch.equal(after["grads"][name], grad)
        assert same, name
    assert torch.equal(after["rng"], before["rng"])


def assert_same_network(got, expected):
    assert type(got) is type(expected)
    assert str(got) == str(expected)
    assert list(got.state_dict()) == list(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name
