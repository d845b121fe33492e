"""A document and its dependent spans."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, order=True)
class Span:
    """Text that can be told from earlier text, and not without it.

    Attributes:
        start, end: character offsets of the dependent text.
        source: character offset of the latest earlier place that gives it.
    """

    start: int
    end: int
    source: int

    @property
    def distance(self) -> int:
        """Characters from the source to the span, both counted at their starts."""
        return self.start - self.source


@dataclass(frozen=True)
class Document:
    """A text of one kind with its dependent spans, sorted and without overlap."""

    text: str
    kind: str
    spans: tuple[Span, ...]

    @property
    def density(self) -> float:
        """Share of the characters that lie in dependent spans."""
        return sum(span.end - span.start for span in self.spans) / len(self.text)


def write_jsonl(path: Path, documents: Iterable[Document]) -> None:
    """Write one document per line: `{"text", "kind", "spans": [[start, end, source], ...]}`."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("w", encoding="utf-8") as lines:
        for document in documents:
            spans = [[span.start, span.end, span.source] for span in document.spans]
            row = {"text": document.text, "kind": document.kind, "spans": spans}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
