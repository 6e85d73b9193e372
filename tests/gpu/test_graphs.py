"""CUDA graphs, host synchronization, torch.compile: `make test-gpu` runs these. Everywhere else they are skipped."""

import copy

import pytest
import torch
from torch import nn

import bnsurgery
from bnsurgery import ops
from bnsurgery.nn import BatchNorm2d

pytestmark = pytest.mark.gpu


@pytest.mark.usefixtures("cuda")
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
        try:
            torch.cuda.set_sync_debug_mode("error")
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


@pytest.mark.parametrize("training", [True, False])
def test_compiled(inserted, images, device, training):
    x = images(8, 32).to(device)
    compiled = torch.compile(copy.deepcopy(inserted).train(training), fullgraph=True)
    torch.testing.assert_close(compiled(x), inserted.train(training)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("cuda")
def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x = torch.randn(4, 3, 5, 5, device="cuda:1")
    torch.testing.assert_close(
        ops.batch_norm(x, None, None, training=True), nn.functional.batch_norm(x, None, None, training=True)
    )
