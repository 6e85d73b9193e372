"""Runs, against a loop written by hand, and against what a run says of itself."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from tiny_task import patterns, tiny
from torch import nn
from torch.nn import functional as F

import bnsurgery
from bnsurgery import finetune
from bnsurgery.errors import BNSurgeryError, CheckpointError, DataError
from bnsurgery.finetune import loop, network, rate_range, recipe, runs
from bnsurgery.finetune.figures import plot_curves
from bnsurgery.finetune.loading import Prepared, TrainBatches, evaluation
from bnsurgery.finetune.run_directory import RunDirectory
from bnsurgery.finetune.setup import _check_sizes, build, processes
from bnsurgery.images.preprocessing import Preprocessing
from bnsurgery.pages.style import write as write_figure
from bnsurgery.records.record import Task

pytestmark = pytest.mark.slow

CLASSES = ("nw", "ne", "sw", "se")
TASK = Task(CLASSES, "9", Preprocessing(8, 8, 8, (0.0,), (1.0,), channels="grey"))


def by_hand(model, data, config, steps):
    """The recipe again, from its description: plain SGD by hand on the same batches; returns losses."""
    prepared = Prepared(data.train, TASK, config.augment, config.seed)
    batches = TrainBatches(len(data.train), config.batch_size, config.seed, 0, 1)
    buffers = {p: torch.zeros_like(p) for p in model.parameters()}
    norms = {p for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for p in m.parameters()}
    losses = []
    model.train()
    total = config.epochs * batches.per_epoch
    for epoch in range(config.epochs):
        batches.epoch = epoch
        for keys in batches:
            images = torch.stack([prepared[key][0] for key in keys])
            labels = torch.tensor([prepared[key][1] for key in keys])
            loss = F.cross_entropy(model(images), labels, label_smoothing=config.label_smoothing)
            model.zero_grad()
            loss.backward()
            rate = config.lr * recipe.rate_factor(len(losses), total, config.warmup)
            with torch.no_grad():
                for p, v in buffers.items():
                    decays = p not in norms and p.ndim > 1
                    gradient = p.grad + (1e-4 * p if decays else 0)
                    v.copy_(gradient if not losses else 0.9 * v + gradient)
                    p -= rate * (gradient + 0.9 * v)
            losses.append(loss.item())
            if len(losses) == steps:
                return losses
    return losses


def test_a_run_is_the_loop_that_one_would_write(model, data, config):
    """bn+features without dropout; the head has no bias here, which leaves the conditioner out."""
    model[-1] = nn.Linear(16, 4, bias=False)
    chosen = config(epochs=2, dropout=0.0, label_smoothing=0.1, head="keep", evaluations=6)
    result = finetune.run(chosen, model=model, data=data)
    images = data.train.items.float() / 255
    reference = bnsurgery.insert(model, images.split(32))
    for module in reference.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    losses = by_hand(reference, data, chosen, 12)
    # One row a step. Float32 sums in another order: 1e-4 is a thousand roundings, grown over 12 steps.
    assert [row.train_loss for row in result.rows] == pytest.approx(losses, rel=1e-4)
    trained = bnsurgery.load(result.directory / "best.safetensors", model=model)
    last = torch.load(result.directory / "last" / "state.pt", weights_only=True)["network"]
    for name, value in reference.state_dict().items():
        if name in dict(reference.named_parameters()):
            torch.testing.assert_close(last[name], value, rtol=1e-3, atol=1e-4)
    assert set(trained.state_dict()) == set(reference.state_dict())


def test_what_is_kept_is_what_was_measured(model, data, config):
    result = finetune.run(config(ema=0.8, evaluations=2, head="new"), model=model, data=data)
    kept = bnsurgery.load(result.directory / "best.safetensors", model=model)
    images, labels = data.val.items.float() / 255, torch.tensor(data.val.labels)
    with torch.inference_mode():
        logits = kept(images)
    assert (logits.argmax(1) == labels).double().mean().item() == pytest.approx(result.best.val_accuracy)
    assert F.cross_entropy(logits, labels).item() == pytest.approx(result.best.val_loss, rel=1e-5)
    # Its statistics are the population's: recalibrating changes nothing but roundings.
    before = {name: value.clone() for name, value in kept.state_dict().items() if "running_" in name}
    prepared = Prepared(data.train, TASK, "none", 0)
    bnsurgery.recalibrate_(kept, evaluation(prepared, 32))  # in the run's own order
    for name, value in before.items():
        torch.testing.assert_close(kept.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    # The record says what it was trained on, and it folds.
    task = bnsurgery.record(kept).task
    assert (task.classes, task.head, task.preprocessing.shape) == (CLASSES, "9", (1, 8, 8))
    torch.testing.assert_close(bnsurgery.fold(kept)(images), logits, rtol=1e-4, atol=1e-4)


def test_validating_changes_nothing_in_training(model, data, config, tmp_path):
    states = []
    for evaluations in (1, 3):
        changes = {"evaluations": evaluations, "output": str(tmp_path / str(evaluations))}
        chosen = config(epochs=2, statistics="renorm", ema=0.8, **changes)
        result = finetune.run(chosen, model=model, data=data)
        states.append(torch.load(result.directory / "last" / "state.pt", weights_only=True))
    assert all(torch.equal(value, states[1]["network"][name]) for name, value in states[0]["network"].items())
    assert all(map(torch.equal, *(state["average"] for state in states)))


def test_the_run_directory_holds_what_it_should(model, data, config, drawn):
    result = finetune.run(config(lr="auto"), model=model, data=data)
    files = {path.name for path in result.directory.iterdir()}
    assert files == {
        "best.safetensors", "config.json", "curves.png", "last", "lr_range.csv", "lr_range.png", "metrics.csv",
        "norms.csv", "tensorboard",
    }  # fmt: skip
    with (result.directory / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["val_accuracy"]) for row in rows] == [row.val_accuracy for row in result.rows]
    with (result.directory / "lr_range.csv").open() as file:
        tried = [(float(row["lr"]), float(row["loss"])) for row in csv.DictReader(file)]
    assert tried[0][0] == pytest.approx(1e-5) and tried == sorted(tried, key=lambda pair: pair[0])
    assert len(tried) > 50 and rate_range.choose(*zip(*tried, strict=True), 0.0125).chosen == result.resolved.lr
    stored = json.loads((result.directory / "config.json").read_text())
    assert stored["config"]["lr"] == "auto"
    assert stored["data"]["train_images"] == 96
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(result.directory / "tensorboard")).Reload()
    values = [event.value for event in events.Scalars("val/accuracy")]
    assert values == pytest.approx([row.val_accuracy for row in result.rows])
    curves = plot_curves(result.rows, start=result.resolved.start_accuracy)
    (result.directory / "again").mkdir()
    write_figure(curves, result.directory / "again" / "curves.png")
    assert (result.directory / "curves.png").read_bytes() == (result.directory / "again" / "curves.png").read_bytes()


def test_the_statistics_of_every_norm_are_recorded_as_they_would_be_kept(model, data, config):
    with torch.no_grad():
        model[0].weight[1] = 0  # a constant channel
    with pytest.warns(bnsurgery.BNSurgeryWarning, match="dead"):
        result = finetune.run(config(evaluations=2, train="bn+head"), model=model, data=data)
    assert finetune.Result.read(result.directory).norms == result.norms
    assert [row.step for row in result.norms] == [step for row in result.rows for step in 3 * [row.step]]
    best = bnsurgery.load(result.directory / "best.safetensors", model=model)
    for row in (row for row in result.norms if row.step == result.best.step):
        norm = best.get_submodule(row.norm)
        sigma = sorted(value**0.5 for value in norm.running_var.tolist())
        assert (row.smallest, row.largest) == pytest.approx((sigma[0], sigma[-1]))
        assert row.median == pytest.approx((sigma[(len(sigma) - 1) // 2] + sigma[len(sigma) // 2]) / 2)
        assert (row.channels, row.dead) == (len(sigma), sum(value**2 < norm.eps for value in sigma))
    assert [row.dead for row in result.norms[:3]] == [1, 0, 0]
    plain = finetune.run(config(arm="plain", epochs=1, output=config().output + "-plain"), model=model, data=data)
    assert plain.norms == () == finetune.Result.read(plain.directory).norms


def test_the_same_seed_gives_the_same_bits_and_leaves_random_numbers_alone(model, data, config, tmp_path):
    torch.manual_seed(9)
    before = torch.get_rng_state()
    states = []
    for name in "ab":
        result = finetune.run(config(output=str(tmp_path / name), epochs=2), model=model, data=data)
        states.append((result.directory / "best.safetensors").read_bytes())
    assert states[0] == states[1]
    assert torch.equal(torch.get_rng_state(), before)
    other = finetune.run(config(output=str(tmp_path / "c"), seed=1, epochs=2), model=model, data=data)
    assert (other.directory / "best.safetensors").read_bytes() != states[0]


def test_a_head_is_replaced_for_other_classes_and_kept_for_the_same(model, data, config, tmp_path):
    three = finetune.from_tensors(
        tuple(t[patterns(96, 1)[1] < 3] for t in patterns(96, 1)),
        tuple(t[patterns(40, 2)[1] < 3] for t in patterns(40, 2)),
        ["nw", "ne", "sw"],
    )
    first = finetune.run(config(), model=model, data=three)
    kept = bnsurgery.load(first.directory / "best.safetensors", model=model)
    assert kept[-1].out_features == 3
    again = finetune.run(config(output=str(tmp_path / "again"), epochs=1, lr=1e-9), model=kept, data=three)
    assert again.final.val_accuracy == pytest.approx(first.best.val_accuracy, abs=0.05)
    other = finetune.run(config(output=str(tmp_path / "other"), epochs=1), model=kept, data=data)
    assert bnsurgery.load(other.directory / "best.safetensors", model=model)[-1].out_features == 4
    with pytest.raises(BNSurgeryError, match="has 3 outputs and cannot be kept for 4 classes"):
        finetune.run(config(output=str(tmp_path / "x"), head="keep"), model=kept, data=data)


@pytest.mark.parametrize("train", ["bn", "head", "bn+head"])
def test_what_is_not_trained_keeps_its_bits(model, data, config, train):
    result = finetune.run(config(train=train, head="keep"), model=model, data=data)
    trained = bnsurgery.load(result.directory / "best.safetensors", model=model)
    original = dict(model.named_parameters())
    head_changed = not torch.equal(trained[-1].weight, original["9.weight"])
    assert head_changed == ("head" in train)
    assert torch.equal(trained[0].weight, original["0.weight"])
    assert result.resolved.statistics == ("running" if train == "head" else "batch")


@pytest.mark.parametrize(
    ("batch_size", "mode"), [(2, "running"), (32, "batch")]
)  # between, it depends on the drift: test_network.py
def test_auto_statistics_go_by_the_batch_size(model, data, config, batch_size, mode):
    result = finetune.run(config(batch_size=batch_size, epochs=1), model=model, data=data, save=False)
    assert result.resolved.statistics == mode
    assert str(batch_size) in result.resolved.reason


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("arm", ["plain", "bn-naive"])
def test_the_other_arms_and_optimizers_train(model, data, config, arm, optimizer):
    rate = 0.05 if optimizer == "sgd" else 0.01
    result = finetune.run(config(arm=arm, optimizer=optimizer, lr=rate, clip=5.0), model=model, data=data, save=False)
    assert result.final.train_loss < result.rows[0].train_loss
    assert result.directory is None


def test_bf16_trains(model, data, config):
    result = finetune.run(config(precision="bf16", epochs=6, lr=0.3), model=model, data=data)
    assert result.final.val_accuracy > 0.8
    assert bnsurgery.load(result.directory / "best.safetensors", model=model)[0].weight.dtype == torch.float32


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_what_was_saved(model, data, config, monkeypatch):
    apply, factor, steps = recipe.HeadConditioner.apply_, recipe.rate_factor, []

    def overflow_in_step_8(self):
        apply(self)
        steps.append(0)
        if len(steps) == 8:
            self._head.weight.grad.fill_(float("inf"))

    monkeypatch.setattr(recipe.HeadConditioner, "apply_", overflow_in_step_8)
    with pytest.raises(finetune.DivergedError) as error:
        finetune.run(config(save_every=0.0), model=model, data=data)
    assert "diverged at step 8 (epoch 2), peak learning rate 0.05: a weight is not finite" in str(error.value)
    assert "best.safetensors" in str(error.value) and "`lr=0.02`" in str(error.value)
    state = RunDirectory(config().output).load_state()
    assert state["step"] == 7
    assert all(value.isfinite().all() for value in state["network"].values())
    monkeypatch.setattr(recipe, "rate_factor", lambda step, *rest: 1e18 if step == 7 else factor(step, *rest))
    with pytest.raises(finetune.DivergedError, match="diverged at step 9 .*: the loss is not finite"):
        finetune.run(config(output=config().output + "-2", arm="plain"), model=model, data=data)


def test_sizes_that_cannot_work_are_refused_before_anything_is_done(model, data, config):
    with pytest.raises(DataError, match="more than the 96 training images: pass `batch_size=96`"):
        finetune.run(config(batch_size=97), model=model, data=data, save=False)
    with pytest.raises(DataError, match="a batch of 16 cannot be shared evenly by 3 processes: pass `batch_size=15`"):
        _check_sizes(config(batch_size=16), data, 3)
    with pytest.raises(BNSurgeryError, match="a batch of 1 has no statistics"):
        finetune.run(config(batch_size=1, statistics="batch"), model=model, data=data, save=False)
    with pytest.raises(BNSurgeryError, match="image size.*`image_size`"):
        finetune.run(config(image_size=None), model=model, data=data, save=False)
    with pytest.raises(BNSurgeryError, match="grey images: leave out .*`normalize='imagenet'`"):
        finetune.run(config(normalize="imagenet"), model=model, data=data, save=False)


def test_a_refused_start_leaves_no_run_behind(model, data, config):
    with pytest.raises(BNSurgeryError, match="leaves nothing to train in the arm plain"):
        finetune.run(config(train="bn", head="keep", arm="plain"), model=model, data=data)
    finetune.run(config(epochs=1), model=model, data=data)


def test_every_arm_starts_with_the_populations_statistics(model, data, config):
    for arm in ("bn", "bn-naive"):
        setup = build(config(arm=arm), processes(config()), model, data, None, False)
        network = setup.network
        norm = network[1]
        assert torch.equal(norm.weight, torch.ones(8)) == (arm == "bn-naive")
        before = {name: value.clone() for name, value in network.named_buffers()}
        bnsurgery.recalibrate_(network, setup.calibration)
        for name, value in network.named_buffers():
            torch.testing.assert_close(value, before[name], rtol=1e-3, atol=1e-3)  # by batches of 32, not by all


def test_thirty_three_images_are_no_divergence(model, config):
    """The last batch of a recalibration would have one image."""
    data = finetune.from_tensors(patterns(33, 1), patterns(8, 2), CLASSES)
    for arm in ("bn", "bn-naive"):
        assert finetune.run(config(epochs=1, arm=arm), model=model, data=data, save=False).rows


@pytest.mark.usefixtures("finished")
def test_only_the_weights_and_pixels_it_started_with_are_resumed(model, data, config):
    images, labels = patterns(96, 1)
    images[0, 0, 0, 0] += 1
    with pytest.raises(DataError, match="train_digest"):
        finetune.resume(
            config().output, model=model, data=finetune.from_tensors((images, labels), patterns(40, 2), CLASSES)
        )
    with pytest.raises(CheckpointError, match="weights that it started from have changed"):
        finetune.resume(config().output, model=tiny(seed=1), data=data)


def test_an_image_size_that_does_not_fit_says_so(model, data, config):
    with pytest.raises(BNSurgeryError, match="failed on an input of shape"):
        finetune.run(config(image_size=12), model=model, data=data, save=False)


@pytest.mark.usefixtures("finished")
def test_a_run_is_not_overwritten(model, data, config):
    with pytest.raises(BNSurgeryError, match="a run is there already.*`resume="):
        finetune.run(config(epochs=1), model=model, data=data)


class _Stop(Exception):
    pass


@pytest.mark.parametrize("ema", [0.0, 0.8])
def test_a_run_stopped_in_an_epoch_goes_on_bit_for_bit(model, data, config, tmp_path, monkeypatch, ema):
    """Dropout, momentum, average, running statistics, and the curves: nothing may be lost. Begun as on a GPU, fused."""
    chosen = {"ema": ema, "dropout": 0.3, "save_every": 0.0}
    whole = finetune.run(config(output=str(tmp_path / "whole"), **chosen), model=model, data=data)
    save, saves = RunDirectory.save_state, []

    def stop_after_some(self, state):
        save(self, state)
        saves.append(state["step"])
        if len(saves) in (4, 9):
            raise _Stop

    monkeypatch.setattr(RunDirectory, "save_state", stop_after_some)
    monkeypatch.setattr(network, "fuses", lambda device: not saves)
    with pytest.raises(_Stop):
        finetune.run(config(**chosen), model=model, data=data)
    with pytest.raises(_Stop):
        finetune.resume(config().output, model=model, data=data)
    assert saves[3] % 6 and saves[8] % 6  # both within an epoch
    with (RunDirectory(config().output).path / "norms.csv").open("a") as file:
        file.write("18,1,8,0,1.0,1.0,1.0\n")  # as a run leaves it that is killed beyond its checkpoint
    result = finetune.resume(config().output, model=model, data=data)
    for name in ("best.safetensors", "norms.csv"):
        assert (result.directory / name).read_bytes() == (whole.directory / name).read_bytes()
    states = [torch.load(run.directory / "last" / "state.pt", weights_only=True) for run in (whole, result)]
    for name, value in states[0]["network"].items():
        assert torch.equal(value, states[1]["network"][name])
    for one, two in zip(whole.rows, result.rows, strict=True):
        assert (one.val_loss, one.train_loss, one.step) == (two.val_loss, two.train_loss, two.step)
    assert finetune.resume(config().output, model=model, data=data).rows == result.rows  # finished: nothing to do


@pytest.mark.usefixtures("finished")
def test_other_data_or_a_damaged_state_is_not_resumed(model, data, config):
    other = finetune.from_tensors(patterns(92, 1), patterns(40, 2), CLASSES)
    with pytest.raises(DataError, match="train_images: 96 then, 92 now"):
        finetune.resume(config().output, model=model, data=other)
    with pytest.raises(CheckpointError, match="does not fit"):
        finetune.resume(config().output, model=_wider(), data=data)
    directory = RunDirectory(config().output)
    directory.last.write_bytes(directory.last.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        finetune.resume(config().output, model=model, data=data)
    with pytest.raises(CheckpointError, match="there is no run to resume"):
        finetune.resume(directory.path / "nothing")


def _wider():
    model = tiny()
    model[6], model[9] = nn.Linear(128, 24), nn.Linear(24, 4)
    return model


def test_on_a_gpu_it_trains_with_fused_relus_and_saves_without(model, data, config, tmp_path, monkeypatch):
    """What is asked of a GPU, and then the CPU in its place: the same files whatever state is trained or given."""
    assert network.fuses(torch.device("cuda", 1)) and not network.fuses(torch.device("cpu"))
    trained = []

    class Noting(loop.Trainer):
        def fit(self, stop):
            trained.append(
                {bool(m.activation) for m in self.network.modules() if isinstance(m, bnsurgery.nn.BatchNorm2d)}
            )
            super().fit(stop)

    monkeypatch.setattr(loop, "Trainer", Noting)
    batches = (data.train.items.float() / 255).split(32)
    given = {state: bnsurgery.insert(model, batches, fuse_relu=state) for state in (False, True)}
    kept = {}
    for fuses in (False, True):
        for state, source in given.items():
            monkeypatch.setattr(network, "fuses", lambda device, fuses=fuses: fuses)
            chosen = config(output=str(tmp_path / f"{fuses}-{state}"), epochs=1, evaluations=2)
            result = finetune.run(chosen, model=source, data=data)
            last = torch.load(result.directory / "last" / "state.pt", weights_only=True)["network"]
            kept[fuses, state] = (result.directory / "best.safetensors").read_bytes(), last
            best = bnsurgery.load(result.directory / "best.safetensors", model=model)
            assert not bnsurgery.record(best).options.fuse_relu and type(best[2]) is nn.ReLU
    assert trained == [{False}, {False}, {True}, {True}]
    expected, state = kept[False, False]
    for best, last in kept.values():
        assert best == expected
        assert all(torch.equal(tensor, last[name]) for name, tensor in state.items())


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_buffers_of_any_kind_come_through_a_run(ema, model, data, config, tmp_path):
    buffers = {
        "order": torch.arange(4).flip(0),
        "mask": torch.tensor([0.0, -torch.inf]),
        "used": torch.tensor([True, False]),
        "phase": torch.complex(torch.ones(2), torch.arange(2.0)),
    }
    for name, buffer in buffers.items():
        model.register_buffer(name, buffer)
    chosen = config(epochs=1, ema=ema)
    finetune.run(chosen, model=model, data=data)
    finetune.resume(chosen.output, model=model, data=data)
    best = bnsurgery.load(RunDirectory(chosen.output).best, model=model)
    assert all(torch.equal(best.get_buffer(name), buffer) for name, buffer in buffers.items())
    bnsurgery.export(best, tmp_path / "folded.pth", to="state-dict")
    folded = torch.load(tmp_path / "folded.pth", weights_only=True)
    assert all(torch.equal(folded[name], buffer) for name, buffer in buffers.items())


def test_the_last_incomplete_batch_is_trained_on_and_what_is_left_is_said(config, model, data, capsys):
    base = config(epochs=1, batch_size=24, limit=None)
    fewer = replace(data, train=replace(data.train, labels=data.train.labels[:50]))
    result = finetune.run(base, model=model, data=fewer, save=False, show=True)
    assert result.final.step == 3 and result.final.epoch == 1
    assert "left out" not in capsys.readouterr().out
    fewer = replace(data, train=replace(data.train, labels=data.train.labels[:49]))
    assert finetune.run(base, model=model, data=fewer, save=False, show=True).final.step == 2
    assert "left out     1 image in each epoch" in capsys.readouterr().out


def test_the_plain_arm_is_a_run_like_the_others(config, model, data, tmp_path):
    """Kept, loaded, folded, gone on with, and a network to start from."""
    plain = config(arm="plain", epochs=2)
    result = finetune.run(plain, model=model, data=data)
    best = bnsurgery.load(result.directory / "best.safetensors", model=model)
    assert not [m for m in best.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert bnsurgery.record(best).sites == () and bnsurgery.record(best).task.classes == data.classes
    images = patterns(4, 3)[0].float() / 255
    folded = bnsurgery.fold(best)
    assert type(folded) is type(model) and folded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(folded(images), best(images)) and not torch.equal(folded(images), model(images))
    again = finetune.resume(result.directory, model=model, data=data)
    assert again.rows == result.rows
    for arm in ("bn", "plain"):  # from what is kept
        trained = finetune.run(replace(plain, arm=arm, output=str(tmp_path / arm)), model=best, data=data)
        kept = bnsurgery.load(trained.directory / "best.safetensors", model=model)
        assert bool(bnsurgery.record(kept).sites) == (arm == "bn")


def test_the_seconds_of_a_run_leave_setting_up_out(config, model, data, monkeypatch):
    """By a clock that the setup alone moves."""
    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    build = runs.build

    def slow(*args):
        now[0] += 100
        return build(*args)

    def step(trainer, *args, original=loop.Trainer.train_step):
        now[0] += 1
        return original(trainer, *args)

    monkeypatch.setattr(runs, "build", slow)
    monkeypatch.setattr(loop.Trainer, "train_step", step)
    assert finetune.run(config(epochs=1), model=model, data=data, save=False).seconds == 6
    monkeypatch.setattr(loop.Trainer, "_validate", diverge)
    with pytest.raises(finetune.DivergedError) as error:
        finetune.run(config(epochs=1), model=model, data=data, save=False)
    assert error.value.seconds == 6


def diverge(trainer):
    raise finetune.DivergedError("no number")


@pytest.mark.parametrize(
    ("asked", "chosen", "reason"), [("auto", "crop", "the default for tensors"), ("none", "none", "as asked")]
)
def test_the_augmentation_is_printed_and_recorded(asked, chosen, reason, config, model, data, capsys):
    finetune.run(config(augment=asked, epochs=1), model=model, data=data, show=True)
    assert f"augment      {chosen}: {reason}\n" in capsys.readouterr().out
    resolved = RunDirectory(config().output).read_config()[2]
    assert (resolved.augment, resolved.augment_reason) == (chosen, reason)


@pytest.mark.parametrize("train", ["all", "head"])
def test_frozen_parameters_that_are_trained_are_printed(train, config, model, data, capsys):
    model[0].requires_grad_(False)
    finetune.run(config(arm="plain", train=train, epochs=1), model=model, data=data, show=True)
    line = "trained      all, 2 parameters of which took no gradient before, the first: 0.weight. "
    assert (line in capsys.readouterr().out) is (train == "all")


@pytest.mark.parametrize(
    ("lr", "clip", "advice"),
    [
        (900.0, 5.0, "`lr=0.0125` or `clip=1`"),  # the default for a batch of 16
        (900.0, 0.0, "`clip=5`, then `lr=0.0125`"),
        (0.0125, 1.0, "`lr=0.004`"),
    ],
)
def test_a_diverged_run_advises_what_was_not_tried(lr, clip, advice, config, model, data, monkeypatch):
    def forward(self, labels, images):
        return self.network(images).sum() * torch.nan, labels.sum()

    monkeypatch.setattr(recipe.Objective, "forward", forward)
    with pytest.raises(finetune.DivergedError) as error:
        finetune.run(config(lr=lr, clip=clip, statistics="batch"), model=model, data=data)
    assert str(error.value).endswith(f" Try {advice}, with another `output`.")
