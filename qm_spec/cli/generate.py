"""`qm-spec generate`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from qm_spec.cli.options import EXIT_INTERRUPTED, NumCpus, NumGpus, RayAddress, Target, ray_settings


def generate(
    target: Target,
    input_file: Annotated[
        Path, typer.Option("--input", metavar="FILE", help="Rows with 'text', 'prompt' or OpenAI 'messages'.")
    ],
    output: Annotated[Path, typer.Option(metavar="FILE", help="One JSON line for each row, in the same order.")],
    method: Annotated[
        str, typer.Option(help="qm_spec, qm_spec-lookup, ngram, or none for plain decoding.")
    ] = "qm_spec",
    draft: Annotated[
        str, typer.Option(metavar="DIR|qm_spec", help="Drafter folder, or qm_spec to find the target's own.")
    ] = "qm_spec",
    num_speculative_tokens: Annotated[
        int | None, typer.Option(metavar="K", help="Drafted tokens per step.", show_default="the drafter's, or 4")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most output tokens; an end-of-text token ends sooner.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 decodes greedily.")] = 0.0,
    concurrency: Annotated[int, typer.Option(help="Requests kept in flight by each engine.")] = 8,
    seed: Annotated[int, typer.Option(help="Of sampling; row i takes seed + i.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto (the model's own), bfloat16, float16 or float32.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Keep what an interrupted run has generated.")] = False,
    ray: Annotated[int, typer.Option(metavar="N", help="Share the rows among N Ray actors, an engine each.")] = 0,
    ray_address: RayAddress = None,
    num_cpus: NumCpus = 1.0,
    num_gpus: NumGpus = None,
) -> None:
    """Answer a file of prompts offline; a row that cannot be answered gets an error in its place.

    Example: `qm-spec generate --target my-model --input prompts.jsonl --output answers.jsonl --ray 4`
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    from qm_spec.bench.runs.generate import Generation, GenerationSettings

    generation = Generation(
        GenerationSettings(
            target=target,
            input=input_file,
            output=output,
            method=method,
            draft=draft,
            num_speculative_tokens=num_speculative_tokens,
            max_tokens=max_tokens,
            temperature=temperature,
            concurrency=concurrency,
            seed=seed,
            dtype=dtype,
            ray=ray_settings(ray, ray_address, num_cpus, num_gpus),
            resume=resume,
        )
    )
    # Ended by the system or by Ctrl-C, the engines are ended too, and --resume goes on.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("rows", total=generation.num_rows)
        try:
            generation.run(lambda done, total: progress.update(bar, completed=done))
        except KeyboardInterrupt as interruption:
            typer.echo("interrupted; --resume goes on with what is finished", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from interruption
    typer.echo(f"saved {output}: {generation.num_rows} rows, {generation.num_errors} of them with an error")
    if generation.num_errors:
        raise typer.Exit(1)
