"""Records and their look-ups."""

from __future__ import annotations

from collections.abc import Callable

from qm_spec.training.dependent.kind import Kind
from qm_spec.training.dependent.manuscript import Fact, Manuscript
from qm_spec.training.dependent.prose import Prose
from qm_spec.training.dependent.vocabulary import Vocabulary


class Records(Kind):
    """People with a town, a trade, a number, a colour and a dog, as a table or as sentences; then look-ups."""

    most, share, early = 0.25, 0.25, 0.5
    _ASPECTS = ("town", "trade", "number", "colour", "dog")
    _VERBS = (" lives in ", ", is employed as ", ", has the number ", ", likes ", " and calls the dog ")

    def __init__(self, manuscript: Manuscript, prose: Prose, vocabulary: Vocabulary, length: int) -> None:
        super().__init__(manuscript, prose, vocabulary, length)
        self._records: dict[str, list[Fact]] = {}
        self._num_open = 0

    def state(self) -> None:
        """Write some records, as lines of a table or as sentences."""
        table = self.rng.random() < 0.5
        end = self.out.length + min(self.longest, 600)
        if table:
            self.out.write("\nname | " + " | ".join(self._ASPECTS) + "\n")
        while self.out.length < end:
            self._state_one(table)
        self.out.write("\n")

    def _state_one(self, table: bool) -> None:
        draw = self.vocabulary
        values = (draw.town(), draw.trade(), draw.number(), draw.colour(), draw.word())
        person = draw.person()
        facts = [Fact(person, value, aspect) for aspect, value in zip(self._ASPECTS, values, strict=True)]
        self._records[person] = facts
        self.out.write(person)
        write = self._tabulate if table else self._describe
        write(facts, self.out.give)

    def _tabulate(self, facts: list[Fact], write: Callable[[Fact], None]) -> None:
        for fact in facts:
            self.out.write(" | ")
            write(fact)
        self.out.write("\n")

    def _describe(self, facts: list[Fact], write: Callable[[Fact], None]) -> None:
        for before, fact in zip(self._VERBS, facts, strict=True):
            self.out.write(before)
            write(fact)
        self.out.write(".\n")

    def recall(self) -> None:
        """Look up one attribute of a record, or all of them."""
        fact = self.out.fact_at(self.out.draw_distance())
        person, aspect, style = fact.topic, fact.aspect, self.rng.randrange(8)
        if style >= 6:
            self.out.write(f"Who is {person}? {person}")
            return self._describe(self._records[person], self.out.repeat)
        if style >= 4:
            self.out.write(person)
            return self._tabulate(self._records[person], self.out.repeat)
        self.out.write(
            (
                f"What is the {aspect} of {person}? The {aspect} of {person} is ",
                f"Q: {person}, {aspect}?\nA: ",
                f"{person}: {aspect} ",
                f"The {aspect} of {person} was ",
            )[style]
        )
        self.out.repeat(fact)
        self.out.write(".\n")
        return None
