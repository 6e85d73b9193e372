"""On a CUDA device: `make test-gpu` runs these and the op's tests there. Everywhere else they are skipped."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import bnsurgery
from bnsurgery import ops
from bnsurgery.nn import BatchNorm2d

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def exact_convolutions():
    """No TF32 and no choice between algorithms: the network itself must compute the same bits twice."""
    flags = torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False, allow_tf32=False)
    with flags:
        yield


@pytest.fixture
def inserted(custom, images):
    return bnsurgery.insert(custom.cuda(), [images(16, 32).cuda()])


@pytest.mark.parametrize("name", ["vgg16", "squeezenet1_1", "alexnet"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_insertion_changes_no_bit(network, images, name, memory_format, dtype):
    model = copy.deepcopy(network(name)).cuda().to(dtype, memory_format=memory_format)
    x = images(4, 128).cuda().to(dtype, memory_format=memory_format)
    for options in ({}, {"fuse_relu": False}, {"placement": "post-activation"}):
        bn_model = bnsurgery.insert(model, [x], **options)
        with torch.inference_mode():
            assert torch.equal(bn_model(x), model(x))


@pytest.mark.parametrize("name", ["squeezenet1_0_imagenet", "vgg19_quarter_width", "vgg19_to_conv3_1"])
def test_insertion_into_real_networks_changes_no_bit(real, images, name):
    model = getattr(real, name)().cuda()
    x = images(4, 128).cuda()
    bn_model = bnsurgery.insert(model, [x])
    with torch.inference_mode():
        assert torch.equal(bn_model(x), model(x))


def test_a_network_inserted_on_the_cpu_is_exact_on_cuda(custom, images):
    x = images(8, 32)
    bn_model = bnsurgery.insert(custom, [x]).cuda()
    custom.cuda()
    with torch.inference_mode():
        assert torch.equal(bn_model(x.cuda()), custom(x.cuda()))


def test_training_agrees_with_the_cpu(inserted, images):
    twin = copy.deepcopy(inserted).cpu().double().train()
    inserted.train()
    x = images(8, 32, seed=1)
    loss, want = inserted(x.cuda()).square().mean(), twin(x.double()).square().mean()
    loss.backward()
    want.backward()
    for (name, mine), theirs in zip(inserted.named_parameters(), twin.parameters(), strict=True):
        scale = theirs.grad.abs().max().clamp_min(1e-6)
        assert (mine.grad.cpu() - theirs.grad).abs().max() <= 1e-3 * scale + 1e-6, name


@pytest.mark.parametrize("statistics", ["batch", "running", "renorm"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_no_host_synchronization_and_cuda_graphs(statistics, momentum):
    norm = BatchNorm2d(16, momentum=momentum, activation="relu").cuda().train()
    bnsurgery.set_statistics_(norm, statistics, renorm_steps=100)
    twin = copy.deepcopy(norm)
    x = torch.randn(4, 16, 9, 9, device="cuda", requires_grad=True)
    grad = torch.randn_like(x)

    def step(module):
        y = module(x)
        return y, *torch.autograd.grad(y, (x, *module.parameters()), grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(norm)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(norm)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = step(norm)
    for _ in range(2):
        graph.replay()
    for _ in range(6):
        want = step(twin)
    assert all(map(torch.equal, results, want))
    torch.testing.assert_close(norm.state_dict(), twin.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(inserted, images, dtype):
    x = images(8, 32).cuda()
    want = inserted.train()(x)
    with torch.autocast("cuda", dtype):
        got = inserted(x)
        got.float().square().sum().backward()
    assert (got - want).norm() / want.norm() < 20 * torch.finfo(dtype).eps
    assert all(p.grad.isfinite().all() for p in inserted.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_compiled(inserted, images, training):
    x = images(8, 32).cuda()
    compiled = torch.compile(copy.deepcopy(inserted).train(training), fullgraph=True)
    torch.testing.assert_close(compiled(x), inserted.train(training)(x), rtol=1e-4, atol=1e-4)


def test_data_parallel_with_nccl(inserted, images, tmp_path):
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x = images(8, 32).cuda()
        want = copy.deepcopy(inserted).train()(x)
        bnsurgery.set_process_group_(inserted, dist.group.WORLD)
        got = DistributedDataParallel(inserted.train())(x)
        torch.testing.assert_close(got, want)
        got.square().sum().backward()
    finally:
        dist.destroy_process_group()


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x = torch.randn(4, 3, 5, 5, device="cuda:1")
    torch.testing.assert_close(
        ops.batch_norm(x, None, None, training=True), nn.functional.batch_norm(x, None, None, training=True)
    )
