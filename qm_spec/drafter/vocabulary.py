"""The draft vocabulary: those of the target's tokens that a drafter may propose.

A drafter's time goes into its vocabulary head, and most of the tokens of a large vocabulary are hardly ever written. A
checkpoint holds the draft vocabulary as EAGLE-3 does, in a tensor `d2t` `[Vd]` int64: what has to be added to a row of
the draft head to get the target's token id.

Source: FR-Spec, Zhao et al. 2025, arXiv 2502.14856; the format is EAGLE-3's, Li et al. 2025, arXiv 2503.01840.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class DraftVocabulary(nn.Module):
    """A base of drafters that hold `d2t` where their vocabulary is smaller than the target's."""

    d2t: Tensor | None
    # Of transformers' class, which stands beside this one.
    post_init: Callable[[], None]

    def init_draft_vocabulary(self, draft_vocab_size: int, vocab_size: int) -> None:
        """Make room for the draft vocabulary of a checkpoint; the first tokens until it is set."""
        reduced = draft_vocab_size < vocab_size
        self.register_buffer("d2t", torch.zeros(draft_vocab_size, dtype=torch.int64) if reduced else None)

    @property
    def draft_token_ids(self) -> Tensor | None:
        """The target's id `[Vd]` int64 of each row of the draft head, rising; None for the whole vocabulary."""
        return None if self.d2t is None else to_token_ids(self.d2t)

    @draft_token_ids.setter
    def draft_token_ids(self, token_ids: Tensor) -> None:
        if self.d2t is None or self.d2t.shape != token_ids.shape:
            size = 0 if self.d2t is None else len(self.d2t)
            raise ValueError(f"draft vocabulary: the drafter has room for {size} tokens, got {list(token_ids.shape)}")
        self.d2t.copy_(to_offsets(token_ids))


def to_token_ids(offsets: Tensor) -> Tensor:
    """Return the target's token ids `[Vd]` of a checkpoint's `d2t` `[Vd]`."""
    return offsets + torch.arange(len(offsets), device=offsets.device)


def to_offsets(token_ids: Tensor) -> Tensor:
    """Return `d2t` `[Vd]` int64 of the target's token ids `[Vd]`.

    Raises:
        ValueError: the ids do not rise.
    """
    if not bool((token_ids.diff() > 0).all()):
        raise ValueError("draft vocabulary: token ids must rise, each of them once")
    return token_ids.long() - torch.arange(len(token_ids), device=token_ids.device)


def check_token_ids(token_ids: Tensor, vocab_size: int) -> Tensor:
    """Return a draft vocabulary `[Vd]` after checking that it is one of the target's V tokens.

    Raises:
        ValueError: the ids do not rise, or are out of range.
    """
    if not bool((token_ids.diff() > 0).all()):
        raise ValueError("draft vocabulary: token ids must rise, each of them once, but those of d2t do not")
    if int(token_ids[0]) < 0 or int(token_ids[-1]) >= vocab_size:
        raise ValueError(
            f"draft vocabulary: token ids must be in 0..{vocab_size - 1}, the target's, but those of d2t are in "
            f"{int(token_ids[0])}..{int(token_ids[-1])}"
        )
    return token_ids


def choose_tokens(counts: Tensor, size: int, required: Iterable[int] = ()) -> Tensor:
    """Return the ids `[size]` of the most frequent tokens, rising; of two that are as frequent the lower id.

    Args:
        counts: `[V]`, how often the target writes each token.
        size: tokens of the draft vocabulary, a multiple of 16 in practice, at most V.
        required: ids that must be among them whatever their counts, such as those that end an answer.

    Raises:
        ValueError: the size is out of range, or too small for what is required.
    """
    needed = sorted(set(required))
    if not max(1, len(needed)) <= size <= len(counts):
        raise ValueError(
            f"draft vocabulary: its size must be in {max(1, len(needed))}..{len(counts)} tokens, got {size}"
        )
    ranked = counts.double().clone()
    ranked[torch.tensor(needed, dtype=torch.int64)] = float("inf")
    return ranked.argsort(descending=True, stable=True)[:size].sort().values


def coverage(counts: Tensor, token_ids: Tensor) -> float:
    """Return the share of written tokens that are among some ids, 0..1, of counts `[V]` and ids `[Vd]`."""
    return float(counts[token_ids].sum() / counts.sum().clamp_min(1))
