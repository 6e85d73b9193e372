"""Several threads insert at once, each into its own model, while another computes: the bits of one after the other."""

import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from small_network import Fire
from torch import fx, nn
from torchvision import models

from bnsurgery import fold, insert, plan, verify
from bnsurgery.images.calibration_images import sample_crops
from bnsurgery.images.decoding import load_image
from bnsurgery.images.preprocessing import Preprocessing

ROUNDS = 3
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*variance below eps:bnsurgery.BNSurgeryWarning")]


@pytest.fixture(autouse=True)
def _often():
    """Threads take turns every 10 µs, so that nothing that can come between them fails to."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class Branches(nn.Module):
    """Reads parameters of another module, branches on shapes, and calls one layer twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x)) + torch.relu(self.second(x * self.first.bias.mean()))
        return self.head(x.mean((2, 3)) if x.shape[-1] > 1 else x.flatten(1))


def networks():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    return [model.eval() for model in (Fire(), plain, Branches(), models.squeezenet1_1(weights=None))]


def everything(model, x):
    """What insert, plan, calibrate, verify and fold make of it."""
    found = plan(model, x)
    bn_model = insert(model, [x[:3], x[3:]])
    report = verify(model, bn_model, [x], drift_batch_sizes=(2,))
    with torch.inference_mode():
        outputs = bn_model(x)
    return found, bn_model.state_dict(), report, outputs, fold(bn_model).state_dict()


def assert_same(got, expected):
    assert got[0] == expected[0]
    assert got[2] == expected[2]
    assert torch.equal(got[3], expected[3])
    for state, wanted in ((got[1], expected[1]), (got[4], expected[4])):
        assert list(state) == list(wanted)
        for name, tensor in wanted.items():
            assert torch.equal(state[name], tensor), name


def in_threads(function, arguments, meanwhile):
    """`function` of every argument at once, and `meanwhile` again and again until all are done."""
    done = threading.Event()

    def repeat():
        count = 0
        while not done.is_set() or not count:
            meanwhile()
            count += 1

    with ThreadPoolExecutor(len(arguments) + 1) as pool:
        other = pool.submit(repeat)
        try:
            results = list(pool.map(function, arguments))
        finally:
            done.set()
        other.result()
    return results


def test_four_models_in_four_threads(images):
    x = images(5, 32)
    expected = [everything(model, x) for model in networks()]
    bystander = networks()[3]
    with torch.inference_mode():
        computed = bystander(x)

    @torch.inference_mode()
    def forward():
        assert torch.equal(bystander(x), computed)
        assert type(bystander.features[0].weight) is nn.Parameter

    calls = nn.Module.__call__, nn.Module.__getattr__
    for _ in range(ROUNDS):
        got = in_threads(lambda model: everything(model, x), networks(), forward)
        for result, wanted in zip(got, expected, strict=True):
            assert_same(result, wanted)
    assert (nn.Module.__call__, nn.Module.__getattr__) == calls


class Waits(nn.Module):
    """Holds the trace open until another thread has computed."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.tracing, self.computed = threading.Event(), threading.Event()

    def forward(self, x):
        if isinstance(x, fx.Proxy):
            self.tracing.set()
            assert self.computed.wait(30), "the other thread did not compute"
        return self.out(self.conv(x).relu())


def test_a_forward_in_the_middle_of_another_threads_trace(images):
    """Not left to chance: the trace goes on only after the other's forward pass, and holds nothing of that.

    Of a layer of the very network that is traced, whose calls and parameters the trace is after.
    """
    model, x = Waits().eval(), images(2, 32)
    expected, seen = model.conv(x), []

    def other():
        assert model.tracing.wait(30)
        seen.append((model.conv(x), type(model.conv.weight)))
        model.computed.set()

    thread = threading.Thread(target=other)
    thread.start()
    found = plan(model, x)
    thread.join()
    assert torch.equal(seen[0][0], expected)
    assert seen[0][1] is nn.Parameter
    assert [site.name for site in found.sites] == ["conv"]
    assert [skip.name for skip in found.skipped] == ["out"]


def test_the_process_keeps_its_filters_of_warnings(tmp_path):
    """Python restores those at the end of a block to what they were at its start, whoever began one in between."""
    for number in range(4):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(tmp_path / f"{number}.png")
    paths = [tmp_path / f"{number % 4}.png" for number in range(400)]
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        colors = [image.getpixel((0, 0))[0] for image in pool.map(load_image, paths)]
    assert colors == [number % 4 for number in range(400)]
    assert warnings.filters == before


def test_crops_do_not_depend_on_other_threads_random_numbers():
    preprocess = Preprocessing(32, 32, 32)

    def crops(seed):
        return torch.cat(list(sample_crops(6, 3, preprocess=preprocess, seed=seed)))

    expected = [crops(seed) for seed in range(4)]
    got = in_threads(crops, range(4), lambda: torch.rand(10))
    assert all(map(torch.equal, got, expected))
