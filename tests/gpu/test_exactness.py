"""Insertion changes no bit on a CUDA device: `make test-gpu` runs these. Everywhere else they are skipped."""

import copy

import pytest
import torch

import bnsurgery

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:channels with a variance below eps"),  # real networks have them
]

FORMATS = [torch.contiguous_format, torch.channels_last]


def assert_exact(model, x, **options):
    bn_model = bnsurgery.insert(model, [x], **options)
    with torch.inference_mode():
        assert torch.equal(bn_model(x), model(x))


@pytest.mark.parametrize("name", ["vgg16", "squeezenet1_1", "alexnet"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_insertion_changes_no_bit(network, images, device, name, memory_format, dtype):
    model = copy.deepcopy(network(name)).to(device, dtype, memory_format=memory_format)
    x = images(4, 128).to(device, dtype, memory_format=memory_format)
    for options in ({}, {"fuse_relu": True}, {"placement": "post-activation"}):
        assert_exact(model, x, **options)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_insertion_into_vgg16_as_torch_is_set_by_default(network, images, device, memory_format, dtype):
    """TF32 convolutions, no deterministic algorithms, a whole image, a batch that is not the calibration's."""
    model = copy.deepcopy(network("vgg16")).to(device, dtype, memory_format=memory_format)
    x = images(8, 224).to(device, dtype, memory_format=memory_format)
    with torch.backends.cudnn.flags(enabled=True, deterministic=False, benchmark=False, allow_tf32=True):
        bn_model = bnsurgery.insert(model, x.split(4))
        other = images(8, 224, seed=1).to(device, dtype, memory_format=memory_format)
        with torch.inference_mode():
            assert torch.equal(bn_model(other), model(other))


@pytest.mark.parametrize("name", ["squeezenet1_0_imagenet", "vgg19_quarter_width", "vgg19_to_conv3_1"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_insertion_into_real_networks_changes_no_bit(real, device, name, memory_format, dtype):
    model = getattr(real, name)().to(device, dtype, memory_format=memory_format)
    transform = real.IMAGENET if "imagenet" in name else real.RGB01
    assert_exact(model, real.photos(transform)[:8].to(device, dtype, memory_format=memory_format))


@pytest.mark.parametrize(("name", "channels", "size"), [("mnist_cnn", 1, 28), ("cifar_cnn_large", 3, 32)])
def test_insertion_into_small_real_networks_changes_no_bit(real, images, device, name, channels, size):
    assert_exact(getattr(real, name)().to(device), images(64, size, channels).to(device))


def test_an_insertion_made_on_the_cpu_is_exact_on_cuda(custom, images, device):
    x = images(8, 32)
    bn_model = bnsurgery.insert(custom, [x]).to(device)
    custom.to(device)
    with torch.inference_mode():
        assert torch.equal(bn_model(x.to(device)), custom(x.to(device)))
