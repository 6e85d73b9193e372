"""benchmarks.dense: scenes, arms and the choice of a rate, on generated images; and a moment of the real comparison."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import dense
from benchmarks.dense import CELL, SIGMA, SIZE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:channels with a variance below eps"),  # the real trunk's, and a new head's
]
WHITE_ON_BLACK = ([Image.new("RGB", (90, 120))], [Image.new("RGB", (96, 96), "white")])


def trunk():
    torch.manual_seed(0)
    widths = (3, 8, 8, 8)
    layers = [(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()) for a, b in pairwise(widths)]
    return nn.Sequential(*(layer for pair in layers for layer in pair))


def cells(pixels):
    """Sums over the cells of (SIZE, SIZE)."""
    return pixels.reshape(SIZE // CELL, CELL, SIZE // CELL, CELL).sum((1, 3))


def test_a_density_map_is_a_gaussian_for_each_object():
    centres = [(3.0, 9.5), (40.2, 33.3), (60.0, 61.0)]
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    expected = np.zeros((SIZE, SIZE))
    for left, top in centres:
        gaussian = np.exp(-((x - left) ** 2 + (y - top) ** 2) / (2 * SIGMA**2))
        expected += gaussian / gaussian.sum()
    found = dense.density(torch.tensor(centres))
    assert found.shape == (1, SIZE // CELL, SIZE // CELL)
    np.testing.assert_allclose(found[0].numpy(), cells(expected), atol=1e-6)  # sums of float32 numbers below 1


def test_the_map_is_where_the_objects_are():
    images, maps = dense.scenes(WHITE_ON_BLACK, 20, 0)
    counts = maps.sum((1, 2, 3))
    torch.testing.assert_close(counts, counts.round(), atol=1e-4, rtol=0)
    assert 5 <= counts.min() < 20 and 45 < counts.max() <= 60
    for image, found in zip(images, maps, strict=True):
        white = cells(image.mean(0).numpy()).flatten()
        upright, turned = (np.corrcoef(white, each.flatten())[0, 1] for each in (found[0], found[0].T))
        assert upright > 0.75 and upright > turned
    again = dense.scenes(WHITE_ON_BLACK, 20, 0)
    assert all(map(torch.equal, (images, maps), again))
    assert not torch.equal(images, dense.scenes(WHITE_ON_BLACK, 20, 1)[0])


def test_the_arms_start_as_they_say():
    """The scenes are one batch, so that recalibration finds what calibration found, up to rounding."""
    data = dense.scenes(WHITE_ON_BLACK, 16, 0)
    model, images = dense.csrnet(trunk(), 8, seed=0), data[0]
    with torch.no_grad():
        features, output = model.trunk(images), model(images)
        for arm, trunk_kept, head_kept in (
            ("plain", True, True), ("bn", True, True), ("bn-new-head", True, False), ("bn-naive", False, False),
        ):  # fmt: skip
            network = dense.train(model, arm, data, 1e-3, 0, epochs=0)
            assert torch.allclose(network.trunk(images), features, rtol=1e-4, atol=1e-5) == trunk_kept, arm
            assert torch.allclose(network(images), output, rtol=1e-3, atol=1e-6) == head_kept, arm
            norms = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
            assert norms == (0 if arm == "plain" else 9)


def test_it_learns_to_count():
    data = {part: dense.scenes(WHITE_ON_BLACK, 64, seed) for seed, part in enumerate(("train", "val", "test"))}
    counts = {part: maps.sum((1, 2, 3)) for part, (_, maps) in data.items()}
    constant = (counts["test"] - counts["train"].mean()).abs().mean().item()
    found = dense.compare(trunk(), 8, data, {"bn-new-head": (1e-2, 1e30)}, seeds=(0,), epochs=10)
    arm = found["bn-new-head"]
    assert (arm.rate, arm.val[1e30]) == (1e-2, [None])
    assert arm.test[0] < constant / 2
    text = dense.report(found, constant)
    assert "1 of 1 diverged" in text and f"{constant:.2f}" in text


def test_only_the_rate_that_is_best_on_validation_is_tested(monkeypatch):
    errors = {0.1: (3.0, 9.0), 0.2: (5.0, 5.0), 0.3: (1.0, None)}  # by seed: 5 is the smallest mean, None diverges
    tested = []

    def error(network, part):
        if part == "test":
            tested.append(network.name)
            return 7.0
        rate, seed = network.name
        return errors[rate][seed]

    def train(model, arm, data, rate, seed, epochs):
        network = nn.Identity()
        network.name = (rate, seed)
        return None if errors[rate][seed] is None else network

    monkeypatch.setattr(dense, "error", error)
    monkeypatch.setattr(dense, "train", train)
    found = dense.compare(trunk(), 8, {part: part for part in ("train", "val", "test")}, {"plain": errors}, (0, 1))
    expected = dense.Arm({rate: list(pair) for rate, pair in errors.items()}, 0.2, [7.0, 7.0])
    assert found == {"plain": expected} and tested == [(0.2, 0), (0.2, 1)]


@pytest.mark.skipif(not dense.REAL.is_file(), reason="needs ../shared/real")
def test_the_real_comparison_on_a_few_scenes():
    photographs = dense.photographs()
    digests = [
        {hashlib.sha256(image.tobytes()).digest() for images in part for image in images}
        for part in photographs.values()
    ]
    assert sum(map(len, digests)) == len(set.union(*digests)) > 2000  # none is in two parts
    data = {part: dense.scenes(found, 8, 0) for part, found in photographs.items()}
    found = dense.compare(
        dense.real().vgg19_quarter_width()[:-4],
        128,
        data,
        {arm: rates[:1] for arm, rates in dense.RATES.items()},
        (0,),
        1,
    )
    assert all(0 < error < 60 for arm in found.values() for error in arm.test)
