"""Generated documents whose later text repeats what earlier text told, at any distance.

Source: needle, multi-key, variables and words after RULER (Hsieh et al. 2024, arXiv 2404.06654), which asks at the end;
here look-ups come all along, at distances drawn log-uniformly.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

MIN_LENGTH = 1000
_MIN_WORDS = 100
# The least distance that is drawn, in characters.
_NEAREST = 32
_ONSETS = (*"bcdfghjklmnprstvwz", "br", "ch", "dr", "fl", "gr", "kr", "sh", "st", "th", "tr")
_VOWELS = ("a", "e", "i", "o", "u", "ai", "au", "ea", "ee", "ie", "oa")
_CODAS = ("", "", "", "l", "n", "r", "s", "m", "nd", "rk", "st", "lt")
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+")
_QUOTED_WORDS = (10, 200)
_ASPECTS = ("town", "trade", "number", "dog")


class _Writer:
    """A document while it is written, and what it says that can be told again.

    Attributes:
        facts: `(topic, value)`, in the order of their places.
    """

    def __init__(self, rng: Random, filler: Sequence[str], longest: int) -> None:
        self.rng = rng
        self.length = 0
        self.facts: list[tuple[str, str]] = []
        self._parts: list[str] = []
        self._places: list[int] = []
        self._filler = [text for text in filler if text.strip()]
        self._longest = longest
        self._names: set[str] = set()

    @property
    def text(self) -> str:
        """All that is written."""
        return "".join(self._parts)

    def write(self, text: str) -> None:
        """Add text."""
        self._parts.append(text)
        self.length += len(text)

    def tell(self, topic: str, value: str) -> None:
        """Remember what is told here."""
        self.facts.append((topic, value))
        self._places.append(self.length)

    def told(self) -> tuple[str, str]:
        """Return a fact told at about a drawn distance, from a few dozen characters to the whole text so far."""
        distance = _NEAREST * math.exp(self.rng.random() * math.log(max(1.0, self.length / _NEAREST)))
        return self.facts[min(bisect_left(self._places, self.length - distance), len(self.facts) - 1)]

    def word(self) -> str:
        """Return an invented word, such as `trolvansea`."""
        choice = self.rng.choice
        return "".join(choice(_ONSETS) + choice(_VOWELS) + choice(_CODAS) for _ in range(choice((2, 2, 3))))

    def name(self) -> str:
        """Return a name that did not come before, such as `Keldra Moustin`."""
        while (name := f"{self.word()} {self.word()}".title()) in self._names:
            pass
        self._names.add(name)
        return name

    def number(self) -> str:
        """Return a number of 4 to 6 digits."""
        return str(self.rng.randrange(1000, 10 ** self.rng.choice((4, 5, 6))))

    def value(self) -> str:
        """Return a number or an invented word."""
        return self.number() if self.rng.random() < 0.5 else self.word()

    def passage(self, length: int) -> str:
        """Return prose of about `length` characters, from the beginning of a sentence to the end of a word."""
        text = self.rng.choices(self._filler, [len(some) for some in self._filler])[0]
        found = _SENTENCE_END.search(text, self.rng.randrange(len(text)))
        begin = found.end() if found and found.end() < len(text) else 0
        passage = text[begin : begin + min(length, self._longest)]
        return passage.rpartition(" ")[0] or passage

    def fill(self) -> None:
        """Write prose that tells nothing."""
        self.write(self.passage(self.rng.randint(80, 500)) + "\n")


@dataclass(frozen=True)
class _Kind:
    """How a kind of document tells, and tells again.

    Attributes:
        tell, repeat: write such a piece.
        told, repeated: shares of the pieces; the others are prose.
    """

    tell: Callable[[_Writer], None]
    repeat: Callable[[_Writer], None]
    told: float
    repeated: float


def _tell_secret(out: _Writer) -> None:
    topic, value = out.name(), out.value()
    out.write("The secret of ")
    out.tell(topic, value)
    out.write(f"{topic} is {value}. ")


def _repeat_secret(out: _Writer) -> None:
    topic, value = out.told()
    out.write(f"What is the secret of {topic}? The secret of {topic} is {value}.\n")


def _tell_secrets(out: _Writer) -> None:
    for _ in range(out.rng.randint(1, 5)):
        _tell_secret(out)
    out.write("\n")


def _repeat_secrets(out: _Writer) -> None:
    facts = list(dict.fromkeys(out.told() for _ in range(out.rng.randint(1, 6))))
    topics, values = (", ".join(part) for part in zip(*facts, strict=True))
    out.write(f"For {topics} the secret is {values}.\n")


def _tell_record(out: _Writer) -> None:
    out.write(f"\nname | {' | '.join(_ASPECTS)}\n")
    for _ in range(out.rng.randint(1, 8)):
        name, values = out.name(), (out.word().title(), out.word(), out.number(), out.word().title())
        for aspect, value in zip(_ASPECTS, values, strict=True):
            out.tell(f"{aspect} of {name}", value)
        out.write(f"{name} | {' | '.join(values)}\n")
    out.write("\n")


def _repeat_record(out: _Writer) -> None:
    topic, value = out.told()
    out.write(f"What is the {topic}? The {topic} is {value}.\n")


def _tell_variable(out: _Writer) -> None:
    for _ in range(out.rng.randint(1, 4)):
        name = out.name().replace(" ", "").upper()
        if out.facts and out.rng.random() < 0.5:
            other, value = out.told()
            out.write(f"VAR {name} = VAR {other}.\n")
        else:
            value = out.value()
            out.write(f"VAR {name} = {value}.\n")
        out.tell(name, value)


def _repeat_variable(out: _Writer) -> None:
    facts = list(dict.fromkeys(out.told() for _ in range(out.rng.randint(1, 5))))
    names, values = (", ".join(part) for part in zip(*facts, strict=True))
    out.write(f"print {names}: {values}.\n")


def _tell_list(out: _Writer) -> None:
    name, words = out.name(), ", ".join(out.word() for _ in range(out.rng.randint(4, 20)))
    out.tell(name, words)
    out.write(f"List {name}: {words}.\n")


def _repeat_list(out: _Writer) -> None:
    name, words = out.told()
    out.write(f"List {name} again: {words}.\n")


def _tell_passage(out: _Writer) -> None:
    passage = out.passage(out.rng.randint(200, 1500))
    out.tell("", passage)
    out.write(passage + "\n")


def _repeat_passage(out: _Writer) -> None:
    words = out.told()[1].split(" ")
    fewest, most = _QUOTED_WORDS
    count = int(fewest * (most / fewest) ** out.rng.random())
    begin = out.rng.randrange(max(1, len(words) - count))
    out.write(f'As it was written before: "{" ".join(words[begin : begin + count])}"\n')


_KINDS = {
    "quotation": _Kind(_tell_passage, _repeat_passage, 0.6, 0.4),
    "records": _Kind(_tell_record, _repeat_record, 0.06, 0.6),
    "needle": _Kind(_tell_secret, _repeat_secret, 0.1, 0.1),
    "multi_key": _Kind(_tell_secrets, _repeat_secrets, 0.25, 0.4),
    "variables": _Kind(_tell_variable, _repeat_variable, 0.3, 0.4),
    "words": _Kind(_tell_list, _repeat_list, 0.25, 0.4),
}
KINDS = tuple(_KINDS)


def generate(kind: str, length: int, seed: int, filler: Sequence[str]) -> str:
    """Write a document, the same one for the same arguments.

    Args:
        kind: one of `KINDS`: prose that quotes itself, tables and look-ups, few facts in much prose, many facts of
            similar keys, assignments and their values, lists of words.
        length: characters, at least `MIN_LENGTH`; the text ends with the last whole word before.
        seed: any integer.
        filler: real prose, for passages between and for quotations.

    Raises:
        ValueError: the kind is unknown, the filler too little, or the length too short.
    """
    if kind not in _KINDS:
        raise ValueError(f"generate: kind must be one of {', '.join(sorted(KINDS))}, got {kind!r}")
    if length < MIN_LENGTH:
        raise ValueError(f"generate: length must be at least {MIN_LENGTH} characters, got {length}")
    num_words = sum(len(text[: 100 * _MIN_WORDS].split()) for text in filler)
    if num_words < _MIN_WORDS:
        raise ValueError(
            f"generate: filler must hold at least {_MIN_WORDS} words of prose, got {num_words} in {len(filler)} texts; "
            "pass real text, such as novels"
        )
    chosen = _KINDS[kind]
    # No piece is longer than a sixth, so that even a short document has several.
    out = _Writer(Random(f"{kind} {length} {seed}"), filler, length // 6)
    repeated = False
    while out.length < length:
        drawn = out.rng.random()
        late = not repeated and out.length > length // 3
        if not out.facts or (drawn < chosen.told and not late):
            chosen.tell(out)
        elif drawn < chosen.told + chosen.repeated or late:
            chosen.repeat(out)
            repeated = True
        else:
            out.fill()
    text = out.text[:length]
    return text[: max(text.rfind(" "), text.rfind("\n"))]
