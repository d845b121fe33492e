"""Answers of finished requests, to copy from where a request's own text holds no match."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from qm_spec.drafter.suffix_index import MAX_LENGTH, NO_MATCH, Lookup, SuffixIndex

# Memory of a token in an index, in bytes, and of an answer beside its tokens, in tokens.
TOKEN_BYTES: Final = 120
_ANSWER_COST: Final = 16
# Between two answers; no text holds it, so no match reaches over it.
_BORDER: Final = -1


class PastResponses:
    """What has been answered lately, by groups of requests that know of each other's answers and of nobody else's.

    The answers are kept in two generations. When the younger one takes half of the memory it becomes the older one,
    and what was that is dropped.

    Args:
        min_length: shortest suffix that counts, in tokens.
        most_bytes: of memory for all groups, about.
        max_length: longest suffix that is tried.
    """

    def __init__(self, min_length: int, most_bytes: int, max_length: int = MAX_LENGTH) -> None:
        self.min_length, self.max_length = min_length, max_length
        self._most_tokens = most_bytes // (2 * TOKEN_BYTES)
        self._younger: dict[str, SuffixIndex] = {}
        self._older: dict[str, SuffixIndex] = {}
        self._num_tokens = 0

    def add(self, group: str, token_ids: Sequence[int]) -> None:
        """Keep an answer for a group; one of more than half the memory is dropped."""
        cost = len(token_ids) + _ANSWER_COST
        if len(token_ids) < self.min_length or cost > self._most_tokens:
            return
        if self._num_tokens + cost > self._most_tokens:
            self._younger, self._older, self._num_tokens = {}, self._younger, 0
        index = self._younger.get(group)
        if index is None:
            index = self._younger[group] = SuffixIndex(self.min_length, self.max_length)
        index.read([*token_ids, _BORDER])
        self._num_tokens += cost

    def look_up(self, group: str, suffix: Sequence[int], num_drafts: int) -> Lookup:
        """Find the longest end of `suffix` in the group's answers, and what followed its latest place.

        Where an answer ends before K tokens the drafts begin with it again from there, to be K.

        Args:
            group: whose answers.
            suffix: the newest tokens of a text, at most `max_length`.
            num_drafts: K.
        """
        indices = [answers[group] for answers in (self._younger, self._older) if group in answers]
        found = [index.find(suffix, num_drafts, _BORDER) for index in indices]
        return max(found, key=lambda lookup: lookup.length, default=NO_MATCH)
