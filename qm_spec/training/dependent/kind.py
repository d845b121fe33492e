"""What every kind of document does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from qm_spec.training.dependent.manuscript import Fact, Manuscript
from qm_spec.training.dependent.prose import Prose
from qm_spec.training.dependent.vocabulary import Vocabulary


class Kind(ABC):
    """Writes statements and recollections into a manuscript.

    Attributes:
        most: the greatest share of dependent characters that is sensible.
        share: share of the characters of statements; what is neither statement nor recollection is prose.
        early: how much of the statements stands at the beginning; the others come throughout the text.
    """

    most: ClassVar[float]
    share: ClassVar[float]
    early: ClassVar[float]

    def __init__(self, manuscript: Manuscript, prose: Prose, vocabulary: Vocabulary, length: int) -> None:
        self.out = manuscript
        self.rng = manuscript.rng
        self.prose = prose
        self.vocabulary = vocabulary
        # No piece is longer, so that even a short document has several.
        self.longest = length // 6

    @abstractmethod
    def state(self) -> None:
        """Write something that can be asked for."""

    @abstractmethod
    def recall(self) -> None:
        """Write something that only earlier text tells."""

    def fill(self) -> None:
        """Write prose that nothing comes back to, and end the line."""
        self.out.write(self._passage() + "\n")

    def _passage(self) -> str:
        return self.prose.passage(min(self.longest, self.rng.randint(80, 500)))

    def _list(self, words: list[str]) -> str:
        return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"

    def _repeat_list(self, facts: list[Fact]) -> None:
        """Write the values of facts as `a, b and c`."""
        for number, fact in enumerate(facts):
            if number:
                self.out.write(" and " if number == len(facts) - 1 else ", ")
            self.out.repeat(fact)
