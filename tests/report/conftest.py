"""A network that has everything a report speaks of: dead, near-dead and silent channels, a site called twice."""

import pytest
import torch
from torch import nn

import bnsurgery
from bnsurgery import report


class Odd(nn.Module):
    """A conv with chosen channels, a conv that is called twice, a dense layer on (N, T, C), names that are no words."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential()
        self.part.add_module("<b>$x$</b>", nn.Conv2d(3, 6, 3, padding=1))
        self.part.add_module("relu", nn.ReLU())
        self.twice = nn.Conv2d(6, 6, 1)
        self.tokens = nn.Linear(6, 5)
        self.head = nn.Linear(5, 4)
        conv = self.part[0]
        with torch.no_grad():
            conv.weight[0] = 0  # dead
            conv.bias[1] = -100  # silent
            conv.weight[2] *= 0.006 / conv.weight[2].norm()  # near eps: a variance of some 3e-5
            conv.bias[2] = 1

    def forward(self, x):
        x = self.part(x)
        x = torch.relu(self.twice(torch.tanh(self.twice(x))))
        x = torch.relu(self.tokens(x.flatten(2).transpose(1, 2)))
        return self.head(x.mean(1))


@pytest.fixture(autouse=True)
def _one_thread():
    """Enough for a tiny network, and faster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made():
    """The network, with weights of its own seed, and batches for it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        odd = Odd().eval()
    generator = torch.Generator().manual_seed(3)
    return odd, list(torch.randn(12, 3, 8, 8, generator=generator).split(5))


def insert(odd, batches):
    with pytest.warns(bnsurgery.BNSurgeryWarning, match="dead"):
        return bnsurgery.insert(odd, batches)


@pytest.fixture
def odd():
    return made()[0]


@pytest.fixture
def batches():
    return made()[1]


@pytest.fixture
def inserted(odd, batches):
    return insert(odd, batches)


@pytest.fixture(scope="session")
def insertion_page():
    """Its page, which tests must not change."""
    odd, batches = made()
    return report.insertion(odd, insert(odd, batches), batches)
