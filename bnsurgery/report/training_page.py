"""The pages of fine-tuning: of a run, and of a comparison."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from bnsurgery.finetune.figures import plot_comparison, plot_curves, seconds_by_arm, telling_panels
from bnsurgery.pages.page import Report, Section, table
from bnsurgery.text.words import percent, thousands

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
            percent(r.train_accuracy),
            r.val_loss,
            percent(r.val_accuracy),
            thousands(r.images_per_second),
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
        verdict=f"{percent(best.val_accuracy)} of the validation images right, in epoch {best.epoch:.4g} "
        f"of {config.epochs}.{_unfinished(result, config)}",
        good=None,
        facts=(
            ("accuracy", f"{percent(best.val_accuracy)} at best, {percent(result.final.val_accuracy)} at the end"),
            ("peak learning rate", f"{resolved.lr:.3g}: {resolved.lr_reason}"),
            ("statistics", f"{resolved.statistics}: {resolved.reason}"),
            ("steps", thousands(result.final.step)),
        ),
        sections=(
            Section("Curves" if len(rows) > 1 else "The one validation", figures=figures),
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
            percent(s.accuracy),
            percent(s.spread),
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
    by_rate = [(s.arm, *map(s.ending, rates)) for s in summary]
    diverged = [f"{t.arm} at {t.lr:g}, seed {t.seed}: {t.diverged}" for t in result.trials if t.diverged]
    names = {"steps": "by-step", "rates": "by-rate"}
    panels = telling_panels(result) if result.winner else ()
    figures = {names[panel]: plot_comparison(result, (panel,)) for panel in panels}
    said = "Same images in the same order, same head, same recipe and budget: only the BatchNorm differs."
    tried = Section(
        "By learning rate",
        ("Accuracy at the end, mean over the seeds; a rate diverges where one of the seeds does.",),
        table(("arm", *(f"{lr:g}" for lr in rates)), by_rate),
    )
    if len(rates) == 1:
        tried = Section(tried.heading, (f"One was tried, {rates[0]:g}: how the arms take to others is not known.",))
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
                (said,) if result.winner else (said, "Every run diverged: there is nothing to draw."),
                table(headers, judged),
                figures=figures,
            ),
            tried,
            *([Section("Time", figures={"time": plot_comparison(result, ("seconds",))})] if seconds else []),
            *([Section("What diverged", tuple(diverged))] if diverged else []),
        ),
        terms=tuple(result.arms),
    )


def _unfinished(result: "Result", config: "Config") -> str:
    if result.final.epoch >= config.epochs:
        return ""
    return f" The run was stopped, or is running: its last validation was in epoch {result.final.epoch:.4g}."


def _rate(lr: float | None) -> str | None:
    return None if lr is None else f"{lr:g}"
