"""Weights files as training scripts leave them: which of their tensors are the network's."""

import argparse
import pathlib
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch_files import assert_is_state

from bnsurgery import BNSurgeryWarning, CheckpointError
from bnsurgery.files.unpickling import load_pickle
from bnsurgery.files.weights import read_weights
from bnsurgery.networks import pretrained
from bnsurgery.networks.fitting import BEST_FIT, Choice, fill_, find
from bnsurgery.records.architectures import Architecture


class Net(nn.Module):
    """Convolutions under `features` and a head, with a buffer that may be infinite and one of integers."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
        self.classifier = nn.Linear(4, 2)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("order", torch.arange(4).flip(0))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3))[:, self.order]) + self.mask.clamp(min=-1)


STATE = Net(1).state_dict()
OTHER = Net(2).state_dict()


def named(prefix, state=STATE):
    return {prefix + name: tensor for name, tensor in state.items()}


def torch_named(wrap):
    """The state dict of a network that torch has wrapped."""
    net = Net()
    net.load_state_dict(STATE)
    return wrap(net).state_dict()


def inner_parallel(net):
    net.features = nn.DataParallel(net.features)
    return net


def inner_compiled(net):
    net.features = torch.compile(net.features)
    return net


OPTIMIZER = torch.optim.Adam(Net().parameters())
LEFT_BY_SCRIPTS = {
    "as it is": STATE,
    "DataParallel": torch_named(nn.DataParallel),
    "compiled": torch_named(torch.compile),
    "compiled in parallel": torch_named(lambda net: nn.DataParallel(torch.compile(net))),
    "parallel inside": torch_named(inner_parallel),
    "compiled inside": torch_named(inner_compiled),
    "averaged": torch_named(AveragedModel),
    "Lightning": {"state_dict": named("model."), "epoch": 3, "hyper_parameters": {"lr": 0.1}, "callbacks": {"a": {}}},
    "prefix of one's own": {"state_dict": named("module.student.backbone.")},
    **{
        name: {name: STATE}
        for name in ("state_dict", "model", "model_state_dict", "net", "params", "weights", "network")
    },
    "BasicSR": {"params_ema": STATE},
    "nested": {"checkpoint": {"models": {"generator": named("module.")}}, "step": 4},
    "parts": {"features": {k[9:]: v for k, v in STATE.items() if k.startswith("features")}, **STATE},
    "of dicts": {
        part: {name.partition(".")[2]: tensor for name, tensor in STATE.items() if name.startswith(f"{part}.")}
        for part in ("features", "classifier")
    }
    | {"mask": STATE["mask"], "order": STATE["order"]},
    "optimizer beside": {"epoch": 1, "optimizer": OPTIMIZER.state_dict(), "model": STATE},
    "step among them": {**STATE, "step": torch.tensor(5)},
    "more than the network": {**STATE, "head2.weight": torch.zeros(3, 4)},
    "namespace beside": {"state_dict": STATE, "args": argparse.Namespace(lr=0.1, data=pathlib.Path("x"), best=[1])},
    "numpy beside": {
        "net": STATE,
        "acc": np.float64(93.1),
        "n": np.int64(3),
        "state": np.arange(3),
        "o": OrderedDict(),
    },
    "two networks": {"netG": STATE, "netD": {"0.weight": torch.zeros(3), "1.running_mean": torch.zeros(3)}},
    "and its average": {"state_dict": STATE, "state_dict_ema": OTHER},
}


@pytest.mark.parametrize("kind", LEFT_BY_SCRIPTS)
def test_the_networks_tensors_are_found(kind, tmp_path):
    torch.save(LEFT_BY_SCRIPTS[kind], tmp_path / "a.pth")
    net = Net()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fill_(net, "Net", read_weights(tmp_path / "a.pth"), BEST_FIT)
    assert_is_state(net.state_dict(), STATE)
    assert len(said) == (kind not in ("as it is", "parts", "of dicts"))  # which have the network's own names
    assert all(warning.category is BNSurgeryWarning for warning in said)


def test_what_was_stripped_and_left_out_is_said(tmp_path):
    save_file({**named("module.net."), "module.head.weight": torch.ones(3)}, tmp_path / "a.safetensors")
    text = r"a.safetensors': its 'module.net.mask' is taken for 'mask'; left out: module.head.weight$"
    with pytest.warns(BNSurgeryWarning, match=text):
        fill_(Net(), "Net", read_weights(tmp_path / "a.safetensors"), BEST_FIT)


def test_every_architecture_is_recognised_in_its_wrapping(tmp_path):
    torch.manual_seed(0)
    state = Architecture("squeezenet1_1", num_classes=3).build("cpu").state_dict()
    torch.save(
        {"net": {f"_orig_mod.{k}": v.half() for k, v in state.items()}, "acc": np.float32(1)}, tmp_path / "a.pth"
    )
    found = pretrained.recognise(tmp_path / "a.pth")
    assert (found.name, found.num_classes) == ("squeezenet1_1", 3)
    with pytest.warns(BNSurgeryWarning, match="is taken for"):
        loaded = pretrained.load(found, str(tmp_path / "a.pth"))
    assert_is_state(loaded.model.state_dict(), {name: tensor.half().float() for name, tensor in state.items()})


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (Choice("ema"), OTHER),
        (Choice("raw.net"), STATE),
        (Choice("raw", "net"), STATE),
        (Choice(prefix="net."), STATE),
        (Choice("ema", ""), OTHER),
    ],
)
def test_a_key_and_a_prefix_choose(choice, expected, tmp_path):
    torch.save({"raw": named("net."), "ema": {**OTHER, "x": {}}}, tmp_path / "a.pth")
    net = Net()
    with pytest.warns(BNSurgeryWarning, match="is taken for"):
        fill_(net, "Net", read_weights(tmp_path / "a.pth"), choice)
    assert_is_state(net.state_dict(), expected)


def test_where_two_places_fit_nobody_guesses(tmp_path):
    torch.save({"params": STATE, "params_ema": OTHER}, tmp_path / "a.pth")
    with pytest.raises(
        CheckpointError, match=r"2 places fit equally well: params\., params_ema\.\. .* `weights_key` or"
    ):
        fill_(Net(), "Net", read_weights(tmp_path / "a.pth"), BEST_FIT)


def test_the_usual_place_is_taken_and_the_other_named(tmp_path):
    torch.save({"ema": OTHER, "model": STATE}, tmp_path / "a.pth")
    net = Net()
    with pytest.warns(
        BNSurgeryWarning, match=r"its 'model\..*; other places that fit \(`weights_key` or .*\): ema"
    ) as said:
        fill_(net, "Net", read_weights(tmp_path / "a.pth"), BEST_FIT)
    assert len(said) == 1
    assert_is_state(net.state_dict(), STATE)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice("teacher"), "nothing under 'teacher'. The file has names that begin with net"),
        (Choice(prefix="teacher."), "no name begins with 'teacher.'. The file has names that begin with net"),
    ],
)
def test_a_choice_that_is_not_there(choice, message, tmp_path):
    torch.save({"net": STATE}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message):
        fill_(Net(), "Net", read_weights(tmp_path / "a.pth"), choice)


@pytest.mark.parametrize("prefix", ["features.", "", "net.features.", "net."])
def test_a_part_of_the_network_is_taken_where_asked(prefix, tmp_path):
    """As torchvision's feature files, or a bare nn.Sequential's."""
    part = {name.removeprefix("features."): tensor for name, tensor in STATE.items() if name.startswith("features.")}
    torch.save({"state_dict": named(prefix, part), "epoch": 1}, tmp_path / "a.pth")
    net, file = Net(), read_weights(tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="not those of Net: "):
        fill_(net, "Net", file, BEST_FIT)
    assert_is_state(net.state_dict(), Net().state_dict())
    with pytest.warns(
        BNSurgeryWarning, match=r"not in it, and left as they were made: mask, order, classifier.weight, cl"
    ):
        fill_(net, "Net", file, Choice(partial=True))
    assert_is_state({name: net.state_dict()[f"features.{name}"] for name in part}, part)
    assert torch.equal(net.classifier.weight, Net().classifier.weight)


def test_a_head_of_another_size_is_left_out_where_asked(tmp_path):
    torch.save({**STATE, "classifier.weight": torch.ones(7, 4), "classifier.bias": torch.ones(7)}, tmp_path / "a.pth")
    net, file = Net(), read_weights(tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"2 of another shape.*\. 6 of 8 fit: `partial=True` takes these alone"):
        fill_(net, "Net", file, BEST_FIT)
    with pytest.warns(BNSurgeryWarning, match="left as they were made: classifier.weight, classifier.bias$"):
        fill_(net, "Net", file, Choice(partial=True))
    assert_is_state(net.state_dict(), {**STATE, **{n: t for n, t in Net().state_dict().items() if n[:5] == "class"}})


def test_a_bare_network_inside_one_that_wraps_it(tmp_path):
    """All names of the network have in front what the file has not."""
    torch.save(STATE, tmp_path / "a.pth")
    outer = nn.ModuleDict({"backbone": Net()})
    with pytest.warns(BNSurgeryWarning, match=r"its 'mask' is taken for 'backbone.mask'"):
        fill_(outer, "outer", read_weights(tmp_path / "a.pth"), BEST_FIT)
    assert_is_state(outer["backbone"].state_dict(), STATE)


def test_an_architectures_part_is_taken_and_the_rest_seeded(tmp_path):
    squeezenet = Architecture("squeezenet1_1")
    state = {
        name: torch.ones_like(t) for name, t in squeezenet.build("cpu").state_dict().items() if name[:8] == "features"
    }
    torch.save(state, tmp_path / "features.pth")
    with pytest.raises(CheckpointError, match="2 missing"):
        pretrained.load(squeezenet, str(tmp_path / "features.pth"))
    loaded = []
    for seed in (0, 0, 1):
        with pytest.warns(BNSurgeryWarning, match="left as they were made: classifier.1.weight, classifier.1.bias"):
            found = pretrained.load(squeezenet, str(tmp_path / "features.pth"), choice=Choice(partial=True), seed=seed)
        loaded.append(found.model.state_dict())
    assert_is_state({name: loaded[0][name] for name in state}, state)
    heads = [found["classifier.1.weight"] for found in loaded]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2]) and heads[0].std() > 0


def test_a_network_with_batchnorm_is_not_taken_for_one_without(tmp_path):
    """Its other weights alone compute something else."""
    norm = named("features.1.", nn.BatchNorm2d(4).state_dict())
    torch.save({"net": {**STATE, **norm}}, tmp_path / "a.pth")
    file = read_weights(tmp_path / "a.pth")
    with pytest.raises(
        CheckpointError, match=r"has BatchNorm already \('net.features.1.running_mean'\).*pass `partial=True`"
    ):
        fill_(Net(), "Net", file, BEST_FIT)
    net = Net()
    with pytest.warns(BNSurgeryWarning, match="left out: net.features.1.weight"):
        fill_(net, "Net", file, Choice(partial=True))
    assert_is_state(net.state_dict(), STATE)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("features.0.weight", torch.full((4, 3, 3, 3), torch.inf), "NaN or Inf in 'features.0.weight'"),
        ("mask", torch.tensor([0.0, torch.nan]), "NaN or Inf in 'mask'"),
        ("features.0.weight", torch.ones(4, 3, 3, 3, dtype=torch.int64), "int64 under 'features.0.weight'"),
        ("order", torch.ones(4), "float32 under 'order'.*The network's is torch.int64"),
        ("features.0.bias", torch.ones(1).expand(4), "expanded or empty-shell tensor 'features.0.bias'"),
        ("features.0.bias", torch.ones(4, dtype=torch.complex64), "complex64 under 'features.0.bias'"),
    ],
)
def test_the_networks_tensors_are_checked_and_no_others(name, value, message, tmp_path):
    torch.save({**STATE, name: value}, tmp_path / "a.pth")
    net = Net()
    with pytest.raises(CheckpointError, match=message):
        fill_(net, "Net", read_weights(tmp_path / "a.pth"), BEST_FIT)
    assert_is_state(net.state_dict(), Net().state_dict())
    torch.save({**STATE, "beside": value}, tmp_path / "a.pth")
    with pytest.warns(BNSurgeryWarning, match="left out: beside"):
        fill_(net, "Net", read_weights(tmp_path / "a.pth"), BEST_FIT)
    assert_is_state(net.state_dict(), STATE)


def test_what_stands_beside_the_weights_is_not_made(tmp_path):
    """A pickle's objects that are no tensors become empty ones of ours: no code of theirs sees the file."""

    class Trap(argparse.Namespace):
        def __setstate__(self, state):
            raise AssertionError("called")

    beside = {"args": argparse.Namespace(lr=1), "n": np.float64(1), "a": np.ones(2), "p": pathlib.PosixPath("/etc")}
    torch.save(beside, tmp_path / "a.pth")
    before = set(torch.serialization.get_safe_globals())
    original, argparse.Namespace.__setstate__ = argparse.Namespace, Trap.__setstate__
    try:
        found = load_pickle(tmp_path / "a.pth")
    finally:
        del original.__setstate__
    assert all(not vars(value) and type(value).__mro__[1].__name__ == "_Nothing" for value in found.values())
    assert set(torch.serialization.get_safe_globals()) == before


def test_a_dict_that_holds_itself_and_names_without_end(tmp_path):
    state = {**STATE}
    state["again"] = state
    torch.save(state, tmp_path / "a.pth")
    assert set(read_weights(tmp_path / "a.pth").tensors) == set(STATE)
    torch.save({"x" * 300: STATE, "a": {"b" * 300: STATE}, "c": {"weight": torch.ones(1)}}, tmp_path / "b.pth")
    assert list(read_weights(tmp_path / "b.pth").tensors) == ["c.weight"]
    torch.save({".".join("a" * 10_000): torch.ones(1)}, tmp_path / "c.pth")
    fit = find(read_weights(tmp_path / "c.pth"), {"a.a": torch.Size([1])}, BEST_FIT)
    assert len(fit.names) == 1
