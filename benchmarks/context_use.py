"""Whether a target uses its context: its loss on dependent spans by the distance to their sources."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from long_context import EXIT_BAD_INPUT, ZOO, Target, Text
from script import run_main

EXAMPLES = """
Examples:

    python benchmarks/context_use.py --kinds quotation --documents 8 --length 30000 --out results/use.json
"""


def main(
    target: Target = ZOO / "target",
    text: Text = None,
    kinds: Annotated[str | None, typer.Option(metavar="K,...", help="Of dependence.", show_default="all")] = None,
    documents: Annotated[int, typer.Option(metavar="N", help="How many.")] = 12,
    length: Annotated[int, typer.Option(metavar="C", help="Characters of each.")] = 20000,
    seed: Annotated[int, typer.Option(metavar="S", help="Of the documents.")] = 0,
    threads: Annotated[int, typer.Option(metavar="T", help="Of torch.")] = 1,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Results.")] = Path("results/context_use.json"),
) -> None:
    """Read dependent documents with their sources and without; a target that uses its context does better with."""
    try:
        print(measure(target, text or [ZOO / "text"], kinds, documents, length, seed, threads, out))
    except (ValueError, OSError) as error:
        print(f"context_use.py: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_BAD_INPUT) from None


def measure(
    target_dir: Path,
    text: list[Path],
    kinds: str | None,
    num_documents: int,
    length: int,
    seed: int,
    threads: int,
    out: Path,
) -> str:
    """Write the record and return its table."""
    import torch
    from rich.progress import Progress
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qm_spec import provenance
    from qm_spec.evaluation.context_use import loss_by_distance
    from qm_spec.training.data import find_files, read_documents, sha256_of
    from qm_spec.training.dependent import KINDS, generate_many

    torch.set_num_threads(threads)
    files = find_files(text)
    chosen = KINDS if kinds is None else tuple(kinds.split(","))
    documents = list(generate_many(num_documents, length, seed, list(read_documents(files)), kinds=chosen))
    target = AutoModelForCausalLM.from_pretrained(target_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(target_dir)
    with Progress() as progress:
        task = progress.add_task("documents", total=num_documents)
        rows = loss_by_distance(target, tokenizer, documents, on_progress=lambda: progress.advance(task))
    record = {
        "command": provenance.command(),
        "commit": provenance.git_commit(),
        "versions": provenance.versions(),
        "text_sha256": sha256_of(files),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    lines = [
        "| tokens to the source | spans | loss, nats per token | without the source | what it is worth |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        name = "other text" if row.distances is None else f"{row.distances[0]}-{row.distances[1]}"
        without = "-" if row.distances is None else f"{row.loss_without:.2f}"
        worth = "-" if row.distances is None else f"{row.gain:.2f} +- {row.gain_error:.2f}"
        lines.append(f"| {name} | {row.num_spans} | {row.loss:.2f} | {without} | {worth} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main, EXAMPLES)
