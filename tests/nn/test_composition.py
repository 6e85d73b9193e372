"""The modules inside what people wrap networks in: compilers, exporters, autocast, checkpointing, functional calls."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing._internal.common_modules import module_db
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor

import bnsurgery
from bnsurgery.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d

OURS = {cls.__name__: cls for cls in (BatchNorm1d, BatchNorm2d, BatchNorm3d)}


def samples_of_torch():
    for info in module_db:
        if info.module_cls.__module__ == "torch.nn.modules.batchnorm" and info.module_cls.__name__ in OURS:
            for training in (True, False):
                inputs = info.module_inputs_func(info, "cpu", torch.float64, requires_grad=True, training=training)
                for sample in inputs:
                    yield pytest.param(info.module_cls, sample, training, id=f"{info.name}-{sample.desc}-{training}")


@pytest.mark.parametrize(("stock", "sample", "training"), list(samples_of_torch()))
def test_torchs_own_module_samples(stock, sample, training):
    args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
    torch.manual_seed(0)
    theirs = stock(*args, **kwargs).double().train(training)
    ours = OURS[stock.__name__](*args, **kwargs).double().train(training)
    ours.load_state_dict(theirs.state_dict())
    (x,) = sample.forward_input.args
    y = x.detach().clone().requires_grad_()
    for _ in range(3):  # running statistics too: cumulative, moving, or none
        got, want = ours(x), theirs(y)
        torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    got.backward(grad)
    want.backward(grad)
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.fixture
def inserted(custom, images):
    return bnsurgery.insert(custom, [images(8, 32)], fuse_relu=True)


def outputs_and_gradients(model, x, run=None):
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x) if run is None else run(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())]


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("statistics", ["batch", "running", "renorm"])
def test_compiles_as_one_graph(inserted, images, training, statistics):
    """Two steps: what the first did to the running statistics must not reach into its own backward."""
    bnsurgery.set_statistics_(inserted.double(), statistics)
    for module in inserted.modules():  # away from 0, where a layer without bias puts what the ReLU before it erased
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            torch.nn.init.normal_(module.bias)
    compiled = copy.deepcopy(inserted).train(training)
    inserted.train(training)
    torch.compiler.reset()
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    # An option that people set for networks with an LSTM, and that torch.export sets, must not pass for an export.
    with torch._dynamo.config.patch(allow_rnn=statistics == "renorm"):
        for seed in (1, 2):
            x = images(4, 32, seed=seed).double()
            torch.testing.assert_close(outputs_and_gradients(compiled, x, run), outputs_and_gradients(inserted, x))
            with torch.no_grad():
                for parameter in inserted.parameters():
                    parameter.mul_(1.0)  # ends the step, which in compiled code each call does


@pytest.mark.slow
def test_compiles_with_momentum_none_and_dynamic_shapes(images):
    norm = BatchNorm2d(3, momentum=None, activation="relu")
    twin = copy.deepcopy(norm)
    torch.compiler.reset()
    compiled = torch.compile(twin, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (4, 6, 9):
        torch.testing.assert_close(compiled(images(2, size)), norm(images(2, size)))
    torch.testing.assert_close(twin.state_dict(), norm.state_dict())


def ours_in(graph_module):
    return [str(node.target) for node in graph_module.graph.nodes if str(node.target).startswith("bnsurgery")]


@pytest.mark.parametrize("training", [True, False])
def test_compiled_networks_run_our_ops(inserted, images, training):
    """Not torch's, which the exporters get."""
    graphs = []
    torch.compiler.reset()
    torch.compile(inserted.train(training), backend=lambda graph, _: graphs.append(graph) or graph.forward)(
        images(2, 32)
    )
    assert "bnsurgery.batch_norm_fwd.default" in ours_in(*graphs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_exports(inserted, images, training, strict):
    x = images(4, 32, seed=1)
    inserted.train(training)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(copy.deepcopy(inserted), (x,), dynamic_shapes=({0: batch},), strict=strict)
    assert not ours_in(program)
    x = images(6, 32, seed=2)
    torch.testing.assert_close(program.module()(x), inserted(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(inserted, images, dtype):
    """Half precision comes in and goes out; statistics and parameters stay float32, as do their gradients."""
    seen = []
    norm = next(module for module in inserted.modules() if isinstance(module, BatchNorm2d))
    norm.register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output.dtype)))
    x = images(4, 32)
    want = inserted.train()(x)
    with torch.autocast("cpu", dtype):
        got = inserted(x)
        got.square().sum().backward()
    assert seen[1] == (dtype, dtype)
    assert norm.weight.grad.dtype == norm.running_mean.dtype == torch.float32
    assert (got - want).norm() / want.norm() < 20 * torch.finfo(dtype).eps


def test_deepcopy_pickle_and_functional_call(inserted, images):
    x = images(2, 32)
    want = inserted(x)
    for twin in (copy.deepcopy(inserted), pickle.loads(pickle.dumps(inserted))):
        assert torch.equal(twin(x), want)
    state = {name: tensor.clone() for name, tensor in inserted.state_dict().items()}
    with torch.no_grad():
        for tensor in inserted.parameters():
            tensor.zero_()
    assert torch.equal(torch.func.functional_call(inserted, state, (x,)), want)


def test_functional_call_updates_the_buffers_it_is_given():
    norm = BatchNorm2d(3).train()
    state = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    torch.func.functional_call(norm, state, (torch.randn(4, 3, 5, 5) + 1,))
    assert norm.num_batches_tracked == 0 and state["num_batches_tracked"] == 1
    assert not torch.equal(state["running_mean"], norm.running_mean)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    block = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm2d(4, activation="relu"), nn.Conv2d(4, 2, 3)).train()
    twin = copy.deepcopy(block)
    x = torch.randn(3, 3, 8, 8, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    checkpoint(block, x, use_reentrant=use_reentrant).square().sum().backward()
    twin(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for mine, other in zip(block.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_eval_then_train_then_backward(inserted, images):
    """A graph built in eval mode survives the update of the running statistics."""
    x = images(4, 32)
    parameters = list(inserted.parameters())
    want = torch.autograd.grad(inserted.eval()(x).square().sum(), parameters)
    first = inserted(x).square().sum()
    inserted.train()(x)
    torch.testing.assert_close(torch.autograd.grad(first, parameters), want, rtol=0, atol=0)


def stock_twin(model):
    """The same network with torch's own norms and ReLU modules."""
    twin = copy.deepcopy(model)
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if type(child).__name__ in OURS and type(child) is OURS[type(child).__name__]:
                norm = getattr(nn, type(child).__name__)(len(child.weight), dtype=child.weight.dtype)
                norm.load_state_dict(child.state_dict())
                setattr(module, name, nn.Sequential(norm, nn.ReLU()) if child.activation else norm)
    return twin


def test_double_backward_through_a_network(inserted, images):
    """A gradient penalty, as in WGAN-GP, against the network made of torch's modules."""
    results = []
    for model in (inserted.double(), stock_twin(inserted)):
        x = images(3, 32).double().requires_grad_()
        (gradient,) = torch.autograd.grad(model.train()(x).square().sum(), x, create_graph=True)
        parameters = list(model.parameters())
        results.append(torch.autograd.grad(gradient.square().sum(), parameters, allow_unused=True))
    torch.testing.assert_close(*results)


def test_symbolic_tracing_takes_the_norms_for_leaves(network, images):
    """torch.fx, and with it torchvision's feature extraction, as people take perceptual losses from a VGG."""
    model = network("squeezenet1_1")
    bn_model = bnsurgery.insert(model, [images(4, 64)])
    x = images(2, 64, seed=1)
    assert torch.equal(torch.fx.symbolic_trace(bn_model)(x), model(x))
    want = create_feature_extractor(model, ["features.3.cat"])(x)
    torch.testing.assert_close(
        create_feature_extractor(bn_model, ["features.4.cat"])(x).popitem()[1], want.popitem()[1]
    )


def test_transposed_inputs_compile(images):
    """A sequence model's (N, L, C) turned into (N, C, L): the output keeps the input's strides, compiled or not."""
    norm = BatchNorm1d(6).eval()
    x = torch.randn(3, 10, 6).transpose(1, 2)
    torch.compiler.reset()
    compiled = torch.compile(lambda t: norm(t).transpose(1, 2).view(-1), fullgraph=True, backend="aot_eager")
    assert norm(x).stride() == x.stride()
    assert torch.equal(compiled(x), norm(x).transpose(1, 2).reshape(-1))


@pytest.mark.parametrize("tracked", [True, False])
def test_a_wrong_number_of_channels_is_refused_before_anything_changes(tracked):
    norm = BatchNorm2d(3, track_running_stats=tracked).train()
    for channels in (1, 5):
        with pytest.raises(ValueError, match=rf"BatchNorm2d: got .* of shape \(3,\), expected \({channels},\)"):
            norm(torch.randn(4, channels, 5, 5))
    if tracked:
        assert norm.num_batches_tracked == 0


def test_results_can_be_changed_in_place_where_torchs_can():
    """Without the fused ReLU nothing of the output is kept."""
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    BatchNorm2d(3)(x).mul_(2).sum().backward()
    F.relu(BatchNorm2d(3)(x), inplace=True).sum().backward()


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # torch 2.11's torch.export.load
def test_exported_programs_can_be_saved(inserted, images):
    program = torch.export.export(inserted, (images(2, 32),), strict=False)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(images(2, 32)), inserted(images(2, 32)))
