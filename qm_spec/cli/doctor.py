"""`qm-spec doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qm_spec.cli.options import EXIT_FOUND_PROBLEM, TargetName

EXAMPLES = """
Example: `qm-spec doctor`

Example: `qm-spec doctor --target my-model --json`
"""
_BROKEN = "install qm_spec again; if that does not help, report this line"


def doctor(
    target: Annotated[str | None, TargetName] = None,
    draft: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A drafter of it.", show_default="the one that the name qm_spec finds"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check what serving needs: packages, kernels, processor, GPU, vLLM, the plug-in, and whether a drafter fits.

    Each finding is one line: ok, warning or problem, what was found, and its remedy. The exit code is 1 where anything
    is a problem. vLLM is not imported.
    """
    import dataclasses
    import json
    from functools import partial

    from qm_spec.diagnosis import installation, pair, plugin
    from qm_spec.diagnosis.finding import examine

    findings = [
        *examine("packages", installation.check_packages, _BROKEN),
        *examine("kernels", installation.check_kernels, "install a torch that qm_spec supports, and build them again"),
        *examine("processor", installation.check_processor, _BROKEN),
        *examine("GPU", installation.check_gpu, _BROKEN),
        *examine("vLLM", plugin.check_vllm, _BROKEN),
        *examine("plug-in", plugin.check_plugin, _BROKEN),
    ]
    if target is not None:
        of_target = examine("target", partial(pair.check_target, target), _BROKEN)
        findings += of_target
        if any(finding.level == "problem" for finding in of_target):
            # Said once; the drafter is looked at alone.
            target = None
    findings += examine("drafter", partial(pair.check_pair, target, draft), _BROKEN)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            typer.echo(finding.line())
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(EXIT_FOUND_PROBLEM)
