"""Time, reconstruction error and perplexity of every token reduction method on the reference target."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from script import NOVELS, run_main, split_list, with_plain_errors

EXAMPLES = """
Examples:

    python benchmarks/bench_methods.py

    python benchmarks/bench_methods.py --tokens 1024 --ratio 3 --depth 0 --methods quickmerge,tome,uniform

    python benchmarks/bench_methods.py --text novels/valid --windows 64
"""


@with_plain_errors
def main(
    target: Annotated[
        Path, typer.Option(metavar="DIR", help="A Llama model and its tokenizer.", show_default="the shipped pair's")
    ] = NOVELS / "target",
    text: Annotated[
        Path, typer.Option(metavar="PATH", help="Text: a file or folder.", show_default="the prompts")
    ] = NOVELS / "prompts.jsonl",
    methods: Annotated[str, typer.Option(metavar="M,...", help="Names.", show_default="all")] = "",
    batch: Annotated[int, typer.Option(metavar="B", help="Sequences reduced at once.")] = 4,
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of each.")] = 512,
    ratio: Annotated[float, typer.Option(metavar="R", help="N / K.")] = 4.0,
    depth: Annotated[int, typer.Option(metavar="L", help="Decoder layers whose output is reduced.")] = 5,
    windows: Annotated[int, typer.Option(metavar="W", help="Windows of the perplexity, N + 64 tokens each.")] = 8,
    repeats: Annotated[int, typer.Option(metavar="R", help="Timed calls of each method, in turn.")] = 10,
    seed: Annotated[int, typer.Option(metavar="S", help="Of the methods that draw.")] = 0,
    threads: Annotated[int, typer.Option(metavar="T", help="Of torch.")] = 1,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Results.")] = Path("results/bench_methods.json"),
) -> None:
    """Compare token reduction methods on hidden states of the target: time, error, perplexity.

    The table goes to stdout. "error" is ||X - X'||^2 / ||X||^2 with each token rebuilt from its group and
    dropped ones as 0; "nearest" rebuilds each from the reduced token nearest to it; "nats more" is what a
    continuation of 64 tokens loses against the whole context, "no context" what it could lose at most.
    """
    from qm_spec.provenance import write_record

    results = measure(target, text, split_list(methods), batch, tokens, ratio, depth, windows, repeats, seed, threads)
    write_record(out, results)
    typer.echo(format_table(results))
    typer.echo(f"results: {out}", err=True)


def measure(
    target: Path,
    text: Path,
    names: list[str],
    batch: int,
    num_tokens: int,
    ratio: float,
    depth: int,
    num_windows: int,
    repeats: int,
    seed: int,
    threads: int,
) -> dict[str, Any]:
    """Return the results with a row per method.

    Raises:
        OSError: target or text is missing.
        ValueError: a setting is out of range, or the text too short.
    """
    import torch
    from rich.console import Console
    from rich.progress import Progress
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from qm_spec import provenance
    from qm_spec.bench.environment import describe_environment
    from qm_spec.bench.reduction import METHODS, find_methods, nearest_error, rebuild_error
    from qm_spec.bench.reduction.language_model import (
        NONE,
        WHOLE,
        ReducedLanguageModel,
        cut_windows,
        score_window,
        tokens_kept,
    )
    from qm_spec.bench.reduction.language_report import summarise
    from qm_spec.training.data import find_files, read_documents, sha256_of

    methods = find_methods(names or METHODS)
    if min(batch, num_tokens, num_windows, repeats) < 1 or ratio <= 1:
        raise ValueError("batch, tokens, windows and repeats must be at least 1, and the ratio above 1")
    if not (target / "config.json").is_file():
        raise FileNotFoundError(f"target: {target} holds no config.json")
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(target)
    model = ReducedLanguageModel(AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval(), depth)
    files = find_files([text])
    documents = [
        tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] for document in read_documents(files)
    ]
    states = model.read(cut_windows(documents, num_tokens, batch, seed)).states
    keep = tokens_kept(num_tokens, ratio)

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        errors: dict[str, tuple[float, float]] = {}
        milliseconds: dict[str, list[float]] = {method.name: [] for method in methods}
        for method in methods:
            merged = method.make(seed)(states, keep)
            errors[method.name] = (
                rebuild_error(states[-1], merged).mean().item(),
                nearest_error(states[-1], merged).mean().item(),
            )
        task = progress.add_task("time", total=repeats)
        for _ in range(repeats):
            for method in methods:
                reduce = method.make(seed)
                begin = time.perf_counter()
                reduce(states, keep)
                milliseconds[method.name].append(1000 * (time.perf_counter() - begin))
            progress.advance(task)
        windows = cut_windows(documents, num_tokens + 64, num_windows, seed)
        task = progress.add_task("perplexity", total=len(windows))
        scores = []
        for index, token_ids in enumerate(windows):
            scores.append(score_window(model, token_ids, num_tokens, methods, [ratio], seed + index))
            progress.advance(task)
    quality = {row["method"]: row for row in summarise(scores, [method.name for method in methods], [ratio])}
    rows = []
    for method in methods:
        times = torch.tensor(milliseconds[method.name])
        latency = times.median().item()
        rows.append(
            {
                "method": method.name,
                "merges": method.merges,
                "latency_ms": latency,
                "latency_ms_quartiles": times.quantile(torch.tensor([0.25, 0.75])).tolist(),
                "tokens_per_s": 1000 * batch * num_tokens / latency,
                "rebuild_error": errors[method.name][0],
                "nearest_error": errors[method.name][1],
                **{
                    key: quality[method.name][key]
                    for key in ("perplexity", "accuracy", "nats_more", "nats_more_interval", "cost_share")
                },
            }
        )
    return {
        "schema_version": 1,
        **provenance.conditions(),
        "environment": describe_environment() | {"threads": threads},
        "data": {"files": [file.name for file in files], "sha256": sha256_of(files)},
        "settings": {
            "batch": batch,
            "tokens": num_tokens,
            "kept": keep,
            "dim": states.shape[-1],
            "layers": len(states),
            "depth": depth,
            "windows": len(windows),
            "continuation": 64,
            "repeats": repeats,
            "seed": seed,
        },
        "whole_context": quality[WHOLE],
        "no_context": quality[NONE],
        "rows": rows,
    }


def format_table(results: dict[str, Any]) -> str:
    """Return the conditions and a row per method, in Markdown."""
    from qm_spec.bench.results.table import align_table, difference_cell

    settings, whole, none = results["settings"], results["whole_context"], results["no_context"]
    body = []
    for row in results["rows"]:
        body.append(
            [
                row["method"] if row["merges"] else f"{row['method']} (prunes)",
                f"{row['latency_ms']:.2f}",
                f"{row['tokens_per_s'] / 1e6:.2f}",
                f"{row['rebuild_error']:.3f}",
                f"{row['nearest_error']:.3f}",
                f"{row['perplexity']:.2f}",
                difference_cell(row["nats_more"], row["nats_more_interval"]),
            ]
        )
    header = ["method", "ms", "M tokens/s", "error", "nearest", "perplexity", "nats more"]
    return "\n".join(
        [
            "B {batch}, N {tokens}, K {kept}, D {dim}, after layer {depth}; {windows} windows".format(**settings),
            f"perplexity of the whole context {whole['perplexity']:.2f}, "
            f"of no context {none['perplexity']:.2f} ({none['nats_more']:+.3f} nats)",
            "",
            align_table(header, body),
        ]
    )


if __name__ == "__main__":
    run_main(main, EXAMPLES)
