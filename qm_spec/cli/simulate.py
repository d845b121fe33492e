"""`qm-spec simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qm_spec.cli.options import options_of
from qm_spec.simulation.settings import Simulation


@options_of(Simulation)
def simulate(
    validate: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE|DIR", help="Instead, predict these results.json and show the errors; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the JSON there.")] = None,
    **options: Any,
) -> None:
    """Predict speed-up on machines, lengths and traffic that were not measured, with a roofline model.

    Everything it prints is a prediction; docs/results/simulation.md says how far it is off.

    Example: `qm-spec simulate --target-config llama/config.json --hardware h200 --acceptance results/results.json`

    Example: `qm-spec simulate --target-config llama --acceptance 0.8,0.65,0.5 --tensor-parallel 8 --context 128k,1M`

    Example: `qm-spec simulate --target-config llama --acceptance 0.8,0.65 --arrival-rate 900 --replicas 100`

    Example: `qm-spec simulate --target-config model --drafter model/qm_spec --hardware mine.json --validate results`
    """
    import json

    from rich.console import Console

    from qm_spec.provenance import write_record
    from qm_spec.simulation.hardware import load_hardware
    from qm_spec.simulation.run import simulate
    from qm_spec.simulation.run import validate as validate_runs

    console = Console(quiet=as_json, width=max(150, Console().width))
    simulation = Simulation(**options)
    if bool(validate) == (simulation.acceptance is not None):
        raise ValueError(
            "simulate: give either --acceptance to predict with or --validate to compare with, and not both"
        )
    if validate:
        machine = load_hardware(simulation.hardware)
        answer = validate_runs(validate, simulation.target_config, machine, simulation.drafter, console)
    else:
        answer = simulate(simulation, console)
    if as_json:
        typer.echo(json.dumps(answer, indent=1))
    if out is not None:
        write_record(out, answer)
