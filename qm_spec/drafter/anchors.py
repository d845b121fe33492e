"""Drafting at many anchors of whole sequences at once: what training and replay ask of a drafter.

An anchor is a position t that drafting starts from: the target's states up to t and the tokens up to t + 1 are known.
Each step feeds an anchor one more token, x_{t+1} first, and predicts the one behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel


class DraftAnchors(Protocol):
    """Anchors `[B, T]` in the middle of drafting."""

    def step(self, embedding: Tensor) -> Tensor:
        """Feed each anchor the embedding `[B, T, D]` of its next token; return the vocabulary head's input."""
        ...

    def keep(self, columns: Tensor) -> None:
        """Go on with the anchors of these columns `[B, T']` int64 alone."""
        ...


class DraftSequences(Protocol):
    """Whole sequences as a drafter has read them."""

    @property
    def num_entries(self) -> int:
        """Entries that each anchor's scores are computed for, masked ones included."""
        ...

    def anchors(self, positions: Tensor) -> DraftAnchors:
        """Begin to draft at positions `[B, T]` int64; each sees what inference would hold there."""
        ...


class Drafter(Protocol):
    """A drafter checkpoint with the target's embedding and head: `QuickMergePrior` or `Eagle3Drafter`."""

    config: Any

    @property
    def draft_token_ids(self) -> Tensor | None:
        """The target's ids `[Vd]` of the tokens that it can propose; None for the whole vocabulary."""
        ...

    def read(self, aux_states: Tensor, embeddings: Tensor) -> DraftSequences:
        """Read whole sequences: the target's states `[B, N, 3 D]` and the tokens' embeddings `[B, N, D]`."""
        ...


def read_target(
    target: PreTrainedModel, input_ids: Tensor, layers: Sequence[int], **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Return the input states of the target's `layers`, side by side, and its logits.

    Args:
        target: any causal LM of transformers that returns its hidden states.
        input_ids: `[B, N]` int64.
        layers: three, as in `eagle_aux_hidden_state_layer_ids`.
        **kwargs: of the target's forward pass, e.g. `logits_to_keep`.

    Returns:
        `[B, N, 3 D]` float32 and `[B, N, V]`.
    """
    out = target(input_ids=input_ids, output_hidden_states=True, use_cache=False, **kwargs)
    return torch.cat([out.hidden_states[layer] for layer in layers], -1).float(), out.logits


def engine_steps(accepted: Sequence[int]) -> list[int]:
    """Return how many draft tokens each step of an engine accepts that would accept `accepted[i]` at position i.

    The first token comes from the prompt's own pass; each step adds what it accepted and one token more.
    """
    steps, position = [], 0
    while position < len(accepted):
        steps.append(int(accepted[position]))
        position += steps[-1] + 1
    return steps


def columns_of(x: Tensor, columns: Tensor, dim: int = 1) -> Tensor:
    """Return the entries `columns` `[B, T']` (`[B, 1, T']` for dim 2) of `x`'s dimension `dim`, row by row."""
    index = columns.view(*columns.shape, *[1] * (x.ndim - columns.ndim))
    return x.gather(dim, index.expand(*x.shape[:dim], columns.shape[-1], *x.shape[dim + 1 :]))
