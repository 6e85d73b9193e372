"""Calibration images of every mode and with every fault, made here; and the two sample photographs."""

import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps, PngImagePlugin
from torchvision.transforms import functional as F
from torchvision.transforms._presets import ImageClassification

from bnsurgery import data
from bnsurgery.data import calibration_batches, find_images, image_batches, load_image, sample_crops
from bnsurgery.errors import DataError

PREPROCESS = ImageClassification(crop_size=32, resize_size=40)


def gradient(width=48, height=36):
    """Red grows to the right, green downwards, blue to the left: every orientation looks different."""
    x = np.linspace(0, 255, width).astype(np.uint8)[None].repeat(height, 0)
    y = np.linspace(0, 255, height).astype(np.uint8)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([x, y, 255 - x], 2))


def save(path, image=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or gradient()).save(path, **options)
    return path


def pixels(image):
    return np.asarray(image).astype(int)


def stored_mode(path):
    with Image.open(path) as image:
        return image.mode


def plain(image):
    """A preprocessing that changes no value."""
    return F.pil_to_tensor(image)


@pytest.fixture
def folder(tmp_path):
    """Five images whose mean values tell which is which, and a broken one between them."""
    for index in range(5):
        save(tmp_path / f"{index}.png", Image.new("RGB", (8, 8), (index, 0, 0)))
    (tmp_path / "2-broken.png").write_bytes(b"not an image")
    return tmp_path


def reds(batches):
    return [[int(image[0, 0, 0]) for image in batch] for batch in batches]


# --- find_images


def test_finds_by_suffix_below_and_sorted(tmp_path):
    names = ["b/2.JPG", "b/1.jpeg", "a.PnG", "c/d/e/3.webp", "b/10.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("notes.txt", "b/._2.jpg", ".hidden.png", ".cache/4.png", "jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path) == sorted(tmp_path / name for name in names)
    assert find_images(str(tmp_path)) == find_images(tmp_path)


def test_a_hidden_folder_may_be_asked_for(tmp_path):
    save(tmp_path / ".cache" / "a.png")
    assert find_images(tmp_path / ".cache") == [tmp_path / ".cache" / "a.png"]


def test_links_are_followed_once(tmp_path):
    image = save(tmp_path / "set" / "cats" / "a.png")
    elsewhere = save(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "set" / "cats" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "self").symlink_to(".")
    (tmp_path / "set" / "dogs").symlink_to(elsewhere.parent)
    (tmp_path / "set" / "dogs again").symlink_to(elsewhere.parent)
    assert find_images(tmp_path / "set") == [image, tmp_path / "set" / "dogs" / "b.png"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing", "got nothing, expected a directory"), ("a.png", "got a file"), ("empty", "got no image, expected")],
)
def test_nothing_to_find(tmp_path, name, message):
    save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=f"{name}': {message}"):
        find_images(tmp_path / name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up its rights and take them again")
def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    (tmp_path / "closed").mkdir(mode=0o700)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    os.seteuid(65534)
    try:
        with pytest.raises(DataError, match="closed': Permission denied"):
            find_images(".")
    finally:
        os.seteuid(0)


# --- load_image


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_rgb(tmp_path, suffix):
    options = {".png": {}, ".webp": {"lossless": True}, ".jpg": {"quality": 100, "subsampling": 0}}[suffix]
    image = load_image(save(tmp_path / f"a{suffix}", **options))
    assert image.mode == "RGB"
    assert abs(pixels(image) - pixels(gradient())).max() <= (4 if suffix == ".jpg" else 0)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1"])
def test_modes_of_png(tmp_path, mode):
    path = save(tmp_path / "a.png", gradient().convert(mode))
    assert stored_mode(path) == mode
    image = load_image(path)
    assert image.mode == "RGB"
    expected = gradient().convert(mode).convert("RGB")
    assert (pixels(image) == pixels(expected)).all()
    assert pixels(image).std() > 30


def test_a_transparent_palette(tmp_path):
    image = gradient().quantize(16)
    path = save(tmp_path / "a.png", image, transparency=bytes(range(16)))
    assert (pixels(load_image(path)) == pixels(image.convert("RGB"))).all()


def test_cmyk(tmp_path):
    path = save(tmp_path / "a.jpg", Image.new("CMYK", (8, 8), (255, 0, 0, 0)), quality=100)
    assert stored_mode(path) == "CMYK"
    red, green, blue = pixels(load_image(path)).mean((0, 1))
    assert red < 10
    assert green > 245
    assert blue > 245


def test_16_bits_are_scaled_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 48 * 36).reshape(36, 48).astype(np.uint16)
    path = save(tmp_path / "a.png", Image.fromarray(values))
    assert stored_mode(path).startswith("I")
    image = load_image(path)
    assert image.mode == "RGB"
    for channel in range(3):
        assert abs(pixels(image)[..., channel] - values / 257).max() <= 1
    assert pixels(image).max() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_exif_orientation(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"a{suffix}", exif=exif, quality=95)
    with Image.open(path) as stored:
        expected = ImageOps.exif_transpose(stored).convert("RGB")
    image = load_image(path)
    assert image.size == ((36, 48) if orientation >= 5 else (48, 36))
    assert (pixels(image) == pixels(expected)).all()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"<html>404</html>", id="html"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + bytes(50), id="png-head"),
        pytest.param(b"GIF89a" + bytes(50), id="gif"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", id="postscript"),
    ],
)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_no_image(tmp_path, content, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"image: '{path}': "):
        load_image(path)


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "GIF", "PPM"])
def test_other_formats_never_reach_their_decoders(tmp_path, kind):
    with pytest.raises(DataError, match=r"a\.png"):
        load_image(save(tmp_path / "a.png", format=kind))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_truncated_or_damaged(tmp_path, suffix):
    """Half the file is refused; whatever single byte is wrong gives an image or a DataError, and no warning."""
    path = save(tmp_path / f"a{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=f"image: '{path}': "):
        load_image(path)
    generator = random.Random(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(200):
            damaged = bytearray(content)
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
            path.write_bytes(damaged)
            try:
                assert load_image(path).mode == "RGB"
            except DataError as error:
                assert str(path) in str(error)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    path = save(tmp_path / "bomb.png", Image.new("1", (20_000, 20_000)))
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match=r"bomb\.png.*400000000 pixels"):
        load_image(path)


def test_the_limit_holds_where_someone_lifted_pillows(tmp_path, monkeypatch):
    path = save(tmp_path / "bomb.png", Image.new("1", (20_000, 20_000)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(DataError, match="20000 x 20000 pixels, above 178,000,000"):
        load_image(path)


def test_large_but_allowed_does_not_warn(tmp_path):
    path = save(tmp_path / "large.png", Image.new("1", (10_000, 9_000)))
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(path).close()
    assert load_image(path).size == (10_000, 9_000)


def test_paths_that_are_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to("nowhere")
    for name, message in (("pipe", "not a regular"), ("folder", "not a regular"), ("dangling", "no such file")):
        with pytest.raises(DataError, match=rf"{name}\.png': {message}"):
            load_image(tmp_path / f"{name}.png")


def test_metadata_does_not_matter(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 1000)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = save(tmp_path / "a.png", pnginfo=info, icc_profile=profile)
    assert (pixels(load_image(path)) == pixels(gradient())).all()


# --- image_batches


def test_batches_in_order_and_again(folder):
    paths = [folder / f"{index}.png" for index in range(5)]
    batches = image_batches(paths, plain, 2)
    assert len(batches) == 3
    assert reds(batches) == [[0, 1], [2, 3], [4]]
    assert reds(batches) == [[0, 1], [2, 3], [4]]
    assert next(iter(batches)).shape == (2, 3, 8, 8)
    assert batches.used == 5
    assert batches.skipped == []


def test_images_are_read_when_their_batch_is_asked_for(folder):
    batches = iter(image_batches(find_images(folder), plain, 2))
    assert reds([next(batches)]) == [[0, 1]]
    with pytest.raises(DataError, match=r"2-broken\.png"):
        next(batches)


def test_bad_images_are_skipped_and_batches_stay_full(folder):
    batches = image_batches(find_images(folder), plain, 2, skip_bad=True)
    for _ in range(2):
        assert reds(batches) == [[0, 1], [2, 3], [4]]
        ((path, reason),) = batches.skipped
        assert path == folder / "2-broken.png"
        assert str(path) in reason
        assert batches.used == 5
        assert len(batches) == 3


def test_what_was_skipped_stays_out_of_later_passes(folder):
    batches = image_batches(find_images(folder), plain, 2, skip_bad=True)
    first = reds(batches)
    save(folder / "2-broken.png", Image.new("RGB", (8, 8), (99, 0, 0)))
    assert reds(batches) == first


def test_a_partial_pass_keeps_what_was_skipped(folder):
    batches = image_batches(find_images(folder), plain, 1, skip_bad=True)
    list(batches)
    next(iter(batches))
    assert len(batches.skipped) == 1


def test_all_bad(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    batches = image_batches(find_images(tmp_path), plain, 2, skip_bad=True)
    for _ in range(2):
        with pytest.raises(DataError, match=r"got no usable image of 2. The first: .*a\.png"):
            list(batches)


def test_mistakes_in_preprocess_are_not_taken_for_bad_images(folder):
    def broken(image):
        raise TypeError("my mistake")

    with pytest.raises(TypeError, match="my mistake"):
        list(image_batches(find_images(folder), broken, 2, skip_bad=True))


def test_memory_does_not_grow_with_the_number_of_images(folder):
    """No batch is held once the consumer let go of it."""
    import weakref

    alive = []
    for batch in image_batches([folder / "1.png"] * 20, plain, 2):
        alive.append(weakref.ref(batch))
        del batch
        assert sum(reference() is not None for reference in alive) <= 1


# --- calibration_batches


def test_a_directory_in_full(folder):
    (folder / "2-broken.png").unlink()
    batches = calibration_batches(folder, num_images=99, batch_size=3, preprocess=PREPROCESS, seed=0)
    assert [batch.shape for batch in batches] == [(3, 3, 32, 32), (2, 3, 32, 32)]
    expected = torch.stack([PREPROCESS(Image.new("RGB", (8, 8), (index, 0, 0))) for index in range(5)])
    assert torch.equal(torch.cat(list(batches)), expected)
    assert str(folder) in batches.description


def test_a_random_choice_of_a_directory(tmp_path):
    for index in range(60):
        save(tmp_path / f"{index:02}.png", Image.new("RGB", (40, 40), (index * 4, 0, 0)))

    def chosen(seed):
        batches = calibration_batches(tmp_path, num_images=20, batch_size=8, preprocess=PREPROCESS, seed=seed)
        assert batches.used == 20
        assert len(batches) == 3
        return torch.cat(list(batches))[:, 0, 0, 0].tolist()

    assert chosen(0) == chosen(0)
    assert chosen(0) == sorted(chosen(0))
    assert len(set(chosen(0))) == 20
    assert set(chosen(0)) != set(chosen(1))
    assert max(chosen(0)) > torch.cat([PREPROCESS(Image.new("RGB", (40, 40), (40 * 4, 0, 0)))])[0, 0, 0]


def test_a_damaged_image_in_a_directory(folder):
    options = {"num_images": 9, "batch_size": 2, "preprocess": PREPROCESS, "seed": 0}
    with pytest.raises(DataError, match=r"2-broken\.png"):
        list(calibration_batches(folder, **options))
    batches = calibration_batches(folder, **options, skip_bad=True)
    assert sum(len(batch) for batch in batches) == 5 == batches.used


@pytest.mark.parametrize("wrong", [{"num_images": 0}, {"batch_size": 0}, {"num_images": -1}])
def test_numbers_below_one(folder, wrong):
    options = {"num_images": 1, "batch_size": 1, "preprocess": PREPROCESS, "seed": 0, **wrong}
    for source in (folder, "samples"):
        with pytest.raises(DataError, match=f"got .*{next(iter(wrong.values()))}.*, expected 1 or more"):
            calibration_batches(source, **options)


def test_a_directory_called_samples_is_no_sample(tmp_path, monkeypatch):
    save(tmp_path / "samples" / "a.png")
    monkeypatch.chdir(tmp_path)
    options = {"num_images": 3, "batch_size": 1, "preprocess": PREPROCESS, "seed": 0}
    assert calibration_batches("./samples", **options).used == 1
    assert calibration_batches("samples", **options).used == 3


# --- sample_crops


def test_samples_are_seeded_and_leave_the_random_numbers_alone():
    before = torch.get_rng_state()
    first = torch.cat(list(sample_crops(6, 4, preprocess=PREPROCESS, seed=3)))
    torch.rand(7)
    state = torch.get_rng_state()
    batches = sample_crops(6, 4, preprocess=PREPROCESS, seed=3)
    again = list(batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(before, state)
    assert [batch.shape for batch in again] == [(4, 3, 32, 32), (2, 3, 32, 32)]
    assert torch.equal(torch.cat(again), first)
    assert torch.equal(torch.cat(list(batches)), first)
    assert not torch.equal(torch.cat(list(sample_crops(6, 4, preprocess=PREPROCESS, seed=4))), first)
    assert len(batches) == 2
    assert batches.used == 6


def test_samples_alternate_between_the_photographs_and_are_normalized():
    """The flower is mostly dark green, the temple mostly bright: every odd crop is darker on average."""
    crops = torch.cat(list(sample_crops(64, 16, preprocess=PREPROCESS, seed=0)))
    mean, std = torch.tensor(PREPROCESS.mean), torch.tensor(PREPROCESS.std)
    colours = crops * std.view(3, 1, 1) + mean.view(3, 1, 1)
    assert colours.min() > -1e-5
    assert colours.max() < 1 + 1e-5
    temple, flower = colours[::2].mean((0, 2, 3)), colours[1::2].mean((0, 2, 3))
    assert temple[2] > flower[2] + 0.2


def test_samples_take_size_and_values_from_the_preprocessing():
    """Another normalization of the same crops, at another size and interpolation."""
    raw = ImageClassification(crop_size=32, mean=(0, 0, 0), std=(1, 1, 1))
    pixel = torch.cat(list(sample_crops(2, 2, preprocess=raw, seed=0)))
    normalized = torch.cat(list(sample_crops(2, 2, preprocess=PREPROCESS, seed=0)))
    torch.testing.assert_close(normalized, F.normalize(pixel, PREPROCESS.mean, PREPROCESS.std))
    (large,) = sample_crops(2, 2, preprocess=ImageClassification(crop_size=64, mean=(0, 0, 0), std=(1, 1, 1)), seed=0)
    assert large.shape == (2, 3, 64, 64)
    assert (torch.nn.functional.avg_pool2d(large, 2) - pixel).abs().mean() < 0.01
    nearest = ImageClassification(
        crop_size=32, mean=(0, 0, 0), std=(1, 1, 1), interpolation=F.InterpolationMode.NEAREST
    )
    assert not torch.equal(next(iter(sample_crops(2, 2, preprocess=nearest, seed=0))), pixel)


def test_samples_do_not_import_scikit_learn():
    script = (
        "import sys; from bnsurgery.data import sample_crops\n"
        "from torchvision.transforms._presets import ImageClassification\n"
        "list(sample_crops(2, 2, preprocess=ImageClassification(crop_size=32), seed=0))\n"
        "sys.exit('sklearn' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_without_scikit_learn(tmp_path):
    """In a process that finds torch and the like, but no scikit-learn: its folder is linked except for that."""
    site = tmp_path / "site"
    site.mkdir()
    for entry in Path(torch.__file__).parents[1].iterdir():
        if not entry.name.startswith(("sklearn", "scikit_learn", "__editable__")) and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    (site / "bnsurgery").exists() or (site / "bnsurgery").symlink_to(Path(data.__file__).parent)
    script = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "from bnsurgery.data import calibration_batches\n"
        "from bnsurgery.errors import DataError\n"
        "try: calibration_batches('samples', num_images=1, batch_size=1, preprocess=None, seed=0)\n"
        "except DataError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, check=True)
    assert "pip install bnsurgery[samples]` or pass --data DIR" in result.stdout


def test_statistics_of_the_samples_are_like_those_of_photographs(real):
    """Per channel of every conv in SqueezeNet: the figures in data.py, with some air."""
    net = real.squeezenet1_0_imagenet()

    def moments(batches):
        sums = {}

        def add(module, _, out):
            out = out.double()
            sums.setdefault(module, []).append(torch.stack([out.mean((0, 2, 3)), out.square().mean((0, 2, 3))]))

        hooks = [m.register_forward_hook(add) for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
        with torch.inference_mode():
            for batch in batches:  # of equal size
                net(batch)
        for hook in hooks:
            hook.remove()
        mean, square = torch.cat([torch.stack(parts).mean(0) for parts in sums.values()], 1)
        return mean, (square - mean**2).clamp_min(0).sqrt()

    mean, std = moments(real.photos().split(8))
    crops = sample_crops(32, 8, preprocess=ImageClassification(crop_size=224), seed=0)
    sample_mean, sample_std = moments(crops)
    alive = std > 1e-3 * std.max()
    assert ((sample_mean - mean).abs() / std)[alive].median() < 0.25
    assert (sample_std / std - 1)[alive].abs().median() < 0.2


def test_a_strip_is_refused(tmp_path):
    """Resized to 256 on its short side it would take 256 × 1,280,000 pixels."""
    Image.new("RGB", (5000, 1)).save(tmp_path / "strip.png")
    with pytest.raises(DataError, match="strip.png.*5000 x 1 pixels"):
        load_image(tmp_path / "strip.png")
    Image.new("RGB", (500, 5)).save(tmp_path / "wide.png")
    assert load_image(tmp_path / "wide.png").size == (500, 5)
