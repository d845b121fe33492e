"""Documents to train a drafter on: token ids, which of them it shall learn to draft, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

# Batches whose documents are sorted by size together: near equals share a batch, and which ones is left to chance.
_POOL = 32


@dataclass(frozen=True)
class Document:
    """A text by itself: nothing before its first token or behind its last one is ever seen with it.

    Attributes:
        token_ids: `[N]` int32.
        learned: `[N]` bool, tokens to be drafted: the answers of a conversation, all of a plain text.
    """

    token_ids: np.ndarray
    learned: np.ndarray

    @classmethod
    def answered(cls, prompt: Sequence[int], output: Sequence[int]) -> Document:
        """Make the document of a prompt and what the target wrote behind it."""
        learned = np.zeros(len(prompt) + len(output), dtype=bool)
        learned[len(prompt) :] = True
        return cls(np.asarray([*prompt, *output], dtype=np.int32), learned)

    @property
    def rows(self) -> np.ndarray:
        """Positions `[T]` to draft from: the next token is the target's own, and the one behind it is to be drafted.

        The first token of an answer comes from the prompt's pass; no draft is made for it.
        """
        return np.flatnonzero(self.learned[1:-1] & self.learned[2:])


def windows(token_ids: np.ndarray, length: int) -> list[Document]:
    """Cut text `[N]` into documents of `length` tokens, all of them to be learned; the tail is dropped.

    Raises:
        ValueError: there are fewer tokens than one window.
    """
    if len(token_ids) < length:
        raise ValueError(
            f"data: {len(token_ids)} tokens do not fill a window of {length}; add text or lower the length"
        )
    cut = token_ids[: len(token_ids) // length * length].reshape(-1, length)
    return [Document(window, np.ones(length, dtype=bool)) for window in cut]


class DocumentBatches(Dataset[dict[str, Tensor]]):
    """Batches of documents of nearly the same number of rows, padded on the right.

    Each item is a whole batch: `input_ids` `[B, N]` int64, `lengths` `[B]`, `rows` `[B, T]` positions to draft from, -1
    where a document has fewer, and `labels` `[B, N]` int64, 1 for tokens to be learned.

    Args:
        documents: those without a row are left out.
        rows_per_batch: rows of a batch, all its documents together, which may exceed it by less than one document.
        rows_per_document: of a document with more rows a random choice of so many is taken, anew in each epoch.
        shuffle_seed: of the order; None keeps documents in order of their size, as validation does.

    Raises:
        ValueError: no document has a row.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        rows_per_batch: int,
        rows_per_document: int | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        self.rows_per_document = rows_per_document
        self.documents = [document for document in documents if len(document.rows)]
        if not self.documents:
            raise ValueError("data: no document has a token to learn; pass answered conversations or text")
        self._seed, self._epoch = shuffle_seed or 0, 0
        rng = None if shuffle_seed is None else np.random.default_rng(shuffle_seed)
        self._batches = list(self._cut(rows_per_batch, rng))
        if rng is not None:
            rng.shuffle(self._batches)

    def _num_rows(self, number: int) -> int:
        count = len(self.documents[number].rows)
        return count if self.rows_per_document is None else min(count, self.rows_per_document)

    def _cut(self, rows_per_batch: int, rng: np.random.Generator | None) -> Iterator[list[int]]:
        numbers = np.arange(len(self.documents)) if rng is None else rng.permutation(len(self.documents))
        counts = np.array([self._num_rows(int(number)) for number in numbers])
        pool_of = np.cumsum(counts) // (_POOL * rows_per_batch) if rng is not None else np.zeros_like(counts)
        batch: list[int] = []
        # Of one pool by size; the last batch of a pool goes on in the next one.
        for number in numbers[np.lexsort((counts, pool_of))]:
            batch.append(int(number))
            if sum(map(self._num_rows, batch)) >= rows_per_batch:
                yield batch
                batch = []
        if batch:
            yield batch

    @property
    def num_rows(self) -> int:
        """Rows of all batches together."""
        return sum(self._num_rows(number) for number in range(len(self.documents)))

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        documents = [self.documents[number] for number in self._batches[index]]
        rows = [self._choose(number) for number in self._batches[index]]
        return {
            "input_ids": _padded([document.token_ids for document in documents], 0),
            "lengths": torch.tensor([len(document.token_ids) for document in documents]),
            "rows": _padded(rows, -1),
            "labels": _padded([document.learned for document in documents], 0),
        }

    def begin_epoch(self, number: int) -> None:
        """Choose rows anew, from now on those of this epoch, counted from 0."""
        self._epoch = number

    def _choose(self, number: int) -> np.ndarray:
        rows = self.documents[number].rows
        if self.rows_per_document is None or len(rows) <= self.rows_per_document:
            return rows
        # Not torch's numbers: batches are fetched before their step, so those that a checkpoint restores come too late,
        # and who resumes would learn from other rows.
        rng = np.random.default_rng((self._seed, self._epoch, number))
        return rows[np.sort(rng.permutation(len(rows))[: self.rows_per_document])]


def _padded(arrays: Sequence[np.ndarray], fill: int) -> Tensor:
    out = torch.full((len(arrays), max(map(len, arrays))), fill, dtype=torch.int64)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = torch.from_numpy(array.astype(np.int64))
    return out
