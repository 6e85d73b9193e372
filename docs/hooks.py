"""MkDocs calls this: what the site needs beyond its plugins."""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_SCRIPT = re.compile(r"^\[`.+`\]\((?:\.\./)+(examples/\w+\.py)\)$", re.MULTILINE)
_ALIGNED = re.compile(r"<p>([^<\n]+(?:\n  [^<\n]+)+)</p>")


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the figures of the measurements, which lie outside of docs/."""
    for figure in (Path(config.docs_dir).parent / "benchmarks" / "results").glob("*.png"):
        files.append(File.generated(config, f"results/{figure.name}", abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, config: MkDocsConfig, **_: Any) -> str:
    """Point to these figures, and show a script whose link is a paragraph; a repository's viewer follows the source."""
    root = Path(config.docs_dir).parent
    markdown = _SCRIPT.sub(lambda found: f'```python title="{found[1]}"\n{(root / found[1]).read_text()}```', markdown)
    return markdown.replace("](../benchmarks/results/", "](results/")


def on_page_content(html: str, **_: Any) -> str:
    r"""Keep the line breaks of help texts that are marked with click's \b.

    mkdocs-click makes a paragraph of them, in which every line but the first is still indented.
    """
    return _ALIGNED.sub(r"<pre><code>  \1</code></pre>", html)
