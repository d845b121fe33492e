"""Where the shipped pairs of target and drafter lie."""

from __future__ import annotations

from pathlib import Path

ZOO = Path(__file__).resolve().parent / "zoo"
NOVELS = ZOO / "novels"
