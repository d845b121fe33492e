"""Drafts by suffix lookup: what followed the last few tokens of a text the last time they stood in it."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, takewhile

# The longest suffix that is looked up: longer ones hardly ever tell more.
MAX_LENGTH = 8
# A suffix of so many tokens is taken as a sign that the text repeats itself, where nothing else is asked for.
SURE_LENGTH = 4
# The most tokens that a lookup is trusted with; see `Lookup.likely`.
MOST_LIKELY = 2 * MAX_LENGTH
# Earlier places of one n-gram that are looked at: a common one may have stood anywhere in a long text.
MOST_PLACES = 256


@dataclass(frozen=True)
class Lookup:
    """What a lookup drafts behind one token.

    Attributes:
        drafts: K token ids; empty where nothing matches.
        length: tokens of the suffix that was found again; 0 where nothing matches.
    """

    drafts: tuple[int, ...]
    length: int

    @property
    def likely(self) -> tuple[int, ...]:
        """The drafts worth a target's time where each costs some: twice as many as have matched, at most K."""
        return self.drafts[: 2 * self.length]


NO_MATCH = Lookup((), 0)


class SuffixIndex:
    """The tokens of one text, and where each of its n-grams of `min_length` tokens stood.

    Reading a token costs a dictionary entry; looking up goes through the earlier places of one n-gram, the latest
    first, at most `MOST_PLACES`. So both cost the same at any length of the text. Memory is about 120 bytes per token
    read, for text in which hardly an n-gram repeats; repeated ones cost 8.

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
        # The latest end of each n-gram, by its bytes, which take half the memory of a tuple; and for each end the one
        # before it of the same n-gram, 0 where there is none.
        self._ends: dict[bytes, int] = {}
        self._earlier = array("i", [0])

    def __len__(self) -> int:
        """The number of tokens read."""
        return len(self.token_ids)

    def read(self, token_ids: Iterable[int]) -> None:
        """Append tokens to the text."""
        ids, size = self.token_ids, self.token_ids.itemsize
        start = max(0, len(ids) + 1 - self.min_length)
        ids.extend(token_ids)
        text, width, ends, earlier = ids[start:].tobytes(), self.min_length * size, self._ends, self._earlier
        # Ends before which there is no n-gram.
        earlier.extend([0] * (min(len(ids), self.min_length - 1) + 1 - len(earlier)))
        for first in range(0, len(text) - width + 1, size):
            ngram = text[first : first + width]
            earlier.append(ends.get(ngram, 0))
            ends[ngram] = len(earlier) - 1

    def look_up(self, newest: int, num_drafts: int) -> Lookup:
        """Find the longest suffix of the text and a newest token in the text read, and of its places the latest.

        The drafts are what followed there. Where that runs into the newest token the copy goes on with itself:
        the text has come round, and is taken to come round again.

        Args:
            newest: the token behind those read; it is not added to them.
            num_drafts: K.
        """
        length, end = self._longest_match(self.suffix(newest))
        return _go_round([*self.token_ids[end : end + num_drafts], newest], num_drafts, length) if length else NO_MATCH

    def suffix(self, newest: int) -> array[int]:
        """Return the text's last tokens and a newest one: what is looked up, at most `max_length`."""
        ids = self.token_ids
        return array("i", [*ids[max(0, len(ids) + 1 - self.max_length) :], newest])

    def find(self, suffix: Sequence[int], num_drafts: int, border: int) -> Lookup:
        """Find the longest end of another text's last tokens in the text read, and of its places the latest.

        The drafts are what followed there. Where that ends the copy begins again, to be K long.

        Args:
            suffix: those tokens, at most `max_length`.
            num_drafts: K.
            border: the token that ends what is copied.
        """
        length, end = self._longest_match(array("i", suffix))
        followed = list(takewhile(lambda token: token != border, self.token_ids[end : end + num_drafts]))
        return _go_round(followed, num_drafts, length) if length and followed else NO_MATCH

    def _longest_match(self, suffix: array[int]) -> tuple[int, int]:
        """Return how many last tokens of `suffix` stand in the text, 0 for none, and where their latest place ends."""
        ids = self.token_ids
        end = self._ends.get(suffix[-self.min_length :].tobytes(), 0)
        found, found_end = 0, 0
        for _ in range(MOST_PLACES):
            if end == 0 or found == len(suffix):
                break
            length = self.min_length
            while length < min(len(suffix), end) and ids[end - 1 - length] == suffix[-1 - length]:
                length += 1
            if length > found:
                found, found_end = length, end
            end = self._earlier[end]
        return found, found_end


def _go_round(token_ids: Sequence[int], num_drafts: int, length: int) -> Lookup:
    """Return a match of `length` tokens that drafts these, again from the first where they are fewer than K."""
    return Lookup(tuple(islice(cycle(token_ids), num_drafts)), length)
