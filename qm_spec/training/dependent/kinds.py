"""What each kind of document states, and how it comes back to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
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


class Quotation(Kind):
    """Passages of prose that are quoted again, word for word.

    A quotation's first words only tell which passage it is, so its span begins after them.
    """

    most, share, early = 0.3, 0.0, 0.0
    _CUE_WORDS, _FEWEST_WORDS, _MOST_WORDS = 4, 10, 200
    _MOST_REPEATS = 4
    # What was quoted is not quoted again within so many characters.
    _FRESH = 500
    _PHRASES = (
        'As it was written before: "{}"\n',
        'As was said above, "{}"\n',
        'It was told earlier: "{}"\n',
        'We have read already: "{}"\n',
        'To quote what stood before: "{}"\n',
        'Remember these words: "{}"\n',
        'And again: "{}"\n',
        'He read it out once more: "{}"\n',
        'She knew the passage by heart: "{}"\n',
        "\n> {}\n\n",
        "The same passage again:\n{}\n",
    )

    def state(self) -> None:
        """Write prose that may be quoted."""
        self._state(self.rng.randint(200, 1500))

    fill = state

    def _state(self, length: int) -> None:
        self.out.give(Fact("", self.prose.passage(min(self.longest, length))))
        self.out.write(self.rng.choice(" \n"))

    def recall(self) -> None:
        """Quote a passage that stood at a drawn distance."""
        distance = self.out.draw_distance()
        passage = self.out.fact_at(distance)
        words = [0] + [i + 1 for i, letter in enumerate(passage.value) if letter in " \n"] + [len(passage.value) + 1]
        if len(words) <= self._FEWEST_WORDS:
            self.out.forget(passage)
            return self._state(200)
        if passage.repeats and self.out.length - passage.place < self._FRESH:
            return self._state(200)
        wanted = self.out.length - distance - passage.place
        first = min(sum(begin <= wanted for begin in words[1:]), len(words) - 1 - self._FEWEST_WORDS)
        count = int(self._FEWEST_WORDS * (self._MOST_WORDS / self._FEWEST_WORDS) ** self.rng.random())
        last = min(first + count, len(words) - 1)
        while words[last] - words[first] > self.longest and last - first > self._FEWEST_WORDS:
            last -= 1
        before, after = self.rng.choice(self._PHRASES).split("{}")
        self.out.write(before)
        self._quote(passage, words[first], words[first + self._CUE_WORDS], words[last] - 1)
        self.out.write(after)
        return None

    def _quote(self, passage: Fact, begin: int, cue_end: int, end: int) -> None:
        """Write a passage's characters `begin..end`; the cue is no span, and what was not quoted stays quotable."""
        text, place = passage.value, passage.place
        self.out.forget(passage)
        for left, right in ((0, begin), (end + 1, len(text))):
            if right > left:
                self.out.keep(Fact("", text[left:right].rstrip(), place=place + left, repeats=passage.repeats))
        quoted = Fact("", text[begin:end], place=self.out.length, repeats=passage.repeats + 1)
        self.out.write(text[begin:cue_end])
        self.out.echo(Fact("", text[cue_end:end], place=place + cue_end))
        if quoted.repeats < self._MOST_REPEATS:
            self.out.keep(quoted)


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


_CLASSES: dict[str, type[Kind]] = {
    "quotation": Quotation,
    "records": Records,
    "needle": Needle,
    "multi_key": MultiKey,
    "variables": Variables,
    "words": Words,
}
KINDS = tuple(_CLASSES)


def kind_class(kind: str) -> type[Kind]:
    """Return the class of a kind.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in _CLASSES:
        raise ValueError(f"generate: kind must be one of {', '.join(sorted(KINDS))}, got {kind!r}")
    return _CLASSES[kind]
