"""`qm-spec compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="Results file, or a folder with one.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="Another, measured on the same prompts.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the resampling of prompts.")] = 0,
) -> None:
    """Compare two results prompt by prompt: per setting and metric the difference, its interval and a verdict.

    Example: `qm-spec compare results/before results/after`
    """
    from qm_spec.bench.results.compare import compare_results, format_comparisons
    from qm_spec.bench.results.file import read_results

    typer.echo(format_comparisons(compare_results(read_results(before), read_results(after), seed)))
