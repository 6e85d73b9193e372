"""The documentation tells the truth: its Python runs and prints what it says, its commands exist, its site is whole."""

import html
import importlib
import math
import os
import re
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from bnsurgery.cli import cli as group
from bnsurgery.cli import main

ROOT = Path(__file__).resolve().parents[1]
_FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = {str(file.relative_to(ROOT)): file.read_text() for file in _FILES}
PACKAGES = [
    "bnsurgery",
    "bnsurgery.finetune",
    "bnsurgery.report",
    "bnsurgery.nn",
    "bnsurgery.ops",
    "bnsurgery.integrations",
]
OPTIONAL = {"lightning", "torchao", "transformers"}  # a block that needs one is skipped where it is missing
_FENCE = re.compile(r'```(\w+)(?: title="(.+)")?')
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e[+-]?\d+)?(?!\w)")


@dataclass
class Block:
    """A fenced or indented block: its language ("" where indented), its file's name, and the words in front of it."""

    language: str
    title: str | None
    before: str
    text: str = ""


def blocks(markdown: str) -> list[Block]:
    found: list[Block] = []
    before, fenced, indented = "", False, False
    for line in markdown.splitlines():
        if fenced:
            fenced = line != "```"
            found[-1].text += f"{line}\n" if fenced else ""
        elif match := _FENCE.fullmatch(line):
            found.append(Block(match[1], match[2], before.strip()))
            before, fenced, indented = "", True, False
        elif line.startswith("    ") and (indented or before.endswith("\n\n")):
            if not indented:
                found.append(Block("", None, before.strip()))
                before, indented = "", True
            found[-1].text += f"{line[4:]}\n"
        else:
            indented = indented and not line
            before += f"{line}\n"
    return found


def commands(block: Block) -> list[list[str]]:
    """The lines of a shell block in words, and of an indented one those that are commands of ours."""
    if block.language not in ("sh", ""):
        return []
    lines = [line for line in block.text.splitlines() if block.language or line.startswith("bnsurgery ")]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def agree(printed: str, expected: str) -> bool:
    """The same words; numbers within a tenth, or both next to nothing, for they are measured or rounding noise.

    A norm's `bias=` is named by newer versions of torch alone.
    """
    texts = [text.replace("affine=True, bias=True", "affine=True") for text in (printed, expected)]
    texts = [[line.rstrip() for line in text.strip().splitlines()] for text in texts]
    if [_NUMBER.sub("#", line) for line in texts[0]] != [_NUMBER.sub("#", line) for line in texts[1]]:
        return False
    numbers = [[float(number) for line in text for number in _NUMBER.findall(line)] for text in texts]
    return all(math.isclose(a, b, rel_tol=0.1) or max(a, b) < 1e-3 for a, b in zip(*numbers, strict=True))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with photos/, and the surroundings that torchrun gives to a single process, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small networks gain nothing by more, and lose much where processors are busy
    rng = np.random.default_rng(0)
    for name, low in (("cats", 0), ("dogs", 100)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(low, low + 150, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    yield tmp_path
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # pages use what torch deprecates, and networks with random weights
@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```python" in text or "```sh" in text])
def test_what_a_page_shows_runs(page, folder, capfd):
    names: dict[str, object] = {"__name__": "__main__"}
    found, missing = blocks(PAGES[page]), []
    for number, (block, following) in enumerate(zip(found, [*found[1:], None], strict=True), 1):
        where = f"{page}, block {number}"
        if block.language == "python":
            if block.title:
                (folder / block.title).write_text(block.text)
            if "group.WORLD" in block.text and "init_process_group" not in block.text:
                torch.distributed.init_process_group("gloo")
            try:
                exec(compile(block.text, where, "exec"), names)
            except ModuleNotFoundError as error:
                if error.name not in OPTIONAL:
                    raise
                missing.append(error.name)
                continue
            printed = capfd.readouterr().out
            if following is not None and following.language in ("text", "") and following.before.startswith("prints"):
                assert agree(printed, following.text), f"{where} prints\n{printed}"
        elif block.language == "sh" and not re.search(r"\bvgg1[69]\b", block.text):
            for words in commands(block):
                run(words, where)
                capfd.readouterr()
    if missing:
        pytest.skip(f"all but the blocks that need {', '.join(missing)}")


def run(words: list[str], where: str) -> None:
    if words[0] == "bnsurgery":
        with pytest.raises(SystemExit) as exit_:
            main(words[1:])
        assert exit_.value.code == 0, f"{where}: {shlex.join(words)}"
        return
    assert words[0] == "torchrun", f"{where}: how is {words[0]} to be run?"
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{where}: {done.stderr}"


COMMANDS = [(page, words) for page, text in PAGES.items() for block in blocks(text) for words in commands(block)]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[" ".join(words) for _, words in COMMANDS])
def test_a_command_has_these_options(page, words):
    for start in ("bnsurgery", "bnsurgery.cli"):  # behind a launcher, too
        if start in words:
            name, *args = words[words.index(start) + 1 :]
            command = group.get_command(click.Context(group), name)
            assert command is not None, f"{page}: no command {name}"
            command.make_context(name, args)


def test_readme_is_short_and_its_links_lead_somewhere():
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= 110
    assert max(map(len, lines)) <= 120
    targets = re.findall(r"\]\(([^)]+)\)", PAGES["README.md"])
    assert len(targets) > 20
    for target in targets:
        path, _, heading = target.partition("#")
        file = ROOT / (path or "README.md")
        assert file.is_file(), target
        headings = re.findall(r"^#+ (.+)", file.read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in [re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings]


def test_every_page_with_commands_was_read():
    """Or the two tests above would pass on nothing."""
    assert {"README.md", "docs/index.md", "docs/howto/multi-gpu.md"} <= {page for page, _ in COMMANDS}
    assert len(COMMANDS) > 15
    expected = [block for text in PAGES.values() for block in blocks(text) if block.before.startswith("prints")]
    assert len(expected) > 10


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return folder


@pytest.mark.slow
def test_the_site_needs_no_network(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img)\b[^>]*(?:src|href)="(https?:[^"]+)"', page.read_text())
        assert not loaded, page


@pytest.mark.slow
def test_the_site_shows_the_script_that_its_source_links(site):
    page = (site / "howto" / "training-loop" / "index.html").read_text()
    shown = html.unescape(re.sub("<[^>]+>", "", page))
    assert (ROOT / "examples" / "finetune_vgg16.py").read_text() in shown


@pytest.mark.slow
def test_the_site_has_every_command_and_option(site):
    page = html.unescape((site / "reference" / "cli" / "index.html").read_text())
    assert "<pre><code>  bnsurgery insert vgg16  " in page  # lines that click leaves as they are
    sections = dict(re.findall(r'<h3 id="bnsurgery-(\w+)">(.*?)(?=<h3|</article>)', page, re.DOTALL))
    context = click.Context(group)
    assert list(sections) == sorted(group.list_commands(context))
    for name, text in sections.items():
        command = group.get_command(context, name)
        for parameter in command.params:
            for option in [*parameter.opts, *parameter.secondary_opts]:
                if option.startswith("-"):
                    assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), f"{name} {option}"


@pytest.mark.slow
@pytest.mark.parametrize("module", PACKAGES)
def test_the_site_has_every_public_name(site, module):
    page = (site / "reference" / "api" / "index.html").read_text()
    missing = [name for name in importlib.import_module(module).__all__ if f'id="{module}.{name}"' not in page]
    assert not missing
