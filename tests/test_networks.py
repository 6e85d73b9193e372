"""The networks people bring, of many kinds: in, checked, out again. torchvision's classifiers are in test_insertion."""

import pytest
import torch
from torch import nn

import bnsurgery
from benchmarks.zoo import NETWORKS, Network, images, timm_network
from bnsurgery import NoSitesError, fold, insert, load, plan, record, save, verify

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*variance below eps:bnsurgery.BNSurgeryWarning", "ignore:.*had no bias:bnsurgery.BNSurgeryWarning"
)
ELSEWHERE = {"vgg11", "vgg13", "vgg16", "vgg19", "alexnet", "squeezenet1_0", "squeezenet1_1"}
BACKBONE = "ssd300_vgg16.backbone"
# A tenth of the weights between its two largest layers.
SMALLER = {"timm vgg11": Network(timm_network("vgg11", mlp_ratio=0.1), images(64))}
SITES = {
    BACKBONE: 22,  # of 23 convs the last is an output
    "ssd300_vgg16": 23,
    "fcn8s": 10,
    "timm vgg11": 10,
    "timm nf_resnet26": 29,
    "timm resmlp_12_224": 37,  # 12 blocks of a layer over the tokens and two over the channels, and the stem
    "alexnet 2012": 5,
    "dcgan generator": 3,
    "u-net": 12,
    "srcnn": 2,
    "edsr": 8,
    "mtcnn o-net": 5,
    "fixup resnet": 7,
    "audio conv1d": 3,
    "wavenet-like": 3,
    "video conv3d": 4,
    "convnet+mlp f64": 4,
    "mixer": 5,
    "siamese": 3,
}


def test_every_network_is_tried():
    assert set(SITES) | ELSEWHERE == set(NETWORKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SITES if name != BACKBONE])
def test_in_and_out(name, tmp_path):
    network = SMALLER.get(name, NETWORKS[name])
    size = 1 if "ssd300" in name else 2  # its images are large
    model, batches = network.make(), network.batches(2, size)
    bn_model = insert(model, batches)
    assert len(record(bn_model).sites) == SITES[name]
    assert verify(model, bn_model, network.batches(1, size, seed=5), drift_batch_sizes=()).bit_identical
    with pytest.raises(NoSitesError):
        plan(bn_model, batches[0])
    folded = fold(bn_model)
    assert str(folded) == str(model)
    assert list(folded.state_dict()) == list(model.state_dict())
    assert all(map(torch.equal, folded.state_dict().values(), model.state_dict().values()))
    save(bn_model, tmp_path / "net")
    again = load(tmp_path / "net", model=model)
    assert str(again) == str(bn_model)
    assert all(map(torch.equal, again.state_dict().values(), bn_model.state_dict().values()))
    if "ssd300" not in name:  # whose outputs are as many boxes as score high enough
        assert_folds_when_trained(name, bn_model, network)


def assert_folds_when_trained(name, bn_model, network):
    """Weights that training could have given, then folded: the same function, or refused by name."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in bn_model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.mul_(1 + 0.2 * torch.randn(len(module.weight), generator=generator))
                module.bias.add_(0.1 * torch.randn(len(module.bias), generator=generator))
    if name in ("wavenet-like", "timm nf_resnet26"):
        with pytest.raises(bnsurgery.FoldError, match="weight is computed|custom forward"):
            fold(bn_model)
        folded = fold(bn_model, allow_partial=True)
    else:
        folded = fold(bn_model)
        assert not any(type(m).__module__.startswith("bnsurgery") for m in folded.modules())
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    report = verify(bn_model, folded, network.batches(1, 4, seed=5), drift_batch_sizes=())
    # float32 rounds at 6e-8; some 30 layers of sums later, relative to the largest output.
    assert report.max_rel < (1e-12 if network.dtype == torch.float64 else 2e-5)


@pytest.mark.slow
def test_a_detectors_backbone_has_its_last_layer_for_an_output():
    """Its other layers are those of the detector above."""
    network = NETWORKS[BACKBONE]
    found = plan(network.make(), *network.batches(1, 1))
    assert len(found.sites) == SITES[BACKBONE]
    assert "output" in found.skipped[-1].reason


@pytest.mark.parametrize("name", ["mtcnn o-net", "u-net", "audio conv1d", "video conv3d", "mixer"])
def test_train_mode_on_the_calibration_batch_changes_little(name):
    """The strong test of calibration, on every kind of layer: the batch's statistics are the calibrated ones."""
    network = NETWORKS[name]
    model, (batch,) = network.make(), network.batches(1, 16)
    bn_model = insert(model, [batch])
    report = verify(model, bn_model, [batch], drift_batch_sizes=(16,))
    assert report.train_drift[16] < 1e-3
