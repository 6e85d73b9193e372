"""Statistics over a process group: gloo on the loopback, three processes with unequal and empty local batches."""

import pytest
import torch
import torch.distributed as dist
import warm_process
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import bnsurgery
from bnsurgery import ops
from bnsurgery.errors import BNSurgeryError
from bnsurgery.nn import BatchNorm2d

pytestmark = pytest.mark.slow

SIZES = (5, 0, 2)  # of the local batches


def spawn(function, tmp_path, ranks=3):
    warm_process.ranks(_join, (function, ranks, str(tmp_path / "store"), str(tmp_path)), ranks)


def _join(rank, function, ranks, store, directory):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        function(rank, directory)
        dist.barrier()  # nobody leaves while another still talks
    finally:
        dist.destroy_process_group()


def data():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(sum(SIZES), 4, 3, 5, generator=generator, dtype=torch.float64) * 2 + 1
    return x, torch.randn(x.shape, generator=generator, dtype=torch.float64)


def part(tensor, rank):
    return tensor.split(SIZES)[rank]


def _op(rank, directory):
    x, grad = (part(tensor, rank).clone() for tensor in data())
    x.requires_grad_()
    running_mean, running_var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    weight = torch.linspace(-1, 2, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.linspace(1, -1, 4, dtype=torch.float64, requires_grad=True)
    y = ops.batch_norm(x, running_mean, running_var, weight, bias, True, relu=True, process_group=dist.group.WORLD)
    y.backward(grad)
    result = (y.detach(), x.grad, weight.grad, bias.grad, running_mean, running_var)
    torch.save(result, f"{directory}/{rank}.pt")


def test_ranks_together_compute_what_one_process_would(tmp_path):
    spawn(_op, tmp_path)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(len(SIZES))]
    x, grad = data()
    x.requires_grad_()
    running_mean, running_var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    weight = torch.linspace(-1, 2, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.linspace(1, -1, 4, dtype=torch.float64, requires_grad=True)
    y = nn.functional.batch_norm(x, running_mean, running_var, weight, bias, True).relu()
    y.backward(grad)
    y_parts, dx_parts, dw_parts, db_parts, means, variances = zip(*results, strict=True)
    torch.testing.assert_close(torch.cat(y_parts), y.detach())
    torch.testing.assert_close(torch.cat(dx_parts), x.grad)
    torch.testing.assert_close(sum(dw_parts), weight.grad)
    torch.testing.assert_close(sum(db_parts), bias.grad)
    for mean, variance in zip(means, variances, strict=True):  # every rank the same bits, the empty one too
        assert torch.equal(mean, means[0]) and torch.equal(variance, variances[0])
        torch.testing.assert_close(mean, running_mean)
        torch.testing.assert_close(variance, running_var)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), BatchNorm2d(6, activation="relu"), nn.Conv2d(6, 2, 3)).double()


def _data_parallel(rank, directory):
    model = network()
    bnsurgery.set_process_group_(model, dist.group.WORLD)
    if directory.endswith("compiled"):
        model.compile(fullgraph=True, backend="aot_eager")
    if directory.endswith("recomputing"):
        bnsurgery.recompute_activations_(model)
    run = DistributedDataParallel(model)
    x, _ = data()
    # DDP averages over ranks, so each weighs its sum by their number.
    (run(part(x, rank)).square().sum() * dist.get_world_size()).backward()
    torch.save([p.grad for p in model.parameters()] + list(model.buffers()), f"{directory}/{rank}.pt")


@pytest.mark.parametrize("kind", ["eager", "compiled", "recomputing"])
def test_data_parallel_training(tmp_path, kind):
    directory = tmp_path / kind
    directory.mkdir()
    spawn(_data_parallel, directory)
    model = network()
    x, _ = data()
    model(x).square().sum().backward()
    want = [p.grad for p in model.parameters()] + list(model.buffers())
    for rank in range(len(SIZES)):
        got = torch.load(directory / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(got, want)


def _modes(rank, directory):
    model = network()
    bnsurgery.set_process_group_(model, dist.group.WORLD)
    x, _ = data()
    if rank == 0:  # alone: eval mode and frozen statistics need no other rank
        model.eval()(x)
        untracked = BatchNorm2d(4, track_running_stats=False).double().eval()
        bnsurgery.set_process_group_(untracked, dist.group.WORLD)
        untracked(x)
        bnsurgery.set_statistics_(model, "running")
        model.train()(x)
    bnsurgery.set_statistics_(model, "renorm", renorm_steps=3)
    got = model.train()(part(x, rank))
    bnsurgery.set_process_group_(model, None)
    assert model[1].process_group == ""
    torch.save(got.detach(), f"{directory}/{rank}.pt")


def test_eval_and_running_do_not_communicate_and_renorm_does(tmp_path):
    spawn(_modes, tmp_path)
    got = torch.cat([torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(len(SIZES))])
    x, _ = data()
    model = network()
    bnsurgery.set_statistics_(model, "renorm", renorm_steps=3)
    torch.testing.assert_close(got, model.train()(x).detach())


def _refusal(rank, directory):
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    y = ops.batch_norm(x, None, None, training=True, process_group=dist.group.WORLD)
    with pytest.raises(NotImplementedError, match="no double backward with a process group"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    bnsurgery.ops.batch_norm(x[:1, :, :1, :1], None, None, training=True, process_group=dist.group.WORLD)


def test_double_backward_is_refused_and_one_value_per_rank_is_enough(tmp_path):
    spawn(_refusal, tmp_path, ranks=2)


def test_no_group_where_none_was():
    """dist.group.WORLD is None before init_process_group: no silent training without synchronization."""
    with pytest.raises(BNSurgeryError, match="call that first"):
        bnsurgery.set_process_group_(network(), dist.group.WORLD)


def test_torchs_conversion_is_refused_where_it_would_lose_something(custom, images):
    """convert_sync_batchnorm knows neither the fused ReLU nor the statistics mode."""
    inserted = bnsurgery.insert(custom, [images(8, 32)], fuse_relu=True)
    with pytest.raises(BNSurgeryError, match="activation='relu'.*call bnsurgery.unfuse_relu_"):
        nn.SyncBatchNorm.convert_sync_batchnorm(inserted)
    moded = nn.Sequential(BatchNorm2d(3))
    for mode in ("running", "renorm"):
        bnsurgery.set_statistics_(moded, mode)
        with pytest.raises(BNSurgeryError, match=f"statistics='{mode}'.*set_statistics_.* use set_process_group_"):
            nn.SyncBatchNorm.convert_sync_batchnorm(moded)


def test_torchs_conversion_of_a_plain_norm(custom, images):
    """Nothing is lost, so it goes through, and eval mode computes the same bits."""
    inserted = bnsurgery.insert(custom, [images(8, 32)])
    x = images(2, 32, seed=1)
    want = inserted(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(inserted)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in converted.modules())
    assert torch.equal(converted.eval()(x), want)
    assert BatchNorm2d(3).num_features == 3
