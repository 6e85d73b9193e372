"""The network on its way in: sources, heads, tasks, and what "auto" chooses."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tiny_task import patterns, tiny
from torch import nn
from torchvision import models

import bnsurgery
from bnsurgery import finetune
from bnsurgery.errors import ArchitectureError, BNSurgeryError, CheckpointError, UntraceableModelError
from bnsurgery.files.labels import noted_classes
from bnsurgery.finetune import network
from bnsurgery.finetune.recipe import choose_parameters_, set_dropout_
from bnsurgery.networks import factories
from bnsurgery.records.record import record
from bnsurgery.surgery.heads import find_head, outputs_of, replace_head_

CONFIG = finetune.Config(source="x", data="x", output="x", image_size=8, normalize="none")
DATA = finetune.from_tensors(patterns(16, 1), patterns(8, 2), ["nw", "ne", "sw", "se"])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A squeezenet1_1 for 7 classes as a plain file."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("plain") / "mine.pth"
    torch.save(models.squeezenet1_1(weights=None, num_classes=7).state_dict(), path)
    return path


def batches(size=32):
    return [torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def prepared(source, data, config, images):
    """The task, the network to train, and its head."""
    task, head = network.task_of(source, data, config)
    made = network.prepare(source, task, head, config, images)
    return task, made, made.get_submodule(head.name_in(made))


@pytest.mark.parametrize("kind", ["architecture", "plain file", "inserted file"])
def test_every_source_ends_as_an_inserted_network_with_a_new_head(plain, tmp_path, kind):
    config = replace(CONFIG, image_size=32, normalize="imagenet")
    if kind == "inserted file":
        original = network.find(replace(config, source=str(plain))).model
        bnsurgery.save(bnsurgery.insert(original, batches()), tmp_path / "bn.safetensors")
        config = replace(config, source=str(tmp_path / "bn.safetensors"))
    elif kind == "plain file":
        config = replace(config, source=str(plain))
    else:
        config = replace(config, source="squeezenet1_1", weights="random")
    source = network.find(config)
    features = {name: value.clone() for name, value in source.model.named_parameters() if "classifier" not in name}
    task, trained, head = prepared(source, DATA, config, batches())
    assert (task.classes, task.head, task.preprocessing.shape) == (DATA.classes, "classifier.1", (3, 32, 32))
    assert task.preprocessing.mean == (0.485, 0.456, 0.406)
    assert outputs_of(head) == 4 and trained(batches()[0]).shape == (4, 4)
    assert bnsurgery.record(trained).task == task
    originals = bnsurgery.fold(trained).state_dict()
    inserted_before = kind == "inserted file"
    assert all(torch.equal(originals[n], v) for n, v in features.items() if not inserted_before)
    bnsurgery.save(trained, tmp_path / "out.safetensors")
    again = bnsurgery.load(tmp_path / "out.safetensors")
    assert torch.equal(again(batches()[0]), trained.eval()(batches()[0]))


def test_a_custom_network_gets_its_head_back_on_load(tmp_path):
    source = network.given(tiny())
    three = finetune.from_tensors(
        tuple(t[patterns(16, 1)[1] < 3] for t in patterns(16, 1)),
        tuple(t[patterns(8, 2)[1] < 3] for t in patterns(8, 2)),
        "abc",
    )
    config = replace(CONFIG, head="new")
    images = patterns(16, 1)[0].float() / 255
    _, trained, _ = prepared(source, three, config, [images])
    bnsurgery.save(trained, tmp_path / "custom.safetensors")
    again = bnsurgery.load(tmp_path / "custom.safetensors", model=tiny())
    assert torch.equal(again(images), trained(images))
    with pytest.raises(CheckpointError, match="pass `model`"):
        bnsurgery.load(tmp_path / "custom.safetensors")


def test_the_naive_arm_forgets_and_the_others_do_not():
    images = patterns(16, 1)[0].float() / 255
    out = {}
    for arm in ("plain", "bn", "bn-naive"):
        config = replace(CONFIG, arm=arm, head="keep")
        source = network.given(tiny())
        _, trained, _ = prepared(source, DATA, config, [images])
        if arm == "bn-naive":
            network.forget_(trained)
        set_dropout_(trained, 0.0)
        out[arm] = trained.train()(images)  # the calibration batch
    torch.testing.assert_close(out["plain"], out["bn"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(out["plain"], out["bn-naive"], rtol=0.1)


def test_the_plain_arm_of_an_inserted_network_has_no_batchnorm():
    images = patterns(16, 1)[0].float() / 255
    inserted = bnsurgery.insert(tiny(), [images])
    config = replace(CONFIG, arm="plain", head="keep")
    source = network.given(inserted)
    _, trained, head = prepared(source, DATA, config, [images])
    assert set(trained.state_dict()) == set(tiny().state_dict())
    assert torch.equal(trained(images), tiny()(images)) and head is trained[-1]


def test_a_new_head_is_not_left_random():
    """Where it is fitted, training BatchNorm alone is fine: test_head_fit.py."""
    config = replace(CONFIG, train="bn", head="new", head_init="random")
    with pytest.raises(BNSurgeryError, match="`train='bn'` would leave the new head random: fit it with `head_init="):
        prepared(network.given(tiny()), DATA, config, [patterns(16, 1)[0].float() / 255])


def test_the_head_is_found_once_whatever_is_renumbered(monkeypatch):
    """Of an inserted network, whose original has another name for it, to the network that is trained."""
    calls = []
    monkeypatch.setattr(network, "find_head", lambda *args: calls.append(args) or find_head(*args))
    images = patterns(16, 1)[0].float() / 255
    for arm in ("bn", "plain"):
        source = network.given(bnsurgery.insert(tiny(), [images]))
        before = find_head(source.model)
        task, made, head = prepared(source, DATA, replace(CONFIG, head="new", arm=arm), [images])
        assert task.head == find_head(tiny()) != before
        assert head is made.get_submodule(find_head(made)) and outputs_of(head) == 4
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("batch_size", "drift", "changes", "mode"),
    [
        (2, None, {}, "running"),
        (64, None, {}, "batch"),
        (8, 0.5, {}, "renorm"),
        (8, 0.1, {}, "batch"),
        (8, None, {"statistics": "running"}, "running"),
        (64, None, {"train": "head"}, "running"),
        (2, None, {"arm": "bn-naive"}, "running"),
        (2, None, {"arm": "plain"}, "none"),
    ],
)
def test_auto_statistics(batch_size, drift, changes, mode):
    def measured():
        assert drift is not None, "measured where it does not matter"
        return drift

    found, reason = network.choose_statistics(replace(CONFIG, batch_size=batch_size, **changes), measured)
    assert found == mode
    assert drift is None or f"{100 * drift:.3g} %" in reason


class _TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.a(x), self.b(x)


def test_a_head_is_found_and_replaced():
    model = models.squeezenet1_1(weights=None, num_classes=5).eval()
    assert find_head(model) == "classifier.1"
    replace_head_(model, "classifier.1", 3, seed=1)
    head = model.classifier[1]
    assert (head.out_channels, head.kernel_size) == (3, (1, 1))
    assert not head.bias.any() and head.weight.std().item() == pytest.approx(0.01, rel=0.1)
    with pytest.raises(BNSurgeryError, match="expected one output layer"):
        find_head(_TwoHeads())
    normed = bnsurgery.insert(tiny(), [torch.rand(8, 1, 8, 8)], head=True)
    with pytest.raises(BNSurgeryError, match="expected one output layer"):
        find_head(normed)


def test_a_head_behind_code_that_looks_at_shapes():
    class Checks(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            assert x.shape[1] == 1, "grey"
            return self.fc(self.conv(x).relu().mean((2, 3)))

    assert find_head(Checks().eval(), (1, 8, 8)) == "fc"
    with pytest.raises(UntraceableModelError):
        find_head(Checks().eval())


def test_a_factory_is_found_in_a_file_and_in_a_package(tmp_path):
    (tmp_path / "mine.py").write_text("import torch\n\ndef net():\n    return torch.nn.Linear(2, 2)\n\ndef text():\n"
                                      "    return 'x'\n\ndef broken():\n    raise ValueError('no')\n")  # fmt: skip
    assert isinstance(factories.build(f"{tmp_path}/mine.py:net"), nn.Linear)
    assert isinstance(factories.build("tiny_task:tiny"), nn.Sequential)
    for name, text in (
        (f"{tmp_path}/mine.py:text", "returned a str"),
        (f"{tmp_path}/mine.py:broken", "ValueError: no"),
        (f"{tmp_path}/mine.py:other", "has no 'other'"),
        ("no_such_package:net", "No module named 'no_such_package'"),
        ("tiny_task", "expected package.module:factory"),
    ):
        with pytest.raises(ArchitectureError, match=text):
            factories.build(name)


def test_channels_and_sizes_follow_the_network(plain):
    grey, _ = network.task_of(network.given(tiny()), DATA, CONFIG)
    assert (grey.preprocessing.channels, grey.preprocessing.resize) == ("grey", 8)
    sized = replace(CONFIG, source=str(plain), image_size=64)
    colour, _ = network.task_of(network.find(sized), DATA, sized)
    assert colour.preprocessing.channels == "rgb"
    photographs = replace(DATA, photographs=True)
    one, five = (
        nn.Sequential(nn.Conv2d(channels, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
        for channels in (1, 5)
    )
    task, _ = network.task_of(network.given(one), photographs, replace(CONFIG, image_size=224))
    assert task.preprocessing.resize == 256
    with pytest.raises(BNSurgeryError, match="takes 5 channels, expected 1 or 3"):
        network.task_of(network.given(five), DATA, CONFIG)


def test_a_gpu_trains_with_fused_relus_what_can_be():
    """What is hooked is trained as it is, and so is a network without BatchNorm; no CPU gains by it."""
    plain, made = tiny(), bnsurgery.insert(tiny(), [torch.rand(8, 1, 8, 8)])
    hooked = bnsurgery.insert(tiny(), [torch.rand(8, 1, 8, 8)])
    hooked[1].register_forward_hook(lambda module, args, output: None)
    before = [str(each) for each in (plain, made, hooked)]
    network.fuse_for_training_(made, torch.device("cpu"))
    for each in (plain, hooked):
        network.fuse_for_training_(each, torch.device("cuda", 1))
    assert [str(each) for each in (plain, made, hooked)] == before
    network.fuse_for_training_(made, torch.device("cuda", 1))
    assert bnsurgery.record(made).options.fuse_relu and made[1].activation == "relu"


def test_a_checkpoint_is_taken_whole(tmp_path):
    bnsurgery.save(bnsurgery.insert(tiny(), [torch.rand(8, 1, 8, 8)]), tmp_path / "bn.safetensors")
    source = replace(CONFIG, source=str(tmp_path / "bn.safetensors"), model="tiny_task:tiny")
    assert network.find(source).description == "checkpoint bn.safetensors"
    for given in ({"weights_key": "model"}, {"weights_prefix": "net."}, {"partial": True}):
        with pytest.raises(
            CheckpointError, match="is a whole checkpoint: `weights_key`, `weights_prefix` and `partial`"
        ):
            network.find(replace(source, **given))


@pytest.mark.parametrize("train", ["all", "bn", "head", "bn+head"])
def test_what_is_trained_goes_before_what_was_frozen(train):
    """Layer, norm and statistics together; the record goes on saying what was frozen at the insertion."""
    frozen = tiny()
    next(module for module in frozen.modules() if isinstance(module, nn.Conv2d)).requires_grad_(False)
    images = patterns(16, 1)[0].float() / 255
    trained = {}
    for name, model in {
        "frozen": bnsurgery.insert(frozen, [images]),
        "free": bnsurgery.insert(tiny(), [images]),
    }.items():
        source, config = network.given(model), replace(CONFIG, train=train, head="keep")
        _, made, head = prepared(source, DATA, config, [images])
        choose_parameters_(made, train, head)
        assert bnsurgery.record(made).frozen == (("0.weight", "0.bias") if name == "frozen" else ())
        assert {m.statistics for m in norms_of(made)} == {"batch"}
        bnsurgery.set_statistics_(made, "renorm")
        assert {m.statistics for m in norms_of(made)} == {"renorm"}
        trained[name] = [n for n, p in made.named_parameters() if p.requires_grad]
    assert trained["frozen"] == trained["free"]
    assert {m.statistics for m in norms_of(bnsurgery.insert(frozen, [images]))} == {"batch", "running"}


def norms_of(model):
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("arm", ["bn", "plain"])
@pytest.mark.parametrize("kind", ["network", "inserted network", "file", "inserted file"])
def test_a_trained_head_that_fits_is_kept(tmp_path, kind, arm):
    """To the bit: from a network or a file, inserted into before or not; as many classes, whose names nobody knows."""
    images = patterns(16, 1)[0].float() / 255
    inserted = bnsurgery.insert(tiny(), [images])
    config = replace(CONFIG, source="", model="tiny_task:tiny", arm=arm)
    if kind == "file":
        torch.save(tiny(7).state_dict(), tmp_path / "mine.pth")
        source = network.find(replace(config, source=str(tmp_path / "mine.pth")))
    elif kind == "inserted file":
        bnsurgery.save(inserted, tmp_path / "bn.safetensors")
        source = network.find(replace(config, source=str(tmp_path / "bn.safetensors")))
    else:
        source = network.given(tiny() if kind == "network" else inserted)
    before = tiny(7 if kind == "file" else 0)
    chosen = network.choose_head(source, (1, 8, 8), DATA.classes, config)
    assert chosen.kept and "4 classes" in chosen.why and "head='new'" in chosen.why
    task, trained, head = prepared(source, DATA, config, [images])
    assert task.head is None
    assert torch.equal(head.weight, before[-1].weight) and torch.equal(head.bias, before[-1].bias)
    torch.testing.assert_close(trained.eval()(images), before(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("classes", "kept", "why"),
    [
        (("nw", "ne", "sw", "se"), True, "for these classes"),
        (("nw", "ne", "se", "sw"), False, "in another order"),
        (("a", "b", "c", "d"), False, "for other classes, such as 'nw'"),
    ],
)
@pytest.mark.parametrize("kind", ["run", "folded"])
def test_a_head_whose_classes_are_known_is_kept_for_those(tmp_path, kind, classes, kept, why):
    """They are: in what a run saved, and in what it was folded to."""
    images = patterns(16, 1)[0].float() / 255
    source = network.given(tiny())
    _, trained, _ = prepared(source, DATA, CONFIG, [images])
    path = tmp_path / "w.safetensors"
    if kind == "run":
        bnsurgery.save(trained, path)
    else:
        bnsurgery.export(trained, path, to="state-dict")
    config = replace(CONFIG, source=str(path), model="tiny_task:tiny")
    data = replace(DATA, classes=classes)
    source = network.find(config)
    chosen = network.choose_head(source, (1, 8, 8), classes, config)
    assert chosen.kept == kept and why in chosen.why
    asked = replace(config, head="keep" if not kept else "new")
    chosen = network.choose_head(source, (1, 8, 8), classes, asked)
    assert (chosen.kept, chosen.why) == (not kept, "as asked")
    _, _, head = prepared(source, data, config, [images])
    assert torch.equal(head.weight, tiny()[-1].weight) == kept


def test_a_head_for_more_classes_is_given_up_in_words():
    chosen = network.choose_head(network.given(tiny()), (1, 8, 8), ("a", "b"), CONFIG)
    assert not chosen.kept and chosen.why == "the old one is for 4 classes"


def test_torchvisions_weights_know_their_classes(monkeypatch):
    """A thousand classes of one's own are not ImageNet's."""
    made = models.squeezenet1_1(weights=None)
    monkeypatch.setattr(network.pretrained, "load", lambda *_, **__: network.pretrained.Pretrained(
        made, None, "SqueezeNet1_1_Weights.IMAGENET1K_V1", None
    ))  # fmt: skip
    source = network.find(replace(CONFIG, source="squeezenet1_1"))
    assert source.classes == tuple(models.SqueezeNet1_1_Weights.DEFAULT.meta["categories"])
    assert network.choose_head(source, (3, 32, 32), source.classes, CONFIG).kept
    own = tuple(f"n{i}" for i in range(1000))
    assert not network.choose_head(source, (3, 32, 32), own, CONFIG).kept


@pytest.mark.parametrize("noted", ["no JSON", "5", "{}", '["a", 1]', "[" * 5000])
def test_class_names_in_a_file_are_not_believed(tmp_path, noted):
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors", metadata={"classes": noted})
    assert noted_classes(str(tmp_path / "w.safetensors")) == ()
    (tmp_path / "text.safetensors").write_text("no weights")
    assert noted_classes(str(tmp_path / "text.safetensors")) == noted_classes(str(tmp_path)) == ()


def test_absorbed_biases_beside_frozen_layers_load_after_a_run(config, data):
    """Which biases were dropped follows from what was frozen at the insertion: a run keeps that in the record."""
    model = tiny()
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    first.requires_grad_(False)
    bn_model = bnsurgery.insert(model, [torch.rand(8, 1, 8, 8)], absorb_bias=True)
    result = finetune.run(config(epochs=1), model=bn_model, data=data)
    loaded = bnsurgery.load(f"{result.directory}/best.safetensors", model=tiny())
    absorbed = [[site.absorbed_bias for site in record(network).sites] for network in (bn_model, loaded)]
    assert absorbed[0] == absorbed[1] and len(set(absorbed[0])) == 2


def test_a_traced_network_is_trained_and_kept(config, data):
    model = torch.fx.symbolic_trace(tiny())
    result = finetune.run(config(epochs=1), model=model, data=data)
    loaded = bnsurgery.load(f"{result.directory}/best.safetensors", model=model)
    assert record(loaded).sites
    plain = finetune.run(config(epochs=1, arm="plain", output=f"{result.directory}-plain"), model=model, data=data)
    assert record(bnsurgery.load(f"{plain.directory}/best.safetensors", model=model)).model == "GraphModule"
