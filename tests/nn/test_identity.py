import numpy as np
import pytest
import torch

from bnsurgery.nn.identity import identity_parameters, kernel_scale_shift

EDGE_VARIANCES = [0.0, 1e-45, 1e-38, 1e-9, 1e-5, 1.0, 1e8]


@pytest.fixture
def variances():
    return np.concatenate([10 ** np.random.default_rng(0).uniform(-12, 8, 100_000), EDGE_VARIANCES])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [1e-5, 1e-3, 1e-12])
def test_the_scale_is_exactly_one_and_the_variance_hardly_moves(variances, dtype, eps):
    tensors = identity_parameters(np.zeros_like(variances), variances, eps, dtype)
    assert (kernel_scale_shift(**tensors, eps=eps)[0] == 1).all()
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    running_var, weight = tensors["running_var"].numpy(), tensors["weight"].numpy()
    # At most 64 steps of one ulp of var + eps, each below 2^-23 (2^-52) of it.
    steps = 64 * torch.finfo(dtype).eps
    assert (np.abs(running_var - variances) <= steps * (variances + eps)).all()
    assert (np.abs(weight - np.sqrt(variances + eps)) <= steps * np.sqrt(variances + eps)).all()


def test_the_plain_square_root_would_not_do(variances):
    """What the search is for: without it a tenth or more of the channels is off by an ulp."""
    var = variances.astype(np.float32)
    arrays = np.zeros_like(var), var, np.sqrt(var + np.float32(1e-5))
    plain, _ = kernel_scale_shift(*map(torch.from_numpy, arrays), None, 1e-5)
    assert (plain != 1).mean() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_stock_kernel_passes_its_input_through(variances, dtype, memory_format):
    """Independent of our arithmetic: torch's own batch norm, on values of every size."""
    channels = len(variances) // 50
    variance = variances[-channels:]
    mean = np.random.default_rng(1).normal(size=channels) * np.sqrt(variance) * 3
    p = identity_parameters(mean, variance, 1e-5, dtype)
    x = torch.randn(2, channels, 3, 5, dtype=dtype) * torch.logspace(-6, 6, 5, dtype=dtype)
    x = x.contiguous(memory_format=memory_format)
    y = torch.nn.functional.batch_norm(x, p["running_mean"], p["running_var"], p["weight"], p["bias"], False, 0.0, 1e-5)
    assert torch.equal(x, y)


def test_scale_shift_is_what_torch_computes():
    norm = torch.nn.BatchNorm1d(37).double().eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        torch.nn.init.normal_(tensor)
    norm.running_var.uniform_(0.1, 5)
    scale, shift = kernel_scale_shift(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    x = torch.randn(4, 37, dtype=torch.float64)
    torch.testing.assert_close(norm(x), x * torch.from_numpy(scale) + torch.from_numpy(shift), rtol=1e-13, atol=1e-13)


def test_scale_shift_without_affine_parameters():
    norm = torch.nn.BatchNorm1d(3, affine=False).eval()
    norm.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    scale, shift = kernel_scale_shift(norm.running_mean, norm.running_var, None, None, norm.eps)
    x = torch.randn(4, 3)
    torch.testing.assert_close(norm(x), x * torch.from_numpy(scale) + torch.from_numpy(shift))
