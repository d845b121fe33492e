"""The command line of `qm-spec data`."""

from __future__ import annotations

import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qm_spec.bench.settings import AnswerSettings
from qm_spec.cli.options import (
    EXIT_ENGINE_FAILED,
    EXIT_INTERRUPTED,
    NumCpus,
    NumGpus,
    RayAddress,
    options_of,
    ray_settings,
)

if TYPE_CHECKING:
    from rich.console import Console

    from qm_spec.bench.runs.answering import Answering, Progress

EXAMPLES = """
Example: `qm-spec data --target my-model --prompts prompts.jsonl --out answers`, then
`qm-spec train --target my-model --data answers --out my-model/qm_spec`

Example: `qm-spec data --target my-model --prompts chats/ --prompts sharegpt.json --out answers --skip-bad-lines`

Example: `qm-spec data --target /shared/my-model --prompts prompts.jsonl.xz --out answers --ray 8 --num-gpus 1 --resume`
"""
# So many of the rows that are left out are named; the record beside the answers has all.
_NAMED = 5
_SECONDS_PER_LINE = 20.0


@options_of(AnswerSettings)
def answer(
    prompts: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE",
            help="Rows with 'prompt', 'text', OpenAI 'messages' or ShareGPT's 'conversations'; .jsonl or .json, packed "
            "with gz or xz or not; or a folder of them. May be repeated.",
        ),
    ],
    more: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE]...", help="Further files of --prompts.", show_default=False)
    ] = None,
    ray: Annotated[int, typer.Option(metavar="N", help="Share the prompts among N Ray actors, an engine each.")] = 0,
    ray_address: RayAddress = None,
    num_cpus: NumCpus = 1.0,
    num_gpus: NumGpus = None,
    **options: Any,
) -> None:
    """Let a target answer prompts, as data to train its drafter on: token ids in shards, greedy and sampled.

    Left out by name: prompts without room for an answer, empty answers. Each prompt is answered once.
    """
    from rich.console import Console

    from qm_spec.bench.runs.answering import Answering

    # Ended by the system or by Ctrl-C, the engines are ended too, and --resume goes on.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console(stderr=True)
    actors = ray_settings(ray, ray_address, num_cpus, num_gpus)
    settings = AnswerSettings(prompts=(*prompts, *(more or ())), ray=actors, **options)
    answering = Answering(settings)
    _say_what_is_left_out(answering)
    try:
        record = _run(answering, console)
    except KeyboardInterrupt as interruption:
        typer.echo(f"interrupted; what is answered stays in {settings.out}, and --resume goes on from there", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from interruption
    _name("empty answers", record["empty_answers"])
    typer.echo(
        f"saved {settings.out}: {record['num_answers']} answers, {record['num_answer_tokens']} tokens, "
        f"{record['num_cut_at_max_tokens']} answers cut at {settings.max_tokens} tokens"
    )
    if answering.failures:
        for failure in answering.failures:
            typer.echo(f"error: {failure}", err=True)
        typer.echo(
            f"{record['finished_shards']} of {record['num_shards']} shards are answered; --resume tries the others",
            err=True,
        )
        raise typer.Exit(EXIT_ENGINE_FAILED)


def _say_what_is_left_out(answering: Answering) -> None:
    if answering.engine != "vllm":
        typer.echo("note: vLLM is not installed; transformers answers, which takes longer", err=True)
    if answering.num_duplicates:
        typer.echo(f"note: left out {answering.num_duplicates} prompts that stand there more than once", err=True)
    _name("rows", answering.skipped)


def _name(what: str, messages: list[str]) -> None:
    if not messages:
        return
    typer.echo(f"note: left out {len(messages)} {what}:", err=True)
    for message in messages[:_NAMED]:
        typer.echo(f"  {message}", err=True)
    if len(messages) > _NAMED:
        typer.echo(f"  and {len(messages) - _NAMED} more, which provenance.json names", err=True)


def describe(progress: Progress) -> str:
    """Say how far a run has come."""
    left = "" if progress.left_s is None else f", {_duration(progress.left_s)} left"
    return f"{progress.done} of {progress.total} answers, {progress.tokens_per_s:.0f} tokens/s{left}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _run(answering: Answering, console: Console) -> dict[str, Any]:
    """Run with a bar on a terminal, and with a line now and then elsewhere."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    bar = Progress(SpinnerColumn(), BarColumn(), TextColumn("{task.description}"), console=console, transient=True)
    task = bar.add_task("starting", total=answering.num_prompts)
    next_line = 0.0
    printed_done = -1

    def on_progress(progress: Any) -> None:
        nonlocal next_line, printed_done
        bar.update(task, completed=progress.done, description=describe(progress))
        now = time.monotonic()
        due = now >= next_line or progress.done == progress.total
        if not console.is_terminal and due and progress.done != printed_done:
            next_line, printed_done = now + _SECONDS_PER_LINE, progress.done
            console.print(describe(progress), highlight=False)

    with bar if console.is_terminal else nullcontext():
        return answering.run(on_progress)
