"""The pages of fine-tuning: of a run, and of a comparison."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from .page import Report, Section, table
from .training_figures import plot_comparison, plot_curves, seconds_by_arm

if TYPE_CHECKING:
    from bnsurgery.finetune import Comparison, Config, Result


def training(result: "Result", config: "Config", *, title: str | None = None) -> Report:
    """Report on a run.

    Args:
        result: what `finetune.run` gave, or `finetune.Result.read`.
        config: the options it was started with.
        title: of the page.
    """
    best, resolved = result.best, result.resolved
    name = config.source or config.model or "network"
    rows = [
        (
            f"{r.epoch:.4g}",
            r.step,
            f"{r.lr:.3g}",
            r.train_loss,
            _percent(r.train_accuracy),
            r.val_loss,
            _percent(r.val_accuracy),
            f"{r.images_per_second:.0f}",
        )
        for r in result.rows
    ]
    headers = (
        "epoch",
        "step",
        "learning rate",
        "training loss",
        "training accuracy",
        "validation loss",
        "validation accuracy",
        "images/s",
    )
    figures = {panel: plot_curves(result.rows, (panel,)) for panel in ("loss", "accuracy")}
    options = [(key, str(value)) for key, value in asdict(config).items() if value not in ("", None)]
    return Report(
        title=title or f"{name} fine-tuned on {config.data}",
        verdict=f"{100 * best.val_accuracy:.2f} % of the validation images right, in epoch {best.epoch:.4g} "
        f"of {config.epochs}.{_unfinished(result, config)}",
        good=None,
        facts=(
            ("accuracy", f"{_percent(best.val_accuracy)} at best, {_percent(result.final.val_accuracy)} at the end"),
            ("peak learning rate", f"{resolved.lr:.3g}: {resolved.lr_reason}"),
            ("statistics", f"{resolved.statistics}: {resolved.reason}"),
            ("steps", f"{result.final.step}"),
        ),
        sections=(
            Section("Curves", figures=figures),
            Section("Validations", table=table(headers, rows)),
            Section("Options", table=table(("option", "value"), options)),
        ),
        terms=("accuracy", "loss", "batch", "renorm", "running"),
    )


def comparison(result: "Comparison", *, title: str | None = None) -> Report:
    """Report on a comparison: what `finetune.compare` gave."""
    summary = result.summary()
    seconds = seconds_by_arm(result)
    judged = [
        (
            s.arm,
            s.statistics or "none",
            _percent(s.accuracy),
            _percent(s.spread),
            _rate(s.lr),
            _rate(s.largest_lr),
            s.steps,
            s.to_plain,
            seconds.get(s.arm),
        )
        for s in summary
    ]
    headers = ("arm", "statistics", "accuracy", "spread", "at rate", "trains to", "steps", "to plain's", "seconds")
    rates = sorted({trial.lr for trial in result.trials})
    by_rate = [
        (s.arm, *((_percent(s.by_rate[lr]) or "diverges") if lr in s.by_rate else None for lr in rates))
        for s in summary
    ]
    diverged = [f"{t.arm} at {t.lr:g}, seed {t.seed}: {t.diverged}" for t in result.trials if t.diverged]
    panels = {"by-step": "steps", "by-rate": "rates", **({"time": "seconds"} if seconds else {})}
    figures = {name: plot_comparison(result, (panel,)) for name, panel in panels.items()}
    return Report(
        title=title or f"Does BatchNorm help? {result.task}",
        verdict=result.verdict(),
        good=None,
        facts=(
            ("runs", f"{len(result.trials)}, of which {len(diverged)} diverged"),
            ("seeds", str(len({trial.seed for trial in result.trials}))),
        ),
        sections=(
            Section(
                "The arms, each at its own best rate",
                ("Same images in the same order, same head, same recipe and budget: only the BatchNorm differs.",),
                table(headers, judged),
                figures={name: figures[name] for name in ("by-step", "by-rate")},
            ),
            Section(
                "By learning rate",
                ("Accuracy at the end, mean over the seeds; a rate diverges where one of the seeds does.",),
                table(("arm", *(f"{lr:g}" for lr in rates)), by_rate),
            ),
            *([Section("Time", figures={"time": figures["time"]})] if seconds else []),
            *([Section("What diverged", tuple(diverged))] if diverged else []),
        ),
        terms=tuple(result.arms),
    )


def _unfinished(result: "Result", config: "Config") -> str:
    if result.final.epoch >= config.epochs:
        return ""
    return f" The run was stopped, or is running: its last validation was in epoch {result.final.epoch:.4g}."


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.2f}%"


def _rate(lr: float | None) -> str | None:
    return None if lr is None else f"{lr:g}"
