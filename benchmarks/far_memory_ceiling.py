"""The ceiling of a far memory: how often a target's own next token survives when it reads less of a long prompt."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any

import typer
from long_prompts import DATA, REQUESTS, SPEC_BENCH
from script import run_main, split_list, with_plain_errors

if TYPE_CHECKING:
    from long_prompts import LongText
    from restricted_target import RestrictedTarget

    from qm_spec.bench.results.bootstrap import Estimate

RECORDS = "prompts.jsonl"
ALL = "all"
# A shorter answer says nothing about acceptance.
MIN_TOKENS = 8
BUDGETS = "128,256,512,1024,2048"
LENGTHS = "1024,2048,4096,8192"

EXAMPLES = """
Example:

    python benchmarks/far_memory_ceiling.py --target TARGET --books BOOKS --num-prompts 3 --out results/ceiling
"""


@dataclass(frozen=True)
class Settings:
    """What a measured prompt depends on."""

    target: str
    num_tokens: int
    seed: int
    material: str


@dataclass(frozen=True)
class Record:
    """One prompt.

    Attributes:
        kind, length, number: which.
        tokens: of the answer.
        matched: a digit per token, 1 where suffix lookup finds a draft behind the tokens before it.
        agree: by variant, 1 per token that the restricted target still takes for most likely.
    """

    kind: str
    length: int
    number: int
    tokens: int
    matched: str
    agree: dict[str, str]


@with_plain_errors
def main(
    target: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the target model, with a chat template.")],
    books: Annotated[
        list[Path] | None, typer.Option(metavar="PATH", help="Books as plain text: files or folders; may be repeated.")
    ] = None,
    dialogues: Annotated[Path, typer.Option(metavar="DIR", help="Answers of this target, from qm-spec data.")] = DATA
    / "smollm2-135m-instruct",
    kinds: Annotated[
        str | None, typer.Option(metavar="K,...", help=f"Of {','.join(REQUESTS)}.", show_default="all; book if --books")
    ] = None,
    lengths: Annotated[str, typer.Option(metavar="L,...", help="Tokens of the prompts, in this order.")] = LENGTHS,
    rules: Annotated[
        str | None,
        typer.Option(metavar="R;...", help="What the far context is read by, with semicolons.", show_default="all"),
    ] = None,
    budgets: Annotated[str, typer.Option(metavar="B,...", help="Entries read per layer and key/value head.")] = BUDGETS,
    num_prompts: Annotated[int, typer.Option(metavar="N", help="Of each kind and length.")] = 3,
    num_tokens: Annotated[int, typer.Option(metavar="M", help="Most tokens of an answer.")] = 48,
    num_speculative_tokens: Annotated[int, typer.Option(metavar="K", help="Drafts per step of the walk.")] = 4,
    lookup_length: Annotated[int, typer.Option(metavar="L", help="Shortest suffix that lookup matches.")] = 4,
    seed: Annotated[int, typer.Option(metavar="S", help="Of the prompts and the intervals.")] = 0,
    threads: Annotated[int, typer.Option(metavar="T", help="Of torch.")] = 1,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the results.")] = Path("results/ceiling"),
) -> None:
    """Measure how well a target predicts its own answers when its attention to the prompt is restricted.

    The target answers greedily. Then it predicts each token again, while all layers read of the prompt only a window,
    merged entries or pages, with the same bytes. Writes prompts.jsonl prompt by prompt, goes on behind the prompts
    that it holds, and sums up in results.json.
    """
    import torch
    from far_attention import RULES
    from long_prompts import LongTexts
    from restricted_target import RestrictedTarget
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qm_spec import provenance
    from qm_spec.data.answers import find_answer_files
    from qm_spec.discovery import target_fingerprint
    from qm_spec.training.data import find_files, sha256_of

    torch.set_num_threads(threads)
    book_files = find_files(books) if books else []
    chosen = _some("--kinds", split_list(kinds) if kinds else [k for k in REQUESTS if k != "book" or books], REQUESTS)
    named = _some("--rules", [one.strip() for one in rules.split(";")] if rules else RULES, RULES)
    sizes = [int(length) for length in split_list(lengths)]
    fingerprint = target_fingerprint(target)
    material = sha256_of([*book_files, SPEC_BENCH, *find_answer_files([dialogues])])
    settings = Settings(fingerprint, num_tokens, seed, material)
    out.mkdir(parents=True, exist_ok=True)
    records = read_records(out / RECORDS, settings)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    texts = LongTexts(AutoTokenizer.from_pretrained(target), max(sizes), book_files, dialogues, fingerprint, seed)
    reader = RestrictedTarget(model, max(sizes) + num_tokens)
    wanted = [(name, int(budget)) for name in named for budget in split_list(budgets)]
    done = {(one.kind, one.length, one.number) for one in records}
    results: dict[str, Any] = {**provenance.conditions(), **asdict(settings), "rows": []}
    end = model.config.eos_token_id
    # In turn, so that an interrupted run has as much of each.
    for number, length, kind in product(range(num_prompts), sizes, chosen):
        if (kind, length, number) in done:
            continue
        began = time.monotonic()
        record = measure(
            reader, texts.write(kind, number), (kind, length, number), wanted, num_tokens, end, lookup_length
        )
        records.append(record)
        append_record(out / RECORDS, record)
        results["rows"] = sum_up(records, num_speculative_tokens, seed)
        provenance.write_record(out / "results.json", results)
        typer.echo(f"{kind} {length} #{number}: {record.tokens} tokens in {time.monotonic() - began:.0f} s")
    results["rows"] = sum_up(records, num_speculative_tokens, seed)
    provenance.write_record(out / "results.json", results)
    typer.echo(tables(results["rows"]))


def measure(
    reader: RestrictedTarget,
    text: LongText,
    name: tuple[str, int, int],
    wanted: Sequence[tuple[str, int]],
    num_tokens: int,
    end: int | None,
    lookup_length: int,
) -> Record:
    """Return the record of one prompt.

    Args:
        reader: reads and writes it.
        text: what it is cut from.
        name: kind, length and number.
        wanted: rules with their budgets.
        num_tokens: most tokens of an answer.
        end: token id at which an answer ends.
        lookup_length: shortest suffix that lookup matches.

    Raises:
        RuntimeError: with nothing restricted, the target predicts another token than it wrote.
    """
    prompt = text.prompt(name[1])
    reader.prefill(prompt)
    answer = reader.write(prompt[-1], len(prompt) - 1, num_tokens, end)
    agree = predict(reader, prompt, answer, wanted)
    if "0" in agree[ALL]:
        raise RuntimeError(f"{name}: token {agree[ALL].index('0')} differs although nothing is restricted")
    return Record(*name, len(answer), matches(prompt, answer, lookup_length), agree)


def predict(
    reader: RestrictedTarget, prompt: Sequence[int], answer: Sequence[int], wanted: Sequence[tuple[str, int]]
) -> dict[str, str]:
    """Return for each variant a digit per token of the answer: 1 where the restricted target would write it."""
    from far_attention import everything, rule

    start = len(prompt) - 1
    found = {f"{name} {budget}": rule(name, start, budget) for name, budget in wanted}
    # A budget that holds the whole prompt restricts nothing.
    whole = [f"{name} {budget}" for name, budget in wanted if budget >= start]
    asked = {ALL: everything} | {name: one for name, one in found.items() if one is not None and name not in whole}
    predicted = reader.predict([prompt[-1], *answer[:-1]], start, list(asked.values()))
    agree = {
        name: "".join(str(int(a == b)) for a, b in zip(tokens, answer, strict=True))
        for name, tokens in zip(asked, predicted, strict=True)
    }
    return {**agree, **dict.fromkeys(whole, agree[ALL])}


def matches(prompt: Sequence[int], answer: Sequence[int], lookup_length: int) -> str:
    """Return a digit per token of the answer: 1 where lookup finds the suffix before it in the text before it."""
    from qm_spec.drafter.suffix_index import SuffixIndex

    index = SuffixIndex(lookup_length)
    index.read(prompt[:-1])
    found = ""
    for newest in [prompt[-1], *answer[:-1]]:
        found += str(int(index.look_up(newest, 1).length > 0))
        index.read([newest])
    return found


def _some(option: str, given: Sequence[str], known: Sequence[str] | dict[str, Any]) -> list[str]:
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"{option}: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return list(given)


def read_records(file: Path, settings: Settings) -> list[Record]:
    """Return the records of an earlier run, or begin the file with the settings.

    Raises:
        ValueError: the file is of other settings.
    """
    if not file.is_file():
        file.write_text(json.dumps(asdict(settings)) + "\n", encoding="utf-8")
    first, *lines = file.read_text(encoding="utf-8").splitlines()
    if json.loads(first) != asdict(settings):
        raise ValueError(f"{file} was measured with {first}; give another --out")
    return [Record(**json.loads(line)) for line in lines]


def append_record(file: Path, record: Record) -> None:
    """Add a line; an interruption loses no prompt before it."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(record)) + "\n")


def sum_up(records: Sequence[Record], num_drafts: int, seed: int) -> list[dict[str, Any]]:
    """Return a row per kind, length and variant, and for all kinds together; answers that are too short are left out.

    A row has p1 and AL, each a value with the bounds of its interval over prompts, `_new` at positions where lookup
    finds nothing, and `gain`: AL less that of the window of the same budget, on the same prompts.
    """
    rows = []
    long = [one for one in records if one.tokens >= MIN_TOKENS]
    cells = list(dict.fromkeys((kind, one.length) for one in long for kind in (one.kind, "together")))
    for kind, length in sorted(cells):
        some = [one for one in long if one.length == length and kind in (one.kind, "together")]
        for variant in dict.fromkeys(name for one in some for name in one.agree):
            mine = [one for one in some if variant in one.agree]
            budget = variant.rpartition(" ")[2]
            window = f"window {budget}" if all(f"window {budget}" in one.agree for one in mine) else variant
            rows.append(
                {"kind": kind, "length": length, "variant": variant, "prompts": len(mine)}
                | {"tokens": sum(one.tokens for one in mine)}
                | estimates(mine, variant, window, num_drafts, seed)
            )
    return rows


def estimates(
    records: Sequence[Record], variant: str, window: str, num_drafts: int, seed: int
) -> dict[str, list[float | None] | None]:
    """Return p1, AL and what AL gains over a window, at all positions and where lookup finds nothing.

    p1 and AL are over all positions and steps, the gain is the mean of the prompts' differences.
    """
    from qm_spec.bench.results.bootstrap import estimate_mean

    found: dict[str, list[float | None] | None] = {}
    for suffix, where in (("", "01"), ("_new", "0")):
        agreed = [
            [a == "1" for a, m in zip(one.agree[variant], one.matched, strict=True) if m in where] for one in records
        ]
        written, beside = (
            [written_by_step(one, name, num_drafts, where) for one in records] for name in (variant, window)
        )
        gains = [mean(ours) - mean(theirs) for ours, theirs in zip(written, beside, strict=True) if ours and theirs]
        found[f"p1{suffix}"] = _pooled(agreed, seed)
        found[f"al{suffix}"] = _pooled(written, seed)
        found[f"gain{suffix}"] = _triple(estimate_mean(gains, seed)) if gains else None
    return found


def written_by_step(record: Record, variant: str, num_drafts: int, where: str) -> list[int]:
    """Return the tokens of each step of the walk that begins where `matched` is one of the digits `where`."""
    from far_attention import walk

    steps = walk([digit == "1" for digit in record.agree[variant]], num_drafts)
    return [tokens for place, tokens in steps if record.matched[place] in where]


def _pooled(values: Sequence[Sequence[float]], seed: int) -> list[float | None] | None:
    import numpy as np

    from qm_spec.bench.results.bootstrap import Resamples

    columns = {"sum": np.array([sum(v) for v in values], float), "count": np.array([len(v) for v in values], float)}
    return _triple(Resamples(columns, seed).share("sum", "count"))


def _triple(estimate: Estimate | None) -> list[float | None] | None:
    if estimate is None:
        return None
    return [None if one is None else round(one, 4) for one in (estimate.value, estimate.low, estimate.high)]


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table per kind and length."""
    from qm_spec.bench.results.table import align_table

    header = ["variant", "p1", "AL", "over the window", "p1, no match", "AL, no match", "over the window"]
    parts = []
    for kind, length in dict.fromkeys((row["kind"], row["length"]) for row in rows):
        mine = [row for row in rows if (row["kind"], row["length"]) == (kind, length)]
        keys = ("p1", "al", "gain", "p1_new", "al_new", "gain_new")
        body = [[row["variant"], *(_cell(row[key]) for key in keys)] for row in mine]
        parts.append(f"### {kind}, {length} tokens, {mine[0]['prompts']} prompts\n\n{align_table(header, body)}\n")
    return "\n".join(parts)


def _cell(triple: list[float | None] | None) -> str:
    if triple is None:
        return "-"
    value, low, high = triple
    return f"{value:.2f}" + ("" if low is None else f" ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    run_main(main, EXAMPLES)
