"""Variables, their chains and their values."""

from __future__ import annotations

from qm_spec.training.dependent.kind import Kind
from qm_spec.training.dependent.manuscript import Fact, Manuscript
from qm_spec.training.dependent.prose import Prose
from qm_spec.training.dependent.vocabulary import Vocabulary


class Variables(Kind):
    """Assignments and chains of them, printed later; a chain gives its value only where it begins."""

    most, share, early = 0.2, 0.3, 0.2

    def __init__(self, manuscript: Manuscript, prose: Prose, vocabulary: Vocabulary, length: int) -> None:
        super().__init__(manuscript, prose, vocabulary, length)
        self._names: dict[Fact, list[str]] = {}

    def state(self) -> None:
        """Begin some chains, and go on with some."""
        for _ in range(self.rng.randint(1, 4)):
            name = self.vocabulary.variable()
            if self.out.num_facts and self.rng.random() < 0.5:
                names = self._names[self.out.fact_at(self.out.draw_distance())]
                self.out.write(f"VAR {name} = VAR {self.rng.choice(names)}.\n")
                names.append(name)
            else:
                fact = Fact(name, self.vocabulary.value())
                self._names[fact] = [name]
                self.out.write(f"VAR {name} = ")
                self.out.give(fact)
                self.out.write(".\n")

    def recall(self) -> None:
        """Print one variable, or several."""
        facts = self.out.some_facts(self.rng.randint(1, 6))
        names = self._list([self.rng.choice(self._names[fact]) for fact in facts])
        if len(facts) == 1:
            self.out.write(self.rng.choice((f"the value of {names} is ", f"print {names}: ", f"{names} is ")))
        else:
            self.out.write(self.rng.choice((f"the values of {names} are ", f"print {names}: ")))
        self._repeat_list(facts)
        self.out.write(".\n")
