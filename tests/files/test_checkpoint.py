from pathlib import Path

import pytest
import torch
from record_files import in_old_format, old_format, rewrite
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models
from warm_process import script

import bnsurgery
from bnsurgery import CheckpointError, ExportError, SurgeryRecord, insert, load, record, save
from bnsurgery.files import checkpoint
from bnsurgery.records.record import FORMAT_VERSION, Options, state_digest

pytestmark = pytest.mark.filterwarnings("ignore:.*variance below eps:bnsurgery.BNSurgeryWarning")


@pytest.fixture(scope="module")
def squeezenet():
    torch.manual_seed(0)
    return models.squeezenet1_1(weights=None, num_classes=7, dropout=0.25).eval()


@pytest.fixture
def inserted(squeezenet, images):
    return insert(squeezenet, [images(8)])


@pytest.fixture
def saved(inserted, tmp_path):
    save(inserted, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vgg11", {}),
        ("alexnet", {"absorb_bias": True}),
        *(
            ("squeezenet1_0", options)
            for options in ({}, {"placement": "post-activation"}, {"absorb_bias": True}, {"fuse_relu": True})
        ),
    ],
)
@pytest.mark.slow
def test_load_gives_the_same_bits_and_record(name, options, network, images, tmp_path):
    bn_model = insert(network(name), [images(8)], **options)
    save(bn_model, tmp_path / "net.safetensors")
    loaded = load(tmp_path / "net.safetensors")
    assert type(loaded) is type(bn_model)
    assert str(loaded) == str(bn_model)
    assert record(loaded) == record(bn_model)
    assert not loaded.training
    with torch.inference_mode():
        assert torch.equal(loaded(images(2)), bn_model(images(2)))
    for name_, tensor in bnsurgery.fold(bn_model).state_dict().items():
        assert torch.equal(bnsurgery.fold(loaded).state_dict()[name_], tensor), name_


@pytest.mark.slow
def test_a_new_process_computes_the_same_bits_without_initializing(saved, inserted, images, tmp_path):
    x = images(2)
    with torch.inference_mode():
        torch.save({"x": x, "y": inserted(x)}, tmp_path / "io.pt")
    code = (
        "import sys, torch, bnsurgery\n"
        "from torch.nn import init\n"
        "def refuse(*a, **k): assert a[0].is_meta, 'random initialization'\n"
        "torch.Tensor.normal_ = torch.Tensor.uniform_ = refuse\n"
        "io = torch.load(sys.argv[2], weights_only=True)\n"
        "model = bnsurgery.load(sys.argv[1])\n"
        "with torch.inference_mode(): assert torch.equal(model(io['x']), io['y'])\n"
    )
    exit_code, _, errors = script(tmp_path, code, saved, tmp_path / "io.pt")
    assert exit_code == 0, errors


def test_loaded_networks_can_be_trained_and_saved_again(saved, images, tmp_path):
    model = load(saved).train()
    model(images(4)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.optim.SGD(model.parameters(), 0.01).step()
    save(model, saved, overwrite=True)
    with torch.inference_mode():
        assert torch.equal(load(saved)(images(2)), model.eval()(images(2)))


def test_architecture_follows_the_model(inserted, saved, tmp_path):
    assert record(load(saved)).architecture.num_classes == 7
    assert next(m.p for m in load(saved).modules() if isinstance(m, nn.Dropout)) == 0.25
    inserted.classifier[1] = nn.Conv2d(512, 3, 1)
    save(inserted, tmp_path / "new.safetensors")
    assert load(tmp_path / "new.safetensors").classifier[1].out_channels == 3


def test_equal_models_give_equal_bytes(squeezenet, images, tmp_path):
    for name in ("a", "b"):
        save(insert(squeezenet, [images(8)]), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_channels_last_and_shared_tensors_are_written(images, tmp_path):
    block = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(block, nn.ReLU(), block, nn.ReLU(), nn.Conv2d(3, 2, 1)).eval()
    model.to(memory_format=torch.channels_last)
    bn_model = insert(model, [images(4, 8)])
    save(bn_model, tmp_path / "net")
    loaded = load(tmp_path / "net", model=model)
    with torch.inference_mode():
        assert torch.equal(loaded(images(2, 8)), bn_model.to(memory_format=torch.contiguous_format)(images(2, 8)))


def test_a_users_own_network_needs_the_class(custom, images, tmp_path):
    bn_model = insert(custom, [images(8, 32)])
    save(bn_model, tmp_path / "net")
    with pytest.raises(CheckpointError, match="holds a Fire, which is not one of torchvision's: pass `model`"):
        load(tmp_path / "net")
    other = type(custom)().eval()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    loaded = load(tmp_path / "net", model=other)
    with torch.inference_mode():
        assert torch.equal(loaded(images(2, 32)), bn_model(images(2, 32)))
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in before.items())
    with pytest.raises(CheckpointError, match="its record does not fit"):
        load(tmp_path / "net", model=nn.Sequential(nn.Conv2d(3, 3, 1)))


def test_the_record_says_what_was_done(saved):
    done = record(load(saved))
    assert done.architecture.name == "squeezenet1_1"
    assert (done.plan.placement, done.plan.layers, done.plan.head, done.options.eps) == (
        "pre-activation",
        "all",
        False,
        1e-5,
    )
    assert done.versions["torch"] == torch.__version__
    assert len(done.calibration_digest) == len(done.weights_digest) == 64
    assert [s.norm for s in done.sites][:2] == ["features.1", "features.4.squeeze.norm"]
    assert SurgeryRecord.from_json(done.to_json()) == done
    assert "features.4.squeeze.norm" in str(done)


def test_different_calibration_data_has_another_digest(squeezenet, images):
    digests = {record(insert(squeezenet, [images(8, seed=seed)])).calibration_digest for seed in (0, 0, 1)}
    assert len(digests) == 2


def test_exists_and_unwritable(inserted, saved, tmp_path):
    before = saved.read_bytes()
    with pytest.raises(CheckpointError, match="exists"):
        save(inserted, saved)
    assert saved.read_bytes() == before
    with pytest.raises(CheckpointError, match="missing"):
        save(inserted, tmp_path / "missing" / "net.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == [saved.name]


def test_a_file_cut_anywhere_is_refused(saved, tmp_path):
    data = saved.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    cuts = {0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(data) // 2, len(data) - 1}
    for cut in sorted(cuts):
        part = tmp_path / "part.safetensors"
        part.write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match="part"):
            load(part)


@pytest.mark.slow
def test_a_flipped_bit_in_the_header_is_refused_or_harmless(saved, tmp_path, images):
    """Every bit of every 67th byte: either refused, or (white space, key order) the network is still the same."""
    data = saved.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    with torch.inference_mode():
        expected = load(saved)(images(1))
    refused = 0
    flipped = tmp_path / "flipped.safetensors"
    for place in range(0, header, 67):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        flipped.write_bytes(damaged)
        try:
            with torch.inference_mode():
                assert torch.equal(load(flipped)(images(1)), expected)
        except CheckpointError:
            refused += 1
    assert refused > 0.9 * header / 67


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format_version=FORMAT_VERSION + 1), "upgrade"),
        (lambda d: d.update(format_version="1"), "format version '1'"),
        (lambda d: d["options"].pop("eps"), "fields missing or unknown: .*eps"),
        (lambda d: d.update(run="rm -rf"), "fields missing or unknown: .*run"),
        (lambda d: d["options"].update(eps="small"), "record.options.eps: got 'small'"),
        (lambda d: d["options"].update(eps=-1.0), "record.options: .*eps must be a number above 0 .*, got -1.0"),
        (lambda d: d["options"].update(eps=10**400), "record.options.eps: got"),
        (lambda d: d["plan"]["sites"][0].update(anchor=""), "does not fit"),
        (lambda d: d["architecture"].update(name="os.system"), "os.system"),
        (lambda d: d["architecture"].update(num_classes=10**12), "do not fit"),
        (lambda d: d["architecture"].update(num_classes=-1), "num_classes: got -1"),
        (lambda d: d["plan"]["sites"][0].update(name="features.99"), "does not fit"),
        (lambda d: d["plan"]["sites"][0].update(channels=10**15), "do not fit|does not fit"),
        (lambda d: d["plan"]["sites"][0].update(ndim=9), "does not fit"),
        (lambda d: d["sites"][0].update(norm="features.7"), "names other layers"),
        (lambda d: d["sites"].pop(), "record.sites: got .*, expected an object for every site"),
        (lambda d: d.update(sites={}), "record.sites: got"),
    ],
)
def test_a_hostile_record_is_refused(change, message, saved):
    rewrite(saved, change)
    with pytest.raises(CheckpointError, match=message):
        load(saved)


def test_deep_json_is_refused(saved):
    with pytest.raises(CheckpointError, match="not JSON"):
        SurgeryRecord.from_json("[" * 100_000)


def test_other_files_are_refused(tmp_path, squeezenet):
    save_file(squeezenet.state_dict(), tmp_path / "plain.safetensors")
    with pytest.raises(
        CheckpointError, match="not a bnsurgery checkpoint.*`bnsurgery fold` wrote is a plain state dict"
    ):
        load(tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="missing.safetensors"):
        load(tmp_path / "missing.safetensors")


class WithBuffer(nn.Module):
    """Two convolutions, and a buffer for which a network may have any use."""

    def __init__(self, buffer):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)
        self.register_buffer("odd", buffer)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


FLOATS = torch.tensor([1.5, -torch.inf, torch.inf, torch.nan, -0.0])
COMPLEX = torch.complex(FLOATS, FLOATS.flip(0))
BUFFERS = {
    **{
        str(kind): torch.arange(5).to(kind) for kind in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    },
    **{str(kind): torch.arange(5).to(kind) for kind in (torch.uint16, torch.uint32, torch.uint64, torch.bool)},
    **{str(kind): FLOATS.to(kind) for kind in (torch.float16, torch.bfloat16, torch.float32, torch.float64)},
    **{str(kind): FLOATS.to(kind) for kind in (torch.float8_e4m3fn, torch.float8_e5m2)},
    **{str(kind): COMPLEX.to(kind) for kind in (torch.complex64, torch.complex128)},
    "conjugate": COMPLEX.conj(),
    "negated": torch.zeros(3, dtype=torch.complex64).conj().imag,
    "no dimension": torch.tensor(7),
    "empty": torch.empty(0, 3, dtype=torch.int64),
    "matrix of pairs": torch.arange(8.0).view(4, 2),
    "complex matrix": torch.ones(3, 2, dtype=torch.complex64),
}


def as_bytes(tensor):
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("kind", BUFFERS)
def test_what_can_be_inserted_into_comes_back(kind, images, tmp_path):
    """To the bit, which tells two NaN from each other, too; and folds into files that others read."""
    model, x = WithBuffer(BUFFERS[kind]).eval(), images(4, 16)
    bn_model = insert(model, [x])
    if not checkpoint.has_place_for(model.odd.dtype) and not model.odd.is_complex():
        pytest.skip("for this type a safetensors of later than 0.5 is needed; it is refused")
    save(bn_model, tmp_path / "net.safetensors")
    loaded = load(tmp_path / "net.safetensors", model=WithBuffer(torch.zeros_like(BUFFERS[kind])))
    assert loaded.odd.dtype == model.odd.dtype and loaded.odd.shape == model.odd.shape
    assert torch.equal(as_bytes(loaded.odd), as_bytes(model.odd))
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))
    bnsurgery.export(loaded, tmp_path / "folded.pth", to="state-dict")
    folded = torch.load(tmp_path / "folded.pth", weights_only=True)
    assert all(torch.equal(as_bytes(folded[name]), as_bytes(tensor)) for name, tensor in model.state_dict().items())


def test_overlapping_buffers_and_a_frozen_integer_come_back(images, tmp_path):
    model = WithBuffer(torch.arange(6.0)).eval()
    model.register_buffer("tail", model.odd[2:])
    model.register_buffer("turned", model.odd.view(2, 3).t())
    model.index = nn.Parameter(torch.arange(3), requires_grad=False)
    bn_model = insert(model, [images(4, 16)])
    save(bn_model, tmp_path / "net.safetensors")
    loaded = load(tmp_path / "net.safetensors", model=model).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in bn_model.state_dict().items())


def test_what_safetensors_has_no_place_for_is_named_before_anything_is_written(images, tmp_path):
    bn_model = insert(WithBuffer(torch.ones(3, dtype=torch.uint8).view(torch.bits8)).eval(), [images(4, 16)])
    (tmp_path / "net.safetensors").write_text("old")
    with pytest.raises(CheckpointError, match=r"'odd' is torch.bits8, which safetensors has no place for"):
        save(bn_model, tmp_path / "net.safetensors", overwrite=True)
    assert (tmp_path / "net.safetensors").read_text() == "old"
    bn_model.odd = torch.ones(3, dtype=torch.complex128)
    with pytest.raises(
        ExportError, match=r"no place for 'odd', which is torch.complex128: give the file a name in .pth"
    ):
        bnsurgery.export(bn_model, tmp_path / "folded.safetensors", to="state-dict")
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]


@pytest.mark.parametrize("place", ["tensors", "record"])
def test_what_came_back_from_the_disk_as_something_else_gets_no_name(place, inserted, tmp_path, monkeypatch):
    def write(tensors, path, metadata):
        save_file(tensors, path, metadata)
        data = bytearray(path.read_bytes())
        spot = len(data) - 5 if place == "tensors" else data.index(b'"bnsurgery":"') + 100
        data[spot] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(checkpoint, "save_file", write)
    with pytest.raises(
        CheckpointError, match="came back from the disk as something else|record in its metadata is dam"
    ):
        save(inserted, tmp_path / "net.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("end", "kind"), [(".weight", torch.int64), (".weight", torch.float8_e5m2), (".running_var", torch.int32)]
)
def test_a_checkpoint_with_tensors_of_another_kind_is_refused(end, kind, images, tmp_path):
    bn_model = insert(WithBuffer(torch.arange(3)).eval(), [images(4, 16)])
    path = tmp_path / "net.safetensors"
    save(bn_model, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith(end))
    save_file({**tensors, name: tensors[name].to(kind)}, path, metadata)
    with pytest.raises(CheckpointError, match=rf"{kind} under '.*{end}'.*The network's is torch.float32"):
        load(path, model=bnsurgery.fold(bn_model))


def half_frozen():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    model[0].requires_grad_(False)
    return model


@pytest.mark.parametrize("skeleton_frozen", [False, True])
def test_what_was_frozen_comes_back_frozen(skeleton_frozen, images, tmp_path):
    """By the file, whatever is frozen in the network that gives the skeleton."""
    model, path, x = half_frozen(), tmp_path / "net.safetensors", images(8, 12)
    bn_model = insert(model, [x])
    save(bn_model, path)
    loaded = load(path, model=half_frozen().requires_grad_(not skeleton_frozen))
    assert record(loaded) == record(bn_model) and record(loaded).frozen == ("0.weight", "0.bias")
    flags = [{name: p.requires_grad for name, p in net.named_parameters()} for net in (bn_model, loaded)]
    assert flags[0] == flags[1] and str(loaded) == str(bn_model)
    kept = {name: value.clone() for name, value in loaded[1].state_dict().items()}
    loaded.train()(x)
    assert all(torch.equal(value, kept[name]) for name, value in loaded[1].state_dict().items())
    assert loaded[4].num_batches_tracked == 1


@pytest.mark.parametrize("options", [{}, {"absorb_bias": True}, {"placement": "post-activation"}])
def test_what_was_frozen_since_comes_back_so(options, images, tmp_path):
    """Layers and norms, frozen or not since the insertion, each as it was on saving; and the record as it was."""
    path, x = tmp_path / "net.safetensors", images(8, 12)
    bn_model = insert(half_frozen(), [x], **options)
    done = record(bn_model)
    first, second = (bn_model.get_submodule(site.norm) for site in done.sites[:2])
    bn_model.get_submodule(done.sites[0].layer).requires_grad_(True)  # frozen at the insertion
    first.requires_grad_(True)
    bnsurgery.set_statistics_(bn_model, "batch", where=lambda name, norm: norm is first)
    bn_model.get_submodule(done.sites[1].layer).requires_grad_(False)
    second.requires_grad_(False)
    bnsurgery.set_statistics_(bn_model, "running", where=lambda name, norm: norm is second)
    for changes in ([], [first.bias], list(bn_model.parameters())):
        for parameter in changes:
            parameter.requires_grad_(False)
        save(bn_model, path, overwrite=True)
        loaded = load(path, model=half_frozen())
        flags = [{name: p.requires_grad for name, p in net.named_parameters()} for net in (bn_model, loaded)]
        assert flags[0] == flags[1] and record(loaded) == record(bn_model) == done
        modes = [[net.get_submodule(site.norm).statistics for site in done.sites] for net in (bn_model, loaded)]
        assert modes[0] == modes[1] == ["batch", "running", *modes[0][2:]]
        again = path.read_bytes()
        save(loaded, path, overwrite=True)
        assert path.read_bytes() == again
    rewrite(path, lambda data: data.update(frozen_at_save=["1.wait"]))
    with pytest.raises(CheckpointError, match="'1.wait' was frozen, and is not there"):
        load(path, model=half_frozen())


def test_files_of_the_third_format_know_what_was_frozen_at_the_insertion(images, tmp_path):
    path = tmp_path / "net.safetensors"
    bn_model = insert(half_frozen(), [images(8, 12)])
    save(bn_model, path)
    rewrite(path, lambda data: old_format(data, 3))
    loaded = load(path, model=half_frozen().requires_grad_(True))
    flags = [{name: p.requires_grad for name, p in net.named_parameters()} for net in (bn_model, loaded)]
    assert flags[0] == flags[1] and loaded[1].statistics == "running"
    assert record(loaded) == in_old_format(record(bn_model))


def test_a_torchvision_networks_frozen_layers_come_back_frozen(squeezenet, images, tmp_path):
    model = models.squeezenet1_1(weights=None, num_classes=7).eval()
    model.features[:5].requires_grad_(False)
    bn_model = insert(model, [images(8)])
    save(bn_model, tmp_path / "net.safetensors")
    loaded = load(tmp_path / "net.safetensors")
    flags = [{name: p.requires_grad for name, p in net.named_parameters()} for net in (bn_model, loaded)]
    assert flags[0] == flags[1] and len(set(flags[0].values())) == 2


def test_files_of_the_second_format_load_trainable(images, tmp_path):
    """It said nothing of frozen layers, and their norms were trained."""
    path = tmp_path / "net.safetensors"
    bn_model = insert(half_frozen().requires_grad_(True), [images(8, 12)])
    save(bn_model, path)
    rewrite(path, lambda data: old_format(data, 2) or data.pop("frozen"))
    loaded = load(path, model=half_frozen())
    assert record(loaded) == in_old_format(record(bn_model)) and all(p.requires_grad for p in loaded.parameters())
    rewrite(path, lambda data: data.pop("frozen", None))
    assert record(load(path, model=half_frozen())).frozen == ()
    rewrite(path, lambda data: data.update(format_version=FORMAT_VERSION))
    with pytest.raises(CheckpointError, match=r"record.plan: got None, expected Plan"):
        load(path, model=half_frozen())


def test_a_file_that_the_first_format_left():
    """Written by the code of that time, which printed these outputs; it fused ReLUs by default."""
    path = Path(__file__).parents[1] / "files" / "format-1.safetensors"
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)]
    loaded = load(path, model=nn.Sequential(*layers))
    outputs = loaded(torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8))
    assert torch.allclose(outputs, torch.tensor([[0.01131286658346653, 0.01205673348158598]]), rtol=1e-5)
    assert record(loaded).options == Options(fuse_relu=True) and record(loaded).plan.placement == "pre-activation"
    assert state_digest(bnsurgery.fold(loaded).state_dict()) == record(loaded).weights_digest
