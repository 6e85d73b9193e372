"""The pages of fine-tuning: of a run, and of a comparison."""

from collections.abc import Callable, Iterable, Sequence
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
    validations = _table(
        {
            "epoch": lambda row: f"{row.epoch:.4g}",
            "step": lambda row: row.step,
            "learning rate": lambda row: f"{row.lr:.3g}",
            "training loss": lambda row: row.train_loss,
            "training accuracy": lambda row: percent(row.train_accuracy),
            "validation loss": lambda row: row.val_loss,
            "validation accuracy": lambda row: percent(row.val_accuracy),
            "images/s": lambda row: thousands(row.images_per_second),
        },
        result.rows,
    )
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
            Section(
                "Curves" if len(result.rows) > 1 else "The one validation",
                figures={panel: plot_curves(result.rows, (panel,)) for panel in ("loss", "accuracy")},
            ),
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
    table = _table(
        {
            "norm": lambda pair: pair[1].norm,
            "channels": lambda pair: pair[1].channels,
            "dead at first": lambda pair: pair[0].dead,
            "dead at the end": lambda pair: pair[1].dead,
            "σ at first": lambda pair: pair[0].median,
            "σ at the end": lambda pair: pair[1].median,
            "smallest σ": lambda pair: pair[1].smallest,
            "largest σ": lambda pair: pair[1].largest,
        },
        ends.values(),
    )
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
    judged = _table(
        {
            "arm": lambda arm: arm.arm,
            "statistics": lambda arm: arm.statistics or "none",
            "at start": lambda arm: percent(arm.start),
            "accuracy": lambda arm: percent(arm.accuracy),
            "spread": lambda arm: percent(arm.spread),
            "at rate": lambda arm: _rate(arm.lr),
            "trains to": lambda arm: _rate(arm.largest_lr),
            "steps": lambda arm: arm.steps,
            "to plain's": lambda arm: arm.to_plain,
            "seconds": lambda arm: seconds.get(arm.arm),
        },
        summary,
    )
    rates = sorted({trial.lr for trial in result.trials})
    if len(rates) == 1:
        text = f"Only {rates[0]:g} was tried, so how the arms do at other rates is not known."
        by_rate = Section("By learning rate", (text,))
    else:
        by_rate = Section(
            "By learning rate",
            ("Validation accuracy at the end, mean over the seeds. A rate diverges if one of its seeds does.",),
            Table(("arm", *(f"{lr:g}" for lr in rates)), [(arm.arm, *map(arm.ending, rates)) for arm in summary]),
        )
    diverged = [f"{t.arm} at {t.lr:g}, seed {t.seed}: {t.diverged}" for t in result.trials if t.diverged]
    names = {"steps": "by-step", "rates": "by-rate"}
    panels = default_panels(result) if result.winner else ()
    texts = ["Same images in the same order, same head, same recipe and budget: only the BatchNorm differs."]
    if not result.winner:
        texts.append("Every run diverged: there is nothing to draw.")
    sections = [
        Section(
            "The arms, each at its best rate",
            tuple(texts),
            judged,
            figures={names[panel]: plot_comparison(result, (panel,)) for panel in panels},
        ),
        by_rate,
    ]
    if seconds:
        sections.append(Section("Time", figures={"time": plot_comparison(result, ("seconds",))}))
    if diverged:
        sections.append(Section("What diverged", tuple(diverged)))
    return Report(
        title=title or f"Does BatchNorm help? {result.task}",
        verdict=result.verdict(),
        good=None,
        facts=(
            ("runs", f"{len(result.trials)}, of which {len(diverged)} diverged"),
            ("seeds", str(len({trial.seed for trial in result.trials}))),
            ("judged on", "the test part" if result.tested else "the validation part, which also chose the rates"),
            *((("task", str(result.kind)),) if result.kind else ()),
        ),
        sections=tuple(sections),
        terms=tuple(result.arms),
    )


def _table(columns: dict[str, Callable[[Any], object]], items: Iterable[Any]) -> Table:
    """One row an item, one column a header and the function that gives its cell."""
    return Table(tuple(columns), [tuple(cell(item) for cell in columns.values()) for item in items])


def _rate(lr: float | None) -> str | None:
    return None if lr is None else f"{lr:g}"
