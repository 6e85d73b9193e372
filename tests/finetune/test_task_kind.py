"""Whether the pretrained function is of use: measured on networks made so that it is, or is not."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from bnsurgery import finetune
from bnsurgery.finetune.setup import build, processes
from bnsurgery.finetune.task_kind import measure


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
@pytest.mark.parametrize(("threshold", "near"), [(0.85, True), (0.0, False)])
def test_a_function_that_tells_the_classes_apart_is_near(config, threshold, near, statistics):
    data = finetune.from_tensors(spots(200, 0), spots(120, 1), ["none", "spots"])
    chosen = replace(config(), arm="bn", head="new", augment="none", statistics=statistics)
    setup = build(chosen, processes(chosen), network(threshold), data, None, False)
    before = {name: tensor.clone() for name, tensor in setup.network.state_dict().items()}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    kind = measure(setup)
    assert torch.equal(torch.get_rng_state(), state)
    assert kind is not None and kind.near is near
    # The inserted network computes what the network computes: one feature, which a threshold divides at best.
    feature = network(threshold)[:4](spots(120, 1)[0] / 255).detach().flatten()
    best = max((((feature > cut) == (spots(120, 1)[1] == 1)).float().mean().item()) for cut in feature)
    assert best - 0.1 <= kind.kept <= best + 1e-6
    assert all(torch.equal(before[name], tensor) for name, tensor in setup.network.state_dict().items())


def test_a_head_that_cannot_be_fitted_measures_nothing(config):
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 8), nn.Flatten())  # a head over 64 positions
    nn.init.ones_(model[0].weight)
    data = finetune.from_tensors(spots(64, 0), spots(64, 1), ["none", "spots"])
    chosen = replace(config(), arm="bn", head="keep", augment="none")
    setup = build(chosen, processes(chosen), model, data, None, False)
    assert measure(setup) is None


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
