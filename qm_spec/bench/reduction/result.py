"""What every method is and returns, and the two ways to it: keep tokens as they are, or average groups."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from qm_spec.quickmerge import Grouping, MergedTokens, merge_groups
from qm_spec.quickmerge.inputs import check_tokens


class Reducer(Protocol):
    """A token reduction method."""

    def __call__(self, tokens: Tensor, keep: int) -> MergedTokens:
        """Reduce N tokens of each sequence to `min(keep, N)`.

        Args:
            tokens: `[B, N, D]`, or a model's layers `[L, B, N, D]` of which the last is reduced.
            keep: K, at least 1.

        Raises:
            TypeError: tokens are not floats.
            ValueError: K is below 1, or a wrong shape.
        """
        ...


def last_layer(caller: str, tokens: Tensor, keep: int) -> tuple[Tensor, int]:
    """Return the tokens that are reduced, `[B, N, D]`, and K, at most N; refuse what cannot be reduced.

    Raises:
        TypeError: tokens are not floats.
        ValueError: K is below 1, or a wrong shape.
    """
    tokens = tokens[-1] if tokens.ndim == 4 and len(tokens) else tokens
    check_tokens(caller, tokens)
    if keep < 1:
        raise ValueError(f"{caller}: K must be at least 1, got {keep}")
    return tokens, min(keep, tokens.shape[1])


def prune(tokens: Tensor, index: Tensor) -> MergedTokens:
    """Return the tokens at `index` `[B, K]` int64, rising, as they are; the others are gone."""
    ones = torch.ones_like(index, dtype=torch.float32)
    slot = torch.arange(index.shape[1], device=index.device).expand_as(index)
    nowhere = torch.full(tokens.shape[:2], -1, device=index.device)
    return MergedTokens(
        tokens=tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])),
        live=ones.bool(),
        size=ones,
        mass=ones,
        place=index,
        cluster=nowhere.scatter(1, index, slot),
        mask=torch.zeros(tokens.shape[:2], device=index.device).scatter(1, index, 1.0),
    )


def average(tokens: Tensor, grouping: Grouping) -> MergedTokens:
    """Return the plain mean of each group, every token of the same weight."""
    mass = torch.ones(tokens.shape[:2], device=tokens.device)
    merged, size, total = merge_groups(tokens, mass, grouping)
    mask = torch.zeros_like(mass).scatter(1, grouping.place, 1.0)
    return MergedTokens(merged, grouping.live, size, total, grouping.place, grouping.cluster, mask)
