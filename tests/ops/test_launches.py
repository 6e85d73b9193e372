"""How many kernels a layer launches, and what else it asks of the dispatcher: on a GPU each costs the host time."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import bnsurgery
from bnsurgery.nn import BatchNorm2d
from bnsurgery.ops import cuda, kernels

pytestmark = pytest.mark.usefixtures("triton_kernels")

SMALL, LARGE = (2, 8, 4, 4), (16, 8, 4, 4)  # LARGE: more tiles than a program adds up alone
ALLOCATIONS = {"aten::empty_like", "aten::new_empty", "aten::empty.memory_format", "aten::detach", "aten::view"}


class Counted:
    """Stands in for a kernel and notes its launches."""

    def __init__(self, name, kernel, launches):
        self.name, self.kernel, self.launches = name, kernel, launches

    def __getitem__(self, grid):
        self.launches.append(self.name)

        def launch(*args, **options):
            with _disable_current_modes():  # the interpreter is made of torch's operators
                self.kernel[grid](*args, **options)

        return launch


class Dispatched(TorchDispatchMode):
    """Notes every operator, those that our ops' kernels call too."""

    def __init__(self):
        super().__init__()
        self.ours, self.others = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "bnsurgery":
            self.others.append(func.name())
            return func(*args, **(kwargs or {}))
        self.ours.append(func.name())
        with self:
            return func._op_dk(torch._C._dispatch_key_parse("CPU" if args[0].is_cpu else "CUDA"), *args)


@pytest.fixture
def launches(monkeypatch):
    monkeypatch.setattr(cuda, "TILE", 256)
    monkeypatch.setattr(cuda, "_processors", lambda device: 16)
    monkeypatch.setattr("bnsurgery.ops.functional._ATEN_UP_TO", -1)
    found = []
    for name in ("reduce", "combine", "stream"):
        monkeypatch.setattr(kernels, name, Counted(name, getattr(kernels, name), found))
    return found


def run(norm, shape, launches):
    """Launches and operators of the forward, and of the backward."""
    x = torch.randn(shape, requires_grad=True)
    grad = torch.randn(shape)
    wanted = [x, *(p for p in norm.parameters() if p.requires_grad)]
    with Dispatched() as forward:
        y = norm(x)
    before = list(launches)
    launches.clear()
    with Dispatched() as backward:
        torch.autograd.grad(y, wanted, grad)
    return before, list(launches), forward, backward


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("statistics", ["batch", "renorm"])
@pytest.mark.parametrize(
    ("shape", "forward", "backward"),
    [
        (LARGE, ["reduce", "combine", "stream"], ["reduce", "combine", "stream"]),
        (SMALL, ["reduce", "stream"], ["reduce", "stream"]),
    ],
)
def test_training(shape, forward, backward, statistics, activation, launches):
    norm = BatchNorm2d(8, activation=activation).train()
    bnsurgery.set_statistics_(norm, statistics, renorm_steps=10)
    found = run(norm, shape, launches)
    assert found[:2] == (forward, backward)
    assert [mode.ours for mode in found[2:]] == [["bnsurgery::batch_norm_fwd"], ["bnsurgery::batch_norm_bwd"]]
    assert set(found[2].others + found[3].others) <= ALLOCATIONS
    assert norm.num_batches_tracked == 1 and (norm.running_mean != 0).all()


@pytest.mark.parametrize("frozen", [True, False])
def test_running_statistics(frozen, launches):
    norm = BatchNorm2d(8, activation="relu").eval().requires_grad_(not frozen)
    found = run(norm, LARGE, launches)
    assert found[0] == ["stream"]
    assert found[1] == ["stream"] if frozen else ["reduce", "combine", "stream"]
    assert set(found[2].others + found[3].others) <= ALLOCATIONS
    launches.clear()
    with torch.no_grad():
        norm(torch.randn(SMALL))
    assert launches == ["stream"]
