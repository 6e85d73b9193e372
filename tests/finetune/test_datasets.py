"""Folders, torchvision's datasets and the digits: what is found, held out, refused."""

import struct
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_task import patterns

from bnsurgery.errors import DataError
from bnsurgery.finetune import Config
from bnsurgery.finetune.datasets import from_tensors, open_data


def folder(root, **counts):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20, 16), (40 * i % 255, 80, 120)).save(root / name / f"{i}.png")
    return root


def load(path, **changes):
    return open_data(Config(data=str(path), output="unused", **{"val_fraction": 0.25, **changes}))


def test_one_folder_is_split_class_by_class(tmp_path):
    data = load(folder(tmp_path, cat=8, dog=4, emu=2))
    assert data.classes == ("cat", "dog", "emu")
    assert Counter(data.train.labels) == {0: 6, 1: 3, 2: 1}
    assert Counter(data.val.labels) == {0: 2, 1: 1, 2: 1}
    assert not set(data.train.names) & set(data.val.names)
    assert data.train.read(0).size == (20, 16)
    again, other = load(tmp_path), load(tmp_path, seed=1)
    assert again.fingerprint == data.fingerprint
    assert other.fingerprint != data.fingerprint


def test_train_and_val_folders_are_taken_as_they_are(tmp_path):
    folder(tmp_path / "train", cat=3, dog=3)
    folder(tmp_path / "val", cat=1, dog=2)
    data = load(tmp_path)
    assert (len(data.train), len(data.val)) == (6, 3)


@pytest.mark.parametrize("has_val", [True, False])
def test_a_test_folder_is_kept_apart(tmp_path, has_val):
    folder(tmp_path / "train", cat=4, dog=4)
    folder(tmp_path / "test", cat=3, dog=2)
    if has_val:
        folder(tmp_path / "val", cat=1, dog=2)
    data = load(tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == ((8, 3, 5) if has_val else (6, 2, 5))
    folder(tmp_path / "test", emu=1)
    with pytest.raises(DataError, match="test/ must have the same classes, but not all have: emu"):
        load(tmp_path)


def test_a_train_folder_alone_is_split(tmp_path):
    folder(tmp_path / "train", cat=4, dog=4)
    data = load(tmp_path)
    assert (len(data.train), len(data.val)) == (6, 2)


@pytest.mark.parametrize(
    ("size", "augment", "kind"),
    [
        ((28, 28), "crop", "small images, such as 28x28"),
        ((200, 63), "crop", "small images, such as 200x63"),
        ((64, 200), "resized-crop", "photographs"),
        (None, "resized-crop", "photographs"),  # damaged
    ],
)
def test_small_images_are_no_photographs(size, augment, kind, tmp_path):
    first = folder(tmp_path, cat=4, dog=4) / "cat" / "0.png"
    first.write_bytes(b"") if size is None else Image.new("L", size).save(first)
    data = load(tmp_path)
    assert (data.augment, data.kind, data.photographs) == (augment, kind, kind == "photographs")


def test_a_changed_file_changes_the_fingerprint(tmp_path):
    before = load(folder(tmp_path, cat=4, dog=4)).fingerprint
    Image.new("RGB", (60, 60), (1, 2, 3)).save(tmp_path / "dog" / "0.png")
    assert load(tmp_path).fingerprint != before


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ({"cat": 4, "dog": 0}, "class 'dog'.*got no image"),
        ({"cat": 4}, "got one class \\('cat'\\)"),
        ({}, "got no folder in it"),
        ({"cat": 4, "dog": 1}, "no validation image of 1 of 2 classes \\('dog'\\)"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(tmp_path, counts, text):
    with pytest.raises(DataError, match=text):
        load(folder(tmp_path, **counts))


def test_classes_of_train_and_val_must_agree(tmp_path):
    folder(tmp_path / "train", cat=2, dog=2)
    folder(tmp_path / "val", cat=2, wolf=2)
    with pytest.raises(DataError, match="not all have: dog, wolf"):
        load(tmp_path)


def test_damaged_images_can_be_left_out(tmp_path):
    folder(tmp_path, cat=4, dog=4)
    (tmp_path / "dog" / "1.png").write_bytes(b"not a picture")
    data = load(tmp_path, skip_bad=True)
    assert len(data.train) + len(data.val) == 7
    assert data.skipped == (str(tmp_path / "dog" / "1.png"),)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(DataError, match="no such folder.*digits, or one of CIFAR10"):
        load("nothing-of-the-kind")


def test_the_digits_are_sixteen_shades_of_grey():
    data = load("digits")
    assert len(data.train) + len(data.val) == 1797
    image = data.train.read(5)
    assert image.shape == (1, 8, 8) and image.dtype == torch.uint8
    assert max(int(data.train.read(i).max()) for i in range(50)) == 255


def idx(path, array):
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def test_torchvision_datasets_are_read_from_their_files(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 30), ("t10k", 20)):
        idx(raw / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (count, 28, 28)))
        idx(raw / f"{part}-labels-idx1-ubyte", np.arange(count) % 10)
    data = load("mnist", root=str(tmp_path))
    assert (len(data.train), len(data.val), len(data.classes)) == (30, 20, 10)
    assert data.train.labels == tuple(i % 10 for i in range(30))
    expected = np.frombuffer((raw / "train-images-idx3-ubyte").read_bytes()[16:], np.uint8).reshape(30, 28, 28)
    assert np.array_equal(np.asarray(data.train.read(7)), expected[7])


def test_a_torchvision_dataset_that_is_not_there_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match="`download=True`"):
        load("CIFAR10", root=str(tmp_path))


def test_a_limit_is_even_over_the_classes():
    data = from_tensors(patterns(96, 1), patterns(8, 2), "abcd")
    limited = data.limited(10, seed=0)
    assert sorted(Counter(limited.train.labels).values()) == [2, 2, 3, 3]
    assert data.limited(200, seed=0) is data
    kept = limited.train.read(0)
    assert any(torch.equal(kept, data.train.read(i)) for i in range(96))
