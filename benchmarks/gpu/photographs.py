"""Fine-tuning of SqueezeNet 1.0 to photographs of waste: without BatchNorm, with it inserted, with a fresh one."""

import time
from dataclasses import replace

from torch import nn

from bnsurgery import finetune

from .job import Job, NotPossible
from .networks import squeezenet

RATES = (0.01, 0.1, 0.03, 0.3)
ARMS = ("plain", "bn", "bn-naive")


def step(job: Job) -> None:
    if job.data is None or not (job.data / "trash").is_dir():
        raise NotPossible("needs trained weights and photographs, the folder of --data with trash/ in it")
    model = squeezenet(job.data)
    config = finetune.Config(
        data=str(job.data / "trash"), output="unused", image_size=48 if job.quick else 88, epochs=1 if job.quick else 4,
        limit=128 if job.quick else None, recalibrate=64 if job.quick else 1024, batch_size=64,
        device="cpu" if job.device == "cpu" else "auto",
    )  # fmt: skip
    trials = [(rate, arm) for rate in RATES[: 1 if job.quick else None] for arm in ARMS]
    best: dict[str, tuple[float, float]] = {}
    longest = 0.0
    for done, (rate, arm) in enumerate(trials):
        if job.left() < longest:
            job.row("left out", what=f"{len(trials) - done} of {len(trials)} trials", reason="no time left")
            break
        start = time.monotonic()
        with job.part(f"{arm} at {rate}"):
            accuracy, seconds = trial(job, config, model, arm, rate)
            print(f"{arm} at {rate}: {accuracy}, {seconds:.1f} s", flush=True)
            best[arm] = max(best.get(arm, (0.0, 0.0)), (accuracy or 0.0, rate))
        longest = max(longest, time.monotonic() - start)
    for arm, (accuracy, rate) in best.items():
        job.key(f"{arm}: {100 * accuracy:.1f} % at its best rate, {rate:g}")


def trial(job: Job, config: finetune.Config, model: nn.Module, arm: str, rate: float) -> tuple[float | None, float]:
    """One run: its last accuracy, None where it diverged, and its seconds."""
    start = time.monotonic()
    figures: dict[str, object] = {}
    try:
        result = finetune.run(replace(config, arm=arm, lr=rate), model=model, save=False)
        last = result.final
        figures = {
            "accuracy, %": 100 * last.val_accuracy, "loss": last.val_loss, "statistics": result.resolved.statistics,
            "steps": last.step, "images a second": last.images_per_second,
        }  # fmt: skip
        accuracy: float | None = last.val_accuracy
    except finetune.DivergedError as error:
        accuracy, figures = None, {"diverged": str(error)}
    seconds = time.monotonic() - start
    job.row(
        f"SqueezeNet 1.0 to 6 classes of waste, {config.image_size}×{config.image_size}",
        rate=rate,
        arm=arm,
        **figures,
        seconds=seconds,
    )
    return accuracy, seconds
