"""The built-in prompts: excerpts of novels that no shipped model was trained on."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

NUM_PROMPTS = 32
# About 2,100 words: more than 3,000 tokens of a vocabulary of 4096.
EXCERPT_CHARACTERS = 12_000
# Title pages, contents and prefaces.
SKIPPED_SHARE = 0.05
OUT = Path(__file__).resolve().parents[1] / "qm_spec" / "zoo" / "novels" / "prompts.jsonl"

# Matches up to a line that begins a sentence, after a line that ended one.
_START = re.compile(r"""[.!?]["']?\n\s*(?=["']?[A-Z])""")
_SENTENCE_END = re.compile(r"""[.!?]["']?(?=\s)""")


def excerpts(text: str, number: int, rng: random.Random) -> Iterator[tuple[int, str]]:
    """Yield `number` excerpts that do not overlap, as (first character, text), in the order of the text.

    The text is cut into equal parts and each part holds one, at a random place, from the beginning of
    a sentence to the end of one.

    Raises:
        ValueError: the text is too short for that many.
    """
    first = int(SKIPPED_SHARE * len(text))
    part = int((1 - 2 * SKIPPED_SHARE) * len(text)) // number
    spare = part - EXCERPT_CHARACTERS
    if spare < EXCERPT_CHARACTERS:
        raise ValueError(
            f"excerpts: text must have {2 * EXCERPT_CHARACTERS} characters per excerpt or more, got {part}"
        )
    for index in range(number):
        place = first + index * part + rng.randrange(spare)
        found = _START.search(text, place, place + spare)
        begin = found.end() if found else place
        end = [match.end() for match in _SENTENCE_END.finditer(text, begin, begin + EXCERPT_CHARACTERS)][-1]
        yield begin, text[begin:end]


def make_prompts(novels: list[Path], seed: int) -> list[dict[str, str]]:
    """Return the rows of the prompts, the novels taking turns so that any first few are mixed."""
    rng = random.Random(seed)
    rounds: dict[int, list[dict[str, str]]] = {}
    for place, novel in enumerate(novels):
        text = novel.read_text(encoding="utf-8")
        number = len(range(place, NUM_PROMPTS, len(novels)))
        for turn, (begin, excerpt) in enumerate(excerpts(text, number, rng)):
            row = {"id": f"{novel.stem}-{turn + 1}", "source": f"{novel.name}:{begin}", "text": excerpt}
            rounds.setdefault(turn, []).append(row)
    return [row for turn in sorted(rounds) for row in rounds[turn]]


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of novels as .txt files.", exists=True, file_okay=False)],
    out: Annotated[Path, typer.Option(help="The JSON-lines file to write.")] = OUT,
    seed: int = 0,
) -> None:
    """Write the built-in prompts, the same for the same novels and seed.

    Example: python benchmarks/make_prompts.py NOVELS/valid
    """
    rows = make_prompts(sorted(folder.glob("*.txt")), seed)
    with out.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    typer.echo(f"wrote {len(rows)} prompts, {out.stat().st_size} bytes, to {out}")


if __name__ == "__main__":
    typer.run(main)
