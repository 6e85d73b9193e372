"""Whether the pretrained function is of use: measured on networks made so that it is, or is not."""

import os
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import warm_process
from torch import nn

from bnsurgery import finetune
from bnsurgery.finetune import kind_measurement
from bnsurgery.finetune.kind_measurement import measure
from bnsurgery.finetune.setup import build, processes


def spots(count, seed):
    """Images of random brightness; those of class 1 have four spots, brighter than any pixel of the others."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    images = 0.8 * torch.rand(count, 1, 8, 8, generator=random) * torch.rand(count, 1, 1, 1, generator=random)
    images[labels == 1, :, ::4, ::4] = 1.0
    return (255 * images).round().to(torch.uint8), labels


def network(threshold):
    """It averages by how much a pixel exceeds the threshold: its one feature, before a head for one class."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 3))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(-threshold)
    return model


@pytest.mark.parametrize("statistics", ["batch", "running", "renorm"])
@pytest.mark.parametrize(("threshold", "verdict"), [(0.85, "near"), (0.0, "far")])
def test_a_function_that_tells_the_classes_apart_is_near(config, threshold, verdict, statistics):
    data = finetune.from_tensors(spots(200, 0), spots(120, 1), ["none", "spots"])
    chosen = replace(config(), arm="bn", head="new", augment="none", statistics=statistics)
    setup = build(chosen, processes(chosen), network(threshold), data, None, False)
    before = {name: tensor.clone() for name, tensor in setup.network.state_dict().items()}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    kind = measure(setup)
    assert torch.equal(torch.get_rng_state(), state)
    assert (kind.verdict, kind.images) == (verdict, 120)
    # The inserted network computes what the network computes: one feature, which a threshold divides at best.
    feature = network(threshold)[:4](spots(120, 1)[0] / 255).detach().flatten()
    best = max((((feature > cut) == (spots(120, 1)[1] == 1)).float().mean().item()) for cut in feature)
    assert best - 0.1 <= kind.kept <= best + 1e-6
    assert all(torch.equal(before[name], tensor) for name, tensor in setup.network.state_dict().items())


@pytest.mark.parametrize("kept", [0.2, 0.4, 0.7, 0.8, 0.9, 1.0])
def test_the_verdict_needs_two_standard_errors(kept):
    """Also where floats differ: 0.7 − 0.6 is less than 0.1, and 0.4 − 0.3 is more."""
    for difference, error, verdict in (
        (0.1, 0.0, "not clear"), (0.1, 0.02, "not clear"), (0.11, 0.004, "near"), (0.11, 0.006, "not clear"),
        (0.09, 0.004, "far"), (0.09, 0.006, "not clear"), (0.2, 0.06, "not clear"), (0.2, 0.04, "near"),
        (-0.1, 0.09, "far"),
    ):  # fmt: skip
        assert finetune.TaskKind(kept, kept - difference, 100, error).verdict == verdict
    text = str(finetune.TaskKind(0.67, 0.54, 300, 0.029))
    assert text.startswith("not clearly near or far: ") and "on 67.00 % of 300 samples with" in text
    assert text.endswith("on 54.00 % without it: 13.0 points, standard error 2.9")


@pytest.mark.parametrize("counts", [(120, 90, 70, 30), (5, 5, 5, 0), (300, 0, 300, 300)])
def test_the_error_is_that_of_paired_differences(config, monkeypatch, counts):
    """Of 1, −1 and 0 an image, after half an image for each of the four outcomes was added."""
    monkeypatch.setattr(kind_measurement, "_counts", lambda *args: list(counts))
    seen, kept, fresh, alone = counts
    data = finetune.from_tensors(spots(40, 0), spots(40, 1), ["none", "spots"])
    chosen = replace(config(), arm="bn", head="new", head_init="random", augment="none")
    kind = measure(build(chosen, processes(chosen), network(0.0), data, None, False))
    only_kept = (alone + kept - fresh) // 2
    halves = [1] * (2 * only_kept + 1) + [-1] * (2 * (alone - only_kept) + 1) + [0] * (2 * (seen - alone) + 2)
    assert kind == finetune.TaskKind(kept / seen, fresh / seen, seen, pytest.approx(np.std(halves) / (seen + 2) ** 0.5))


def test_a_rare_class_is_among_the_images_of_the_fit(config):
    images, labels = spots(700, 0)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(0))  # of `evaluation`
    labels[order[600:604]] = 2
    data = finetune.from_tensors((images, labels), (images[order[500:604]], labels[order[500:604]]), ["a", "b", "rare"])
    chosen = replace(config(), arm="bn", head="new", head_init="random", augment="none")
    assert measure(build(chosen, processes(chosen), network(0.0), data, None, False)).images == 104


def kind_and_head(chosen):
    """Of a run whose validation images are an odd number, sorted by class, and more than are looked at."""
    torch.set_num_threads(1)
    images, labels = spots(901, 1)
    data = finetune.from_tensors(spots(201, 0), (images[labels.argsort()], labels.sort().values), ["none", "spots"])
    setup = build(chosen, processes(chosen), network(0.6), data, None, False)
    head = setup.network.get_submodule(setup.head)
    return asdict(measure(setup)), head.weight.detach(), head.bias.detach()


def rank_of_two(rank, chosen, directory):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # which torchrun sets, and the file replaces
    store = f"file://{directory}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.save(kind_and_head(chosen), f"{directory}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_several_processes_measure_what_one_does(config, tmp_path):
    """And fit the same head, on all training images."""
    chosen = replace(config(), arm="bn", head="new", augment="none")
    kind, *head = kind_and_head(chosen)
    assert kind["images"] == 512
    warm_process.ranks(rank_of_two, (chosen, str(tmp_path)), 2)
    for rank in range(2):
        got, *got_head = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert got == kind
        assert all(map(torch.equal, got_head, head))


def test_a_head_that_cannot_be_fitted_measures_nothing(config, capsys):
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 8), nn.Flatten())  # a head over 64 positions
    nn.init.ones_(model[0].weight)
    data = finetune.from_tensors(spots(64, 0), spots(64, 1), ["none", "spots"])
    chosen = replace(config(), arm="bn", head="keep", augment="none")
    result = finetune.run(replace(chosen, epochs=1), model=model, data=data, show=True)
    assert result.resolved.kind is None
    told = capsys.readouterr().out
    assert "task         not measured: the head is a convolution over more than one position, or in groups\n" in told


def test_a_run_says_what_it_measured_and_what_to_type(config, capsys):
    data = finetune.from_tensors(spots(200, 0), spots(120, 1), ["none", "spots"])
    options = {"data": data, "model": network(0.0), "show": True}
    result = finetune.run(replace(config(epochs=1), arm="bn", head="new"), **options)
    told = capsys.readouterr().out
    assert f"task         {result.resolved.kind}. A fresh BatchNorm may do as well or better: " in told
    assert "far: " in told and "`arm='bn-naive'`" in told
    start = result.resolved.start_accuracy
    assert f"start        {100 * start:.2f} % of the validation images right" in told
    assert finetune.Result.read(result.directory).resolved == result.resolved
    finetune.run(replace(config(epochs=1, output=f"{result.directory}-plain"), arm="plain", head="new"), **options)
    assert "task    " not in capsys.readouterr().out
