import pytest
import torch
from torch import nn
from torchvision import models
from unchanged import assert_unchanged, snapshot

import bnsurgery
from bnsurgery import CalibrationError, NoSitesError, UntraceableModelError, plan

X = torch.randn(2, 3, 32, 32)


def meta(name):
    with torch.device("meta"):
        return models.get_model(name, weights=None).eval()


def meta_plan(name, **choice):
    return plan(meta(name), torch.empty(1, 3, 224, 224, device="meta"), **choice)


@pytest.mark.parametrize(
    ("name", "conv", "dense"),
    [
        ("vgg11", 8, 2),
        ("vgg13", 10, 2),
        ("vgg16", 13, 2),
        ("vgg19", 16, 2),
        ("alexnet", 5, 2),
        ("squeezenet1_0", 25, 0),
        ("squeezenet1_1", 25, 0),
    ],
)
def test_every_layer_but_the_head_is_a_site(name, conv, dense):
    found = meta_plan(name)
    assert [site.kind for site in found.sites] == ["conv"] * conv + ["dense"] * dense
    assert [skip.reason for skip in found.skipped] == ["output layer (`head=True` takes it, too)"]
    assert all(site.relu is not None for site in found.sites)
    assert len(meta_plan(name, head=True).sites) == conv + dense + 1


def test_choice_of_layers():
    assert {site.kind for site in meta_plan("vgg11", layers="conv").sites} == {"conv"}
    assert [site.name for site in meta_plan("vgg11", layers="dense").sites] == ["classifier.0", "classifier.3"]
    seen = []

    def wide(name, module):
        seen.append(name)
        return isinstance(module, nn.Conv2d) and module.out_channels >= 512

    found = meta_plan("vgg11", layers=wide)
    assert [site.name for site in found.sites] == ["features.11", "features.13", "features.16", "features.18"]
    assert "features.0" in seen
    assert {skip.reason for skip in found.skipped} == {"left out by the layers predicate"}


def test_custom_network(custom):
    before = snapshot(custom)
    found = plan(custom, X)
    assert_unchanged(custom, before)
    sites = {site.name: site for site in found.sites}
    assert list(sites) == ["stem.0", "squeeze", "left", "right", "hidden"]
    assert sites["stem.0"].in_sequential
    assert not sites["squeeze"].in_sequential
    # A functional ReLU cannot be taken over: the code that calls it stays.
    assert [site.relu for site in found.sites] == ["stem.1", "squeeze_relu", None, None, None]
    assert [(site.kind, site.channels, site.ndim) for site in found.sites][-1] == ("dense", 20, 2)


def test_post_activation_anchors_on_the_activation(custom):
    found = plan(custom, X, placement="post-activation")
    assert [(site.name, site.anchor) for site in found.sites] == [("stem.0", "stem.1"), ("squeeze", "squeeze_relu")]
    assert {"left", "right", "hidden"} <= {skip.name for skip in found.skipped if "no activation module" in skip.reason}


def test_a_relu_with_hooks_or_other_readers_is_not_taken_over():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    net[1].register_forward_hook(lambda *_: None)
    assert [site.relu for site in plan(net, X).sites] == [None, "3"]
    relu = nn.ReLU()
    shared = nn.Sequential(nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 4, 3), relu, nn.Conv2d(4, 4, 3))
    assert [site.relu for site in plan(shared, X).sites] == [None, None]


def test_children_picked_by_index_are_not_renumbered():
    class Perceptual(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(
                nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)
            )

        def forward(self, x):
            taps = []
            for i, layer in enumerate(self.features):
                x = layer(x)
                if i in (1, 3):
                    taps.append(x)
            return taps, x

    class Sliced(Perceptual):
        def forward(self, x):
            return self.features[2:](self.features[:2](x))

    for cls in (Perceptual, Sliced):
        assert [site.in_sequential for site in plan(cls(), X, head=True).sites] == [False] * 3


def test_already_normalized_networks_are_told_so_by_name():
    with pytest.raises(NoSitesError, match=r"ResNet has normalization layers already.*'conv1'.*'bn1' \(BatchNorm2d\)"):
        meta_plan("resnet18")
    with pytest.raises(NoSitesError, match=r"VGG has normalization.*'features.1' \(BatchNorm2d\).*layers='dense'"):
        meta_plan("vgg16_bn")
    assert [site.name for site in meta_plan("vgg16_bn", layers="dense").sites] == ["classifier.0", "classifier.3"]


def test_partly_normalized_networks_get_the_rest():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3136, 2),
    )
    found = plan(net, X)
    assert [site.name for site in found.sites] == ["3"]
    assert found.skipped[0].reason == "normalized already by '2' (BatchNorm2d)"


@pytest.mark.parametrize(
    ("norm", "kind"),
    [(nn.GroupNorm(2, 4), "GroupNorm"), (nn.InstanceNorm2d(4), "InstanceNorm2d")],
)
def test_other_norms_count(norm, kind):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    assert kind in plan(net, X).skipped[0].reason


def test_a_layer_called_twice_is_one_site():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.head = nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return self.head(self.relu(self.conv(self.relu(self.conv(x)))))

    (site,) = plan(Twice(), X).sites
    assert (site.name, site.relu) == ("conv", "relu")


def test_reasons_for_leaving_layers_out():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Conv2d(3, 3, 1)
            self.tokens = nn.Linear(32, 32)
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
            self.conv = nn.Conv2d(4, 4, 1)
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.head(self.conv(nn.functional.conv2d(self.tokens(x), self.weight)))

    reasons = {skip.name: skip.reason for skip in plan(Odd(), X).skipped}
    assert reasons["unused"] == "never called in the forward pass"
    assert "in the middle of Odd's forward" in reasons["conv2d"]


def test_layers_without_a_batch_dimension_are_left_out():
    class Unbatched(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.dense, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.dense(self.conv(x[0]).mean((1, 2))))

    with pytest.raises(NoSitesError, match="3 dimensions; BatchNorm needs 4.*1 dimensions; BatchNorm needs 2"):
        plan(Unbatched(), X)


def test_no_site_at_all():
    with pytest.raises(NoSitesError, match="no conv or dense layer"):
        plan(nn.Sequential(nn.ReLU()), X)
    with pytest.raises(NoSitesError, match="output layer.*'0'"):
        plan(nn.Sequential(nn.Conv2d(3, 3, 3)), X)


def test_untraceable_models_name_the_construct():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x):
            if x.sum() > 0:
                return self.conv(x)
            return x

    model = Branches()
    before = snapshot(model)
    with pytest.raises(UntraceableModelError, match=r"Branches: .*test_planning.py:\d+ \(if x.sum\(\) > 0:\)"):
        plan(model, X)
    assert_unchanged(model, before)
    with pytest.raises(UntraceableModelError, match=r"pass model\.module"):
        plan(nn.DataParallel(nn.Conv2d(3, 3, 3)), X)


def test_bad_arguments(custom):
    with pytest.raises(ValueError, match="placement must be one of"):
        plan(custom, X, placement="behind")
    with pytest.raises(ValueError, match="layers must be one of"):
        plan(custom, X, layers="convs")
    with pytest.raises(CalibrationError, match="Fire failed on an input of shape"):
        plan(custom, torch.randn(2, 5, 32, 32))
    with pytest.raises(CalibrationError, match="got str, expected a tensor"):
        plan(custom, "images")


def test_text_and_dict():
    found = meta_plan("vgg11")
    text = str(found)
    assert max(map(len, text.splitlines())) <= 80
    assert "features.0" in text
    assert "VGG: 10 sites, 1 skipped, pre-activation" in text
    assert found.to_dict()["sites"][0]["name"] == "features.0"
    assert isinstance(found, bnsurgery.Plan)
