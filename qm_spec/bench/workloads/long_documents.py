"""Prompts of a wanted length in tokens: generated documents, and books."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qm_spec.bench.engine.shards import TokenPrompt
from qm_spec.bench.workloads.generated import KINDS, MIN_LENGTH, generate
from qm_spec.bench.workloads.prompts import BUILTIN_FILE, read_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Characters from which the first guess of a text's length in tokens is taken.
_SAMPLE = 20_000
# Beyond the guess, so that one attempt is mostly enough.
_MARGIN = 1.15


class DocumentWriter:
    """Writes documents of exact lengths in tokens, in which later text depends on distant earlier text.

    Args:
        tokenizer: the target's.
        filler: real prose for the passages between; None for the built-in prompts' novels.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, filler: Sequence[str] | None = None) -> None:
        self._tokenizer = tokenizer
        self._filler = filler or [prompt.text for prompt in read_prompts(BUILTIN_FILE) if prompt.text]
        sample = "\n".join(self._filler)[:_SAMPLE]
        self._characters_per_token = len(sample) / len(self._tokenized(sample))

    def _tokenized(self, text: str) -> list[int]:
        return self._tokenizer(text, verbose=False)["input_ids"]

    def write(self, kind: str, num_tokens: int, seed: int) -> tuple[int, ...]:
        """Return `num_tokens` token ids, the same ones for the same arguments.

        Args:
            kind: one of `qm_spec.bench.workloads.generated.KINDS`.

        Raises:
            ValueError: the kind is unknown.
        """
        length = max(MIN_LENGTH, int(_MARGIN * num_tokens * self._characters_per_token))
        while True:
            token_ids = self._tokenized(generate(kind, length, seed, self._filler))
            if len(token_ids) >= num_tokens:
                return tuple(token_ids[:num_tokens])
            length *= 2


def generated_prompts(
    tokenizer: PreTrainedTokenizerBase,
    num_prompts: int,
    num_tokens: int,
    seed: int,
    filler: Sequence[str] | None = None,
) -> list[TokenPrompt]:
    """Return documents of every kind in turn, whose kind is their category.

    Args:
        num_tokens: length of each.
        filler: see `DocumentWriter`.
    """
    writer = DocumentWriter(tokenizer, filler)
    kinds = [KINDS[number % len(KINDS)] for number in range(num_prompts)]
    return [
        TokenPrompt(f"{kind}-{seed + number}", writer.write(kind, num_tokens, seed + number), kind)
        for number, kind in enumerate(kinds)
    ]


def book_prompts(
    folder: Path, tokenizer: PreTrainedTokenizerBase, num_prompts: int | None, num_tokens: int | None
) -> list[TokenPrompt]:
    """Return the beginnings of the books in a folder, one text file each, sorted by name.

    Args:
        num_prompts: how many; None for every book that is long enough.
        num_tokens: taken of each, and the least that a book must have; None for whole books.

    Raises:
        ValueError: there are fewer such books.
    """
    found: list[TokenPrompt] = []
    files = sorted(folder.rglob("*.txt"))
    for file in files:
        if len(found) == num_prompts:
            break
        token_ids = _beginning(file.read_text(encoding="utf-8"), tokenizer, num_tokens)
        if token_ids and len(token_ids) >= (num_tokens or 1):
            found.append(TokenPrompt(file.relative_to(folder).with_suffix("").as_posix(), token_ids))
    if not found or len(found) < (num_prompts or 1):
        raise ValueError(
            f"books: {folder} must hold at least {num_prompts or 1} texts (.txt) of {num_tokens or 1} tokens, got "
            f"{len(found)} of {len(files)}; lower num_prompts or the context length, or add books"
        )
    return found


def _beginning(text: str, tokenizer: PreTrainedTokenizerBase, num_tokens: int | None) -> tuple[int, ...]:
    """Tokenize no more of a book than is asked for; a whole one takes seconds."""
    length = len(text) if num_tokens is None else 8 * num_tokens
    while True:
        token_ids = tuple(tokenizer(text[:length], verbose=False)["input_ids"])
        # The last word may be cut in two, and with it the last tokens.
        if length >= len(text) or (num_tokens is not None and len(token_ids) >= num_tokens + 16):
            return token_ids[:num_tokens]
        length *= 2
