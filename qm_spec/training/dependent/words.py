"""Lists of words, and what is in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from qm_spec.training.dependent.kind import Kind
from qm_spec.training.dependent.manuscript import Fact, Manuscript
from qm_spec.training.dependent.prose import Prose
from qm_spec.training.dependent.vocabulary import Vocabulary


class Words(Kind):
    """Named lists of words, some more than once; later a list is written again, or what comes often in it."""

    most, share, early = 0.5, 0.3, 0.2

    def __init__(self, manuscript: Manuscript, prose: Prose, vocabulary: Vocabulary, length: int) -> None:
        super().__init__(manuscript, prose, vocabulary, length)
        self._lists: dict[str, list[Fact]] = {}
        # Lists that repeat words, and were not asked for these.
        self._unasked: set[str] = set()
        self._known = prose.words(length // 2)

    def state(self) -> None:
        """Write a list; about half of the lists repeat some of their words."""
        name, count = self.vocabulary.list_name(), self.rng.randint(4, max(4, min(30, self.longest // 16)))
        draw = self.rng
        words = [
            draw.choice(self._known) if self._known and draw.random() < 0.5 else self.vocabulary.word().lower()
            for _ in range(count)
        ]
        if draw.random() < 0.5:
            words += [word for word in dict.fromkeys(words) if draw.random() < 0.25 for _ in range(2)]
            draw.shuffle(words)
        self.out.write(f"List {name}: ")
        facts = self._lists[name] = [Fact(name, word) for word in words]
        if len(set(words)) < len(words):
            self._unasked.add(name)
        self._write(facts, self.out.give)

    def recall(self) -> None:
        """Write a list again, or once the words that come several times in it."""
        name = self.out.fact_at(self.out.draw_distance()).topic
        facts = self._lists[name]
        if name in self._unasked and self.rng.random() < 0.5:
            self._unasked.remove(name)
            count = Counter(fact.value for fact in facts)
            first: dict[str, Fact] = {}
            for fact in facts:
                first.setdefault(fact.value, fact)
            self.out.write(f"More than once in list {name}: ")
            self._write([fact for word, fact in first.items() if count[word] > 1], self.out.echo)
        else:
            self.out.write(self.rng.choice((f"List {name} again: ", f"Once more list {name}: ", f"{name}: ")))
            self._write(facts, self.out.repeat)

    def _write(self, facts: list[Fact], write: Callable[[Fact], None]) -> None:
        for number, fact in enumerate(facts):
            self.out.write(", " if number else "")
            write(fact)
        self.out.write(".\n")
