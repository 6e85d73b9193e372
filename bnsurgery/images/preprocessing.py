"""The way from an image to a network's input: one description, kept in checkpoints and exported files."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from bnsurgery.errors import BNSurgeryError, CheckpointError, DataError, shown

MAX_SIDE = 4096  # pixels
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHANNELS, NORMALIZE = ("rgb", "bgr", "grey"), ("auto", "imagenet", "none")
_WHITE = 255
_FINEST, _COARSEST = 1000, 10  # white by the smallest std, and the largest std by white; beyond, scale was forgotten


@dataclass(frozen=True)
class Preprocessing:
    """The way from an image to the input of a network.

    The image is scaled, with its proportions, until it covers height and width times resize / min(height, width), and
    its centre is cut out. A pixel p, 0 to 255, of colour c becomes

        y_c = (p · scale / 255 - mean_c) / std_c,

    and then the colours are put in the order of `channels`. The VGGs of Caffe have scale 255, mean (123.68, 116.779,
    103.939), std (1, 1, 1) and "bgr".

    Attributes:
        height, width: of the input, in pixels.
        resize: length of the shorter side of a square image before its centre is cut out; of other inputs, see above.
        mean, std: of red, green and blue, whatever the order of `channels`, or of grey; in units of `scale`.
        scale: the value of white, before mean and std, such as 1 or 255.
        channels: "rgb", "bgr" or "grey".
        interpolation: "bilinear", "bicubic" or another of torchvision's `InterpolationMode`.

    Raises:
        CheckpointError: a value is out of range: of scale 0.1 to 100,000, of a mean 0 to `scale`, as images can have,
            of a std a 1000th of `scale` to 10 times `scale`.
    """

    height: int
    width: int
    resize: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    scale: float = 1.0
    channels: str = "rgb"
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        _set_numbers(self, CheckpointError)
        count = 1 if self.channels == "grey" else 3
        counted = f"{count}, one for each colour of {self.channels} images"
        pixels = f"as white is {self.scale:g}; that of pixels from 0 to 255 needs `scale=255`"
        finest, coarsest = self.scale / _FINEST, self.scale * _COARSEST
        sizes, modes = (self.height, self.width), [mode.value for mode in InterpolationMode]
        rules = (
            ("height and width", sizes, all(0 < side <= MAX_SIDE for side in sizes), f"1 to {MAX_SIDE}"),
            ("resize", self.resize, min(sizes) <= self.resize <= 2 * MAX_SIDE, f"{min(sizes)} to {2 * MAX_SIDE}"),
            ("channels", self.channels, self.channels in CHANNELS, " | ".join(CHANNELS)),
            ("interpolation", self.interpolation, self.interpolation in modes, " | ".join(modes)),
            ("scale", self.scale, 0.1 <= self.scale <= 1e5, "0.1 to 100000, such as 1 or 255"),  # no factor of 1/255
            ("number of means", len(self.mean), len(self.mean) == count, counted),
            ("number of stds", len(self.std), len(self.std) == count, counted),
            ("mean", self.mean, all(0 <= mean <= self.scale for mean in self.mean), f"0 to {self.scale:g}, {pixels}"),
            ("std", self.std, all(finest <= s <= coarsest for s in self.std), f"{finest:g} to {coarsest:g}, {pixels}"),
        )
        for name, got, fits, expected in rules:
            if not fits:
                text = ",".join(shown(v).removesuffix(".0") for v in got) if isinstance(got, tuple) else shown(got)
                raise CheckpointError(f"preprocessing: {name}: got {text}, expected {expected}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one input: (C, H, W)."""
        return len(self.mean), self.height, self.width

    def __str__(self) -> str:
        mean, std = (",".join(f"{value:g}" for value in part) for part in (self.mean, self.std))
        order = " (of red, green, blue)" if len(self.mean) > 1 else ""
        return (
            f"{self.channels}, height {self.height}, width {self.width}, pixels scaled to 0..{self.scale:g}, "
            f"minus {mean}, divided by {std}{order}"
        )

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """From a PIL image, or a uint8 tensor (C, H, W), to float32 (C, `height`, `width`)."""
        return self.numbers(self.fit(self.coloured(image)))

    def transform(self, *geometry: Callable[[Any], Any]) -> v2.Compose:
        """The same, but with `geometry`, such as random crops, in place of scaling and cutting."""
        return v2.Compose([self.coloured, *geometry, self.numbers])

    def coloured(self, image: Any) -> Any:
        """The image in colour or grey, as the network takes it."""
        return (F.rgb_to_grayscale if self.channels == "grey" else F.grayscale_to_rgb)(image)

    def fit(self, image: Any) -> Any:
        """Scale the image and cut out its centre."""
        height, width = F.get_size(image)
        rows, columns = (round(side * self.resize / min(self.shape[1:])) for side in self.shape[1:])
        if height * columns <= width * rows:  # wider than the input
            columns = rows * width // height
        else:
            rows = columns * height // width
        return F.center_crop(self.resized(image, rows, columns), [self.height, self.width])

    def resized(self, image: Any, height: int, width: int) -> Any:
        """Scale the image to this size; its proportions may change."""
        return F.resize(image, [height, width], InterpolationMode(self.interpolation), antialias=True)

    def numbers(self, image: Any) -> Tensor:
        """Turn pixels into the network's numbers; the size stays."""
        pixels = F.pil_to_tensor(image) if isinstance(image, Image.Image) else image
        values = F.normalize(pixels.float() * self.scale / _WHITE, list(self.mean), list(self.std))
        return values.flip(0) if self.channels == "bgr" else values


@dataclass(frozen=True)
class Wanted:
    """The preprocessing that a caller wants; for None and "auto", the network's own holds.

    Attributes:
        image_size: of the input, in pixels: the side of a square, or height and width as "240x320".
        normalize: "imagenet" for its mean and standard deviation, "none" for values from 0 to 1.
        mean, std, scale: see `Preprocessing`; one number stands for all channels. Where one of the three is given, the
            others are 0, 1 and 1 by default.
        channels: "rgb" or "bgr".

    Raises:
        DataError: a value is out of range, or mean, std or scale are given beside a `normalize` other than "auto".
    """

    image_size: int | str | None = None
    normalize: str = "auto"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float | None = None
    channels: str | None = None

    def __post_init__(self) -> None:
        _set_numbers(self, DataError)
        if self.normalize not in NORMALIZE or self.channels not in (None, "rgb", "bgr"):
            raise DataError(
                f"got normalize {shown(self.normalize)} and channels {shown(self.channels)}, expected "
                f"{' | '.join(NORMALIZE)}, and rgb | bgr"
            )
        if () in (self.mean, self.std):
            raise DataError("mean and std: got no number, expected one for each colour, or one for all")
        if self.size is not None and not all(0 < side <= MAX_SIDE for side in self.size):
            raise DataError(f"image_size: got {shown(self.image_size)}, expected 1 to {MAX_SIDE}, or as 240x320 (HxW)")
        if self.normalize != "auto" and (self.mean, self.std, self.scale) != (None, None, None):
            raise DataError(f"normalize '{self.normalize}' sets mean, std and scale: give one or the other.")

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width; 0 where that is no number."""
        if self.image_size is None:
            return None
        sides = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", str(self.image_size).lower())
        return (int(sides[1]), int(sides[2] or sides[1])) if sides else (0, 0)

    def of(self, own: Preprocessing) -> Preprocessing:
        """The network's own preprocessing with the changes that are wanted.

        Raises:
            DataError: colours are wanted of a network for grey images, or `Preprocessing` refuses a value.
        """
        if own.channels == "grey" and (self.channels is not None or self.normalize == "imagenet"):
            raise DataError("the network takes grey images: leave out `channels` and `normalize='imagenet'`")
        changes: dict[str, Any] = {} if self.channels is None else {"channels": self.channels}
        if self.size is not None:
            resize = round(min(self.size) * own.resize / min(own.height, own.width))
            changes |= {"height": self.size[0], "width": self.size[1], "resize": resize}
        if self.normalize == "imagenet":
            changes |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "scale": 1.0}
        elif (self.normalize, self.mean, self.std, self.scale) != ("auto", None, None, None):
            count = len(own.mean)
            mean, std = self.mean or (0.0,), self.std or (1.0,)
            changes |= {"mean": mean * (count if len(mean) == 1 else 1), "std": std * (count if len(std) == 1 else 1)}
            changes["scale"] = 1.0 if self.scale is None else self.scale
        try:
            return replace(own, **changes)
        except CheckpointError as error:
            raise DataError(str(error)) from None


def _set_numbers(found: Preprocessing | Wanted, error: type[BNSurgeryError]) -> None:
    """Make mean and std tuples and scale a float, which files give back as they are, of lists, arrays and tensors."""
    for name in ("mean", "std", "scale"):
        value = getattr(found, name)
        try:
            made = value if value is None else float(value) if name == "scale" else tuple(float(v) for v in value)
        except (TypeError, ValueError):
            expected = "a number" if name == "scale" else "a tuple of numbers"
            raise error(f"preprocessing: {name}: got {shown(value)}, expected {expected}") from None
        object.__setattr__(found, name, made)


NOTHING = Wanted()
