"""From images to inputs: the numbers, sizes and orders that other people's networks want."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from record_files import old_format
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models

import bnsurgery
from bnsurgery.errors import BNSurgeryError, CheckpointError, DataError
from bnsurgery.files.labels import labels
from bnsurgery.finetune import Config, network
from bnsurgery.finetune.datasets import from_tensors
from bnsurgery.images.preprocessing import Preprocessing, Wanted
from bnsurgery.networks import interface, pretrained
from bnsurgery.records.architectures import architecture
from bnsurgery.records.record import SurgeryRecord, Task, attach_record, record

MEAN = (123.68, 116.779, 103.939)
CAFFE = Preprocessing(8, 8, 8, MEAN, (1.0, 1.0, 1.0), scale=255.0, channels="bgr")


def picture(height, width, seed=0):
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


@pytest.mark.parametrize("size", [(300, 400), (400, 300), (256, 256), (100, 700), (257, 255)])
def test_imagenet_is_what_torchvision_does(size):
    own = models.VGG16_Weights.DEFAULT.transforms()
    assert torch.equal(interface.preprocessing(architecture("vgg16"), "VGG16_Weights.IMAGENET1K_V1")(picture(*size)),
                       own(picture(*size)))  # fmt: skip


def test_the_formula_of_caffe():
    """Exact pixels, since 255 · p / 255 is p in float32 for every p."""
    image = picture(8, 8)
    expected = np.asarray(image).astype(np.float32)[..., ::-1] - np.float32(MEAN[::-1])
    np.testing.assert_array_equal(CAFFE(image), expected.transpose(2, 0, 1))
    halved = replace(CAFFE, std=(2.0, 4.0, 8.0))
    np.testing.assert_array_equal(halved(image), expected.transpose(2, 0, 1) / np.float32([8, 4, 2])[:, None, None])


def test_a_real_network_s_own_conversion(real):
    """Its first layer makes what Caffe's VGG wants of colours from 0 to 1."""
    convert, image = real.vgg19_to_conv3_1()[0], Image.open(next((real.HERE / "photos").glob("*.png")))
    ours = replace(CAFFE, height=64, width=64, resize=64)
    unit = replace(ours, mean=(0.0,) * 3, scale=1.0, channels="rgb")
    with torch.no_grad():
        torch.testing.assert_close(convert(unit(image)[None])[0], ours(image), atol=0.01, rtol=0)  # the mean is rounded


@pytest.mark.parametrize("size", [(50, 200), (200, 50), (64, 64), (30, 41), (7, 9)])
def test_height_and_width(size):
    """What is left of an image of columns has the middle ones, evenly spaced; nothing is padded or stretched."""
    height, width = 24, 40
    wide = Preprocessing(height, width, 27, (0.0,) * 3, (1.0,) * 3)
    assert wide(picture(*size)).shape == (3, height, width)
    ramp = np.linspace(20, 230, size[1])[None].repeat(size[0], 0)
    seen = wide(Image.fromarray(ramp.astype(np.uint8)))[0] * 255
    assert seen.min() >= 19
    step = (seen[:, -5] - seen[:, 5]).mean() / (width - 10)
    scale = max(27 / size[0], round(40 * 27 / 24) / size[1])  # covers, with its proportions
    assert step.item() == pytest.approx(210 / (size[1] - 1) / scale, rel=0.1)
    assert abs(seen.mean().item() - 125) < 4  # the middle


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"image_size": "240x"}, "image_size: got '240x'"),
        ({"image_size": 0}, "image_size: got 0"),
        ({"image_size": "1x2x3"}, "image_size"),
        ({"image_size": "-3"}, "image_size"),
        ({"image_size": 5000}, "1 to 4096"),
        ({"normalize": "none", "scale": 255.0}, "give one or the other"),
        ({"channels": "grey"}, r"rgb \| bgr"),
    ],
)
def test_what_cannot_be_wanted(wanted, message):
    with pytest.raises(DataError, match=message):
        Wanted(**wanted)
    with pytest.raises(BNSurgeryError, match=message):
        Config(source="vgg11", data="x", output="x", **wanted)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"mean": MEAN}, "mean: got 123.68,116.779,103.939, expected 0 to 1, .*needs `scale=255`"),
        ({"mean": (-0.5,)}, "mean: got -0.5,-0.5,-0.5, expected 0 to 1"),
        ({"mean": (0.5, 0.5)}, "number of means: got 2, expected 3, one for each colour"),
        ({"std": (0.5,) * 4}, "number of stds: got 4, expected 3"),
        ({"mean": ()}, "got no number"),
        ({"std": ()}, "got no number"),
        ({"std": (0.0,)}, "std: got 0,0,0, expected 0.001 to 10, as white is 1"),
        ({"std": (58.0,)}, "std: got 58,58,58, .*needs `scale=255`"),  # of pixels
        ({"scale": 255.0, "std": (0.229, 0.224, 0.225)}, "std: got 0.229,0.224,0.225, expected 0.255 to 2550"),
        ({"scale": -1.0}, "scale: got -1.0, expected 0.1 to 100000, such as 1 or 255"),
        ({"scale": 0.0}, "scale: got 0.0"),
        ({"scale": 1 / 255}, "scale: got 0.0039.*such as 1 or 255"),  # what others multiply by
        *(
            ({name: value}, f"{name}: got {number}")
            for number in ("nan", "inf")
            for name, value in (("scale", float(number)), ("mean", (float(number),)), ("std", (float(number),)))
        ),
    ],
)
def test_what_no_image_is_like(wanted, message):
    with pytest.raises(DataError, match=message):
        Wanted(**wanted).of(CAFFE)


def test_what_is_wanted_of_a_network_s_own():
    assert Wanted(240).of(CAFFE) == replace(CAFFE, height=240, width=240, resize=240)
    assert Wanted("120x200").of(Preprocessing(224, 224, 256)) == Preprocessing(120, 200, 137)
    assert Wanted(channels="rgb").of(CAFFE) == replace(CAFFE, channels="rgb")
    assert Wanted(std=(2.0,)).of(CAFFE) == replace(CAFFE, mean=(0.0,) * 3, std=(2.0,) * 3, scale=1.0)
    assert Wanted(normalize="imagenet", channels="bgr").of(CAFFE) == Preprocessing(8, 8, 8, channels="bgr")
    assert Wanted(scale=255.0, mean=(127.5,), std=(256.0,)).of(CAFFE).std == (256.0,) * 3
    grey = Preprocessing(8, 8, 8, (0.0,), (1.0,), channels="grey")
    with pytest.raises(DataError, match="number of means: got 3, expected 1, one for each colour of grey images"):
        Wanted(mean=MEAN, scale=255.0).of(grey)
    assert Wanted(scale=255.0, mean=(33.0,)).of(grey) == replace(grey, scale=255.0, mean=(33.0,))
    with pytest.raises(DataError, match="grey images"):
        Wanted(channels="bgr").of(grey)


def made():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def test_fine_tuning_takes_it_from_the_checkpoint_or_the_options():
    images, labels = torch.randint(0, 256, (8, 3, 12, 12), dtype=torch.uint8), torch.arange(8) % 4
    data = from_tensors((images, labels), (images, labels), "abcd")
    config = Config(source="x", data="x", output="x", image_size="12x20", scale=255.0, mean=MEAN, channels="bgr")
    asked = network.task_of(network.given(made()), data, config)[0].preprocessing
    assert asked == replace(CAFFE, height=12, width=20, resize=12)
    assert Config.from_dict(json.loads(json.dumps(vars(config))), "config.json") == config
    model = bnsurgery.insert(made().eval(), [torch.randn(4, 3, 12, 20)])
    attach_record(model, replace(record(model), task=Task((), None, asked)))
    later = Config(source="x", data="x", output="x")
    assert network.task_of(network.given(model), data, later)[0].preprocessing == asked


def test_a_number_of_any_length_is_refused():
    """A float holds none above 1e308, and a record's side may have any number of digits."""
    with pytest.raises(CheckpointError, match=r"height and width: got 10{90}.*,8, expected 1 to 4096"):
        Preprocessing(10**400, 8, 8)


def test_a_folded_file_brings_its_preprocessing(tmp_path):
    """To the network of its weights; beside other metadata, or none, ImageNet's holds."""
    own = replace(CAFFE, height=40, width=48, resize=44)
    kind, file = architecture("squeezenet1_1"), tmp_path / "folded.safetensors"
    bn_model = bnsurgery.insert(kind.build("cpu"), [torch.randn(2, 3, 40, 48)], preprocessing=own)
    bnsurgery.export(bn_model, file, to="torchvision")
    assert pretrained.load(kind, str(file)).preprocess == own
    assert pretrained.load(kind, str(file), wanted=Wanted(64)).preprocess == replace(
        CAFFE, height=64, width=64, resize=70
    )
    tensors, grey = load_file(file), Preprocessing(40, 40, 40, (0.5,), (0.5,), channels="grey")
    (own_label,) = labels(own, ()).values()
    for metadata in (
        {},
        {"preprocessing": "no JSON"},
        {"preprocessing": "[1]"},
        {"preprocessing": '{"mean": 1}'},
        labels(grey, ()),
    ):
        save_file(tensors, file, metadata)
        assert pretrained.load(kind, str(file)).preprocess == interface.preprocessing(kind)
    save_file(tensors, file, {"preprocessing": own_label.replace('"height": 40', '"height": -40')})
    with pytest.raises(CheckpointError, match="folded.safetensors': its metadata: preprocessing: .*got -40,48"):
        pretrained.load(kind, str(file))


def test_records_of_older_formats():
    """As format 2 had them: a task with one size, of images from 0 to 1 in red, green, blue, or grey."""
    model = bnsurgery.insert(made().eval(), [torch.randn(4, 3, 8, 8)])
    data = record(model).to_dict()
    for mean, channels in (((0.1, 0.2, 0.3), "rgb"), ((0.5,), "grey")):
        old = {"classes": ["a", "b"], "head": "4", "image_size": 8, "resize_size": 9, "mean": mean, "std": mean}
        second = copy.deepcopy(data)
        old_format(second, 2)
        found = SurgeryRecord.from_json(json.dumps({**second, "task": old}))
        assert found.task == Task(("a", "b"), "4", Preprocessing(8, 8, 9, mean, mean, channels=channels))
        with pytest.raises(CheckpointError, match="fields missing or unknown"):
            SurgeryRecord.from_json(json.dumps({**data, "task": old}))
        del old["image_size"]
        with pytest.raises(CheckpointError, match="preprocessing: fields missing"):
            SurgeryRecord.from_json(json.dumps({**second, "task": old}))


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor], ids=["list", "array", "tensor"])
def test_numbers_in_other_containers_are_tuples(tmp_path, kind):
    mean, std = (0.5, 0.25, 0.125), (1.0, 0.5, 2.0)
    given = Preprocessing(8, 8, 8, kind(mean), kind(std), np.float32(1))
    assert given == Preprocessing(8, 8, 8, mean, std) and type(given.scale) is float
    assert Wanted(mean=kind(mean), std=kind(std)).of(CAFFE) == replace(CAFFE, mean=mean, std=std, scale=1.0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    bn_model = bnsurgery.insert(model, [torch.randn(8, 3, 8, 8)], preprocessing=given)
    bnsurgery.save(bn_model, tmp_path / "bn.safetensors")
    again = bnsurgery.load(tmp_path / "bn.safetensors", model=model)
    assert record(again).task.preprocessing == given


@pytest.mark.parametrize(
    "made, error", [(lambda **n: Preprocessing(8, 8, 8, **n), CheckpointError), (Wanted, DataError)]
)
def test_numbers_that_are_none(made, error):
    for numbers, words in (
        ({"mean": 0.5}, "a tuple of numbers"),
        ({"std": "abc"}, "a tuple"),
        ({"scale": "x"}, "a number"),
    ):
        with pytest.raises(error, match=f"{next(iter(numbers))}: got .*, expected {words}"):
            made(**numbers)
