"""MkDocs calls this: what the site needs beyond its plugins."""

import re
from typing import Any

_ALIGNED = re.compile(r"<p>([^<\n]+(?:\n  [^<\n]+)+)</p>")


def on_page_content(html: str, **_: Any) -> str:
    r"""Keep the lines of what click is told to leave as it is, by a \b.

    mkdocs-click makes a paragraph of it, of which every line but the first is indented still.
    """
    return _ALIGNED.sub(r"<pre><code>  \1</code></pre>", html)
