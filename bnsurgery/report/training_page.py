"""The pages of fine-tuning: of a run, and of a comparison."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bnsurgery.finetune.figures import (
    NORM_PANELS,
    by_norm,
    default_panels,
    plot_comparison,
    plot_curves,
    plot_norms,
    seconds_by_arm,
)
from bnsurgery.finetune.own_data import FOR_IMAGES
from bnsurgery.networks import factories
from bnsurgery.pages.page import Report, Section, Table
from bnsurgery.text.words import counted, percent, thousands

if TYPE_CHECKING:
    from bnsurgery.finetune import Comparison, Config, NormRow, Result


def training(result: "Result", config: "Config", *, title: str | None = None) -> Report:
    """Report on a run.

    Args:
        result: the result of `finetune.run`, or of `finetune.Result.read`.
        config: the options it was started with.
        title: of the page.

    Examples:
        >>> from bnsurgery.finetune.results import Resolved, Row
        >>> row = Row(1.0, 10, 0.1, 0.5, 0.75, 0.4, 0.8, 99.0)
        >>> resolved = Resolved(0.1, "batch", "64 images", "as asked", "kept", "crop", "as asked", 64)
        >>> result = bnsurgery.finetune.Result(None, (row,), resolved)
        >>> config = bnsurgery.finetune.Config(data="photos", output="runs/x", source="vgg11", epochs=1)
        >>> bnsurgery.report.training(result, config).verdict
        '80.00 % of the validation images right, in epoch 1 of 1.'
    """
    best, final, resolved = result.best, result.final, result.resolved
    measures = ("training loss", "training accuracy", "validation loss", "validation accuracy")
    rows = []
    for row in result.rows:
        measured = (row.train_loss, percent(row.train_accuracy), row.val_loss, percent(row.val_accuracy))
        speed = thousands(row.images_per_second)
        rows.append((f"{row.epoch:.4g}", row.step, f"{row.lr:.3g}", *measured, speed))
    validations = Table(("epoch", "step", "learning rate", *measures, "images/s"), rows)
    curves = {panel: plot_curves(result.rows, (panel,), resolved.start_accuracy) for panel in ("loss", "accuracy")}
    chosen = {"augment": resolved.augment, "batch_size": resolved.batch_size}
    options = [(key, str(chosen.get(key, value))) for key, value in _applying(config).items()]
    right = f"{percent(best.val_accuracy)} of the validation {result.thing}s right"
    verdict = f"{right}, in epoch {best.epoch:.4g} of {config.epochs}."
    if final.epoch < config.epochs:
        verdict += f" The run was stopped, or is running: its last validation was in epoch {final.epoch:.4g}."
    return Report(
        title=title or f"{config.source or config.model or 'network'} fine-tuned on {config.data}",
        verdict=verdict,
        good=None,
        facts=(
            ("accuracy", f"{percent(best.val_accuracy)} at best, {percent(final.val_accuracy)} at the end"),
            *((("at start", percent(resolved.start_accuracy)),) if resolved.start_accuracy is not None else ()),
            *((("task", str(resolved.kind)),) if resolved.kind else ()),
            ("peak learning rate", f"{resolved.lr:.3g}: {resolved.lr_reason}"),
            ("statistics", f"{resolved.statistics}: {resolved.reason}"),
            ("head", resolved.head),
            ("augmentation", f"{resolved.augment}: {resolved.augment_reason}"),
            ("steps", thousands(final.step)),
        ),
        sections=(
            Section("Curves" if len(rows) > 1 else "The one validation", figures=curves),
            Section("Validations", table=validations),
            *([_norms(result.norms)] if result.norms else ()),
            Section("Options", table=Table(("option", "value"), options)),
        ),
        terms=("accuracy", "loss", "batch", "renorm", "running"),
    )


def _norms(rows: Sequence["NormRow"]) -> Section:
    """The statistics of every BatchNorm at the first and the last validation, and their curves in between."""
    norms = by_norm(rows)
    ends = {name: (line[0], line[-1]) for name, line in norms.items()}
    headers = ("norm", "channels", "dead at first", "dead at the end", "σ at first", "σ at the end")
    cells = [
        (name, last.channels, first.dead, last.dead, first.median, last.median, last.smallest, last.largest)
        for name, (first, last) in ends.items()
    ]
    table = Table((*headers, "smallest σ", "largest σ"), cells)
    worst = max(ends.values(), key=lambda pair: pair[1].dead / pair[1].channels)[1]
    dead, channels = (sum(getattr(last, field) for _, last in ends.values()) for field in ("dead", "channels"))
    text = f"Of {counted(channels, 'channel')} in {counted(len(norms), 'norm')}, {thousands(dead)} are dead at the end"
    text += f", the largest share at {worst.norm}: {worst.dead} of {worst.channels}." if dead else "."
    drawn = [panel for panel in NORM_PANELS if panel != "dead" or any(row.dead for row in rows)]
    several = len({row.step for row in rows}) > 1
    figures = {f"norms-{panel}": plot_norms(rows, (panel,)) for panel in drawn} if several else {}
    return Section("BatchNorms over training", (text,), table, figures=figures)


def _applying(config: "Config") -> dict[str, Any]:
    """The options that have a value and mean something for the network and data of `config`."""
    idle = {*FOR_IMAGES} if factories.names_code(config.data) else set()
    named = config.model or config.source
    if config.weights == "DEFAULT" and not (factories.is_timm(named) or factories.is_torchvision(named)):
        idle.add("weights")
    return {key: value for key, value in asdict(config).items() if value not in ("", None) and key not in idle}


def comparison(result: "Comparison", *, title: str | None = None) -> Report:
    """Report on a comparison.

    Args:
        result: the result of `finetune.compare`.
        title: of the page.

    Examples:
        >>> from bnsurgery.finetune.comparison import Trial
        >>> from bnsurgery.finetune.results import Row
        >>> rows = (Row(1.0, 10, 0.1, 0.5, 0.75, 0.4, 0.8, 99.0),)
        >>> trials = tuple(Trial(arm, 0.1, 0, "batch", None, rows, 2.0) for arm in ("plain", "bn"))
        >>> list(bnsurgery.report.comparison(bnsurgery.finetune.Comparison("digits", trials)).figures)
        ['by-step', 'time']
    """
    summary, seconds = result.summary(), seconds_by_arm(result)
    judged_by = ("at start", "accuracy", "spread", "at rate", "trains to")
    headers = ("arm", "statistics", *judged_by, "steps", "to plain's", "seconds")
    rows = []
    for arm in summary:
        rated = (_rate(arm.lr), _rate(arm.largest_lr))
        judged = (percent(arm.start), percent(arm.accuracy), percent(arm.spread), *rated)
        rows.append((arm.arm, arm.statistics or "none", *judged, arm.steps, arm.to_plain, seconds.get(arm.arm)))
    rates, raced_out = result.rates, sum(trial.raced_out for trial in result.trials)
    chart = Table(("arm", *(f"{lr:g}" for lr in rates)), [(arm.arm, *map(arm.ending, rates)) for arm in summary])
    text = "Validation accuracy at the end, mean over the seeds. A rate diverges if one of its seeds does."
    if raced_out:
        text += " One that is raced out was stopped before the end, because other rates of the arm were ahead."
    if len(rates) == 1:
        text = f"Only {rates[0]:g} was tried: the accuracy of the arms at other rates is not known."
    diverged = [f"{t.arm} at {t.lr:g}, seed {t.seed}: {t.diverged}" for t in result.trials if t.diverged]
    names = {"steps": "by-step", "rates": "by-rate"}
    panels = default_panels(result) if result.winner else ()
    figures = {names[panel]: plot_comparison(result, (panel,)) for panel in panels}
    texts = ["The arms differ only in BatchNorm: images, their order, head, recipe and budget are the same."]
    texts += [] if result.winner else ["Every run diverged: there is nothing to draw."]
    sections = [
        Section("The arms, each at its best rate", tuple(texts), Table(headers, rows), figures=figures),
        Section("By learning rate", (text,), chart if len(rates) > 1 else None),
    ]
    if seconds:
        sections.append(Section("Time", figures={"time": plot_comparison(result, ("seconds",))}))
    if diverged:
        sections.append(Section("Diverged runs", tuple(diverged)))
    raced = f" and {raced_out} were raced out" if raced_out else ""
    return Report(
        title=title or f"Does BatchNorm help? {result.task}",
        verdict=result.verdict(),
        good=None,
        facts=(
            ("runs", f"{len(result.trials)}, of which {len(diverged)} diverged{raced}"),
            ("seeds", str(len({trial.seed for trial in result.trials}))),
            ("judged on", "the test part" if result.tested else "the validation part, which also chose the rates"),
            *((("task", str(result.kind)),) if result.kind else ()),
        ),
        sections=tuple(sections),
        terms=tuple(result.arms),
    )


def _rate(lr: float | None) -> str | None:
    return None if lr is None else f"{lr:g}"
