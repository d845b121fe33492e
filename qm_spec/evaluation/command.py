"""The command line of a benchmark, as `qm-spec eval` and `benchmarks/spec.py` have it in common."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from qm_spec.evaluation.benchmark import Benchmark
    from qm_spec.evaluation.settings import RaySettings

SHIPPED_TARGET = Path(__file__).resolve().parents[1] / "zoo" / "novels" / "target"

EXIT_ENGINE_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def evaluate(
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME=VALUES]...", help="Further settings of --sweep.")
    ] = None,
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
            help="none (always run as the reference), none-again (shows the noise floor), ngram, qm_spec, "
            "qm_spec-window (emptied far memory), qm_spec-reference (without the compiled operators), "
            "qm_spec-lookup (suffix lookup where a request repeats itself).",
        ),
    ] = "none,ngram,qm_spec,qm_spec-window",
    num_speculative_tokens: Annotated[
        int | None,
        typer.Option(metavar="K", help="Drafted tokens per step.", show_default="the drafter's, or 4"),
    ] = None,
    prompts: Annotated[
        str,
        typer.Option(
            "--benchmark",
            "--prompts",
            metavar="NAME|FILE",
            help="builtin, spec_bench, mt_bench, gsm8k, humaneval, sharegpt, documents (generated), books, or a file "
            "of rows with 'text', 'prompt' or OpenAI 'messages'.",
        ),
    ] = "builtin",
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the benchmarks' files.", show_default="$QM_SPEC_DATA"),
    ] = None,
    num_prompts: Annotated[
        int | None,
        typer.Option(metavar="N", help="So many of them.", show_default="8 built-in ones, or the whole file"),
    ] = None,
    skip_long: Annotated[
        bool, typer.Option("--skip-long", help="Leave prompts out that the target has no room for, and name them.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(metavar="M", help="Output tokens per prompt.")] = 128,
    temperature: Annotated[float, typer.Option(metavar="T", help="0 decodes greedily.")] = 0.0,
    concurrency: Annotated[int, typer.Option(metavar="C", help="Requests kept in flight by each engine.")] = 1,
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
    seed: Annotated[int, typer.Option(metavar="S", help="Of sampling.")] = 0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the results.")] = Path("results/spec"),
    dtype: Annotated[
        str, typer.Option(help="auto (float32 on CPU, the model's on GPU), bfloat16, float16 or float32.")
    ] = "auto",
    repeats: Annotated[int, typer.Option(help="Measured passes; the median is reported.")] = 3,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what an interrupted run of the same command has measured.")
    ] = False,
    ray: Annotated[
        int, typer.Option(metavar="N", help="Share the prompts among N Ray actors, an engine each; 0 does without Ray.")
    ] = 0,
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Of a running cluster, or auto.", show_default="one on this machine"),
    ] = None,
    num_cpus: Annotated[float, typer.Option(help="Cores per actor.")] = 1.0,
    num_gpus: Annotated[
        float | None, typer.Option(help="GPUs per actor.", show_default="1 where this machine has one, else 0")
    ] = None,
) -> None:
    """Compare speculation methods on one target: speed, acceptance, and whether the output stays the same.

    Each method decodes the same prompts in an engine process of its own, after a warm-up. The table goes
    to stdout; DIR gets results.json, acceptance.png, speedup.png and logs/METHOD.log.
    """
    # An end asked for by the system is handled like Ctrl-C: the engine is ended, the results stay.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        from qm_spec.evaluation.settings import BenchmarkSettings
        from qm_spec.evaluation.sweep import parse_sweep, parse_values

        if more and not sweep:
            raise ValueError(f"sweep: {' '.join(more)} must stand behind --sweep")
        settings = BenchmarkSettings(
            target=target,
            out=out,
            draft=draft,
            methods=tuple(name.strip() for name in methods.split(",") if name.strip()),
            num_speculative_tokens=num_speculative_tokens,
            prompts=prompts,
            data=data,
            num_prompts=num_prompts,
            max_tokens=max_tokens,
            temperature=temperature,
            concurrency=concurrency,
            context_lengths=None if context_lengths is None else parse_values(context_lengths, int, "context_lengths"),
            seed=seed,
            dtype=dtype,
            repeats=repeats,
            sweep=parse_sweep([*(sweep or ()), *(more or ())]),
            ray=ray_settings(ray, ray_address, num_cpus, num_gpus),
            resume=resume,
            skip_long=skip_long,
        )
        # Behind the settings: it imports torch, which wrong ones need not wait for.
        from qm_spec.evaluation.benchmark import Benchmark

        code = run_with_progress(Benchmark(settings))
    except (OSError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(EXIT_BAD_INPUT) from error
    raise typer.Exit(code)


def ray_settings(num_actors: int, address: str | None, num_cpus: float, num_gpus: float | None) -> RaySettings | None:
    """Return what the options of a command ask of Ray, None for nothing.

    Raises:
        ValueError: Ray is not installed, an address comes without actors, or a value is out of range.
    """
    from importlib.util import find_spec

    from qm_spec.evaluation.environment import default_device
    from qm_spec.evaluation.settings import RaySettings

    if num_actors == 0:
        if address is not None:
            raise ValueError(f"ray: the address {address} must come with --ray N, the number of actors")
        return None
    if find_spec("ray") is None:
        raise ValueError("ray: is not installed; install it with pip install 'qm_spec[eval]', or leave --ray out")
    if num_gpus is None:
        num_gpus = 1.0 if default_device() == "cuda" else 0.0
    return RaySettings(num_actors, address, num_cpus, num_gpus)


def run_with_progress(benchmark: Benchmark) -> int:
    """Run with one progress bar per engine on stderr, print the table, and return the exit code."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from qm_spec.evaluation.recommend import format_front
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

        def on_progress(name: str, state: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name, total=total)
            progress.update(bars[name], description=f"{name}: {state}", completed=done)
            if state in ("done", "failed"):
                progress.stop_task(bars[name])
            # A log file gets a line per state instead of the moving bars.
            if not console.is_terminal and states.get(name) != state:
                console.print(f"{name}: {state}", highlight=False)
            states[name] = state

        try:
            benchmark.run(on_progress)
        except KeyboardInterrupt:
            code = EXIT_INTERRUPTED
    out = benchmark.settings.out
    if benchmark.results["runs"]:
        typer.echo(format_table(benchmark.results["runs"]))
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
