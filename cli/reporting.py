"""--report and --plot: checked before the work starts, written when it is done."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from bnsurgery.text.words import counted

from .options import claim

if TYPE_CHECKING:
    from bnsurgery.report import Report

F = TypeVar("F", bound=Callable[..., Any])

plot_option = click.option(
    "--plot", type=click.Path(path_type=Path), metavar="DIR", help="Write every figure as SVG and PNG into this folder."
)


def report_options(function: F) -> F:
    """--report and --plot."""
    page = click.option(
        "--report",
        "page",
        type=click.Path(path_type=Path),
        metavar="FILE.html",
        help="Write a page that shows what was done, with figures.",
    )
    return page(plot_option(function))


force_option = click.option("--force", is_flag=True, help="Replace the files of --report and --plot if they exist.")


def check_report(page: Path | None, plot: Path | None, force: bool, *others: str | Path | None) -> bool:
    """Whether a report is wanted at all; that it can be made and written is made sure of.

    Args:
        others: what the command reads or writes besides: the page must not take its place. A folder among them, or
            that of the figures, is made if the page goes into it.

    Raises:
        CheckpointError: a file is there already, cannot be written, or is one of the others.
        BNSurgeryError: matplotlib or Jinja is not installed.
    """
    from bnsurgery.errors import CheckpointError
    from bnsurgery.files.writing import check_writable, make_folder
    from bnsurgery.pages.page import require_libraries

    if page is None and plot is None:
        return False
    require_libraries()
    if plot is not None:
        if any(make_folder(plot).iterdir()) and not force:
            raise CheckpointError(f"write: '{plot}': got a folder that is not empty, expected an empty one, or --force")
        check_writable(plot / "figure.svg", overwrite=True)
    if page is not None:
        if page.suffix.lower() not in (".html", ".htm"):
            raise CheckpointError(f"write: '{page}': a report is an HTML page: give it a name that ends in .html")
        # realpath, for resolve raises where a link leads back to itself
        places = {os.path.realpath(other) for other in (*others, plot) if other is not None}
        if os.path.realpath(page) in places:
            raise CheckpointError(f"write: '{page}': this command needs that file itself: give the report another name")
        if os.path.realpath(page.parent) in places:
            make_folder(page.parent)
        claim(page, force)
    return True


def write_report(report: "Report", page: Path | None, plot: Path | None, force: bool) -> str:
    """Write what was asked for, and say so in a line each."""
    wrote = []
    if page is not None:
        report.save(page, overwrite=force)
        wrote.append(f"Wrote {page}.\n")
    if plot is not None:
        count = len(report.save_figures(plot, overwrite=force))
        wrote.append(f"Wrote {counted(count, 'figure')} into {plot}.\n")
    return "".join(wrote)


def written(page: Path | None, plot: Path | None) -> dict[str, str]:
    """For --json: where the report and the figures are."""
    return {name: str(path) for name, path in (("report", page), ("plot", plot)) if path is not None}
