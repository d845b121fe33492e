"""`qm-spec report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of results, with a results.json.")],
) -> None:
    """Write a folder's results as one self-contained page, report.html, and as report.md with its plots.

    Example: `qm-spec report results/`
    """
    from qm_spec.bench.report.render import write_report

    page, markdown = write_report(folder)
    typer.echo(f"saved {page} and {markdown}")
