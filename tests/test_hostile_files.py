"""Files that claim more than they hold, in weights, records, runs and configurations."""

import io
import json
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from record_files import rewrite
from safetensors.torch import save_file
from torch_files import deflated, to_torch

import bnsurgery
from bnsurgery.errors import BNSurgeryError, CheckpointError, ExportError
from bnsurgery.exports.exporting import export
from bnsurgery.files.weights import read_tensors, read_weights
from bnsurgery.finetune import Comparison, Config
from bnsurgery.images.preprocessing import Preprocessing
from bnsurgery.networks.fitting import BEST_FIT, fill_
from bnsurgery.networks.interface import preprocessing_of
from bnsurgery.networks.prediction import predict
from bnsurgery.networks.pretrained import load as load_weights
from bnsurgery.records.architectures import architecture
from bnsurgery.records.record import SurgeryRecord, Task, attach_record, record
from tests.fuzz.networks import inserted, small

pytestmark = pytest.mark.filterwarnings("ignore::bnsurgery.BNSurgeryWarning")
MIB = 2**20
ESCAPE = "\x1b]0;mine\x07\x9b2J\u202e"


def peak_growth(code, *words):
    """MiB by which the memory of a process grows at its peak while `code` runs, and what it refused.

    Not ru_maxrss, which a process inherits from the one that starts it.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux, which tells a process its own peak")
    script = (
        "import pathlib, resource, sys, torch\n"
        "from bnsurgery.files.weights import read_tensors\n"
        "from bnsurgery.errors import CheckpointError\n"
        "from bnsurgery.files.checkpoint import read_record\n"
        "def peak():\n"
        "    status = pathlib.Path('/proc/self/status').read_text()\n"
        "    return int(status.partition('VmHWM:')[2].split()[0])\n"
        "before = peak()\n"
        f"try:\n    {code}\nexcept CheckpointError as error:\n    print(error, file=sys.stderr)\n"
        "print((peak() - before) / 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True, check=True)
    return float(done.stdout), done.stderr


@pytest.mark.slow
def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "bomb.pth"
    path.write_bytes(deflated(to_torch({"a": torch.zeros(128 * MIB)})))
    assert path.stat().st_size < MIB
    grown, said = peak_growth("read_tensors(sys.argv[1])", path)
    assert "536,87" in said
    assert "in a file of" in said
    assert grown < 100


def test_compressed_weights_are_still_read(tmp_path):
    path = tmp_path / "a.pth"
    state = {"a": torch.arange(300_000.0)}
    path.write_bytes(deflated(to_torch(state)))
    assert path.stat().st_size < 4 * 300_000
    assert torch.equal(read_tensors(path)["a"], state["a"])


@pytest.mark.slow
def test_views_of_one_tensor_are_not_copied_without_bound(tmp_path):
    """Unaligned, each would be: 400 of 4 MB from a file of 4 MB."""
    path, whole = tmp_path / "views.pth", torch.ones(MIB + 1)
    torch.save({str(i): whole[1:] for i in range(400)}, path)
    grown, said = peak_growth("read_tensors(sys.argv[1])", path)
    assert "in a file of" in said
    assert grown < 100
    torch.save({str(i): whole[1:] for i in range(4)}, path)
    assert len(read_tensors(path)) == 4  # as tied weights are


@pytest.mark.slow
def test_a_long_header_is_not_parsed(tmp_path):
    path = tmp_path / "long.safetensors"
    header = json.dumps({"__metadata__": {str(i): "x" for i in range(2_500_000)}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    assert len(header) > 30 * MIB
    for reader in ("read_tensors", "read_record"):
        grown, said = peak_growth(f"{reader}(sys.argv[1])", path)
        assert f"a header of {len(header):,} bytes" in said
        assert grown < 60


@pytest.mark.slow
@pytest.mark.parametrize("size", [10_000_000, 3])
def test_too_little_memory_is_not_called_damage(tmp_path, size):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(size)}, path, _use_new_zipfile_serialization=False)
    code = (
        "resource.setrlimit(resource.RLIMIT_AS, (int(open('/proc/self/statm').read().split()[0]) * 4096 + 2**24,) * 2)"
    )
    _, said = peak_growth(f"{code}; read_tensors(sys.argv[1])", path)
    assert ("more than there is memory for" in said) == (size > 3)
    assert "damaged file" not in said


@pytest.mark.parametrize("legacy", [False, True])
def test_a_storage_that_is_called_is_not_printed_number_by_number(tmp_path, legacy):
    """As torch's unpickler would for its message: a minute for each million numbers. Found by fuzzing."""
    path, whole = tmp_path / "a.pth", torch.zeros(2**20)
    torch.save({"a": whole}, path, _use_new_zipfile_serialization=not legacy)
    called = path.read_bytes().replace(b"ctorch._utils\n_rebuild_tensor_v2\n", b"", 1).replace(b"Q", b"Q)R", 1)
    if not legacy:
        buffer = io.BytesIO()
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w") as new:
            for name in old.namelist():
                data = old.read(name)
                new.writestr(name, data.replace(b"Q", b"Q)R", 1) if name.endswith(".pkl") else data)
        called = buffer.getvalue()
    path.write_bytes(called)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match="holds code or objects"):
        read_tensors(path)
    assert time.perf_counter() - start < 5
    assert "a UntypedStorage" not in str(torch.ones(2).untyped_storage())  # torch's own are as they were


def test_keys_in_messages_are_short_and_printable(tmp_path):
    long = ESCAPE + "k" * 10**6
    contents = {
        "dtype": {long: torch.ones(1, dtype=torch.int8)},
        "nan": {long: torch.tensor([torch.nan])},
        "shape": {long: torch.ones(1).expand(10**9)},
        "sparse": {long: torch.ones(1).to_sparse()},
        "number": {10**5000: torch.ones(1)},
        "object": {long: "text"},
    }
    network = torch.nn.Module()
    network.register_buffer(long, torch.ones(1))
    for name, content in contents.items():
        (tmp_path / name).write_bytes(to_torch(content))
        with pytest.raises(CheckpointError) as caught:
            fill_(network, "network", read_weights(tmp_path / name), BEST_FIT)
        assert str(caught.value).isprintable(), name
        assert len(str(caught.value)) < 500 + len(str(tmp_path)), name
    save_file({long: torch.ones(1)}, tmp_path / "unexpected")
    with pytest.raises(CheckpointError, match="1 unexpected") as caught:
        load_weights(architecture("alexnet"), str(tmp_path / "unexpected"))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["options"].update(eps=float("nan")), "NaN is no number"),
        (lambda d: d["options"].update(eps=float("inf")), "Infinity is no number"),
        (lambda d: d["options"].update(eps=2.0), "record.options: .* got 2.0"),
        (lambda d: d["options"].update(momentum=-0.1), "record.options: .* got -0.1"),
        (lambda d: d.update(input_shape=[3, -1]), r"record: input_shape: got \(3, -1\)"),
        (lambda d: d.update(input_shape=[0]), r"record: input_shape: got \(0,\)"),
        (lambda d: d["architecture"].update(num_classes=0), "num_classes: got 0"),
        (lambda d: d["architecture"].update(num_classes=10**18), "do not fit|does not fit"),
        (lambda d: d["architecture"].update(dropout=1.5), "dropout: got 1.5"),
        # its builder would download a backbone
        (
            lambda d: d["architecture"].update(name="fasterrcnn_resnet50_fpn"),
            "record.architecture: name: got 'fasterrcnn",
        ),
        (lambda d: d.update(task={**TASK, "classes": [], "head": "classifier.1"}), "task: a new head, but no classes"),
        *(
            (
                lambda d, c=change: d.update(task={**TASK, "preprocessing": {**SEEN, **c}}),
                "preprocessing: .*: got .*, expected",
            )
            for change in (
                {"width": 10**9},
                {"height": 0},
                {"resize": 31},
                {"mean": [0.5] * 3},
                {"mean": [2.0]},
                {"std": [0.0]},
                {"scale": 0.0},
                {"channels": "bgr"},
                {"channels": "x"},
                {"interpolation": "x"},
            )
        ),
        *(
            (lambda d, n=name, f=field: d["plan"]["sites"][0].update({f: n}), "does not fit|other layers|do not fit")
            for name in ("../../x", "__class__.x", "forward", "features.__class__", "")
            for field in ("name", "anchor", "relu")
        ),
    ],
)
def test_a_record_out_of_range_is_refused(change, message, squeezenet_file, tmp_path):
    path = Path(shutil.copy(squeezenet_file, tmp_path))
    rewrite(path, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        bnsurgery.load(path)
    assert str(caught.value).isprintable()


GREY = Preprocessing(4, 4, 4, (0.5,), (0.25,), channels="grey")
SEEN = {"height": 32, "width": 32, "resize": 32, "mean": [0.5], "std": [0.5], "scale": 1.0, "channels": "grey"}
SEEN = {**SEEN, "interpolation": "bilinear"}
TASK = {"classes": ["a", "b"], "head": None, "preprocessing": SEEN}


@pytest.mark.parametrize("name", ["forward", "../../x", "__class__", "", "0.norm"])
def test_a_head_that_is_no_layer_is_refused(name, tmp_path):
    network = inserted()
    attach_record(
        network,
        replace(record(network), task=Task(("a", "b", "c"), name, GREY)),
    )
    bnsurgery.save(network, tmp_path / "net")
    with pytest.raises(BNSurgeryError):
        bnsurgery.load(tmp_path / "net", model=small())


@pytest.mark.parametrize(
    "noted", [{"image_size": "wide"}, {"image_size": 10**6}, {"image_size": 0}, {"normalize": "x"}]
)
def test_a_provenance_out_of_range_is_refused(noted):
    done = replace(record(inserted()), provenance={"image_size": 4, "normalize": "none", **noted})
    with pytest.raises(CheckpointError, match=f"record.provenance.{next(iter(noted))}: got"):
        preprocessing_of(done, small())


def test_a_size_that_a_file_made_up_is_not_allocated(tmp_path):
    network = inserted()
    attach_record(network, replace(record(network), input_shape=(1, 10**6, 10**6)))
    with pytest.raises(ExportError, match=r"\(1, 1000000, 1000000\) is too large to try"):
        export(network, tmp_path / "out.safetensors", to="state-dict")


def test_a_task_that_the_network_does_not_take_is_refused_in_words(tmp_path):
    network = inserted()
    attach_record(
        network,
        replace(record(network), task=Task(("a", "b", "c"), None, replace(GREY, height=9, width=9, resize=9))),
    )
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(BNSurgeryError, match=r"predict: .* failed on an input of shape \(1, 1, 9, 9\)"):
        list(predict(network, [tmp_path / "a.png"]))


def test_nesting_is_refused_at_any_depth():
    """Around what the interpreter allows, too, where a value can be read but not be printed any more."""
    sound = json.loads(record(inserted()).to_json())
    text = json.dumps({**sound, "sites": "@"})
    for depth in (100, *range(800, 1000), 5000, 100_000):
        with pytest.raises(CheckpointError) as caught:
            SurgeryRecord.from_json(text.replace('"@"', "[" * depth + "]" * depth))
        assert len(str(caught.value)) < 300


def test_a_trial_without_an_end_is_no_result(tmp_path):
    trial = {"arm": "bn", "lr": 0.1, "seed": 0, "statistics": "", "diverged": None, "rows": [], "seconds": 1.0}
    trial |= {"start_accuracy": None, "kind": None, "test_accuracy": None, "raced_out": False}
    (tmp_path / "comparison.json").write_text(json.dumps({"task": "x", "trials": [trial]}))
    with pytest.raises(CheckpointError, match="0 rows, expected a finite rate and rows"):
        Comparison.read(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", "3"), ("epochs", True), ("epochs", 2**31), ("lr", [0.1]), ("output", b"run"), ("output", None),
        ("output", "r\udcff"), ("limit", 3.5), ("skip_bad", 1), ("weight_decay", float("inf")), ("clip", float("nan")),
        ("image_size", 10**9), ("num_workers", 10**6), ("save_every", None), ("layers", None), ("model", 3),
        ("recalibrate", 10**12), ("dropout", "0.1"), ("seed", 0.5),
        ("mean", ("0.5",)), ("mean", []), ("std", (True,)),
    ],
)  # fmt: skip
def test_a_configuration_names_the_field_that_is_wrong(field, value):
    with pytest.raises(BNSurgeryError, match=f"^finetune: `?{field}`?: got "):
        Config(**{"output": "run", field: value})


def test_an_integer_will_do_for_a_rate():
    assert Config(output="run", lr=1, clip=5).lr == 1
