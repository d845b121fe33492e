"""Secrets and their owners: needles in prose, and many similar keys."""

from __future__ import annotations

from qm_spec.training.dependent.kind import Kind
from qm_spec.training.dependent.manuscript import Fact, Manuscript
from qm_spec.training.dependent.prose import Prose
from qm_spec.training.dependent.vocabulary import Vocabulary


class _Secrets(Kind):
    """Facts of the form: the secret of the grey fox is 48213."""

    _QUESTIONS = (
        "What is {}? {} is ",
        "Somebody asked for {}. {}, as was said, is ",
        "Do you remember {}? {} is ",
    )

    def _tell(self, owned: str) -> None:
        self.out.write(f"The {owned} is ")
        self.out.give(Fact(owned, self.vocabulary.value()))
        self.out.write(". ")

    def _ask(self, fact: Fact) -> None:
        self.out.write(self.rng.choice(self._QUESTIONS).format(f"the {fact.topic}", f"The {fact.topic}"))
        self.out.repeat(fact)
        self.out.write(".\n")


class Needle(_Secrets):
    """A few facts in a lot of prose, each asked for now and then."""

    most, share, early = 0.02, 0.03, 0.0

    def __init__(self, manuscript: Manuscript, prose: Prose, vocabulary: Vocabulary, length: int) -> None:
        super().__init__(manuscript, prose, vocabulary, length)
        for _ in range(self.rng.randrange(4)):
            self.fill()

    def fill(self) -> None:
        """Write prose in which a fact may stand."""
        self.out.write(self._passage() + self.rng.choice(" \n"))

    def state(self) -> None:
        """Write one fact."""
        self._tell(f"{self.vocabulary.secret()} of the {self.vocabulary.creature()}")

    def recall(self) -> None:
        """Ask for one fact, then go on with prose."""
        self._ask(self.out.fact_at(self.out.draw_distance()))
        self.fill()


class MultiKey(_Secrets):
    """Many facts of similar keys: the same secret of many creatures."""

    most, share, early = 0.2, 0.25, 0.4

    def __init__(self, manuscript: Manuscript, prose: Prose, vocabulary: Vocabulary, length: int) -> None:
        super().__init__(manuscript, prose, vocabulary, length)
        self._secret = vocabulary.secret()

    def state(self) -> None:
        """Write several facts in a row."""
        for _ in range(self.rng.randint(1, 5)):
            self._tell(f"{self._secret} of the {self.vocabulary.creature()}")
        self.out.write("\n")

    def recall(self) -> None:
        """Ask for one fact, or for several at once."""
        facts = self.out.some_facts(self.rng.randint(1, 8))
        if len(facts) == 1:
            return self._ask(facts[0])
        owners = self._list([f"the {fact.topic.partition(' of the ')[2]}" for fact in facts])
        self.out.write(f"For {owners} the {self._secret} is ")
        self._repeat_list(facts)
        self.out.write(" in this order.\n")
        return None
