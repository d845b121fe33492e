"""`qm-spec install`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from qm_spec.cli.options import TargetName


def install(
    drafter: Annotated[Path, typer.Argument(metavar="DRAFT", help="Folder of a drafter; it stays.")],
    target: Annotated[str, TargetName],
    force: Annotated[
        bool, typer.Option("--force", help="Replace the drafter that is there, with all its files.")
    ] = False,
) -> None:
    """Put a drafter where the name `qm_spec` finds it: `TARGET/qm_spec`, or by fingerprint for a hub id.

    It is checked first, and appears there whole or not at all.

    Example: `qm-spec install trained --target my-model`
    """
    from qm_spec.discovery.installation import install_drafter
    from qm_spec.discovery.search import find_drafter

    place = install_drafter(drafter, target, force)
    typer.echo(f"installed {place}")
    found = find_drafter(target)
    if found.resolve() != place.resolve():
        typer.echo(f"note: the name qm_spec finds {found} first; to take yours: --speculative-model {place}", err=True)
        return
    typer.echo(f"next: vllm serve {shlex.quote(target)} --speculative-model qm_spec")
