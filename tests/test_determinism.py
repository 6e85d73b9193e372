"""The same bits again: in another process, with other thread counts, worker counts and numbers of ranks."""

import json
import os
import subprocess
import sys

import pytest
import torch
import warm_process
from small_network import Fire
from tiny_task import patterns
from torch import distributed, nn
from torch.utils.data import DataLoader, TensorDataset

from bnsurgery import calibrate, insert, plan
from bnsurgery.finetune import from_tensors
from bnsurgery.finetune.loading import Loader, Prepared, TrainBatches
from bnsurgery.images.preprocessing import Preprocessing
from bnsurgery.records.record import Task
from bnsurgery.statistics.moments import digest

pytestmark = pytest.mark.slow
U = 2.0**-53  # the unit roundoff of float64

CHILD = """
import hashlib, json, sys
import torch
from bnsurgery.images.preprocessing import Preprocessing
from small_network import Fire
from bnsurgery import insert
from bnsurgery.images.calibration_images import sample_crops
from bnsurgery.statistics.moments import digest, ChannelMoments
from bnsurgery.statistics.calibration import calibrate
from bnsurgery.ops import channel_moments
from bnsurgery.graph.planning import plan
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
model = Fire().eval()
batches = sample_crops(12, 5, preprocess=Preprocessing(32, 32, 32), seed=7)
bn_model = insert(model, batches)
torch.save(bn_model.state_dict(), sys.argv[2])
generator = torch.Generator().manual_seed(0)
given = {}
for shape in ((8, 64, 55, 55), (2, 2, 600, 700), (4000, 64), (100_000, 9), (2, 3, 20, 64, 64)):
    x = torch.randn(shape, generator=generator)
    given[f"{shape}"] = ChannelMoments(*channel_moments(x))
    if len(shape) == 4:
        given[f"{shape}, last"] = ChannelMoments(*channel_moments(x.to(memory_format=torch.channels_last)))
state = hashlib.sha256(b"".join(t.numpy().tobytes() for t in bn_model.state_dict().values())).hexdigest()
inputs = hashlib.sha256(b"".join(batch.numpy().tobytes() for batch in batches)).hexdigest()
moments = calibrate(model.double(), plan(model, next(iter(batches))), batches)
print(json.dumps({
    "inputs": inputs, "given": digest(given), "inserted": state, "calibrated": digest(moments),
    "moments": {name: (m.count, m.mean.tolist(), m.m2.tolist()) for name, m in moments.items()},
}))
"""


def child(threads, place):
    code, out, err = warm_process.script(place.parent, CHILD, threads, place)
    assert code == 0, err
    return json.loads(out)


def child_of_its_own(threads, place):
    """With another hash seed and other addresses."""
    path = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", CHILD, str(threads), str(place)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_processes_and_thread_counts(tmp_path, images):
    """Two runs with one thread count are the same to the bit.

    With another count so are the images and the moments of given activations. The activations themselves are torch's:
    its convolutions may sum in another order. In float64 that is about 100 terms a layer and 5 layers, each rounded
    by U: 1e-13 of σ, or of the mean square; 1e-11 leaves room for terms larger than their sum.
    """
    one, two = (child(threads, tmp_path / f"{i}.pt") for i, threads in ((0, 1), (2, 2)))
    again = child_of_its_own(1, tmp_path / "1.pt")
    assert one == again
    for name in ("inputs", "given"):
        assert one[name] == two[name], name
    for name, (count, mean, m2) in one["moments"].items():
        other_count, other_mean, other_m2 = two["moments"][name]
        assert count == other_count
        mean, m2, other_mean, other_m2 = (torch.tensor(x).double() for x in (mean, m2, other_mean, other_m2))
        size = (m2 / count + mean.square()).sqrt()
        assert ((mean - other_mean).abs() <= 1e-11 * size).all()
        assert ((m2 - other_m2).abs() <= 1e-11 * size.square() * count).all()
    # What was inserted with two threads changes no bit with however many this process has.
    torch.manual_seed(0)
    model, x = Fire().eval(), images(5, 32)
    bn_model = insert(model, [x])
    bn_model.load_state_dict(torch.load(tmp_path / "2.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(bn_model(x), model(x))


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_any_number_of_workers(custom, images):
    """Of calibration, and of fine-tuning's augmented batches."""
    found = plan(custom, images(2, 32))
    task = Task(("a", "b", "c", "d"), None, Preprocessing(8, 8, 8, (0.0,), (1.0,), channels="grey"))
    data = Prepared(from_tensors(patterns(50, 1), patterns(8, 2), "abcd").train, task, "trivial", 3)
    calibrated, trained = [], []
    for workers in (0, 1, 3):
        loader = DataLoader(
            TensorDataset(images(25, 32), torch.arange(25)),
            batch_size=4,
            shuffle=True,
            generator=torch.Generator().manual_seed(5),
            num_workers=workers,
        )
        calibrated.append(digest(calibrate(custom, found, loader)))
        trained.append(list(Loader(data, TrainBatches(50, 12, 7, 0, 1), workers)))
    assert len(set(calibrated)) == 1
    assert len(trained[0]) == 5  # the last one of two images
    for batches in trained[1:]:
        for (x, y), (expected_x, expected_y) in zip(batches, trained[0], strict=True):
            assert torch.equal(x, expected_x)
            assert torch.equal(y, expected_y)


def small_network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 8), nn.ReLU(), nn.Linear(8, 2))


def batches():
    return torch.randn(84, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(4)


def results(shard):
    model = small_network().eval()
    moments = calibrate(model, plan(model, shard[0]), shard)
    state = insert(model, shard).state_dict()
    return {name: (m.count, m.mean, m.m2) for name, m in moments.items()}, state


def rank_of_three_two_and_one(rank, directory):
    torch.set_num_threads(1)
    if rank == 0:
        model = small_network().eval()
        found = plan(model, batches()[0])
        means = [{name: m.mean for name, m in calibrate(model, found, [batch]).items()} for batch in batches()]
        torch.save((*results(batches()), means), f"{directory}/1.pt")
    for world in (3, 2):
        if rank < world:
            store = f"file://{directory}/store{world}"
            distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
            torch.save(results(batches()[rank::world]), f"{directory}/{world}-{rank}.pt")
            distributed.barrier()
            distributed.destroy_process_group()


def test_one_process_and_several(tmp_path):
    """On the same batches, which another number of processes merges in another order.

    Every one of k − 1 merges rounds the mean by 2U·max|μ_batch| at most, and m2, whose terms are positive, by 4U of it
    and by what the means are off, 2·n·|δ|·4kU·max|μ|. That is far below a float32, so what is inserted is the same:
    but for a number so close to the middle of two float32 that 1e-13 of it decides, one in a million.
    """
    warm_process.ranks(rank_of_three_two_and_one, (str(tmp_path),), 3)
    expected, state, by_batch = torch.load(tmp_path / "1.pt", weights_only=True)
    k = len(batches())
    for world in (2, 3):
        for rank in range(world):
            got, got_state = torch.load(tmp_path / f"{world}-{rank}.pt", weights_only=True)
            for name, (count, mean, m2) in expected.items():
                means = torch.stack([batch[name] for batch in by_batch])
                largest, apart = means.abs().amax(0), means.amax(0) - means.amin(0)
                assert got[name][0] == count
                assert ((got[name][1] - mean).abs() <= 4 * k * U * largest).all()
                assert ((got[name][2] - m2).abs() <= 8 * k * U * m2 + 8 * k * U * largest * apart * count).all()
            for name, tensor in state.items():
                assert torch.equal(got_state[name], tensor), (world, rank, name)
