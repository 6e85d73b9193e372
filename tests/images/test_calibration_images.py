"""Batches of calibration images, made here; and the two sample photographs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm_process
from image_files import save
from PIL import Image
from torchvision.transforms import functional as F

from bnsurgery.errors import DataError
from bnsurgery.images import decoding
from bnsurgery.images.calibration_images import ImageBatches, calibration_batches, sample_crops
from bnsurgery.images.decoding import load_image
from bnsurgery.images.folders import find_images
from bnsurgery.images.preprocessing import Preprocessing

PREPROCESS = Preprocessing(32, 32, 40)


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


def image_batches(paths, preprocess, batch_size, **options):
    return ImageBatches(paths, lambda path: preprocess(load_image(path)), batch_size, description="files", **options)


# --- ImageBatches


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
    batches = iter(image_batches(find_images(folder).images, plain, 2))
    assert reds([next(batches)]) == [[0, 1]]
    with pytest.raises(DataError, match=r"2-broken\.png"):
        next(batches)


def test_bad_images_are_skipped_and_batches_stay_full(folder):
    batches = image_batches(find_images(folder).images, plain, 2, skip_bad=True)
    for _ in range(2):
        assert reds(batches) == [[0, 1], [2, 3], [4]]
        ((path, reason),) = batches.skipped
        assert path == folder / "2-broken.png"
        assert str(path) in reason
        assert batches.used == 5
        assert len(batches) == 3


def test_what_was_skipped_stays_out_of_later_passes(folder):
    batches = image_batches(find_images(folder).images, plain, 2, skip_bad=True)
    first = reds(batches)
    save(folder / "2-broken.png", Image.new("RGB", (8, 8), (99, 0, 0)))
    assert reds(batches) == first


def test_a_partial_pass_keeps_what_was_skipped(folder):
    batches = image_batches(find_images(folder).images, plain, 1, skip_bad=True)
    list(batches)
    next(iter(batches))
    assert len(batches.skipped) == 1


def test_all_bad(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    batches = image_batches(find_images(tmp_path).images, plain, 2, skip_bad=True)
    for _ in range(2):
        with pytest.raises(DataError, match=r"no usable image of 2. The first: .*a\.png"):
            list(batches)


def test_mistakes_in_preprocess_are_not_taken_for_bad_images(folder):
    def broken(image):
        raise TypeError("my mistake")

    with pytest.raises(TypeError, match="my mistake"):
        list(image_batches(find_images(folder).images, broken, 2, skip_bad=True))


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
    raw = Preprocessing(32, 32, 32, mean=(0, 0, 0), std=(1, 1, 1))
    pixel = torch.cat(list(sample_crops(2, 2, preprocess=raw, seed=0)))
    normalized = torch.cat(list(sample_crops(2, 2, preprocess=PREPROCESS, seed=0)))
    torch.testing.assert_close(normalized, F.normalize(pixel, PREPROCESS.mean, PREPROCESS.std))
    (large,) = sample_crops(2, 2, preprocess=Preprocessing(64, 64, 64, mean=(0, 0, 0), std=(1, 1, 1)), seed=0)
    assert large.shape == (2, 3, 64, 64)
    assert (torch.nn.functional.avg_pool2d(large, 2) - pixel).abs().mean() < 0.01
    nearest = Preprocessing(32, 32, 32, mean=(0, 0, 0), std=(1, 1, 1), interpolation="nearest")
    assert not torch.equal(next(iter(sample_crops(2, 2, preprocess=nearest, seed=0))), pixel)


@pytest.mark.slow
def test_samples_do_not_import_scikit_learn(tmp_path):
    code = (
        "import sys; from bnsurgery.images.calibration_images import sample_crops\n"
        "from bnsurgery.images.preprocessing import Preprocessing\n"
        "list(sample_crops(2, 2, preprocess=Preprocessing(32, 32, 32), seed=0))\n"
        "sys.exit('sklearn' in sys.modules)"
    )
    assert warm_process.script(tmp_path, code)[0] == 0


@pytest.mark.slow
def test_without_scikit_learn(tmp_path):
    """In a process that finds torch and the like, but no scikit-learn: its folder is linked except for that."""
    site = tmp_path / "site"
    site.mkdir()
    for entry in Path(torch.__file__).parents[1].iterdir():
        if not entry.name.startswith(("sklearn", "scikit_learn", "__editable__")) and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    (site / "bnsurgery").exists() or (site / "bnsurgery").symlink_to(Path(decoding.__file__).parents[1])
    script = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "from bnsurgery.images.calibration_images import calibration_batches\n"
        "from bnsurgery.errors import DataError\n"
        "try: calibration_batches('samples', num_images=1, batch_size=1, preprocess=None, seed=0)\n"
        "except DataError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, check=True)
    assert "pip install 'bnsurgery[samples]', or pass `data=DIR`" in result.stdout


@pytest.mark.slow
def test_statistics_of_the_samples_are_like_those_of_photographs(real):
    """Per channel of every conv in SqueezeNet: the figures in calibration_images.py, with some air."""
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
    crops = sample_crops(32, 8, preprocess=Preprocessing(224, 224, 224), seed=0)
    sample_mean, sample_std = moments(crops)
    alive = std > 1e-3 * std.max()
    assert ((sample_mean - mean).abs() / std)[alive].median() < 0.25
    assert (sample_std / std - 1)[alive].abs().median() < 0.2
