"""Drafts by suffix lookup at every position of a finished text."""

from __future__ import annotations

from collections.abc import Sequence

from qm_spec.drafter.suffix_index import MAX_LENGTH, Lookup, SuffixIndex


def lookup_drafts(
    token_ids: Sequence[int],
    first: int,
    num_rows: int,
    num_drafts: int,
    min_length: int = 2,
    max_length: int = MAX_LENGTH,
) -> list[Lookup]:
    """Look up the suffix at each position; see `SuffixIndex`.

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
    index = SuffixIndex(min_length, max_length)
    index.read(token_ids[: first + 1])
    found = []
    for newest in token_ids[first + 1 : first + 1 + num_rows]:
        found.append(index.look_up(newest, num_drafts))
        index.read([newest])
    return found
