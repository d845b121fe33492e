"""Drafts by suffix lookup: what followed the last few tokens of a text the last time they stood in it."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle, islice

# The longest suffix that is looked up: longer ones hardly ever tell more.
MAX_LENGTH = 8
# A suffix of so many tokens is taken as a sign that the text repeats itself, where nothing else is asked for.
SURE_LENGTH = 4


@dataclass(frozen=True)
class Lookup:
    """What a lookup drafts behind one token.

    Attributes:
        drafts: K token ids; empty where nothing matches.
        length: tokens of the suffix that was found again; 0 where nothing matches.
    """

    drafts: tuple[int, ...]
    length: int


class SuffixIndex:
    """The tokens of one text, and where each of its n-grams stood last.

    Reading a token and looking up cost the same at any length of the text: a dictionary entry per length of n-gram.
    Memory is 450 to 750 bytes per token read, for text in which hardly an n-gram repeats; repeated ones cost 4.

    Args:
        min_length: shortest suffix that counts, in tokens.
        max_length: longest that is tried.

    Raises:
        ValueError: the lengths are not 1 or more and in order.
    """

    def __init__(self, min_length: int, max_length: int = MAX_LENGTH) -> None:
        if not 1 <= min_length <= max_length:
            raise ValueError(f"SuffixIndex: expected 1 <= min_length <= max_length, got {min_length} and {max_length}")
        self.min_length, self.max_length = min_length, max_length
        self.token_ids = array("i")
        # By the n-gram's bytes, which take half the memory of a tuple.
        self._ends: dict[bytes, int] = {}

    def __len__(self) -> int:
        """The number of tokens read."""
        return len(self.token_ids)

    def read(self, token_ids: Iterable[int]) -> None:
        """Append tokens to the text."""
        ids, size = self.token_ids, self.token_ids.itemsize
        start = len(ids)
        ids.extend(token_ids)
        for end in range(start + 1, len(ids) + 1):
            suffix = ids[max(0, end - self.max_length) : end].tobytes()
            for length in range(self.min_length * size, len(suffix) + 1, size):
                self._ends[suffix[-length:]] = end

    def look_up(self, newest: int, num_drafts: int) -> Lookup:
        """Find the longest suffix of the text and a newest token in the text read, and of its places the latest.

        The drafts are what followed there. Where that runs into the newest token the copy goes on with itself:
        the text has come round, and is taken to come round again.

        Args:
            newest: the token behind those read; it is not added to them.
            num_drafts: K.
        """
        ids, size = self.token_ids, self.token_ids.itemsize
        suffix = array("i", [*ids[max(0, len(ids) + 1 - self.max_length) :], newest]).tobytes()
        for length in range(len(suffix) // size, self.min_length - 1, -1):
            end = self._ends.get(suffix[-length * size :])
            if end is not None:
                followed = [*ids[end : end + num_drafts], newest]
                return Lookup(tuple(islice(cycle(followed), num_drafts)), length)
        return Lookup((), 0)
