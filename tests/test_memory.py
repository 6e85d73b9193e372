"""Memory that runs out, and memory that does not grow."""

import gc
import sys
import weakref

import pytest
import torch
from PIL import Image
from warm_process import script

from bnsurgery import calibrate, fold, insert, plan
from bnsurgery.errors import DataError
from bnsurgery.images.calibration_images import ImageBatches
from bnsurgery.running.calls import out_of_memory

pytestmark = pytest.mark.slow
# The limit is on what comes on top of the libraries, whose address space is larger than their memory.
LIMITED = """
import re, resource, sys
from pathlib import Path
import torch, torchvision
from bnsurgery.files import checkpoint
from bnsurgery.errors import DataError
from bnsurgery.images.calibration_images import ImageBatches
from bnsurgery.images.decoding import load_image
from bnsurgery.networks import pretrained
from bnsurgery.statistics import verification
from bnsurgery.surgery import insertion
from bnsurgery.cli import main
torch.nn.functional.conv2d(torch.rand(1, 3, 64, 64), torch.rand(4, 3, 3, 3))
kibibytes = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
limit = (kibibytes + 1024 * int(sys.argv[1])) * 1024
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
"""
COMMAND = LIMITED + "main(sys.argv[2:])"
READING = (
    LIMITED
    + """
batches = ImageBatches([Path(sys.argv[2])], load_image, 1, description="files", skip_bad=True)
try:
    list(batches)
except DataError as error:
    print(error, batches.skipped)
"""
)
needs_limits = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS and /proc are Linux's")


def insert_with(mebibytes, folder, *options):
    """`bnsurgery insert squeezenet1_0` with that much memory for tensors."""
    return script(folder, COMMAND, mebibytes, "insert", "squeezenet1_0", "--weights", "random", *options)


@needs_limits
def test_out_of_memory_while_calibrating_names_a_batch_size_that_works(tmp_path):
    """The first layer puts out 96·109²·4 bytes an image, 278 MiB of 64; squeeze, expand and input are as much again.

    64 images need more than 720 MiB, and 32 less than 480: 580 is far from both.
    """
    code, out, err = insert_with(580, tmp_path, "--num-images", 64, "--batch-size", 64)
    assert (code, out) == (1, "")
    assert "Error: calibrate: out of memory on a batch of 64: use smaller ones, for instance " in err
    assert "32" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
    code, _, err = insert_with(580, tmp_path, "--num-images", 32, "--batch-size", 32)
    assert code == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["squeezenet1_0-bn.safetensors"]


@needs_limits
def test_out_of_memory_on_one_image_and_while_stacking(tmp_path):
    """One image of 1500 pixels is 27 MB, the first layer's output 214; 64 of 448 are 154 MB, and once more as one."""
    code, _, err = insert_with(150, tmp_path, "--num-images", 2, "--batch-size", 1, "--image-size", 1500)
    assert code == 1
    assert "Error: calibrate: out of memory on a batch of 1: use smaller images (" in err
    code, _, err = insert_with(220, tmp_path, "--num-images", 64, "--batch-size", 64, "--image-size", 448)
    assert code == 1
    assert "Error: images: out of memory on a batch of 64: use smaller ones, for instance " in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_errors_that_say_that_memory_ran_out():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)  # more than any machine has
    assert out_of_memory(refused.value)
    assert out_of_memory(MemoryError())
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as other:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not out_of_memory(other.value)
    assert not out_of_memory(ValueError("can't allocate memory"))


@needs_limits
def test_an_image_that_memory_does_not_hold_is_not_damaged(tmp_path):
    """It is decoded to 103 MiB."""
    Image.new("RGB", (6000, 6000)).save(tmp_path / "large.png")
    code, out, err = script(tmp_path, READING, 40, "large.png")
    assert code == 0, err
    assert out == "images: out of memory on a batch of 1: use smaller images (`image_size`). []\n"


def test_a_tensor_that_memory_does_not_hold_is_not_damage_either():
    batches = ImageBatches(range(3), lambda item: torch.empty(2**60), 8, description="huge", skip_bad=True)
    with pytest.raises(DataError, match="out of memory on a batch of 8: use smaller ones, for instance `batch_size=4`"):
        list(batches)
    assert batches.skipped == []


def test_calibration_keeps_no_batch(custom, images):
    """While one is worked on, the one before it may still be in a variable; none older is anywhere."""
    references, alive = [], []

    def batches():
        for seed in range(6):
            batch = images(2, 32, seed=seed)
            references.append(weakref.ref(batch))
            yield batch
            del batch
            alive.append(sum(reference() is not None for reference in references))

    found = plan(custom, images(2, 32))
    calibrate(custom, found, batches())
    assert max(alive) <= 1
    assert [reference() for reference in references] == [None] * 6


def test_images_are_not_kept_beside_their_batch():
    references = []

    def read(item):
        image = torch.full((3, 4, 4), float(item))
        references.append(weakref.ref(image))
        return image

    for batch in ImageBatches(range(8), read, 4, description="numbers"):
        assert batch.shape == (4, 3, 4, 4)
        assert [reference() for reference in references] == [None] * len(references)
    assert len(references) == 8


def test_inserting_and_folding_leaves_nothing_behind(custom, images):
    """Counted by the collector, after a few rounds in which caches fill: exactly as many objects as before."""
    x = images(4, 32)

    def cycle():
        inserted = insert(custom, [x[:2], x[2:]])
        folded = fold(inserted)
        return weakref.ref(inserted), weakref.ref(folded)

    def count():
        gc.collect()
        objects = gc.get_objects()
        tensors = sum(issubclass(type(found), torch.Tensor) for found in objects)
        return tensors, sum(
            str(type(found).__module__).startswith(("torch.nn", "torch.fx", "bnsurgery")) for found in objects
        )

    for _ in range(3):
        cycle()
    before = count()
    references = [reference for _ in range(20) for reference in cycle()]
    assert count() == before
    assert all(reference() is None for reference in references)
