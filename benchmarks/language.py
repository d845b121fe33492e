"""Perplexity, accuracy, time and memory of a language model whose context is reduced, method by method."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from script import NOVELS, run_main, split_list, with_plain_errors

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from transformers import LlamaForCausalLM

    from qm_spec.bench.reduction.language_model import Score


# Long contexts cost seconds per call, so these are measured there.
LONG_METHODS = ("quickmerge", "tome", "uniform")
LONG_RATIOS = (3.0,)

EXAMPLES = """
Examples:

    python benchmarks/language.py --quick

    python benchmarks/language.py --text novels/valid --out docs/results

    python benchmarks/language.py --methods quickmerge,tome,window --depths 0,5,10 --ratios 2,8
"""


@with_plain_errors
def main(
    target: Annotated[
        Path, typer.Option(metavar="DIR", help="A Llama model and its tokenizer.", show_default="the shipped pair's")
    ] = NOVELS / "target",
    text: Annotated[
        Path,
        typer.Option(metavar="PATH", help="Text the model has not seen: a file or folder.", show_default="the prompts"),
    ] = NOVELS / "prompts.jsonl",
    methods: Annotated[str, typer.Option(metavar="M,...", help="Names, see --list.", show_default="all")] = "",
    ratios: Annotated[str, typer.Option(metavar="R,...", help="Context tokens over tokens kept.")] = "1.5,2,3,4",
    depths: Annotated[
        str, typer.Option(metavar="L,...", help="Decoder layers that see the whole context; 0 reduces the embeddings.")
    ] = "0,5",
    context: Annotated[int, typer.Option(metavar="C", help="Tokens that are reduced.")] = 512,
    continuation: Annotated[int, typer.Option(metavar="T", help="Tokens after them, never reduced.")] = 64,
    windows: Annotated[int, typer.Option(metavar="N", help="Windows, drawn from the text.")] = 64,
    cost: Annotated[bool, typer.Option(help="Measure time and memory of every method at C tokens.")] = True,
    long: Annotated[
        bool, typer.Option(help="Measure time and memory of some methods at 4000 tokens and in a wider model too.")
    ] = True,
    repeats: Annotated[int, typer.Option(metavar="N", help="Timed pairs per method and ratio.")] = 5,
    proportional: Annotated[
        bool, typer.Option(help="Add the log of a merged token's size to its attention scores.")
    ] = True,
    seed: Annotated[int, typer.Option(metavar="S", help="Of the methods that draw.")] = 0,
    threads: Annotated[int, typer.Option(metavar="N", help="Of torch.")] = 1,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the results.")] = Path("results/language"),
    quick: Annotated[bool, typer.Option(help="A few windows, one depth, two ratios: under a minute.")] = False,
    list_methods: Annotated[bool, typer.Option("--list", help="List the methods and leave.")] = False,
) -> None:
    """Measure a language model whose context is reduced: quality, time and memory by method and ratio.

    Each window is C tokens of context, reduced after L layers, and T of continuation, whose predictions
    count. DIR gets quickmerge.json, quickmerge.png and the tables in quickmerge.md (between its marks).
    Windows done are kept in DIR/quickmerge.windows.jsonl: after Ctrl-C the same command goes on.
    """
    from qm_spec.bench.reduction import METHODS

    if list_methods:
        for method in METHODS.values():
            typer.echo(f"{method.name:20}{'merges' if method.merges else 'prunes'}  {method.about}")
        return
    if quick:
        windows, depths, ratios, context, long, repeats = 4, "0", "2,4", 256, False, 1
    settings = {
        "methods": split_list(methods) or list(METHODS),
        "ratios": [float(entry) for entry in split_list(ratios)],
        "depths": [int(entry) for entry in split_list(depths)],
        "context": context,
        "continuation": continuation,
        "num_windows": windows,
        "proportional": proportional,
        "seed": seed,
    }
    check(settings)
    Run(target, text, settings, out, threads, repeats, cost, long)()


def check(settings: dict[str, Any]) -> None:
    """Refuse settings that cannot be measured.

    Raises:
        ValueError: one is unknown or out of range.
    """
    from qm_spec.bench.reduction import find_methods

    find_methods(settings["methods"])
    if not settings["ratios"] or min(settings["ratios"]) <= 1:
        raise ValueError(f"ratios: must be above 1, got {settings['ratios']}; 1x is always measured")
    if settings["context"] < 1 or settings["continuation"] < 2 or settings["num_windows"] < 1:
        raise ValueError("context and windows must be at least 1, and continuation at least 2")


class Run:
    """One measurement, from the text to the files.

    Raises:
        OSError: target or text is missing.
        ValueError: the text is too short, or a depth out of range.
    """

    def __init__(
        self,
        target: Path,
        text: Path,
        settings: dict[str, Any],
        out: Path,
        threads: int,
        repeats: int,
        cost: bool,
        long: bool,
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        from qm_spec.bench.reduction.language_model import ReducedLanguageModel, cut_windows
        from qm_spec.training.data import find_files, read_documents, sha256_of

        torch.set_num_threads(threads)
        logging.disable_progress_bar()
        if not (target / "config.json").is_file():
            raise FileNotFoundError(f"target: {target} holds no config.json")
        tokenizer = AutoTokenizer.from_pretrained(target)
        self.model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        for depth in settings["depths"]:
            ReducedLanguageModel(self.model, depth)
        files = find_files([text])
        documents = [
            tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
            for document in read_documents(files)
        ]
        length = settings["context"] + settings["continuation"]
        self.windows = cut_windows(documents, length, settings["num_windows"], settings["seed"])
        self.longest = max(documents, key=len)
        self.settings = settings | {"num_windows": len(self.windows)}
        self.repeats, self.cost, self.long = repeats, cost, long
        self.threads = threads
        self.data = {"files": [file.name for file in files], "sha256": sha256_of(files)}
        self.out = out
        self.rows_file = out / "quickmerge.windows.jsonl"

    def __call__(self) -> None:
        """Measure what is not yet measured, write the files and print the tables."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        from qm_spec import provenance
        from qm_spec.bench.environment import describe_environment
        from qm_spec.bench.reduction.language_report import compare, draw, summarise, write_tables

        self.out.mkdir(parents=True, exist_ok=True)
        started, commit = time.time(), provenance.git_commit()
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            scores = self.score(progress)
            costs = self.measure(progress)
        methods, ratios = self.settings["methods"], self.settings["ratios"]
        results: dict[str, Any] = {
            "schema_version": 1,
            "command": provenance.command(),
            "commit": commit,
            "environment": describe_environment() | {"threads": self.threads},
            "wall_s": round(time.time() - started, 1),
            "data": self.data,
            "settings": self.settings,
            "quality": [
                {
                    "depth": depth,
                    "rows": summarise(windows, methods, ratios),
                    "quickmerge_minus": compare(windows, methods, ratios),
                }
                for depth, windows in scores.items()
            ],
            "costs": costs,
        }
        provenance.write_record(self.out / "quickmerge.json", results)
        draw(results, self.out / "quickmerge.png")
        tables = format_tables(results)
        write_tables(tables, self.out / "quickmerge.md")
        typer.echo(tables)
        typer.echo(f"results: {self.out}/quickmerge.json, .png and .md", err=True)

    def score(self, progress: Progress) -> dict[int, list[dict[str, Score]]]:
        """Return the scores of each depth's windows; those of an earlier run with these settings are taken."""
        from qm_spec.bench.reduction import find_methods
        from qm_spec.bench.reduction.language_model import ReducedLanguageModel, score_window

        # A row belongs to one depth and window, so more of both may be asked for later.
        same = {name: value for name, value in self.settings.items() if name not in ("depths", "num_windows")}
        identity = json.dumps({"settings": same, "data": self.data}, sort_keys=True)
        done = dict(read_rows(self.rows_file, identity))
        methods = find_methods(self.settings["methods"])
        scores: dict[int, list[dict[str, Score]]] = {}
        # Written anew: a line that was cut must not run into the next one.
        partial = self.rows_file.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as stream:
            print(identity, file=stream)
            for (depth, index), row in done.items():
                write_row(stream, depth, index, row)
        partial.replace(self.rows_file)
        with self.rows_file.open("a", encoding="utf-8") as stream:
            for depth in self.settings["depths"]:
                model = ReducedLanguageModel(self.model, depth, self.settings["proportional"])
                task = begin(progress, f"windows, depth {depth}", len(self.windows))
                scores[depth] = []
                for index, token_ids in enumerate(self.windows):
                    if (depth, index) not in done:
                        # Each window has draws of its own.
                        seed = self.settings["seed"] + index
                        context, ratios = self.settings["context"], self.settings["ratios"]
                        done[depth, index] = score_window(model, token_ids, context, methods, ratios, seed)
                        write_row(stream, depth, index, done[depth, index])
                    scores[depth].append(done[depth, index])
                    progress.advance(task)
        return scores

    def measure(self, progress: Progress) -> list[dict[str, Any]]:
        """Return time and memory of the target at each depth, and of long contexts at the first one."""
        first, num_context = self.settings["depths"][0], self.settings["context"]
        methods, ratios = self.settings["methods"], self.settings["ratios"]
        parts = []
        if self.cost:
            for depth in self.settings["depths"]:
                parts.append(self.measure_part(progress, "target", self.model, depth, num_context, methods, ratios))
        if self.cost and self.long:
            some = [method for method in methods if method in LONG_METHODS] or methods[:1]
            limit = min(4000, self.model.config.max_position_embeddings, len(self.longest))
            parts.append(self.measure_part(progress, "target", self.model, first, limit, some, LONG_RATIOS))
            wide = wide_model(self.model.config.vocab_size)
            name, shorter = "random weights, 1024 wide", min(2048, limit)
            parts.append(self.measure_part(progress, name, wide, 0, shorter, some, LONG_RATIOS))
        return parts

    def measure_part(
        self,
        progress: Progress,
        name: str,
        model: LlamaForCausalLM,
        depth: int,
        context: int,
        methods: Sequence[str],
        ratios: Sequence[float],
    ) -> dict[str, Any]:
        """Return time and memory of one model at one depth and context."""
        import torch

        from qm_spec.bench.reduction import find_methods
        from qm_spec.bench.reduction.cost import measure_costs
        from qm_spec.bench.reduction.language_model import ReducedLanguageModel

        total = 2 * len(methods) * len(ratios) * self.repeats
        task = begin(progress, f"time of {name}, {context} tokens, depth {depth}", total)
        rows = measure_costs(
            ReducedLanguageModel(model, depth, self.settings["proportional"]),
            torch.tensor([self.longest[:context]]),
            find_methods(methods),
            ratios,
            repeats=self.repeats,
            seed=self.settings["seed"],
            on_progress=lambda: progress.advance(task),
        )
        return {"model": name, "context": context, "depth": depth, "rows": rows}


def begin(progress: Progress, description: str, total: int) -> TaskID:
    """Add a bar; a log file gets a line instead."""
    if not progress.console.is_terminal:
        progress.console.print(description, highlight=False)
    return progress.add_task(description, total=total)


def write_row(stream: TextIO, depth: int, index: int, scores: dict[str, Score]) -> None:
    """Write the scores of one window at one depth as a line."""
    plain = {name: asdict(score) for name, score in scores.items()}
    print(json.dumps([depth, index, plain]), file=stream)
    stream.flush()


def read_rows(file: Path, identity: str) -> Iterator[tuple[tuple[int, int], dict[str, Score]]]:
    """Yield depth, window and scores of an earlier run of the same settings and data; a cut last line is dropped."""
    from qm_spec.bench.reduction.language_model import Score

    if not file.exists():
        return
    first, *lines = file.read_text(encoding="utf-8").split("\n")
    if first != identity:
        return
    for line in lines[:-1]:
        depth, index, scores = json.loads(line)
        yield (depth, index), {name: Score(**score) for name, score in scores.items()}


def wide_model(vocab_size: int) -> LlamaForCausalLM:
    """Return a Llama of 4 layers and width 1024 with random weights, for time and memory only."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(torch.float32).eval()


def format_tables(results: dict[str, Any]) -> str:
    """Return all tables as Markdown, each with a line that says what its cells are."""
    from qm_spec.bench.reduction.language_report import comparison_table, cost_table, quality_table

    settings = results["settings"]
    parts = [
        f"Context {settings['context']} tokens, continuation {settings['continuation']}, "
        f"{settings['num_windows']} windows, proportional attention {'on' if settings['proportional'] else 'off'}. "
        f"Command: `{results['command']}`; commit `{results['commit']}`."
    ]
    for part in results["quality"]:
        depth = part["depth"]
        where = f"Reduced after {depth} of the decoder's layers" if depth else "Embeddings reduced (depth 0)"
        parts += [
            f"### {where}",
            "Perplexity (nats per token above 1x ± half of the 95 % interval; share of the context's worth lost):",
            quality_table(part["rows"]),
            "Next-token accuracy (percentage points above 1x ± half of the 95 % interval):",
            quality_table(part["rows"], accuracy=True),
        ]
        if part["quickmerge_minus"]:
            parts += [
                "Nats per token of quickmerge minus those of the method, below 0 = quickmerge is better; "
                "bold where the 95 % interval excludes 0:",
                comparison_table(part["quickmerge_minus"]),
            ]
    for part in results["costs"]:
        parts += [
            f"### Cost: {part['model']}, {part['context']} tokens, reduced after {part['depth']} layers",
            "Prefill time / decode time / peak memory, over those of 1x (medians of pairs):",
            cost_table(part["rows"]),
        ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    run_main(main, EXAMPLES)
