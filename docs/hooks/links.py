"""Turns links that leave the site into the paths that they lead to.

In the repository a page may link to a record beside it or to a source file. The site holds neither, so there the link's
text is followed by the path. A link to a file that is nowhere stays as it is, and mkdocs refuses it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_CODE = re.compile(r"(```.*?```)", re.DOTALL)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    """Return a page's text without links that leave the site; called by mkdocs."""
    inside = {file.src_uri for file in files if not file.inclusion.is_excluded()}
    folder = os.path.dirname(page.file.src_uri)

    def without_link(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        uri = os.path.normpath(os.path.join(folder, target))
        if uri in inside or not (ROOT / "docs" / uri).exists():
            return match[0]
        path = os.path.normpath(os.path.join("docs", uri))
        return f"`{path}`" if path.endswith(text.strip("`")) else f"{text} (`{path}`)"

    parts = _CODE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(without_link, part) for part in parts)
