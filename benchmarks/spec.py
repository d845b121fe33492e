"""Compare speculation methods on one target: speed, acceptance, and whether the output stays the same."""

from __future__ import annotations

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[1]
SHIPPED_TARGET = ROOT / "qm_spec" / "zoo" / "novels" / "target"

EXIT_ENGINE_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

EXAMPLES = """
Examples:

    python benchmarks/spec.py

    python benchmarks/spec.py --target MODEL --methods none,ngram --prompts questions.jsonl

    python benchmarks/spec.py --methods none,qm_spec,qm_spec-reference

    python benchmarks/spec.py --context-lengths 256,1024,3000 --concurrency 4 --out results/long
"""


def main(
    target: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Folder of the target model.", show_default="the shipped pair's"),
    ] = SHIPPED_TARGET,
    draft: Annotated[
        str, typer.Option(metavar="DIR|qm_spec", help="Drafter folder, or qm_spec to find the target's own.")
    ] = "qm_spec",
    methods: Annotated[
        str,
        typer.Option(
            metavar="M,...",
            help="none (always run as the reference), ngram, qm_spec, qm_spec-window (emptied far memory), "
            "qm_spec-reference (without the compiled operators).",
        ),
    ] = "none,ngram,qm_spec,qm_spec-window",
    num_speculative_tokens: Annotated[
        int | None,
        typer.Option(metavar="K", help="Drafted tokens per step.", show_default="the drafter's, or 4"),
    ] = None,
    prompts: Annotated[
        str,
        typer.Option(metavar="builtin|FILE.jsonl", help="Rows with 'text', 'prompt' or OpenAI 'messages'."),
    ] = "builtin",
    num_prompts: Annotated[
        int | None,
        typer.Option(metavar="N", help="The first N of them.", show_default="8 built-in ones, or the whole file"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(metavar="M", help="Output tokens per prompt.")] = 128,
    temperature: Annotated[float, typer.Option(metavar="T", help="0 decodes greedily.")] = 0.0,
    concurrency: Annotated[int, typer.Option(metavar="C", help="Requests kept in flight.")] = 1,
    context_lengths: Annotated[
        str | None,
        typer.Option(
            metavar="L,...",
            help="One run per length: each prompt is cut to its first L tokens.",
            show_default="256, or a file's prompts whole",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="S", help="Of sampling.")] = 0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the results.")] = Path("results/spec"),
    dtype: Annotated[
        str, typer.Option(help="auto (float32 on CPU, the model's on GPU), bfloat16, float16 or float32.")
    ] = "auto",
    repeats: Annotated[int, typer.Option(help="Measured passes; the median is reported.")] = 3,
) -> None:
    """Compare speculation methods on one target: speed, acceptance, and whether the output stays the same.

    Each method decodes the same prompts in an engine process of its own, after a warm-up. The table goes
    to stdout; DIR gets results.json, acceptance.png, speedup.png and logs/METHOD.log.
    """
    # An end asked for by the system is handled like Ctrl-C: the engine is ended, the results stay.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        from qm_spec.evaluation.benchmark import Benchmark
        from qm_spec.evaluation.settings import BenchmarkSettings

        benchmark = Benchmark(
            BenchmarkSettings(
                target=target,
                out=out,
                draft=draft,
                methods=tuple(split_list(methods)),
                num_speculative_tokens=num_speculative_tokens,
                prompts=prompts,
                num_prompts=num_prompts,
                max_tokens=max_tokens,
                temperature=temperature,
                concurrency=concurrency,
                context_lengths=None if context_lengths is None else tuple(parse_lengths(context_lengths)),
                seed=seed,
                dtype=dtype,
                repeats=repeats,
            )
        )
    except (OSError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(EXIT_BAD_INPUT) from error
    raise typer.Exit(run_with_progress(benchmark))


def split_list(text: str) -> list[str]:
    """Return the entries of a comma-separated list without the spaces around them."""
    return [entry.strip() for entry in text.split(",") if entry.strip()]


def parse_lengths(text: str) -> list[int]:
    """Return a comma-separated list of integers.

    Raises:
        ValueError: an entry is none.
    """
    try:
        return [int(entry) for entry in split_list(text)]
    except ValueError as error:
        raise ValueError(f"context_lengths: must be integers like 256,1024, got {text!r}") from error


def run_with_progress(benchmark: Any) -> int:
    """Run with one progress bar per method on stderr, print the table, and return the exit code."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from qm_spec.evaluation.table import format_table

    console = Console(stderr=True)
    for note in benchmark.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    num_notes = len(benchmark.notes)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    bars: dict[str, Any] = {}
    states: dict[str, str] = {}
    code = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def on_progress(method: str, state: str, done: int, total: int) -> None:
            if method not in bars:
                bars[method] = progress.add_task(method, total=total)
            progress.update(bars[method], description=f"{method}: {state}", completed=done)
            if state in ("done", "failed"):
                progress.stop_task(bars[method])
            # A log file gets a line per state instead of the moving bars.
            if not console.is_terminal and states.get(method) != state:
                console.print(f"{method}: {state}", highlight=False)
            states[method] = state

        try:
            benchmark.run(on_progress)
        except KeyboardInterrupt:
            code = EXIT_INTERRUPTED
    out = benchmark.settings.out
    if benchmark.results["runs"]:
        typer.echo(format_table(benchmark.results["runs"]))
    for note in benchmark.notes[num_notes:]:
        typer.echo(f"note: {note}", err=True)
    if code == EXIT_INTERRUPTED:
        typer.echo(f"interrupted; what was measured is in {out / 'results.json'}", err=True)
    else:
        typer.echo(f"results: {out / 'results.json'}, acceptance.png, speedup.png; logs: {out / 'logs'}", err=True)
    return code or (EXIT_ENGINE_FAILED if benchmark.results["failures"] else 0)


if __name__ == "__main__":
    if find_spec("qm_spec") is None:
        # A clone that is not installed: for this process and for the engines that it starts.
        sys.path.insert(0, str(ROOT))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(epilog=EXAMPLES)(main)
    app()
