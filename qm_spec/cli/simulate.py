"""`qm-spec simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def simulate(
    target_config: Annotated[Path, typer.Option(metavar="FILE|DIR", help="config.json of the target, or its folder.")],
    hardware: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="h100, h200, cpu, or a file as measure-hardware writes it.")
    ] = "h100",
    acceptance: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|P,...", help="results.json of a benchmark, or shares kept per position: 0.8,0.6,0.5"
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="Whose runs of the results are taken; ngram needs no drafter, eagle3 attends to all.")
    ] = "qm_spec",
    drafter: Annotated[
        Path | None,
        typer.Option(metavar="FILE|DIR", help="config.json of the drafter.", show_default="one of the target's sizes"),
    ] = None,
    batch: Annotated[str, typer.Option(metavar="B,...", help="Requests in a step.")] = "1,8,32,128",
    context: Annotated[str, typer.Option(metavar="L,...", help="Tokens of context; 128k and 1M work.")] = "1k,8k,128k",
    num_speculative_tokens: Annotated[
        str | None, typer.Option(metavar="K,...", help="As 1..4 or 2,4.", show_default="all of known acceptance")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="bfloat16, float16, float32 or float8; keys and values take 2 bytes or 4.")
    ] = ("bfloat16"),
    tensor_parallel: Annotated[int, typer.Option(help="Devices of one replica.")] = 1,
    max_num_seqs: Annotated[int, typer.Option(help="Most requests in a step of a replica.")] = 256,
    arrival_rate: Annotated[
        float | None, typer.Option(help="Requests per second over all replicas: simulates traffic, too.")
    ] = None,
    replicas: Annotated[int, typer.Option(help="Of the traffic.")] = 1,
    num_requests: Annotated[
        int | None, typer.Option(help="That arrive in all.", show_default="200 per replica, 2000 at least")
    ] = None,
    output_tokens: Annotated[int, typer.Option(help="Mean length of an output.")] = 256,
    ttft_limit_ms: Annotated[float | None, typer.Option(help="Later first tokens are no goodput.")] = None,
    tpot_limit_ms: Annotated[float | None, typer.Option(help="Slower further tokens are no goodput.")] = None,
    seed: Annotated[int, typer.Option(help="Of the traffic.")] = 0,
    validate: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE|DIR", help="Instead, predict these results.json and show the errors; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the JSON there.")] = None,
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
    from qm_spec.simulation.run import Simulation, simulate
    from qm_spec.simulation.run import validate as validate_runs

    console = Console(quiet=as_json, width=max(150, Console().width))
    if validate and acceptance is None:
        answer = validate_runs(validate, target_config, load_hardware(hardware), drafter, console)
    elif acceptance is None or validate:
        raise ValueError(
            "simulate: give either --acceptance to predict with or --validate to compare with, and not both"
        )
    else:
        simulation = Simulation(
            target_config=target_config,
            hardware=hardware,
            acceptance=acceptance,
            method=method,
            drafter=drafter,
            batches=batch,
            contexts=context,
            depths=num_speculative_tokens,
            dtype=dtype,
            tensor_parallel=tensor_parallel,
            max_num_seqs=max_num_seqs,
            arrival_rate=arrival_rate,
            replicas=replicas,
            num_requests=num_requests,
            output_tokens=output_tokens,
            ttft_limit_ms=ttft_limit_ms,
            tpot_limit_ms=tpot_limit_ms,
            seed=seed,
        )
        answer = simulate(simulation, console)
    if as_json:
        typer.echo(json.dumps(answer, indent=1))
    if out is not None:
        write_record(out, answer)
