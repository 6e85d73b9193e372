import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from bnsurgery.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, Normed
from bnsurgery.nn.identity import identity_parameters
from bnsurgery.nn.normed import attach_, detach_

CASES = [(BatchNorm1d, (6, 5)), (BatchNorm1d, (6, 5, 7)), (BatchNorm2d, (6, 5, 4, 3)), (BatchNorm3d, (6, 5, 2, 4, 3))]


def fill_(norm):
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


def identity_norm(channels, **kwargs):
    rng = np.random.default_rng(0)
    norm = BatchNorm2d(channels, **kwargs).eval()
    variance = np.concatenate([[0.0, 1e-9], 10 ** rng.uniform(-6, 6, channels - 2)])
    values = identity_parameters(rng.normal(size=channels), variance, norm.eps, norm.weight.dtype)
    norm.load_state_dict({**values, "num_batches_tracked": norm.num_batches_tracked})
    return norm


@pytest.mark.parametrize(("cls", "shape"), CASES)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("training", [True, False])
def test_is_torchs_batch_norm_and_relu(cls, shape, activation, training):
    """Forward, gradients and running statistics against torch's module in float64; tolerances are float64's."""
    ours = fill_(cls(5, activation=activation).double()).train(training)
    stock = cls.__mro__[2](5).double().train(training)
    stock.load_state_dict(ours.state_dict())
    assert type(stock).__module__.startswith("torch.nn")
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    got, expected = ours(x), stock(y)
    expected = expected.relu() if activation else expected
    torch.testing.assert_close(got, expected)
    grad = torch.randn_like(got)
    got.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(x.grad, y.grad)
    for a, b in zip([*ours.parameters(), *ours.buffers()], [*stock.parameters(), *stock.buffers()], strict=True):
        torch.testing.assert_close(a, b)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


def test_state_dict_goes_both_ways():
    ours, stock = fill_(BatchNorm2d(4, activation="relu")), nn.BatchNorm2d(4)
    stock.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(stock.state_dict(), strict=True)
    assert isinstance(ours, nn.BatchNorm2d)


def test_repr_names_the_activation():
    assert "activation='relu'" in repr(BatchNorm2d(3, activation="relu"))
    assert "activation" not in repr(BatchNorm2d(3))


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="`activation` must be None or 'relu', got 'gelu'"):
        BatchNorm2d(3, activation="gelu")


def test_wrong_number_of_dimensions_is_refused():
    with pytest.raises(ValueError, match="expected 4D input"):
        BatchNorm2d(3)(torch.randn(2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_float32_parameters_and_every_bit(dtype):
    norm = identity_norm(40).to(dtype)
    assert {t.dtype for t in norm.state_dict().values() if t.is_floating_point()} == {torch.float32}
    x = torch.randn(3, 40, 5, 5).to(dtype)
    assert torch.equal(norm(x), x)


def test_a_cast_to_float64_and_back_keeps_identity_channels_exact():
    norm = identity_norm(200)
    double = copy.deepcopy(norm).double()
    x = torch.randn(3, 200, 5, 5, dtype=torch.float64) * 1e3
    assert double.weight.dtype == torch.float64
    assert torch.equal(double(x), x)
    assert torch.equal(double.float()(x.float()), x.float())


def test_a_norm_made_in_half_precision_can_be_widened():
    norm = BatchNorm2d(4, dtype=torch.bfloat16).float().eval()
    assert norm.weight.dtype == torch.float32
    torch.testing.assert_close(norm(torch.ones(2, 4, 3, 3)), torch.ones(2, 4, 3, 3), rtol=1e-4, atol=0)


def test_a_cast_leaves_trained_channels_alone():
    norm = fill_(BatchNorm2d(8))
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    for name, tensor in norm.double().state_dict().items():
        assert torch.equal(tensor, before[name].to(tensor.dtype)), name


def test_a_cast_keeps_the_parameters_of_an_optimizer():
    norm = identity_norm(8)
    weight = norm.weight
    norm.bfloat16()
    assert norm.weight is weight


def test_normed_layer_is_the_layer_then_the_norm():
    conv, norm = nn.Conv2d(3, 5, 3), fill_(BatchNorm2d(5)).eval()
    x = torch.randn(2, 3, 6, 6)
    plain = conv(x)
    keys = list(conv.state_dict())
    attach_(conv, norm)
    assert isinstance(conv, Normed)
    assert isinstance(conv, nn.Conv2d)
    assert list(conv.state_dict()) == keys + [f"norm.{key}" for key in norm.state_dict()]
    assert torch.equal(conv(x), norm(plain))
    for twin in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert type(twin) is type(conv)
        assert torch.equal(twin(x), conv(x))
        assert twin.weight is not conv.weight
    detach_(conv)
    assert type(conv) is nn.Conv2d
    assert list(conv.state_dict()) == keys
    assert torch.equal(conv(x), plain)
