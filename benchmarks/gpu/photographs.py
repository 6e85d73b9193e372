"""Fine-tuning on photographs of waste: without BatchNorm, with it inserted, with a fresh one; several trials at a time.

The validation part chooses the rate of an arm, the test part is only reported. SqueezeNet 1.0 comes with ImageNet's
weights. No weights of a full-size VGG-16 can travel, so it is trained here on half of the classes: as vgg16_bn, which
learns from nothing in seconds, and folded into a stock vgg16.
"""

import functools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models.vgg import make_layers

import bnsurgery
from benchmarks.tasks import TASKS, TRASH, divided, photographs
from bnsurgery.errors import BNSurgeryError
from bnsurgery.finetune import Comparison, Config, Data, Trial
from bnsurgery.finetune.grid import Run
from bnsurgery.finetune.setup import processes
from bnsurgery.finetune.trials import train_trial, trial_config
from bnsurgery.images.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from bnsurgery.text.words import counted, percent

from .job import Job, NotPossible

ARMS = ("plain", "bn", "bn-naive")
SEEDS = 3
RATES = (0.01, 0.03, 0.003, 0.1, 0.001, 0.3)  # the most telling first
VGG_RATES = (0.01, 0.003, 0.03)
OLD, NEW = ("cardboard", "glass", "paper"), ("metal", "plastic", "trash")
Task = Callable[[], tuple[nn.Module, Data]]


def squeezenet(job: Job) -> None:
    """The task "trash" of benchmarks.compare_tasks over the whole grid."""
    config = _config(job)
    name = f"{TASKS['trash'].description}, {config.image_size}×{config.image_size}"
    compare(job, name, functools.partial(_squeezenet, job.quick), config, keys(job, RATES), 12)


def vgg16(job: Job) -> None:
    """VGG-16 at its full size, trained on three classes, to the three others."""
    config = replace(_config(job), head="new")
    name = f"VGG-16 trained on {', '.join(OLD)}, to {', '.join(NEW)}"
    with tempfile.TemporaryDirectory() as folder:  # half a gigabyte
        file = Path(folder, "vgg16.pt")
        torch.save(pretrain(job).state_dict(), file)
        compare(job, name, functools.partial(_vgg16, file, job.quick), config, keys(job, VGG_RATES), 9)


def _config(job: Job) -> Config:
    """The options that both share; raises where the step cannot be done."""
    if job.data is None or not (job.data / "trash").is_dir():
        raise NotPossible("needs trained weights and photographs, the folder of --data with trash/ in it")
    config = replace(TASKS["trash"].config, device="cpu" if job.device == "cpu" else "auto")
    try:
        processes(config)
    except BNSurgeryError as error:  # a package is not there, and nothing is installed
        raise NotPossible(str(error)) from error
    return replace(config, image_size=32, epochs=1, recalibrate=64) if job.quick else config


def keys(job: Job, rates: Sequence[float]) -> list[Run]:
    """Arm, rate and seed of the trials: all rates with one seed before the next seed."""
    seeds, rates = (1, rates[:1]) if job.quick else (SEEDS, rates)
    return [(arm, rate, seed) for seed in range(seeds) for rate in rates for arm in ARMS]


@functools.cache  # once a process
def _squeezenet(quick: bool) -> tuple[nn.Module, Data]:
    task = TASKS["trash"]
    return task.network(), _data(TRASH, 32, (96, 48, 48)) if quick else task.data()


@functools.cache
def _vgg16(file: Path, quick: bool) -> tuple[nn.Module, Data]:
    model = network(False, quick)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval(), _data(NEW, 32, (48, 24, 24)) if quick else _data(NEW, 96, (400, 300, 329))


def _data(classes: Sequence[str], side: int, counts: tuple[int, int, int]) -> Data:
    return divided(*photographs(side, classes, sum(counts)), counts, classes, "photographs of waste")


def network(batch_norm: bool, quick: bool) -> models.VGG:
    """VGG-16 of torchvision for the old classes; a quick one has five narrow convs and dense layers of 64 features."""
    if not quick:
        return (models.vgg16_bn if batch_norm else models.vgg16)(num_classes=len(OLD), init_weights=batch_norm)
    with torch.device("meta"):  # its 120 million weights are replaced
        model = models.VGG(nn.Identity(), num_classes=len(OLD), init_weights=False)
    model.features = make_layers([16, "M", 32, "M", 64, "M", 64, "M", 64, "M"], batch_norm)
    layers = [nn.Linear(64 * 7 * 7, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout()]
    model.classifier = nn.Sequential(*layers, nn.Linear(64, len(OLD)))
    return model


def pretrain(job: Job) -> nn.Module:
    """A stock VGG-16 that knows the old classes: a vgg16_bn trained from random weights, and folded."""
    start = time.monotonic()
    torch.manual_seed(0)
    epochs, size, count = (1, 32, 64) if job.quick else (50, 64, 1200)
    side, most = (32, 96) if job.quick else (96, None)
    images, labels = (tensor.to(job.device) for tensor in photographs(side, OLD, most))
    model = network(True, job.quick).to(job.device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, epochs * (count // size), cycle_momentum=False)
    done = 0
    while done < epochs and job.left() > job.seconds / 2:
        for batch in torch.randperm(count)[: count - count % size].to(job.device).split(size):
            with torch.autocast(job.device, torch.bfloat16, enabled=job.device == "cuda"):
                loss = F.cross_entropy(model(augmented(images[batch])), labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
        done += 1
    stock = network(False, job.quick).to(job.device).eval()
    tensors = bnsurgery.fold(model.eval()).state_dict().values()  # the same, under names that count the norms
    stock.load_state_dict(dict(zip(stock.state_dict(), tensors, strict=True)))
    before, after = (accuracy(each, images[count:], labels[count:]) for each in (model, stock))
    seconds = time.monotonic() - start
    shares = in_percent({"with BatchNorm, %": before, "folded, %": after})
    job.row(f"VGG-16 on {', '.join(OLD)}, held out", images=count, epochs=done, **shares, seconds=seconds)
    job.key(f"VGG-16 from random weights: {percent(after, '.1f')} of {len(OLD)} classes in {seconds:.0f} s")
    return stock.cpu()


def augmented(images: Tensor) -> Tensor:
    """Normalized, shifted by up to a twelfth, half of them flipped."""
    side = images.shape[-1]
    flipped = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    images = normalized(torch.where(flipped, images.flip(3), images))
    most = side // 12
    top, left = torch.randint(2 * most + 1, (2,)).tolist()
    return F.pad(images, [most] * 4, mode="replicate")[..., top : top + side, left : left + side]


def normalized(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((images / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of the images whose class is found."""
    outputs = torch.cat([model(normalized(batch)) for batch in images.split(64)])
    return (outputs.argmax(1) == labels).double().mean().item()


def compare(job: Job, name: str, task: Task, config: Config, wanted: Sequence[Run], most: int) -> None:
    """Report trials as they end, in up to `most` processes and in the order of `wanted`, until there is no time left.

    Last a summary of those rates that all arms have finished with the same seeds.
    """
    processors = os.cpu_count() or 1
    workers = min(most, len(wanted), max(1, processors - 2))
    each = max(1, processors // workers)
    context, others = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(each,))
    measuring = next(key for key in wanted if key[0] == "bn")  # the trial that also measures the kind of the task
    running = {pool.submit(_trial, task, key, trial_config(config, *key), key == measuring): key for key in wanted}
    found: list[Trial] = []
    with job.part("the trials"):
        try:
            for future in as_completed(running, max(0.0, job.left())):
                if isinstance(error := future.exception(), BrokenProcessPool):
                    raise error  # the others end like this, too
                arm, rate, seed = running[future]
                with job.part(f"{arm} at {rate:g}, seed {seed}"):
                    found.append(future.result())
                    tell(job, name, found[-1])
        except TimeoutError:
            left = len(running) - sum(future.done() for future in running)
            job.row("left out", what=f"{left} of {len(running)} trials", reason="no time left")
        finally:
            for child in set(multiprocessing.active_children()) - others:
                child.kill()
            pool.shutdown(cancel_futures=True)
    summarize(job, name, complete(found))


def _trial(task: Task, run: Run, config: Config, measures_kind: bool) -> Trial:
    return train_trial(run, config, *task(), measures_kind=measures_kind)[0]


def tell(job: Job, name: str, trial: Trial) -> None:
    """A row for a trial."""
    figures: dict[str, object] = {"diverged": trial.diverged}
    if trial.rows:
        end = trial.rows[-1]
        shares = {
            "at start, %": trial.start_accuracy,
            "validation, %": end.val_accuracy,
            "test, %": trial.test_accuracy,
        }
        figures = {
            **in_percent(shares), "by validation, %": [round(100 * row.val_accuracy, 1) for row in trial.rows],
            "statistics": trial.statistics, "steps": end.step, "seconds": trial.seconds,
        }  # fmt: skip
    job.row(name, arm=trial.arm, rate=trial.lr, seed=trial.seed, **figures)


def in_percent(shares: dict[str, float | None]) -> dict[str, float | None]:
    return {name: None if share is None else 100 * share for name, share in shares.items()}


def complete(trials: Iterable[Trial]) -> list[Trial]:
    """The trials at those rates that all arms have finished with the seeds 0 to n, for the n with the most of them."""
    trials = sorted(trials, key=lambda trial: (ARMS.index(trial.arm), trial.lr, trial.seed))
    done = {(trial.arm, trial.lr, trial.seed) for trial in trials}
    best: list[Trial] = []
    for seeds in range(1, SEEDS + 1):
        wanted = [(arm, seed) for arm in ARMS for seed in range(seeds)]
        rates = {trial.lr for trial in trials if all((arm, trial.lr, seed) in done for arm, seed in wanted)}
        best = max([t for t in trials if t.lr in rates and t.seed < seeds], best, key=len)  # of equals the first
    return best


def summarize(job: Job, name: str, trials: Sequence[Trial]) -> None:
    """What the trials say together."""
    if not trials:
        job.row("left out", what="the summary", reason="no rate has finished in all arms")
        return
    comparison = Comparison(name, tuple(trials))
    print(comparison, flush=True)
    seeds = counted(len({trial.seed for trial in trials}), "seed")
    for s in comparison.summary():
        shares = {"at start, %": s.start, "test, %": s.accuracy, "spread, points": s.spread}
        by_rate = {f"validation at {rate:g}": s.ending(rate) for rate in comparison.rates}
        job.row(
            f"{name}: each arm at its best rate, {seeds}", arm=s.arm,
            **in_percent(shares), rate=s.lr, steps=s.steps, **{"steps to plain's": s.to_plain}, **by_rate,
        )  # fmt: skip
        spread = "" if s.spread is None else f", spread {percent(s.spread, '.1f')}"
        at = "every rate diverged" if s.lr is None else f"{percent(s.accuracy, '.1f')} at its best rate, {s.lr:g}"
        job.key(f"{s.arm}: {at}{spread} ({seeds})")
    job.row("verdict", text=comparison.verdict())
