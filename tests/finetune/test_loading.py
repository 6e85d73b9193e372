"""Order and augmentation depend on seed, epoch and image alone."""

import multiprocessing
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from PIL import Image
from tiny_task import patterns

from bnsurgery.errors import DataError
from bnsurgery.finetune import from_tensors
from bnsurgery.finetune.loading import Loader, Prepared, Reader, TrainBatches, evaluation
from bnsurgery.finetune.parts import Split
from bnsurgery.images.preprocessing import Preprocessing
from bnsurgery.records.record import Task

TASK = Task(("a", "b", "c", "d"), None, Preprocessing(8, 8, 8, (0.0,), (1.0,), channels="grey"))


def prepared(augment="crop", seed=0):
    return Prepared(from_tensors(patterns(50, 1), patterns(8, 2), "abcd").train, TASK, augment, seed)


def everything(loader):
    return [(images.clone(), labels.clone()) for images, labels in loader]


def same(first, second):
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True))


def test_ranks_share_out_what_one_process_takes():
    whole = list(TrainBatches(51, 12, 7, 0, 1))
    shares = [list(TrainBatches(51, 12, 7, rank, 3)) for rank in range(3)]
    assert [len(batch) for batch in whole] == [12, 12, 12, 12, 3]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert sorted(batch) == sorted(key for part in parts for key in part)
        assert {len(part) for part in parts} == {len(batch) // 3}


@pytest.mark.parametrize(
    ("images", "world", "sizes", "left"),
    [
        (48, 1, [12] * 4, 0),
        (49, 1, [12] * 4, 1),
        (50, 1, [12] * 4 + [2], 0),
        (59, 1, [12] * 4 + [11], 0),
        (50, 3, [12] * 4, 2),
        (52, 3, [12] * 4 + [3], 1),
    ],
)
def test_an_epoch_takes_every_image_once_but_for_what_makes_no_batch(images, world, sizes, left):
    """Two images or more in all, as many on every rank."""
    ranks = [TrainBatches(images, 12, 7, rank, world) for rank in range(world)]
    epochs = []
    for epoch in range(2):
        taken = []
        for batches in ranks:
            batches.epoch = epoch
            assert [len(batch) * world for batch in batches] == sizes
            assert (len(batches), batches.images, batches.left_over) == (len(sizes), sum(sizes), left)
            taken += [index for batch in batches for _, index in batch]
        assert len(set(taken)) == len(taken) == images - left
        epochs.append(taken)
    assert epochs[0] != epochs[1]
    assert (set(epochs[0]) != set(epochs[1])) == (left > 0)  # others are left over


def test_an_epoch_resumed_in_the_middle_goes_on_as_it_would_have():
    batches = TrainBatches(50, 12, 7, 0, 1)
    whole = list(batches)
    batches.start = 2
    assert list(batches) == whole[2:]
    assert len(batches) == 3


@pytest.mark.parametrize("augment", ["none", "crop", "crop-flip", "resized-crop", "trivial"])
def test_workers_and_other_random_numbers_change_nothing(augment):
    data, batches = prepared(augment), TrainBatches(50, 12, 7, 0, 1)
    one = everything(Loader(data, batches, 0))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert same(one, everything(Loader(data, batches, 0)))
    assert torch.equal(torch.get_rng_state(), before)
    if augment == "trivial":
        assert same(one, everything(Loader(data, batches, 1)))


def test_augmentation_differs_by_epoch_image_and_seed():
    data = prepared("crop")
    assert not torch.equal(data[0, 4][0], data[1, 4][0])
    assert not torch.equal(data[0, 4][0], prepared("crop", seed=1)[0, 4][0])
    assert torch.equal(data[0, 4][0], data[0, 4][0])


def test_reading_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    prepared("trivial")[0, 3]
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_gives_the_images_themselves():
    images, labels = patterns(50, 1)
    got = everything(evaluation(prepared(), 16))
    pairs = [pair for x, y in got for pair in zip((255 * x).round().flatten(1).tolist(), y.tolist(), strict=True)]
    assert sorted(pairs) == sorted(zip(images.flatten(1).tolist(), labels.tolist(), strict=True))
    assert same(got, everything(evaluation(prepared(seed=5), 16)))  # the order is fixed
    assert sum(len(y) for _, y in everything(evaluation(prepared(), 16, images=40))) == 40
    shares = [everything(evaluation(prepared(), 16, Reader(rank=rank, world=3))) for rank in range(3)]
    assert sum(len(y) for share in shares for _, y in share) == 50


def test_batches_of_sorted_data_hold_all_classes_and_never_one_image():
    images, labels = patterns(65, 1)
    order = labels.argsort()
    data = Prepared(from_tensors((images[order], labels[order]), patterns(8, 2), "abcd").train, TASK, "none", 0)
    sizes = [len(y) for _, y in everything(evaluation(data, 32))]
    assert sizes == [32, 33]
    assert all(set(y.tolist()) == {0, 1, 2, 3} for _, y in everything(evaluation(data, 32, images=40)))


class _Broken:
    def __getitem__(self, index):
        if index == 3:
            raise DataError("image 'third.png': cannot be decoded")
        return Image.new("L", (8, 8))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_without_a_traceback(workers):
    data = Prepared(Split(_Broken(), (0, 1, 2, 3)), TASK, "none", 0)
    with pytest.raises(DataError) as error:
        everything(evaluation(data, 2, Reader(workers)))
    assert str(error.value) == "image 'third.png': cannot be decoded"
    assert not multiprocessing.active_children()  # though `error` holds the loader


@pytest.mark.slow
def test_a_process_that_holds_a_loader_ends(tmp_path):
    """As the last traceback of a script does, whatever error ended its run."""
    code = """
        from tiny_task import patterns
        from bnsurgery.finetune import from_tensors
        from bnsurgery.finetune.loading import Loader, Prepared, TrainBatches
        from bnsurgery.records.record import Task
        split = from_tensors(patterns(50, 1), patterns(8, 2), "abcd").train
        loader = Loader(Prepared(split, Task(tuple("abcd"), None, None), "none", 0), TrainBatches(50, 12, 7, 0, 1), 1)
        batches = iter(loader)
        next(batches)
        print("read")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    path = os.pathsep.join(sys.path)
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "read\n", "")


class _Dying:
    def __getitem__(self, index):
        import os

        os._exit(9)


@pytest.mark.slow
def test_a_worker_that_dies_says_so():
    data = Prepared(Split(_Dying(), (0, 1)), TASK, "none", 0)
    with pytest.raises(DataError, match="`num_workers=0`"):
        everything(evaluation(data, 2, Reader(workers=1)))
