"""The op and its contracts; on CUDA too where there is one, and interpreted (see conftest.py)."""

import importlib.util
import itertools

import pytest
import torch
from batch_norm_oracle import DTYPES, INTERPRETED, SHAPES, assert_agrees, layouts, parameters
from torch.nn import functional as F

from bnsurgery import ops
from bnsurgery.ops import library

FLAGS = list(itertools.product([True, False], repeat=2))
CASES = [(shape, dtype, *flags) for shape, dtype, flags in itertools.product(SHAPES, DTYPES, FLAGS)]
if INTERPRETED:  # all of all would take a minute: every shape with every dtype, and each of them with all four flags
    CASES = [(shape, dtype, *FLAGS[(i + j) % 4]) for i, shape in enumerate(SHAPES) for j, dtype in enumerate(DTYPES)]


@pytest.mark.parametrize(("shape", "dtype", "training", "relu"), CASES)
def test_shapes_layouts_and_dtypes(shape, dtype, training, relu):
    for x in layouts((torch.randn(shape) * 2 + 1).to(dtype)):
        assert_agrees(x, training, relu)


@pytest.mark.parametrize(("affine", "tracked"), [(False, True), (True, False), (False, False)])
@pytest.mark.parametrize("relu", [True, False])
def test_weight_bias_and_running_statistics_are_optional(affine, tracked, relu):
    assert_agrees(torch.randn(4, 6, 5, 5), True, relu, affine=affine, tracked=tracked)


@pytest.mark.parametrize("relu", [True, False])
def test_gradients_of_any_stride(relu):
    """Past bugs elsewhere: kernels that took the gradient to be laid out like the input."""
    x = torch.randn(3, 8, 6, 5)
    for (i, this), (j, other) in itertools.product(enumerate(layouts(x)), enumerate(layouts(torch.randn_like(x)))):
        if (i + j + relu) % 2:  # every pair of layouts once, every layout with and without
            assert_agrees(this, True, relu, grad=other)
    assert_agrees(x, True, relu, grad=torch.ones(()).expand(x.shape))
    assert_agrees(x, False, relu, grad=torch.randn(8).view(1, 8, 1, 1).expand(x.shape))


@pytest.mark.parametrize("channels", [63, 64, 65, 257])
def test_many_channels_last(channels):
    """A past bug elsewhere: channels from 64 on were left zero."""
    assert_agrees(torch.randn(2, channels, 4, 4).to(memory_format=torch.channels_last), True, True)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_mean_far_above_the_deviation(memory_format):
    """X = 1e4 + noise: Σx²/M − mean² in float32 has an error of 1e8·2^-24 = 6, so a variance of 1 would be lost."""
    x = (torch.randn(8, 4, 32, 32) + 1e4).contiguous(memory_format=memory_format)
    running_mean, running_var = torch.zeros(4), torch.ones(4)
    y = ops.batch_norm(x, running_mean, running_var, training=True, momentum=1.0)
    want = F.batch_norm(x.double(), None, None, training=True)
    samples = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(running_var.double(), samples.var(1), rtol=1e-5, atol=0)
    # ATen's kernel computes x·scale + (bias − mean·scale): two roundings at 1e4.
    assert (y - want).abs().max() <= 2 * 1e4 * 2**-23
    weight = torch.ones(4, requires_grad=True)
    grad = 1 + torch.randn_like(x)
    ops.batch_norm(x, None, None, weight, training=True).backward(grad)
    want_weight = (grad * want).transpose(0, 1).flatten(1)
    # Σg·(x − mean) by a mean rounded to float32, off by up to 5e-4, would be off by 5e-4·Σg.
    assert (weight.grad - want_weight.sum(1)).abs().max() <= 8 * 2**-23 * want_weight.abs().sum(1).max()


def test_absent_running_mean_writes_nowhere():
    """A past bug elsewhere: with running_mean=None the statistics were written into the input."""
    x = torch.randn(4, 3, 5, 5)
    before = x.clone()
    running_var = torch.ones(3)
    ops.batch_norm(x, None, running_var, training=True)
    assert torch.equal(x, before)
    assert not torch.equal(running_var, torch.ones(3))


def test_nan_passes_the_relu_as_in_torch():
    x = torch.randn(4, 2, 3, 3)
    x[0, 0, 0, 0] = torch.nan
    y = ops.batch_norm(x, torch.zeros(2), torch.ones(2), relu=True)
    assert y[0, 0, 0, 0].isnan()
    assert y.isnan().sum() == 1
    assert ops.batch_norm(x, None, None, training=True, relu=True)[:, 0].isnan().all()


def test_the_gradient_at_exactly_zero_is_zero():
    """As threshold_backward has it; dead channels sit there."""
    x = torch.tensor([[-1.0], [0.0], [2.0]]).requires_grad_()
    ops.batch_norm(x, torch.zeros(1), torch.ones(1), eps=0.0, relu=True).sum().backward()
    assert x.grad.flatten().tolist() == [0.0, 0.0, 1.0]
    bias = torch.zeros(2, requires_grad=True)
    ops.batch_norm(torch.full((4, 2, 3, 3), 0.5), None, None, None, bias, True, relu=True).sum().backward()
    assert bias.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4)])
@pytest.mark.parametrize("training", [True, False])
def test_empty_batches(shape, training):
    x = torch.randn(shape, requires_grad=True)
    running_mean, running_var, weight, bias = parameters(3, x.dtype)
    before = running_mean.clone(), running_var.clone()
    y = ops.batch_norm(x, running_mean, running_var, weight, bias, training, relu=True)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert weight.grad.tolist() == bias.grad.tolist() == [0.0] * 3
    assert torch.equal(running_mean, before[0])
    assert torch.equal(running_var, before[1])


def samples_of_torch():
    if importlib.util.find_spec("expecttest") is None:  # torch.testing._internal needs it, and a borrowed GPU has none
        return [pytest.param(None, marks=pytest.mark.skip("torch's own samples need expecttest"))]
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = [op for op in op_db if op.name == "nn.functional.batch_norm" and not op.variant_test_name]
    samples = info.sample_inputs(torch.get_default_device(), torch.float64, requires_grad=True)
    return [sample for sample in samples if sample.input.ndim > 1]  # F.batch_norm takes (0,), which has no channels


@pytest.mark.parametrize(
    "sample", samples_of_torch(), ids=lambda s: f"{tuple(s.input.shape)}-{s.kwargs}" if s else "none"
)
def test_torchs_own_samples(sample):
    clones = [None if t is None else t.detach().clone().requires_grad_(t.requires_grad) for t in sample.args]
    x = sample.input.detach().clone().requires_grad_()
    got, want = ops.batch_norm(x, *clones, **sample.kwargs), F.batch_norm(sample.input, *sample.args, **sample.kwargs)
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    got.backward(grad)
    want.backward(grad)
    for mine, theirs in zip((x, *clones), (sample.input, *sample.args), strict=True):
        if theirs is not None:
            torch.testing.assert_close(mine, theirs)
            torch.testing.assert_close(mine.grad, theirs.grad)


def arguments_for_gradients(shape=(3, 2, 4, 3)):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    running_mean, running_var, weight, bias = parameters(shape[1], torch.float64)
    return x, weight, bias, running_mean, running_var


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_gradients_once_and_twice(training, relu):
    x, weight, bias, running_mean, running_var = arguments_for_gradients()

    def f(x, weight, bias):
        return ops.batch_norm(x, running_mean.clone(), running_var.clone(), weight, bias, training, relu=relu)

    assert torch.autograd.gradcheck(f, (x, weight, bias))
    assert torch.autograd.gradgradcheck(f, (x, weight, bias))


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_double_backward_of_some_inputs_only(frozen):
    tensors = list(arguments_for_gradients())
    for index in frozen:
        tensors[index].requires_grad_(False)
    x, weight, bias, *_ = tensors
    f = lambda x, weight, bias: ops.batch_norm(x, None, None, weight, bias, True)  # noqa: E731
    assert torch.autograd.gradgradcheck(f, (x, weight, bias))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # opcheck looks at it
@pytest.mark.parametrize(
    ("batch", "relu", "affine"),  # every two of the flags in every combination
    [(True, True, True), (True, False, False), (False, True, False), (False, False, True)],
)
def test_the_ops_keep_the_dispatchers_contract(batch, relu, affine):
    """Schema, fake kernels, autograd registration, and AOT dispatch with static and dynamic shapes."""
    x = torch.randn(3, 4, 5, 6)
    mean, var, weight, bias = parameters(4, torch.float32)
    weight, bias = (weight, bias) if affine else (None, None)
    torch.library.opcheck(library.channel_moments, (x,))
    for layout in layouts(x):
        given, moving = ((None, None), (mean, var)) if batch else ((mean, var), (None, None))
        first = (layout.requires_grad_(), *given, weight, bias, 1e-5, relu, *moving)
        renorm = torch.stack((mean, var, *torch.tensor([1.0, 10.0]).view(2, 1).expand(2, 4)))
        for counter, state in itertools.product((None, torch.tensor(0)), (None, renorm) if batch else (None,)):
            torch.library.opcheck(library.batch_norm_fwd, (*first, counter, state, 0.1, ""))
    x = x.detach().to(memory_format=torch.channels_last)
    affine = [t if t is None else t.detach() for t in (weight, bias)]
    for rows, wanted in itertools.product((2, 4), ((True, True), (True, False), (False, True))):
        statistics = torch.rand(rows, 4, dtype=torch.float64)
        arguments = (x, x, x if relu else None, statistics, *affine, 1e-5, batch, relu, "", *wanted)
        torch.library.opcheck(library.batch_norm_bwd, arguments)


@pytest.mark.parametrize("training", [True, False])
def test_double_backward_where_the_inputs_depend_on_each_other(training):
    """One norm applied twice, and weight and bias tied: gradients with and without create_graph are the same."""
    x, weight, _, running_mean, running_var = arguments_for_gradients()

    def f(x, weight):
        for _ in range(2):
            x = ops.batch_norm(x, running_mean.clone(), running_var.clone(), weight, weight, training, relu=True)
        return x

    loss = f(x, weight).square().sum()
    want = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, (x, weight), create_graph=True), want)
    assert torch.autograd.gradgradcheck(f, (x, weight))


def test_double_backward_beside_half_precision():
    x = torch.randn(4, 3, 5, 5, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(3, requires_grad=True)
    y = ops.batch_norm(x, torch.zeros(3), torch.ones(3), weight, None, False)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    gradient.sum().backward()
    torch.testing.assert_close(weight.grad, 4 * x.detach().float().sum((0, 2, 3)), rtol=0.05, atol=1.0)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own forward mode uses it
@pytest.mark.parametrize("training", [True, False])
def test_transforms_of_torch_func_and_forward_mode(training):
    x, weight, bias, running_mean, running_var = (t.detach() for t in arguments_for_gradients())
    statistics = (None, None) if training else (running_mean, running_var)

    def ours(x, weight, bias):
        return ops.batch_norm(x, *statistics, weight, bias, training, relu=True)

    def stock(x, weight, bias):
        return F.relu(F.batch_norm(x, *statistics, weight, bias, training))

    loss = [lambda *args, f=f: f(*args).square().sum() for f in (ours, stock)]
    got, want = (torch.func.grad(f, argnums=(0, 1, 2))(x, weight, bias) for f in loss)
    torch.testing.assert_close(got, want)
    tangents = tuple(map(torch.randn_like, (x, weight, bias)))
    torch.testing.assert_close(*(torch.func.jvp(f, (x, weight, bias), tangents) for f in (ours, stock)))
    batched = torch.stack([x, 2 * x])
    torch.testing.assert_close(*(torch.func.vmap(f, (0, None, None))(batched, weight, bias) for f in (ours, stock)))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangents[0])
        outputs = [torch.autograd.forward_ad.unpack_dual(f(dual, weight, bias)).tangent for f in (ours, stock)]
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("training", [True, False])
def test_parameters_of_any_stride(training):
    """A weight expanded from one number, statistics that are columns of a matrix."""
    x, grad = torch.randn(4, 6, 5, 5), torch.randn(4, 6, 5, 5)
    table = torch.rand(6, 3) + 0.5
    results = []
    for dense in (True, False):
        weight = torch.full((1,), 2.0).expand(6).requires_grad_()
        columns = [table[:, i].clone() if dense else table.clone()[:, i] for i in range(3)]
        y = x.clone().requires_grad_()
        out = ops.batch_norm(y, *columns[:2], weight.clone() if dense else weight, columns[2], training, relu=True)
        results.append((out, torch.autograd.grad(out, (y, weight), grad), columns))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_in_half_precision_are_widened(dtype):
    """They are rounded, but what is computed from them is not rounded again."""
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    mean, var = torch.randn(3).to(dtype), (torch.rand(3) + 0.5).to(dtype)
    weight = torch.randn(3, requires_grad=True)
    tensors = (x, weight)
    got = ops.batch_norm(x, mean, var, weight)
    want = F.batch_norm(x.double(), mean.double(), var.double(), weight.double())
    grad = torch.randn_like(got)
    gradients = torch.autograd.grad(got, tensors, grad), torch.autograd.grad(want, tensors, grad.double())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_backward_after_the_running_statistics_moved_on():
    """The network was run in eval mode with gradients, then trained: the first graph must survive the update."""
    x, weight, bias, running_mean, running_var = arguments_for_gradients()
    y = ops.batch_norm(x, running_mean, running_var, weight, bias, False, relu=True)
    (want,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    ops.batch_norm(x, running_mean, running_var, weight, bias, True, relu=True)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("affine", [True, False])
def test_half_precision_with_a_mean_far_above_the_deviation(dtype, affine):
    """One dead channel is enough. Its dtype stays, and it is as exact as without."""
    x = torch.randn(8, 3, 6, 6).to(dtype) + 12
    x[:, 0] = 0.5
    weight = torch.ones(3) if affine else None
    y = ops.batch_norm(x, None, None, weight, training=True)
    assert y.dtype == dtype
    want = F.batch_norm(x.double(), None, None, training=True)
    assert (y - want).abs().max() <= torch.finfo(dtype).eps * want.abs().max()


@pytest.mark.parametrize("shape", [(1, 3, 4, 5), (4, 3, 1, 5), (4, 1, 4, 5), (1, 3, 1, 5)])
@pytest.mark.parametrize("training", [True, False])
def test_expanded_inputs_come_out_as_torchs_do(shape, training):
    x = torch.randn(shape).expand(4, 3, 4, 5)
    statistics = torch.zeros(3), torch.ones(3)
    got = ops.batch_norm(x, *statistics, training=training)
    want = F.batch_norm(x, torch.zeros(3), torch.ones(3), training=training)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert got.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("shapes", [((4, 3, 5, 5), (2, 3, 9, 9)), ((2, 3, 9, 9), (4, 3, 5, 5))])
def test_graphs_of_several_calls_survive_each_other(shapes, monkeypatch):
    """A head that is shared by levels of several sizes, some of which go another way, and one with a mean far off."""
    monkeypatch.setattr("bnsurgery.ops.functional._ATEN_UP_TO", 300)  # between the two sizes
    _, weight, bias, running_mean, running_var = (t.detach().float() for t in arguments_for_gradients((2, 3, 2, 2)))
    weight.requires_grad_()
    inputs = [torch.randn(shape) for shape in shapes] + [torch.randn(shapes[0]) + 1e3]
    outputs = [ops.batch_norm(x, running_mean, running_var, weight, bias, True) for x in inputs]
    (got,) = torch.autograd.grad(sum(y.square().sum() for y in outputs), weight)
    want = sum(2 * weight.detach().double() * x.numel() / 3 for x in inputs)  # of Σ(weight·x̂ + bias)², with Σx̂ = 0
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "int64"),
        ({"input": torch.ones(3)}, ValueError, r"shape \(3,\), expected \(N, C, \.\.\.\)"),
        ({"running_mean": torch.zeros(4)}, ValueError, r"running_mean of shape \(4,\), expected \(3,\)"),
        ({"weight": torch.zeros(1)}, ValueError, r"weight of shape \(1,\), expected \(3,\)"),
        ({"running_mean": None}, ValueError, "no `running_mean`"),
        ({"input": torch.ones(1, 3, 1, 1), "training": True}, ValueError, "more than 1 value per channel"),
    ],
)
def test_refusals(arguments, error, message):
    good = {"input": torch.randn(2, 3, 4, 4), "running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    with pytest.raises(error, match=message):
        ops.batch_norm(**{**good, **arguments})
