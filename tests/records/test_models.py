import copy

import pytest
import torch
from torch import nn
from torchvision import models as tv

from bnsurgery import ArchitectureError
from bnsurgery.records.architectures import (
    NAMES,
    Architecture,
    architecture,
    identify,
    identify_model,
    state_shapes,
    summary,
)


@pytest.mark.parametrize("name", NAMES)
def test_builds_torchvisions_network_without_allocating(name):
    built = architecture(name).build()
    with torch.device("meta"):
        stock = tv.get_model(name, weights=None)
    assert str(built) == str(stock)
    assert all(tensor.is_meta for tensor in built.state_dict().values())
    assert not built.training


@pytest.mark.parametrize("name", NAMES)
def test_identify(name):
    for chosen in (Architecture(name), Architecture(name, num_classes=3, dropout=0.1)):
        assert identify_model(chosen.build()) == chosen
    shapes = state_shapes(architecture(name).build())
    assert identify(shapes) == Architecture(name)
    shapes.popitem()
    assert identify(shapes) is None


def test_what_is_not_torchvisions_is_not_identified():
    class Mine(tv.VGG):
        def forward(self, x):
            return super().forward(x) * 2

    with torch.device("meta"):
        mine = Mine(tv.vgg11().features)
    assert identify_model(mine) is None
    assert identify_model(nn.Sequential(nn.Conv2d(3, 3, 3))) is None
    changed = copy.deepcopy(architecture("vgg11").build())
    changed.classifier.append(nn.Linear(1000, 10, device="meta"))
    assert identify_model(changed) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vgg61", "no such architecture or file. Did you mean .*vgg16"),
        ("xyzzy", "no such architecture or file. Known: alexnet, "),
        (
            "vgg16_bn",
            r"normalization layers already, the first: 'features.1' \(BatchNorm2d\). Its BN-free twin is vgg16",
        ),
        ("resnet18", r"normalization layers already, the first: 'bn1' \(BatchNorm2d\)"),
        ("vit_b_16", "LayerNorm"),
        ("googlenet", "BatchNorm2d"),
        ("regnet_y_400mf", "not one of the networks"),
        ("ssd300_vgg16", "not one of the networks"),
    ],
)
def test_other_names_are_refused(name, message):
    with pytest.raises(ArchitectureError, match=message):
        architecture(name)


def test_summary():
    vgg = summary("vgg16")
    assert [vgg[name] for name in ("conv", "dense", "parameters", "min_size")] == [13, 3, 138.4, 32]
    assert "IMAGENET1K_V1" in vgg["weights"]
