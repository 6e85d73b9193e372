"""What a user's own function gives to train on: Datasets by number, batches as they come."""

import textwrap
from dataclasses import replace
from itertools import chain

import pytest
import torch
from tiny_task import patterns, tiny
from torch import nn
from torch.utils.data import DataLoader, Dataset

import bnsurgery
from bnsurgery import finetune, report
from bnsurgery.errors import BNSurgeryError, DataError
from bnsurgery.finetune.loading import EVALUATED, Prepared, Reader, Share, TrainBatches
from bnsurgery.finetune.own_data import open_own
from bnsurgery.finetune.parts import Stream
from bnsurgery.finetune.run_directory import RunDirectory
from bnsurgery.networks.own_data import OwnBatches
from bnsurgery.records.record import Task, record
from bnsurgery.running.batches import Inputs

CODE = """
    import torch
    from tiny_task import patterns
    from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate
    from torchvision.datasets import VisionDataset

    def both():
        return [(images.float() / 255, labels) for images, labels in (patterns(96, 1), patterns(40, 2))]

    class Counted(TensorDataset):
        reads = 0
        def __getitem__(self, index):
            Counted.reads += 1
            return super().__getitem__(index)

    class Named(Counted):
        @property
        def targets(self):
            return self.tensors[1]

    class Lying(Counted):
        @property
        def targets(self):
            return self.tensors[1].roll(1)

    class Shifted(VisionDataset):  # by its transforms: targets 4 to 7 become classes
        def __init__(self, part, **transforms):
            super().__init__(**transforms)
            self.images, self.targets = part[0], (part[1] + 4).tolist()
        def __len__(self):
            return len(self.targets)
        def __getitem__(self, index):
            pair = self.images[index], self.targets[index]
            return pair if self.transforms is None else self.transforms(*pair)
    def shifted(): return tuple(Shifted(part, target_transform=lambda target: target - 4) for part in both())
    def jointly(): return tuple(Shifted(part, transforms=lambda image, target: (image, target - 4)) for part in both())
    def unchanged(): return *(Shifted(part, transform=lambda image: image) for part in both()), list("abcdefgh")

    def dataset(): return tuple(TensorDataset(*part) for part in both())
    def counted(): return tuple(Counted(*part) for part in both())
    def named(): return (*(Named(*part) for part in both()), ["nw", "ne", "sw", "se"])
    def lying(): return tuple(Lying(*part) for part in both())

    class Noisy(TensorDataset):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image + 0.1 * torch.randn(1, 8, 8), label

    def noisy(): return tuple(Noisy(*part) for part in both())
    def shuffled():  # no function without a name can be sent to another process
        return tuple(DataLoader(Noisy(*p), 15, shuffle=True, collate_fn=lambda x: default_collate(x)) for p in both())

    def kept():
        return tuple(DataLoader(TensorDataset(*part), 16, num_workers=1, persistent_workers=True) for part in both())
    def plain():
        return tuple(DataLoader(TensorDataset(*part), 16) for part in both())

    def mixed():
        (x, y), val = both()
        return [(x[:16], y[:16]), (x[:16, :, 1:, 1:], y[:16])], [val]
    def mixed_later():
        (x, y), val = both()
        return [(x[:16], y[:16])], [val, (val[0][:, :, 1:, 1:], val[1])]

    second = torch.rand(1, generator=torch.Generator().manual_seed(hash((0, 1)) & (2**63 - 1)))
    class Shorter:
        def __iter__(self):
            count = 5 if torch.equal(torch.rand(1), second) else 6  # in the second epoch
            return iter(list(zip(*(part.split(16) for part in both()[0])))[:count])
    def shorter(): return Shorter(), list(zip(*(part.split(20) for part in both()[1])))
"""


@pytest.fixture
def own(config, tmp_path, monkeypatch):
    """A configuration whose data a function of CODE gives; batches that come as they are have no workers of ours."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(textwrap.dedent(CODE))

    def chosen(name, **changes):
        mine = (
            {"num_workers": None, "batch_size": 64}
            if name in ("shuffled", "ordered", "shorter", "kept", "plain", "mixed", "mixed_later")
            else {}
        )
        base = config(data=f"own.py:{name}", image_size=None, normalize="auto", augment="auto", **mine)
        return replace(base, **changes)

    return chosen


def test_a_dataset_is_trained_like_the_same_images(own, config, data, model):
    images = finetune.run(config(augment="none"), model=model, data=data)
    ours = finetune.run(own("named", output="own"), model=model)
    for run, thing in ((images, "image"), (ours, "sample")):
        assert f"of the validation {thing}s right" in str(run)
        assert f"of the validation {thing}s right" in report.training(run, own("named")).verdict
    assert replace(ours, seconds=None) == finetune.Result.read(ours.directory)
    assert images.rows[-1].val_loss < images.rows[0].val_loss
    for one, two in zip(images.rows, ours.rows, strict=True):
        assert replace(one, images_per_second=0) == replace(two, images_per_second=0)
    kept = [bnsurgery.load(run.directory / "best.safetensors", model=tiny(1)) for run in (images, ours)]
    for one, two in zip(*(net.state_dict().values() for net in kept), strict=True):
        assert torch.equal(one, two)
    done = record(kept[1])
    assert (done.task.classes, done.task.preprocessing, done.input_shape) == (("nw", "ne", "sw", "se"), None, (1, 8, 8))


def test_batches_are_taken_as_they_come(own, model, tmp_path, monkeypatch):
    """The same batches as the Dataset's first epoch has, so the same training but for the order of sums."""
    order = list(chain.from_iterable(TrainBatches(96, 16, 0, 0, 1)))
    torch.save([index for _, index in order], tmp_path / "order.pt")
    (tmp_path / "own.py").write_text(
        textwrap.dedent(CODE)
        + "def ordered():\n    order = torch.load('order.pt')\n    (x, y), val = both()\n"
        + "    return list(zip(x[order].split(16), y[order].split(16))), [val]\n"
    )
    for arm in ("plain", "bn"):
        one = finetune.run(own("dataset", epochs=1, arm=arm, output=f"one-{arm}"), model=model).final
        two = finetune.run(own("ordered", epochs=1, arm=arm, output=f"two-{arm}"), model=model).final
        for name in ("train_loss", "val_loss"):
            assert getattr(one, name) == pytest.approx(getattr(two, name), rel=1e-3 if arm == "bn" else 1e-5)
        assert (one.step, one.val_accuracy) == (two.step, two.val_accuracy)
    assert RunDirectory("two-bn").read_config()[0].batch_size == 16  # theirs, in place of the default


@pytest.mark.parametrize("name", ["shuffled", "noisy"])
def test_a_run_stopped_in_an_epoch_goes_on_bit_for_bit(name, own, model, monkeypatch):
    chosen = {"dropout": 0.3, "save_every": 0.0, **({"batch_size": 15} if name == "noisy" else {})}
    whole = finetune.run(own(name, output="whole", **chosen), model=model)
    outside = torch.get_rng_state()
    save, saves = RunDirectory.save_state, []

    def stop_after_some(self, state):
        save(self, state)
        saves.append(state["step"])
        if len(saves) in (4, 10):
            raise KeyboardInterrupt

    monkeypatch.setattr(RunDirectory, "save_state", stop_after_some)
    with pytest.raises(KeyboardInterrupt):
        finetune.run(own(name, **chosen), model=model)
    with pytest.raises(KeyboardInterrupt):
        finetune.resume(own(name).output, model=model, data=f"own.py:{name}")
    assert saves[3] % 7 and saves[9] % 7  # both within an epoch
    with pytest.raises(
        BNSurgeryError, match=rf"its data is made by running 'own.py:{name}': pass `data='own.py:{name}'` again"
    ):
        finetune.resume(own(name).output, model=model)
    result = finetune.resume(own(name).output, model=model, data=f"own.py:{name}")
    states = [torch.load(run.directory / "last" / "state.pt", weights_only=True) for run in (whole, result)]
    for key, value in states[0]["network"].items():
        assert torch.equal(value, states[1]["network"][key])
    assert [row.val_loss for row in whole.rows] == [row.val_loss for row in result.rows]
    assert len({row.train_loss for row in whole.rows}) == 3  # the noise is another in each epoch
    assert torch.equal(torch.get_rng_state(), outside)


def test_other_data_is_not_resumed(own, model, tmp_path):
    finetune.run(own("shuffled", epochs=1), model=model)
    code = (tmp_path / "own.py").read_text()
    (tmp_path / "own.py").write_text(code.replace("patterns(40, 2)", "patterns(39, 2)"))
    with pytest.raises(DataError, match=r"the data has changed since the start: val_images: 40 then, 39 now"):
        finetune.resume(own("shuffled").output, model=model, data="own.py:shuffled")


def _numbered(*sizes):
    """Batches of (numbers, labels) of these sizes."""
    numbers = torch.arange(sum(sizes)).float()[:, None]
    return list(zip(numbers.split(sizes), numbers.long()[:, 0].split(sizes), strict=True))


@pytest.mark.parametrize(
    ("sizes", "world", "used"),
    [
        ((4, 4, 4), 1, (4, 4, 4)),
        ((4, 4, 1), 1, (4, 4)),  # a norm has no statistics of one
        ((4, 4, 3), 2, (4, 4, 2)),
        ((5, 5, 2), 3, (3, 3)),
        ((1, 1), 1, (1, 1)),  # all are: for frozen statistics
        ((1, 1), 2, ()),
    ],
)
def test_ranks_share_every_batch(sizes, world, used):
    stream = Stream("f", "training", _numbered(*sizes))
    shares = [Share(stream, 0, Reader(0, rank, world), train=True) for rank in range(world)]
    assert [(share.per_epoch, share.images, share.left_over) for share in shares] == [
        (len(used), sum(used), sum(sizes) - sum(used))
    ] * world
    given = [list(share) for share in shares]
    for number, parts in enumerate(zip(*given, strict=True)):
        assert all(torch.equal(inputs.args[0][:, 0].long(), labels) for inputs, labels in parts)
        assert len({len(labels) for _, labels in parts}) == 1
        whole = torch.stack([labels for _, labels in parts], 1).flatten()
        assert torch.equal(whole, _numbered(*sizes)[number][1][: used[number]])
    everything = [list(Share(stream, 0, Reader(0, rank, world), train=False)) for rank in range(world)]
    assert sorted(torch.cat([labels for part in everything for _, labels in part]).tolist()) == list(range(sum(sizes)))
    shares[0].start = 1
    assert len(list(shares[0])) == max(0, len(used) - 1)
    assert sum(len(y) for _, y in Share(stream, 0, Reader(), train=False, most=2)) == min(sum(sizes), max(2, sizes[0]))


def test_passes_within_passes_do_not_disturb_each_other(own, model):
    """Workers that stay would give a validation's recalibration and the epoch around it one iterator for both."""
    chosen = {"epochs": 1, "evaluations": 2, "recalibrate": 20}
    one, two = (finetune.run(own(name, output=name, **chosen), model=model).rows for name in ("plain", "kept"))
    assert [replace(row, images_per_second=0) for row in one] == [replace(row, images_per_second=0) for row in two]


def test_a_pass_with_fewer_batches_says_so_and_is_saved(own, model):
    with pytest.raises(DataError, match=r"'own.py:shorter': training: gave 5 batches, and 6 in .* Saved at step 11 "):
        finetune.run(own("shorter"), model=model)


def test_targets_are_read_with_the_samples_or_from_the_attribute(own):
    reads = []
    for name in ("counted", "named"):
        data = open_own(own(name))
        reads.append(data.train.items.dataset.reads)
        assert data.train.labels == tuple(patterns(96, 1)[1].tolist()) and len(data.val) == 40
    assert reads == [96 + 40 + 4, 4]  # two of each are examples
    assert open_own(own("counted")).classes == ("0", "1", "2", "3")
    with pytest.raises(DataError, match=r"^data 'own.py:lying': training sample 0: its target is 0, but was 3 before"):
        open_own(own("lying"))


@pytest.mark.parametrize(("name", "shift"), [("shifted", 0), ("jointly", 0), ("unchanged", 4)])
def test_targets_are_those_that_transforms_give(name, shift, own):
    assert open_own(own(name)).train.labels == tuple((patterns(96, 1)[1] + shift).tolist())


class _Wrong(Dataset):
    def __getitem__(self, index):
        raise AssertionError("not read")


def _returns(monkeypatch, value):
    def call():
        return value() if callable(value) else value

    monkeypatch.setattr("bnsurgery.networks.factories.function", lambda *_: call)


def _pairs(targets, count=4):
    return [(torch.zeros(count, 1, 8, 8), targets)]


GOOD = _pairs(torch.tensor([0, 1, 2, 3]))


class _Samples(Dataset):
    def __init__(self, *samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, "returned an int, expected a tuple (training, validation)"),
        (GOOD, "returned a list, expected a tuple"),
        (lambda: DataLoader(_Samples()), "returned a DataLoader, expected a tuple (training, validation)"),
        ((GOOD,), "returned a tuple of 1, expected a tuple"),
        ((GOOD, 5), "validation: got an int, expected"),
        ((torch.zeros(4, 1), GOOD), "training: got a Tensor, expected"),
        ((iter(GOOD), GOOD), "training: got a list_iterator, which can be gone through once"),
        ((GOOD, GOOD, 4), "classes: got int, expected a list of names"),
        ((GOOD, GOOD, []), "classes: got no name, expected one for each class"),
        ((_pairs(torch.tensor([0, 1, 2, 2**62])), GOOD), f"training: targets: the largest is {2**62}, but none is 3."),
        ((_pairs(torch.tensor([1, 2, 3, 1])), GOOD), "training: targets: the largest is 3, but none is 0."),
        ((_Samples(*((torch.zeros(1), n) for n in (0, 2, 2))), GOOD), "targets: the largest is 2, but none is 1."),
        ((GOOD, GOOD, "abcd"), "classes: got str, expected a list of names"),
        (([], GOOD), "training: gave no batch"),
        ((_Samples(), GOOD), "training: gave no sample"),
        ((GOOD, _Wrong()), "validation: a Dataset without a length"),
        (([torch.zeros(4, 1)], GOOD), "training batch 1: got a Tensor, expected a pair (inputs, targets)"),
        (([("a", torch.tensor([0]))], GOOD), "training batch 1: batches: got str"),
        ((_pairs([0, 1, 2, 3]), GOOD), "training batch 1: targets: got list, expected a tensor of integers (4,)"),
        ((_pairs(torch.zeros(4)), GOOD), "training batch 1: targets: got torch.float32 (4,), expected a tensor of"),
        (
            (_pairs(torch.zeros(3).long()), GOOD),
            "training batch 1: targets: got torch.int64 (3,), expected a tensor of integers (4,)",
        ),
        (
            (_pairs(torch.eye(4).long()), GOOD),
            "training batch 1: targets: got torch.int64 (4, 4), expected a tensor of",
        ),
        ((_pairs(torch.zeros(0).long(), 0), GOOD), "training batch 1: has no sample"),
        (
            ([*GOOD, *_pairs(torch.tensor([0, 1, 2, -1]))], GOOD),
            "training batch 2: targets: got -1, expected 0 or more",
        ),
        ((GOOD, _pairs(torch.tensor([0, 1, 2, 4]))), "validation: targets: got 4, expected 0 to 3, for 4 classes"),
        ((GOOD, GOOD, ["a", "b"]), "training: targets: got 2, expected 0 to 1, for 2 classes"),
        ((_pairs(torch.zeros(4).long()), GOOD), "got one class, expected two or more"),
        ((_Samples(torch.zeros(1)), GOOD), "training sample 0: got a Tensor, expected a pair (inputs, target)"),
        ((_Samples((torch.zeros(1), 0.5)), GOOD), "training sample 0: target: got a float, expected an integer"),
        ((_Samples((torch.zeros(1), torch.tensor(1.0))), GOOD), "target: got a Tensor of torch.float32, expected an"),
        ((_Samples(*((torch.zeros(n + 1), n) for n in range(4))), GOOD), "training: data: the inputs do not go into"),
        ((_Samples(*(("a", n) for n in range(4))), GOOD), "training: batches: got list"),
    ],
)
def test_what_is_no_labelled_data_is_refused(value, message, config, monkeypatch):
    _returns(monkeypatch, value)
    with pytest.raises(DataError) as refusal:
        open_own(config(data="x.py:f", image_size=None, normalize="auto", augment="auto"))
    assert str(refusal.value).startswith("data 'x.py:f'") and message in str(refusal.value)


@pytest.mark.parametrize("name", ["noisy", "shuffled"])
def test_options_that_mean_nothing_here_are_refused(name, own, model):
    for change in ({"image_size": 8}, {"mean": (0.5,)}, {"augment": "crop"}, {"limit": 8}, {"val_fraction": 0.5}):
        field = next(iter(change))
        with pytest.raises(DataError, match=rf"`{field}` is for images: what 'own.py:{name}' gives is taken as it is"):
            finetune.run(own(name, **change), model=model)


def test_batches_have_their_own_size(own, model):
    for change in ({"batch_size": 8}, {"batch_size": 15, "num_workers": 1}):
        field = list(change)[-1]
        with pytest.raises(
            DataError, match=rf"`{field}` is for a Dataset: 'own.py:shuffled' gives batches of its own, of 15"
        ):
            finetune.run(own("shuffled", **change), model=model)


def test_a_network_that_puts_out_something_else_is_refused(own):
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with pytest.raises(BNSurgeryError, match=r"Sequential returns shape \(2, 4, 4, 4\), expected \(2, 4\)"):
        finetune.run(own("dataset", head="keep"), model=network)


@pytest.mark.parametrize("name", ["mixed", "mixed_later"])
def test_a_batch_that_the_network_does_not_take_is_named(name, own, model):
    with pytest.raises(
        DataError, match=rf"data 'own.py:{name}': Sequential failed on an input of shape \(\d+, 1, 7, 7\)"
    ):
        finetune.run(own(name, arm="plain", recalibrate=2), model=model)


def test_what_a_dataset_draws_goes_by_seed_epoch_and_sample(own):
    data, outside = open_own(own("noisy")), torch.get_rng_state()
    one, other = (Prepared(data.train, Task(data.classes, None, None), "none", seed) for seed in (0, 1))
    alone = one[0, 3][0]
    assert torch.equal([one[0, index][0] for index in (5, 3)][1], alone)
    assert not any(torch.equal(alone, drawn) for drawn in (one[1, 3][0], other[0, 3][0], one[EVALUATED, 3][0]))
    assert torch.equal(torch.get_rng_state(), outside)


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_comparison_makes_the_data_in_every_process(jobs, own, model):
    """Trials with the data at hand are those of runs that make it themselves."""
    both = {"arms": ("plain", "bn"), "rates": (0.05,), "jobs": jobs, "model": model}
    result = finetune.compare(own("shuffled", output="compared", epochs=1), **both)
    for trial in result.trials:
        alone = finetune.run(own("shuffled", epochs=1, arm=trial.arm), model=model, save=False).final
        assert trial.rows[-1].val_loss == pytest.approx(alone.val_loss, rel=1e-5)
    assert finetune.compare(own("shuffled", output="compared", epochs=1), **both).trials == result.trials


@pytest.mark.parametrize("name", ["dataset", "named", "noisy", "shuffled", "mixed", "many"])
def test_insert_and_verify_take_the_training_part_of_the_same_function(name, own, tmp_path):
    with (tmp_path / "own.py").open("a") as file:
        file.write("def many():\n    return tuple(tuple(zip(x.split(8), y.split(8))) for x, y in both())\n")
    name = f"own.py:{name}"
    batches, again = list(OwnBatches(name, num=40)), list(OwnBatches(name, num=40))
    images = torch.cat([batch[0][:, :, 1:, 1:] if batch[0].shape[-1] == 8 else batch[0] for batch in batches])
    assert images.shape[0] >= 32 and all(torch.equal(one[0], two[0]) for one, two in zip(batches, again, strict=True))
    training = patterns(96, 1)[0][:, :, 1:, 1:].flatten(1).float() / 255
    near = torch.cdist(images.flatten(1), training).min(1)
    assert near.values.max() < (2 if name in ("own.py:noisy", "own.py:shuffled") else 1e-2)
    assert len(near.indices.unique()) >= 16
    if name == "own.py:dataset":
        assert near.indices.tolist() != sorted(near.indices.tolist())  # as data sorted by class would come


@pytest.mark.parametrize(
    ("given", "count", "inputs"),
    [
        ((torch.zeros(2, 3), torch.ones(2, 3)), 2, 1),  # two batches without targets
        (([torch.zeros(2, 3), torch.tensor([0, 1])],) * 2, 2, 1),  # as a DataLoader makes them
        ((((torch.zeros(2, 3), torch.tensor([3, 2])), torch.tensor([0, 1])),) * 3, 3, 2),  # of two inputs, one integers
        (([((torch.zeros(2, 3), torch.tensor([3, 2])), torch.tensor([0, 1]))] * 2, [], ["a", "b"]), 2, 2),
        ((_Samples(*[((torch.zeros(3), torch.tensor(3)), 0)] * 10), _Samples()), 2, 2),
        (_Samples(*[(torch.zeros(3), 0)] * 10), 2, 1),
    ],
)
def test_a_tuple_of_batches_is_no_division(given, count, inputs, monkeypatch):
    _returns(monkeypatch, given)
    batches = [Inputs.of(batch) for batch in OwnBatches("x.py:f")]
    assert [len(batch.args) for batch in batches] == [inputs] * count
