"""What the command lines of these benchmarks share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).resolve().parents[1]

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def run_main(main: Callable[..., Any], examples: str) -> None:
    """Call `main` with the options of the command line.

    Args:
        main: annotated as typer reads it; imports qm_spec only when it runs.
        examples: stand under the options in `--help`.
    """
    if find_spec("qm_spec") is None:
        # A clone that is not installed.
        sys.path.insert(0, str(ROOT))
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(epilog=examples)(main)
    app()
