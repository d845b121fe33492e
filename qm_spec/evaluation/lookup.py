"""Drafts by suffix lookup: what followed the same few tokens the last time they stood in the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Lookup:
    """What a lookup drafts at one position.

    Attributes:
        drafts: at most K token ids; empty where nothing matches.
        length: tokens of the suffix that was found again; 0 where nothing matches.
    """

    drafts: tuple[int, ...]
    length: int


def lookup_drafts(
    token_ids: Sequence[int], first: int, num_rows: int, num_drafts: int, min_length: int = 2, max_length: int = 8
) -> list[Lookup]:
    """Look up the longest suffix at each position, and of its places the latest.

    Args:
        token_ids: prompt and continuation.
        first: the first position t; tokens up to t + 1 are known there, as for any drafter.
        num_rows: positions from there on.
        num_drafts: K.
        min_length: shortest suffix that counts, in tokens.
        max_length: longest that is tried.

    Raises:
        ValueError: the lengths are not 1 or more and in order.
    """
    if not 1 <= min_length <= max_length:
        raise ValueError(f"lookup_drafts: expected 1 <= min_length <= max_length, got {min_length} and {max_length}")
    ids = list(token_ids)
    # Where each n-gram ended last, among those that have a token behind them.
    ends: dict[tuple[int, ...], int] = {}

    def remember(end: int) -> None:
        for length in range(min_length, min(max_length, end) + 1):
            ends[tuple(ids[end - length : end])] = end

    for end in range(min_length, first + 2):
        remember(end)
    found = []
    for known in range(first + 2, first + 2 + num_rows):
        # The suffix itself must not be found: it is remembered only after the row.
        match = Lookup((), 0)
        for length in range(min(max_length, known), min_length - 1, -1):
            end = ends.get(tuple(ids[known - length : known]))
            if end is not None:
                match = Lookup(tuple(ids[end : min(end + num_drafts, known)]), length)
                break
        found.append(match)
        remember(known)
    return found
