"""How commands print and write: --json, --quiet, --force, --output, --report and --plot."""

import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO, cast

import click

import bnsurgery
from bnsurgery.errors import BNSurgeryError, CheckpointError, printable
from bnsurgery.files.writing import check_writable, claimed, make_folder
from bnsurgery.text.words import counted

from .options import PATH, Decorator, group, option, together, with_flags

_COLOURS = {
    r"(?m)^eval mode    different": "red",
    r"bit-identical|equal within [^,]*": "green",
    r"(?m)^Next:": None,
}


class _Command(click.Command):
    """A command with --json and --quiet; the functions below find these and --force in the context's object."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.params += [
            click.Option(["--json"], is_flag=True, help="Print one JSON object on stdout and nothing else."),
            click.Option(["--quiet", "-q"], is_flag=True, help="Print only errors and warnings."),
        ]

    def invoke(self, ctx: click.Context) -> Any:
        ctx.obj = {name: ctx.params.pop(name, False) for name in ("json", "quiet", "overwrite")}
        return super().invoke(ctx)


subcommand = partial(click.command, cls=_Command)
force_option = option("overwrite", "Replace existing files of these names.", bool, "--force")


def output_options(help: str) -> Decorator:
    """--output, as `output`, and --force."""
    return together(option("output", help, PATH, "--output", "-o", metavar="FILE"), force_option)


def overwrite() -> bool:
    """Whether --force was given."""
    return bool(click.get_current_context().obj["overwrite"])


class _NamingOptions:
    """A stream that writes the library's fields as options of the command at hand."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._command = stream, click.get_current_context().command

    def write(self, text: str) -> int:
        return self._stream.write(with_flags(text, self._command))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def naming_options() -> AbstractContextManager[Any]:
    """Inside, what the library prints names options, as messages do."""
    return redirect_stdout(cast(TextIO, _NamingOptions(sys.stdout)))


def loud() -> bool:
    """Whether to show progress: neither --json nor --quiet was given."""
    noted = click.get_current_context().obj
    return not (noted["json"] or noted["quiet"])


def show(text: str, data: dict[str, Any]) -> None:
    """Print a result as the user asked for it, as text or JSON; nothing in it steers the terminal."""
    context = click.get_current_context()
    if context.obj["json"]:
        text = json.dumps(data, ensure_ascii=(sys.stdout.encoding or "").lower() != "utf-8")
        click.echo("".join(c if c.isprintable() else json.dumps(c)[1:-1].replace("\x7f", "\\u007f") for c in text))
    elif loud():
        text = "\n".join(printable(line, len(line)) for line in with_flags(text, context.command).split("\n"))
        for pattern, colour in _COLOURS.items():  # click takes the colours out if stdout is no terminal
            text = re.sub(pattern, lambda match, colour=colour: click.style(match[0], colour, bold=True), text)  # type: ignore[misc]
        click.echo(text, color=False if os.environ.get("NO_COLOR") else None)


def claim(output: Path) -> None:
    """Make sure that `output` can be written, and keep other processes from it until the command ends."""
    click.get_current_context().with_resource(claimed(output, overwrite=overwrite()))


@dataclass(frozen=True)
class Reporting:
    """Where to write a report: a page, its figures, or neither."""

    page: Path | None
    plot: Path | None

    @property
    def wanted(self) -> bool:
        """Whether there is anything to write."""
        return self.page is not None or self.plot is not None

    def check(self, *others: str | Path | None) -> None:
        """Make sure, before the work starts, that the report can be made and written.

        The page must not replace one of the `others`, the files and folders that the command reads or writes. If it
        goes into one of these folders or that of the figures, the folder is made.
        """
        page, plot = self.page, self.plot
        missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
        if self.wanted and missing:
            raise BNSurgeryError(f"report: needs {' and '.join(missing)}: pip install 'bnsurgery[report]'")
        if plot is not None:
            if any(make_folder(plot).iterdir()) and not overwrite():
                raise CheckpointError(f"write: '{plot}': got a non-empty folder, expected an empty one, or --force")
            check_writable(plot / "figure.svg", overwrite=True)
        if page is not None:
            if page.suffix.lower() not in (".html", ".htm"):
                raise CheckpointError(f"write: '{page}': a report is an HTML page: give it a name that ends in .html")
            # realpath, because resolve raises on a link that leads back to itself
            places = {os.path.realpath(other) for other in (*others, plot) if other is not None}
            if os.path.realpath(page) in places:
                raise CheckpointError(f"write: '{page}': the command needs that file itself: name another for the page")
            if os.path.realpath(page.parent) in places:
                make_folder(page.parent)
            claim(page)

    def write(self, make: "Callable[[], bnsurgery.report.Report]") -> str:
        """Write what was asked for of the report that `make` makes; returns a line for each, for people."""
        if not self.wanted:
            return ""
        report, wrote = make(), ""
        if self.page is not None:
            report.save(self.page, overwrite=overwrite())
            wrote += f"Wrote {self.page}.\n"
        if self.plot is not None:
            count = len(report.save_figures(self.plot, overwrite=overwrite()))
            wrote += f"Wrote {counted(count, 'figure')} into {self.plot}.\n"
        return wrote

    def to_dict(self) -> dict[str, str]:
        """For --json: where the report and the figures are."""
        return {name: str(path) for name, path in (("report", self.page), ("plot", self.plot)) if path is not None}


plot_option = option("plot", "Write every figure as SVG and PNG into this folder.", PATH, metavar="DIR")
report_options = group(
    "reporting",
    Reporting,
    option("page", "Write a page with figures.", PATH, "--report", metavar="FILE.html"),
    plot_option,
)
