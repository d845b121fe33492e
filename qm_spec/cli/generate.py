"""`qm-spec generate`."""

from __future__ import annotations

import signal
from typing import Annotated, Any

import typer

from qm_spec.bench.settings import GenerationSettings
from qm_spec.cli.options import EXIT_INTERRUPTED, NumCpus, NumGpus, RayAddress, options_of, ray_settings


@options_of(GenerationSettings)
def generate(
    ray: Annotated[int, typer.Option(metavar="N", help="Share the rows among N Ray actors, an engine each.")] = 0,
    ray_address: RayAddress = None,
    num_cpus: NumCpus = 1.0,
    num_gpus: NumGpus = None,
    **options: Any,
) -> None:
    """Answer a file of prompts offline; a row that cannot be answered gets an error in its place.

    Example: `qm-spec generate --target my-model --input prompts.jsonl --output answers.jsonl --ray 4`
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    from qm_spec.bench.runs.generate import Generation

    settings = GenerationSettings(ray=ray_settings(ray, ray_address, num_cpus, num_gpus), **options)
    generation = Generation(settings)
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
    typer.echo(f"saved {settings.output}: {generation.num_rows} rows, {generation.num_errors} of them with an error")
    if generation.num_errors:
        raise typer.Exit(1)
