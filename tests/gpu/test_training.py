"""Training on a CUDA device: `make test-gpu` runs these. Everywhere else they are skipped."""

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_task import patterns, tiny
from torch.nn.parallel import DistributedDataParallel

import bnsurgery
from bnsurgery import finetune

pytestmark = pytest.mark.gpu


def test_training_agrees_with_the_cpu(inserted, images, device):
    twin = copy.deepcopy(inserted).cpu().double().train()
    inserted.train()
    x = images(8, 32, seed=1)
    loss, want = inserted(x.to(device)).square().mean(), twin(x.double()).square().mean()
    loss.backward()
    want.backward()
    for (name, mine), theirs in zip(inserted.named_parameters(), twin.parameters(), strict=True):
        scale = theirs.grad.abs().max().clamp_min(1e-6)
        assert (mine.grad.cpu() - theirs.grad).abs().max() <= 1e-3 * scale + 1e-6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(inserted, images, device, dtype):
    x = images(8, 32).to(device)
    want = inserted.train()(x)
    with torch.autocast(device, dtype):
        got = inserted(x)
        got.float().square().sum().backward()
    assert (got - want).norm() / want.norm() < 20 * torch.finfo(dtype).eps
    assert all(p.grad.isfinite().all() for p in inserted.parameters())


def test_data_parallel_with_one_rank(inserted, images, device, tmp_path):
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x = images(8, 32).to(device)
        want = copy.deepcopy(inserted).train()(x)
        bnsurgery.set_process_group_(inserted, dist.group.WORLD)
        got = DistributedDataParallel(inserted.train())(x)
        torch.testing.assert_close(got, want)
        got.square().sum().backward()
    finally:
        dist.destroy_process_group()


ROOT = Path(__file__).parents[2]
RUN = "import sys, test_training; test_training.train(*sys.argv[1:])"


def task():
    return finetune.from_tensors(patterns(256, 1), patterns(64, 2), ["nw", "ne", "sw", "se"])


def train(device, output):
    """A run of 8 epochs of 16 steps that saves after every step."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    config = finetune.Config(
        data="patterns", output=output, image_size=8, normalize="none", augment="crop", epochs=8, batch_size=16,
        lr=0.05, num_workers=0, precision="no", save_every=0, device="auto" if device == "cuda" else device,
    )  # fmt: skip
    return finetune.run(config, model=tiny(), data=task())


def test_a_killed_run_ends_where_the_whole_one_does(device, tmp_path, record_property):
    whole = train(device, str(tmp_path / "whole"))
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    killed = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", RUN, device, str(killed)], env={**os.environ, "PYTHONPATH": path})
    end = time.monotonic() + 60
    while not (killed / "last" / "state.pt").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    resumed = finetune.resume(killed, model=tiny(), data=task())
    assert resumed.final.step == whole.final.step == 128
    record_property("final training loss", whole.final.train_loss)
    record_property("after kill and resume", resumed.final.train_loss)
    assert resumed.final.train_loss == pytest.approx(whole.final.train_loss, rel=1e-2)
    if device == "cpu":
        assert resumed.final.train_loss == whole.final.train_loss
