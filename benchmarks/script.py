"""What the command lines of these benchmarks share."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).resolve().parents[1]
NOVELS = ROOT / "qm_spec" / "zoo" / "novels"

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def split_list(text: str) -> list[str]:
    """Return the entries of a comma-separated list without the spaces around them."""
    return [entry.strip() for entry in text.split(",") if entry.strip()]


def with_plain_errors(main: Callable[..., Any]) -> Callable[..., Any]:
    """Let wrong input end a command line with a sentence, and Ctrl-C without a traceback."""

    @functools.wraps(main)
    def run(*arguments: Any, **options: Any) -> Any:
        try:
            return main(*arguments, **options)
        except (OSError, TypeError, ValueError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(EXIT_BAD_INPUT) from error
        except KeyboardInterrupt:
            typer.echo("interrupted; what was finished before is in the files of --out", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None

    return run


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
