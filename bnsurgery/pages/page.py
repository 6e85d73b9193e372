"""One self-contained HTML page from figures, tables and text: no network, no script, light and dark, for any width."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files as resources
from pathlib import Path
from typing import TYPE_CHECKING

from bnsurgery._version import __version__
from bnsurgery.errors import printable
from bnsurgery.files.writing import atomic_write, check_writable, make_folder
from bnsurgery.text.tables import cell_text, is_number

from .glossary import TERMS
from .style import inline_svg, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LONGEST = 2000  # characters of a paragraph: names in it can come from an untrusted file


@dataclass(frozen=True)
class Table:
    """Headers that are terms of the glossary get their definition; columns of numbers are aligned right."""

    headers: Sequence[str]
    rows: Sequence[Sequence[object]]

    @property
    def cells(self) -> list[list[str]]:
        """The rows as text, as in the terminal."""
        return [[cell_text(cell) for cell in row] for row in self.rows]

    @property
    def numeric(self) -> list[bool]:
        """By column: whether it holds numbers only."""
        return [bool(self.rows) and all(is_number(row[i]) for row in self.cells) for i in range(len(self.headers))]


@dataclass(frozen=True)
class Box:
    """One layer of a strip."""

    name: str  # fqn
    label: str  # class and channels
    kind: str  # "inserted", "taken" (a ReLU that the BatchNorm applies), "conv", "dense", "activation" or "other"
    site: str = ""  # name in the original network, as in the tables, if the layer has a BatchNorm


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, then paragraphs, a strip of layers, a table, and figures by name."""

    heading: str
    paragraphs: tuple[str, ...] = ()
    table: Table | None = None
    strip: dict[str, list[Box]] = field(default_factory=dict)
    figures: dict[str, "Figure"] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """A page and its figures.

    Attributes:
        title: heading of the page.
        verdict: the result, in a sentence.
        good: whether the result is the expected one; None if nothing is expected.
        facts: pairs of name and value under the verdict.
        sections: the parts of the page, in order.
        terms: terms of the glossary to explain, besides the headers of tables and the names of facts.

    Examples:
        >>> page = bnsurgery.report.Report("My network", "All outputs are equal.", True, (("images", "8"),), ())
        >>> page.save("page.html")
        >>> page.save_figures("figures")
        []
    """

    title: str
    verdict: str
    good: bool | None
    facts: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]
    terms: tuple[str, ...] = ()

    @property
    def figures(self) -> dict[str, "Figure"]:
        """All matplotlib figures, by name."""
        return {name: figure for section in self.sections for name, figure in section.figures.items()}

    def to_html(self) -> str:
        """The page as HTML."""
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup

        headers = [header for section in self.sections if section.table for header in section.table.headers]
        names = {*headers, *(name for name, _ in self.facts), *self.terms}
        environment = Environment(
            loader=PackageLoader(__package__, "."),
            autoescape=True,
            undefined=StrictUndefined,
            finalize=lambda value: printable(value, _LONGEST) if type(value) is str else value,  # not Markup
            trim_blocks=True,
            lstrip_blocks=True,
        )
        return environment.get_template("page.html.jinja").render(
            report=self,
            style=Markup(resources(__package__).joinpath("page.css").read_text(encoding="utf-8")),
            svg=lambda name, figure: Markup(inline_svg(figure, name)),
            terms=TERMS,
            used=[term for term in TERMS if term in names],
            version=__version__,
        )

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the page atomically.

        Raises:
            CheckpointError: the file exists without `overwrite`, or cannot be written.
        """
        html = self.to_html()
        with atomic_write(path, overwrite=overwrite) as temporary:
            temporary.write_text(html, encoding="utf-8", newline="\n")

    def save_figures(self, directory: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Write every figure as NAME.svg and NAME.png into `directory`, which is created if it is missing.

        Raises:
            CheckpointError: one of the files exists without `overwrite`, or cannot be written.
        """
        folder = make_folder(directory)
        paths = [folder / f"{name}.{kind}" for name in self.figures for kind in ("svg", "png")]
        for path in paths:
            check_writable(path, overwrite=overwrite)
        for path in paths:
            write(self.figures[path.stem], path, overwrite=overwrite)
        return paths
