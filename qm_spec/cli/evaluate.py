"""The command line of a benchmark, as `qm-spec eval` and `benchmarks/spec.py` have it in common."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qm_spec.bench.methods import METHODS
from qm_spec.bench.settings import DEFAULT_METHODS, WAITING, BenchmarkSettings
from qm_spec.cli.options import (
    EXIT_BAD_INPUT,
    EXIT_ENGINE_FAILED,
    EXIT_INTERRUPTED,
    NumCpus,
    NumGpus,
    RayAddress,
    options_of,
    ray_settings,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qm_spec.bench.runs.benchmark import Benchmark


EXAMPLES = """
Example: `qm-spec eval --methods none,none-again,qm_spec --out results/mine`, then `qm-spec report results/mine`

Example: `qm-spec eval --target my-model --benchmark spec_bench --data data --skip-long --ray 4`

Example: `qm-spec eval --target /shared/my-model --ray 16 --ray-address auto --num-cpus 8 --num-gpus 1 --resume`

Example: `qm-spec eval --target my-model --sweep num_speculative_tokens=1..8 concurrency=1,8,32 temperature=0,1`
"""


# A log file is told of the progress each time that another such share is done.
_LOGGED_SHARE = 0.1


@options_of(BenchmarkSettings)
def evaluate(
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME=VALUES]...", help="Further settings of --sweep.")
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            metavar="M,...",
            help="; ".join(f"{one.name}: {one.about}" for one in METHODS.values()) + ".",
        ),
    ] = ",".join(DEFAULT_METHODS),
    baselines: Annotated[
        list[str] | None,
        typer.Option(
            "--baseline",
            metavar="NAME=DIR",
            help="Run a trained drafter as eagle3, eagle3-window or under a name of your own: a folder of EAGLE-3 in "
            "vLLM's format, or of one of ours. May be repeated.",
        ),
    ] = None,
    context_lengths: Annotated[
        str | None,
        typer.Option(
            metavar="L,...",
            help="One run per length: each prompt is cut to its first L tokens.",
            show_default="256, or a file's prompts whole",
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUES",
            help="Measure every combination of several values of num_speculative_tokens, temperature, concurrency and "
            "context_lengths, as 1..8 or 1,8,32.",
        ),
    ] = None,
    ray: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Share the prompts among N Ray actors, each with one engine at a time, so not in turn.",
        ),
    ] = 0,
    ray_address: RayAddress = None,
    num_cpus: NumCpus = 1.0,
    num_gpus: NumGpus = None,
    **options: Any,
) -> None:
    """Compare speculation methods on one target: speed, acceptance, and whether the output stays the same.

    Each method has an engine of its own, run as a server runs it. All engines are alive together, and each prompt is
    decoded by one after the other (with several requests in flight: each few waves of them), so that speed-ups compare
    times next to each other. The tables go to stdout; DIR gets results.json, acceptance.png, speedup.png and
    logs/METHOD.log.
    """
    # An end asked for by the system is handled like Ctrl-C: the engine is ended, the results stay.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        from qm_spec.bench.sweep import parse_sweep, parse_values

        if more and not sweep:
            raise ValueError(f"sweep: {' '.join(more)} must stand behind --sweep")
        settings = BenchmarkSettings(
            methods=tuple(name.strip() for name in methods.split(",") if name.strip()),
            baselines=parse_baselines(baselines or ()),
            context_lengths=None if context_lengths is None else parse_values(context_lengths, int, "context_lengths"),
            sweep=parse_sweep([*(sweep or ()), *(more or ())]),
            ray=ray_settings(ray, ray_address, num_cpus, num_gpus),
            **options,
        )
        # Behind the settings: it imports torch, which wrong ones need not wait for.
        from qm_spec.bench.runs.benchmark import Benchmark

        code = run_with_progress(Benchmark(settings))
    except (OSError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(EXIT_BAD_INPUT) from error
    raise typer.Exit(code)


def parse_baselines(entries: Sequence[str]) -> dict[str, Path]:
    """Read entries such as `eagle3=DIR`.

    Raises:
        ValueError: one is not NAME=DIR, or a name stands twice.
    """
    found: dict[str, Path] = {}
    for entry in entries:
        name, _, folder = entry.partition("=")
        if not name or not folder or name in found:
            raise ValueError(f"baseline: must be NAME=DIR with each name once, got {entry!r}")
        found[name] = Path(folder)
    return found


def run_with_progress(benchmark: Benchmark) -> int:
    """Run with one progress bar per engine on stderr, print the table, and return the exit code."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from qm_spec.bench.report.recommend import format_front
    from qm_spec.bench.results.table import format_categories, format_table

    console = Console(stderr=True)
    for note in benchmark.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    num_notes = len(benchmark.notes)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    bars: dict[str, Any] = {}
    log = _ProgressLog(lambda line: console.print(line, highlight=False, markup=False))
    code = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def on_progress(name: str, state: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name, total=total)
            progress.update(bars[name], description=f"{name}: {state}", completed=done)
            if state in ("done", "failed"):
                progress.stop_task(bars[name])
            # A log file gets lines instead of the moving bars.
            if not console.is_terminal:
                log(name, state, done, total)

        try:
            benchmark.run(on_progress)
        except KeyboardInterrupt:
            code = EXIT_INTERRUPTED
    out = benchmark.settings.out
    if benchmark.results["runs"]:
        typer.echo(format_table(benchmark.results["runs"]))
    if categories := format_categories(benchmark.results["runs"]):
        typer.echo(f"\n{categories}")
    if benchmark.recommendation is not None:
        typer.echo(f"\n{format_front(benchmark.results)}\n\n{benchmark.recommendation}")
    for note in benchmark.notes[num_notes:]:
        typer.echo(f"note: {note}", err=True)
    if code == EXIT_INTERRUPTED:
        typer.echo(
            f"interrupted; what was measured is in {out / 'results.json'}, and --resume goes on from there", err=True
        )
    else:
        typer.echo(f"results: {out / 'results.json'}, acceptance.png, speedup.png; logs: {out / 'logs'}", err=True)
        typer.echo(f"as a page: qm-spec report {out}", err=True)
    return code or (EXIT_ENGINE_FAILED if benchmark.results["failures"] else 0)


class _ProgressLog:
    """Prints a line where an engine does something else, and where another tenth of all requests is done."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._begin = time.monotonic()
        self._states: dict[str, str] = {}
        self._counts: dict[str, tuple[int, int]] = {}
        self._said = 0

    def __call__(self, name: str, state: str, done: int, total: int) -> None:
        if state not in (self._states.get(name), WAITING):
            self._say(f"{name}: {state}")
        self._states[name] = state
        self._counts[name] = done, total
        finished, expected = (sum(column) for column in zip(*self._counts.values(), strict=True))
        share = finished / expected if expected else 0.0
        if int(share / _LOGGED_SHARE) > self._said:
            self._said = int(share / _LOGGED_SHARE)
            minutes = (time.monotonic() - self._begin) / 60
            self._say(f"{finished} of {expected} requests after {minutes:.0f} min, {share:.0%}")
