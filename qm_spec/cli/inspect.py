"""`qm-spec inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qm_spec.cli.options import EXIT_FOUND_PROBLEM, TargetName


def inspect(
    drafter: Annotated[Path, typer.Argument(metavar="DRAFT", help="Folder of a drafter.")],
    target: Annotated[str | None, TargetName] = None,
) -> None:
    """Print what a drafter is: sizes, cost of its memory, draft vocabulary, provenance; its weights are not read.

    With a target, also whether it fits that one; the exit code is 1 where it does not.

    Example: `qm-spec inspect my-model/qm_spec --target my-model`
    """
    from qm_spec.diagnosis.summary import DrafterSummary
    from qm_spec.discovery import check_drafter
    from qm_spec.discovery.files import shown

    for name, text in DrafterSummary.of(drafter).lines():
        typer.echo(f"{name:<18}{shown(text)}")
    if target is None:
        return
    try:
        depth = check_drafter(drafter, target)
    except (TypeError, ValueError) as error:
        typer.echo(f"{'fits':<18}no: {str(error).removeprefix('drafter: ')}")
        raise typer.Exit(EXIT_FOUND_PROBLEM) from error
    typer.echo(f"{'fits':<18}yes: {shown(target)}, K {depth}")
