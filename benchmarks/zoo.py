"""BN-free networks of the kinds that people bring, small enough for two cores: with random weights and inputs."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models


@dataclass(frozen=True)
class Network:
    """How to make a network, and a batch of its inputs: what a loader would give, from a batch size."""

    build: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    dtype: torch.dtype = torch.float32

    def make(self, seed: int = 0) -> nn.Module:
        """In eval mode, with weights that keep activations alive (He), and biases."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.ndim > 1 and "original" not in name:
                        parameter.normal_(0, math.sqrt(2 / parameter[0].numel()))
                    elif name.endswith("bias"):
                        parameter.normal_(0, 0.1)
            return model.to(self.dtype).eval()

    def batches(self, count: int, size: int, seed: int = 1) -> list[Any]:
        """`count` batches of `size` samples."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return [self.batch(size) for _ in range(count)]


def images(side: int, channels: int = 3) -> Callable[[int], Tensor]:
    scale = torch.linspace(0.5, 1.5, channels).view(-1, 1, 1)
    return lambda count: torch.randn(count, channels, side, side) * scale + scale / 2


def tensors(*shape: int) -> Callable[[int], Tensor]:
    return lambda count: torch.randn(count, *shape)


class FCN8(nn.Module):
    """VGG with a fully convolutional head and skips, as Long et al. 2015."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        features = models.vgg11(weights=None).features
        self.low, self.high = features[:11], features[11:]
        self.head = nn.Sequential(nn.Conv2d(512, 64, 1), nn.ReLU(inplace=True), nn.Dropout2d())
        self.score, self.skip = nn.Conv2d(64, classes, 1), nn.Conv2d(256, classes, 1)
        self.up = nn.ConvTranspose2d(classes, classes, 4, stride=2, padding=1, bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low = self.low(x)
        coarse = self.up(self.score(self.head(self.high(low))))
        fused = self.skip(low) + F.interpolate(coarse, size=low.shape[-2:], mode="bilinear", align_corners=False)
        return {"out": F.interpolate(fused, size=x.shape[-2:], mode="bilinear", align_corners=False), "low": low}


def dcgan(width: int = 16, latent: int = 20) -> nn.Module:
    """Radford et al. 2016's generator, without its BatchNorm."""
    return nn.Sequential(
        nn.ConvTranspose2d(latent, width * 4, 4, 1, 0, bias=False), nn.ReLU(True),
        nn.ConvTranspose2d(width * 4, width * 2, 4, 2, 1, bias=False), nn.ReLU(True),
        nn.ConvTranspose2d(width * 2, width, 4, 2, 1, groups=2), nn.LeakyReLU(0.2, True),
        nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip


class UNet(nn.Module):
    """Ronneberger et al. 2015: concats, pads to the skip's size."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.enter, self.down, self.deep = self.block(3, width), self.block(width, width * 2), nn.MaxPool2d(2)
        self.bottom = self.block(width * 2, width * 4)
        self.up2, self.mid = nn.ConvTranspose2d(width * 4, width * 2, 2, 2), self.block(width * 4, width * 2)
        self.up1, self.top = nn.ConvTranspose2d(width * 2, width, 2, 2), self.block(width * 2, width)
        self.out = nn.Conv2d(width, 2, 1)

    @staticmethod
    def block(inside: int, out: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inside, out, 3, padding=1), nn.ReLU(True), nn.Conv2d(out, out, 3, padding=1), nn.ReLU(True)
        )

    def join(self, up: Tensor, skip: Tensor) -> Tensor:
        rows, columns = skip.size(2) - up.size(2), skip.size(3) - up.size(3)
        if rows or columns:
            up = F.pad(up, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        return torch.cat([skip, up], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 4 and x.shape[1] == 3, "an image"
        first = self.enter(x)
        second = self.down(self.deep(first))
        y = self.mid(self.join(self.up2(self.bottom(self.deep(second))), second))
        return self.out(self.top(self.join(self.up1(y), first)))


def srcnn() -> nn.Module:
    """Dong et al. 2014."""
    return nn.Sequential(
        nn.Conv2d(1, 64, 9, padding=4), nn.ReLU(), nn.Conv2d(64, 32, 1), nn.ReLU(), nn.Conv2d(32, 1, 5, padding=2)
    )


class EDSR(nn.Module):
    """Lim et al. 2017: residual blocks that had their BatchNorm removed, scaled sums, sub-pixel convolution."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(3)
        )
        self.up = nn.Sequential(nn.Conv2d(width, width * 4, 3, padding=1), nn.PixelShuffle(2))
        self.out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first = y = self.enter(x)
        for block in self.blocks:
            y = y + 0.1 * block(y)
        return self.out(self.up(first + y))


class ONet(nn.Module):
    """MTCNN's last stage (Zhang et al. 2016): PReLU, and three outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3), nn.PReLU(32), nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.Conv2d(32, 64, 3), nn.PReLU(64), nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.Conv2d(64, 64, 3), nn.PReLU(64), nn.MaxPool2d(2, 2, ceil_mode=True),
            nn.Conv2d(64, 128, 2), nn.PReLU(128), nn.Flatten(),
        )  # fmt: skip
        self.dense, self.prelu = nn.Linear(1152, 256), nn.PReLU(256)
        self.face, self.box, self.landmarks = nn.Linear(256, 2), nn.Linear(256, 4), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.prelu(self.dense(self.features(x)))
        return self.box(y), self.landmarks(y), F.softmax(self.face(y), dim=1)


class FixupBlock(nn.Module):
    """Zhang et al. 2019: scalar biases and a scale in the place of BatchNorm."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.bias1a, self.bias1b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.bias2a, self.bias2b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.scale = nn.Parameter(torch.ones(1))
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.AvgPool2d(1, stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.conv1(x + self.bias1a) + self.bias1b)
        out = self.conv2(out + self.bias2a) * self.scale + self.bias2b
        if self.downsample is not None:
            x = self.downsample(x + self.bias1a)
            x = torch.cat((x, torch.zeros_like(x)), 1)
        return self.relu(out + x)


def fixup_resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), FixupBlock(8, 8, 1), FixupBlock(8, 16, 2), FixupBlock(16, 32, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def audio() -> nn.Module:
    """Raw waveforms, as Dai et al. 2016's M5 without its BatchNorm, dilated."""
    return nn.Sequential(
        nn.Conv1d(1, 16, 40, stride=4), nn.ReLU(), nn.MaxPool1d(4), nn.Conv1d(16, 16, 3, dilation=2), nn.GELU(),
        nn.MaxPool1d(4), nn.Conv1d(16, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def wavenet() -> nn.Module:
    """A weight-normed stack of dilated convolutions, as in vocoders."""
    weight_norm = nn.utils.parametrizations.weight_norm
    return nn.Sequential(
        weight_norm(nn.Conv1d(1, 8, 3, padding=1)), nn.LeakyReLU(0.1), weight_norm(nn.Conv1d(8, 8, 3, dilation=2)),
        nn.LeakyReLU(0.1), weight_norm(nn.ConvTranspose1d(8, 8, 4, 2, 1)), nn.SiLU(), nn.Conv1d(8, 1, 3), nn.Tanh(),
    )  # fmt: skip


def video() -> nn.Module:
    """Tran et al. 2015's C3D, in small."""
    return nn.Sequential(
        nn.Conv3d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool3d((1, 2, 2)), nn.Conv3d(8, 16, 3, padding=1), nn.ReLU(),
        nn.MaxPool3d(2), nn.Conv3d(16, 16, 3, padding=1, groups=2), nn.ELU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
        nn.Linear(16, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 4),
    )  # fmt: skip


def convnet_and_mlp() -> nn.Module:
    """What a course takes for CIFAR-10, trained in float64."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(8, 16, 3), nn.Sigmoid(), nn.Flatten(),
        nn.Linear(16 * 14 * 14, 32), nn.Hardswish(), nn.Linear(32, 16), nn.ReLU6(), nn.Linear(16, 10),
    )  # fmt: skip


def alexnet_2012() -> nn.Module:
    """Krizhevsky et al. 2012: two groups, local response normalization."""
    return nn.Sequential(
        nn.Conv2d(3, 24, 11, 4, 2), nn.ReLU(True), nn.LocalResponseNorm(5, 1e-4, 0.75, 2), nn.MaxPool2d(3, 2),
        nn.Conv2d(24, 64, 5, padding=2, groups=2), nn.ReLU(True), nn.LocalResponseNorm(5, 1e-4, 0.75, 2),
        nn.MaxPool2d(3, 2), nn.Conv2d(64, 96, 3, padding=1), nn.ReLU(True), nn.Conv2d(96, 64, 3, padding=1, groups=2),
        nn.ReLU(True), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Dropout(), nn.Linear(576, 128), nn.ReLU(True),
        nn.Linear(128, 10),
    )  # fmt: skip


class Mixer(nn.Module):
    """Dense layers on (N, T, C), with the norms of an MLP-Mixer (Tolstikhin et al. 2021) left out."""

    def __init__(self, tokens: int = 16, width: int = 24) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 8, 8)
        self.tokens = nn.Sequential(nn.Linear(tokens, 32), nn.GELU(), nn.Linear(32, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Dropout(0.1), nn.Linear(48, width))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x).flatten(2).transpose(1, 2)
        y = y + self.tokens(y.transpose(1, 2)).transpose(1, 2)
        y = y + self.channels(y)
        return self.head(y.mean(1))


class Siamese(nn.Module):
    """Two inputs through one tower."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(8 * 12 * 12, 16), nn.SiLU(), nn.Linear(16, 1))

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        a, b = self.tower(left), self.tower(right)
        return {"distance": self.head((a - b).abs()), "left": a}


def timm_network(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=10, **options)

    return build


def torchvision_network(name: str) -> Callable[[], nn.Module]:
    return lambda: models.get_model(name, weights=None, num_classes=10)


def _ssd() -> nn.Module:
    return models.detection.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=3)


def _pair(count: int) -> Any:
    return {"left": torch.randn(count, 1, 16, 16), "right": torch.randn(count, 1, 16, 16)}


def _detection(count: int) -> Any:
    return ([torch.rand(3, 120, 160) for _ in range(count)], None)


NETWORKS: dict[str, Network] = {
    **{
        name: Network(torchvision_network(name), images(64))
        for name in ("vgg11", "vgg13", "vgg16", "vgg19", "alexnet", "squeezenet1_0", "squeezenet1_1")
    },
    "ssd300_vgg16.backbone": Network(lambda: _ssd().backbone, images(300)),
    "ssd300_vgg16": Network(_ssd, _detection),
    "fcn8s": Network(FCN8, images(64)),
    "timm vgg11": Network(timm_network("vgg11"), images(64)),
    "timm nf_resnet26": Network(timm_network("nf_resnet26"), images(64)),
    "timm resmlp_12_224": Network(timm_network("resmlp_12_224", img_size=64), images(64)),
    "alexnet 2012": Network(alexnet_2012, images(96)),
    "dcgan generator": Network(dcgan, tensors(20, 1, 1)),
    "u-net": Network(UNet, images(37)),
    "srcnn": Network(srcnn, images(24, 1)),
    "edsr": Network(EDSR, images(16)),
    "mtcnn o-net": Network(ONet, images(48)),
    "fixup resnet": Network(fixup_resnet, images(32)),
    "audio conv1d": Network(audio, tensors(1, 2000)),
    "wavenet-like": Network(wavenet, tensors(1, 64)),
    "video conv3d": Network(video, tensors(3, 4, 16, 16)),
    "convnet+mlp f64": Network(convnet_and_mlp, images(32), torch.float64),
    "mixer": Network(Mixer, images(32)),
    "siamese": Network(Siamese, _pair),
}
