"""A document while it is written, and what it says that can be asked for."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from dataclasses import dataclass
from random import Random

from qm_spec.training.dependent.document import Document, Span

# The least distance that is drawn, characters.
_NEAREST = 32
# Of this many facts at about the wanted distance, within this factor, the one told least often is taken.
_CANDIDATES, _ABOUT = 4, 1.4


@dataclass(eq=False)
class Fact:
    """What the text says at `place`, the latest place that does so.

    Attributes:
        topic: what the fact is about, such as the creature that owns a number.
        value: as the text gives it.
        aspect: which of the topic's facts it is, where it has several.
        place: character offset.
        repeats: how often it was told again.
    """

    topic: str
    value: str
    aspect: str = ""
    place: int = -1
    repeats: int = 0

    @property
    def end(self) -> int:
        """Where the value ends."""
        return self.place + len(self.value)


class Manuscript:
    """Takes text piece by piece and remembers where it gave each fact."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.length = 0
        self.num_dependent = 0
        self._pieces: list[str] = []
        self._spans: list[Span] = []
        # Sorted by place, and the places beside them.
        self._facts: list[Fact] = []
        self._places: list[int] = []

    @property
    def num_facts(self) -> int:
        """How many facts can be asked for."""
        return len(self._facts)

    def write(self, text: str) -> None:
        """Add text that depends on nothing."""
        self._pieces.append(text)
        self.length += len(text)

    def give(self, fact: Fact) -> None:
        """Write a fact's value for the first time."""
        self._remember(fact)
        self.write(fact.value)

    def repeat(self, fact: Fact) -> None:
        """Write a fact's value again, a dependent span; this is its latest place from now on."""
        self.forget(fact)
        source = fact.place
        self._remember(fact)
        self._depend(fact, source)

    def echo(self, fact: Fact) -> None:
        """Write a fact's value again, a dependent span, without moving its place."""
        self._depend(fact, fact.place)

    def _depend(self, fact: Fact, source: int) -> None:
        fact.repeats += 1
        self._spans.append(Span(self.length, self.length + len(fact.value), source))
        self.num_dependent += len(fact.value)
        self.write(fact.value)

    def _remember(self, fact: Fact) -> None:
        fact.place = self.length
        self._facts.append(fact)
        self._places.append(fact.place)

    def keep(self, fact: Fact) -> None:
        """Remember a fact whose value already stands at its place."""
        insort(self._facts, fact, key=lambda known: known.place)
        insort(self._places, fact.place)

    def forget(self, fact: Fact) -> None:
        """Ask no more for a fact."""
        index = bisect_left(self._places, fact.place)
        del self._facts[index], self._places[index]

    def draw_distance(self) -> int:
        """Draw a distance log-uniformly from a few dozen characters to the whole text so far."""
        return int(_NEAREST * math.exp(self.rng.random() * math.log(max(1.0, self.length / _NEAREST))))

    def fact_at(self, distance: int) -> Fact:
        """Return a seldom told fact given about `distance` characters ago, or the nearest where there is none."""
        oldest = bisect_left(self._places, self.length - distance * _ABOUT)
        newest = bisect_left(self._places, self.length - distance / _ABOUT)
        if oldest < newest:
            drawn = [oldest + int(self.rng.random() * (newest - oldest)) for _ in range(_CANDIDATES)]
            return min((self._facts[index] for index in drawn), key=lambda fact: fact.repeats)
        index = bisect_left(self._places, self.length - distance)
        if index == len(self._facts):
            return self._facts[-1]
        if index == 0:
            return self._facts[0]
        older, newer = self.length - self._places[index - 1], self.length - self._places[index]
        return self._facts[index] if distance * distance < older * newer else self._facts[index - 1]

    def some_facts(self, count: int) -> list[Fact]:
        """Return up to `count` different facts, each at a distance of its own."""
        return list(dict.fromkeys(self.fact_at(self.draw_distance()) for _ in range(count)))

    def finish(self, kind: str, length: int) -> Document:
        """Return the document, cut after a whole word at `length` characters at most."""
        text = "".join(self._pieces)
        if len(text) > length:
            text = text[: max(text.rfind(" ", 0, length), text.rfind("\n", 0, length))]
        return Document(text, kind, tuple(span for span in self._spans if span.end <= len(text)))
