"""Images of every mode and with every fault, made here: which are found, and what is read."""

import os
import random
import warnings

import numpy as np
import pytest
from image_files import gradient, save
from PIL import EpsImagePlugin, Image, ImageCms, ImageOps, PngImagePlugin

from bnsurgery.errors import DataError
from bnsurgery.images.decoding import load_image
from bnsurgery.images.folders import find_images


def pixels(image):
    return np.asarray(image).astype(int)


def stored_mode(path):
    with Image.open(path) as image:
        return image.mode


# --- find_images


def test_finds_by_suffix_below_and_sorted(tmp_path):
    names = ["b/2.JPG", "b/1.jpeg", "a.PnG", "c/d/e/3.webp", "b/10.png", "c/4.TIF", "5.tiff", "6.bmp", "7.ppm", "8.gif"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    others = ["b/labels.png.txt", "c/a.eps", "c/icon.ico", "jpg", "notes.txt", "weights.h5"]
    for name in (*others, "b/._2.jpg", ".hidden.png", ".cache/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path).images == sorted(tmp_path / name for name in names)
    assert find_images(tmp_path).others == sorted(tmp_path / name for name in others)
    assert find_images(str(tmp_path)) == find_images(tmp_path)


def test_a_hidden_folder_may_be_asked_for(tmp_path):
    save(tmp_path / ".cache" / "a.png")
    assert find_images(tmp_path / ".cache").images == [tmp_path / ".cache" / "a.png"]


def test_links_are_followed_once(tmp_path):
    image = save(tmp_path / "set" / "cats" / "a.png")
    elsewhere = save(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "set" / "cats" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "self").symlink_to(".")
    (tmp_path / "set" / "dogs").symlink_to(elsewhere.parent)
    (tmp_path / "set" / "dogs again").symlink_to(elsewhere.parent)
    assert find_images(tmp_path / "set").images == [image, tmp_path / "set" / "dogs" / "b.png"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing", "no such folder"), ("a.png", "a file, expected a folder"), ("empty", "got no image, expected")],
)
def test_nothing_to_find(tmp_path, name, message):
    save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=f"{name}': {message}"):
        find_images(tmp_path / name)


def test_what_was_passed_over_is_named_where_nothing_is_left(tmp_path):
    for name in ("b.heic", "a.txt", "d.npy", "c\x1b[2J.csv"):
        (tmp_path / name).touch()
    with pytest.raises(DataError) as refused:
        find_images(tmp_path)
    assert r"got no image (4 files passed over, no images by name: a.txt, b.heic, c\x1b[2J.csv, ...)" in str(
        refused.value
    )


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


LOSSLESS = {
    ".tif": {}, ".tiff": {"compression": "tiff_lzw"}, ".TIF": {"compression": "tiff_deflate"}, ".bmp": {}, ".ppm": {},
    ".tga": {}, ".pcx": {}, ".sgi": {}, ".jp2": {}, ".dds": {},
}  # fmt: skip


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_other_formats(tmp_path, suffix):
    path = save(tmp_path / f"a{suffix}", **LOSSLESS[suffix])
    assert (pixels(load_image(path)) == pixels(gradient())).all()
    assert find_images(tmp_path).images == [path]


@pytest.mark.parametrize(
    ("suffix", "options"), [(".tif", {"format": "TIFF"}), (".gif", {}), (".pgm", {}), (".bmp", {})]
)
def test_other_formats_in_grey(tmp_path, suffix, options):
    grey = gradient().convert("L")
    image = load_image(save(tmp_path / f"a{suffix}", grey, **options))
    assert (pixels(image) == pixels(grey)[..., None]).all()


def test_the_first_frame_or_page_is_taken(tmp_path):
    frames = [Image.new("RGB", (48, 36), colour) for colour in ("red", "blue", "green")]
    for name in ("a.gif", "a.tif"):
        path = save(tmp_path / name, frames[0], save_all=True, append_images=frames[1:])
        assert pixels(load_image(path)).reshape(-1, 3).tolist() == [[255, 0, 0]] * (48 * 36)


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


@pytest.mark.parametrize("name", ["a.tif", "a.ppm"])
def test_16_bits_of_other_formats(tmp_path, name):
    values = np.linspace(0, 65535, 48 * 36).reshape(36, 48).astype(np.uint16)
    path = tmp_path / name
    if name == "a.ppm":  # by hand: Pillow writes 8 bits
        path.write_bytes(b"P5 48 36 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(path)
    assert abs(pixels(load_image(path)) - values[..., None] / 257).max() <= 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.linspace(0, 1, 400, dtype=np.float32), "floating-point pixels"),
        (np.arange(400, dtype=np.int32) * 1000, "pixels from 0 to 399000, beyond 16 bits"),
        (np.arange(400, dtype=np.int32) - 5, "pixels from -5 to 394, beyond 16 bits"),
    ],
)
def test_numbers_whose_range_is_not_known_are_refused(tmp_path, values, message):
    Image.fromarray(values.reshape(20, 20)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=f"a.tif': {message}"):
        load_image(tmp_path / "a.tif")


TURNED = {2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2)}
TURNED |= {6: lambda a: np.rot90(a, 3), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: np.rot90}


@pytest.mark.parametrize("orientation", TURNED)
def test_orientation_of_tiff(tmp_path, orientation):
    path = save(tmp_path / "a.tif", tiffinfo={274: orientation})
    assert (pixels(load_image(path)) == TURNED[orientation](pixels(gradient()))).all()


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


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "GIF", "PPM", "PNG", "JPEG", "WEBP"])
def test_the_name_does_not_matter(tmp_path, kind):
    assert abs(pixels(load_image(save(tmp_path / "a.png", format=kind))) - pixels(gradient())).mean() < 12


@pytest.mark.parametrize("name", ["a.eps", "a.png", "a.iim"])
def test_postscript_never_reaches_an_interpreter(tmp_path, name, monkeypatch):
    """Nor inside of an IPTC container."""
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: started.append(args))
    path = save(tmp_path / name, format="EPS")
    if name == "a.iim":
        header = b"".join(
            bytes([0x1C, *tag]) + len(data).to_bytes(2, "big") + data
            for tag, data in (((3, 20), b"\0\x30"), ((3, 30), b"\0\x24"), ((3, 60), b"\1\0"), ((3, 120), b"\x01"))
        )
        content = path.read_bytes()
        path.write_bytes(header + bytes([0x1C, 8, 10, 0x84]) + len(content).to_bytes(4, "big") + content)
    with pytest.raises(DataError, match=f"image: '{path}': "):
        load_image(path)
    assert not started
    if name != "a.png":
        with pytest.raises(DataError, match="got no image"):
            find_images(tmp_path)


@pytest.mark.parametrize("suffix", [".ico", ".icns"])
def test_icons_are_no_pictures(tmp_path, suffix):
    with pytest.raises(DataError, match=f"a{suffix}"):
        load_image(save(tmp_path / f"a{suffix}", Image.new("RGB", (64, 64))))


def test_a_damaged_file_is_not_taken_for_a_format_without_a_mark(tmp_path):
    """Any bytes with a header that fits are a TGA."""
    content = save(tmp_path / "a.tga").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jpg"):
        load_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".bmp", ".ppm", ".gif", ".tga", ".pcx", ".jp2"])
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


@pytest.mark.parametrize("name", ["bomb.tif", "bomb.gif", "bomb.bmp", "bomb.ppm"])
def test_other_bombs_are_refused_before_they_are_decoded(tmp_path, name, monkeypatch):
    """A small image whose header says otherwise."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    content = bytearray(save(tmp_path / name, Image.new("L", (8, 8))).read_bytes())
    large = (20_000).to_bytes(2, "little")
    if name == "bomb.tif":
        with Image.open(tmp_path / name) as image:
            places = [content.index((tag).to_bytes(2, "little")) for tag in (256, 257)]
            assert image.tag_v2[256] == 8
        for place in places:
            content[place + 8 : place + 10] = large
    elif name == "bomb.gif":
        content[6:10] = large * 2
    elif name == "bomb.bmp":
        content[18:26] = (20_000).to_bytes(4, "little") * 2
    else:
        content[:] = bytes(content).replace(b"8 8", b"20000 20000")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="20000 x 20000 pixels, above 178,000,000"):
        load_image(tmp_path / name)


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
    for name, message in (("pipe", "not a regular"), ("folder", "a folder"), ("dangling", "no such file")):
        with pytest.raises(DataError, match=rf"{name}\.png': {message}"):
            load_image(tmp_path / f"{name}.png")


def test_metadata_does_not_matter(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 1000)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = save(tmp_path / "a.png", pnginfo=info, icc_profile=profile)
    assert (pixels(load_image(path)) == pixels(gradient())).all()


def test_a_strip_is_refused(tmp_path):
    """Resized to 256 on its short side it would take 256 × 1,280,000 pixels."""
    Image.new("RGB", (5000, 1)).save(tmp_path / "strip.png")
    with pytest.raises(DataError, match="strip.png.*5000 x 1 pixels"):
        load_image(tmp_path / "strip.png")
    Image.new("RGB", (500, 5)).save(tmp_path / "wide.png")
    assert load_image(tmp_path / "wide.png").size == (500, 5)
