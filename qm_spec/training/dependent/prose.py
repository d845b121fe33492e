"""Real prose, read on from a random place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

_MIN_WORDS = 100
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+")
_SPACE = re.compile(r"\s+")
_WORD = re.compile(r"\b[a-z]{5,11}\b")


def check_prose(texts: Sequence[str]) -> None:
    """Refuse filler that is too little to read from.

    Raises:
        ValueError: there are fewer than 100 words.
    """
    if isinstance(texts, str):
        raise ValueError("filler: must be a list of texts, got one string; pass [text]")
    num_words = 0
    for text in texts:
        num_words += len(text[: 100 * _MIN_WORDS].split())
        if num_words >= _MIN_WORDS:
            return
    raise ValueError(
        f"filler: must hold at least {_MIN_WORDS} words of prose, got {num_words} in {len(texts)} texts; "
        "pass real text, such as novels"
    )


class Prose:
    """Reads passages that follow each other in one text, then in another.

    Args:
        texts: see `check_prose`.
        rng: where the reading begins.
    """

    def __init__(self, texts: Sequence[str], rng: Random) -> None:
        self._texts = [text for text in texts if text and not text.isspace()]
        self._lengths = [len(text) for text in self._texts]
        self._rng = rng
        self._open()

    def _open(self) -> None:
        """Go to the beginning of a sentence somewhere in the texts."""
        self._text = self._rng.choices(self._texts, self._lengths)[0]
        place = self._rng.randrange(len(self._text))
        sentence = _SENTENCE_END.search(self._text, place)
        self._place = sentence.end() if sentence else 0

    def passage(self, length: int) -> str:
        """Return the next passage: about `length` characters, to the end of a sentence or else of a word."""
        text = self._text
        while not (passage := text[self._place : self._end(length)].strip()):
            self._open()
            text = self._text
        self._place = self._end(length)
        return passage

    def _end(self, length: int) -> int:
        wanted = self._place + length
        end = _SENTENCE_END.search(self._text, wanted, wanted + max(80, length // 2)) or _SPACE.search(
            self._text, wanted
        )
        return end.end() if end else len(self._text)

    def words(self, around: int) -> list[str]:
        """Return the different lower-case words of 5 to 11 letters in about `around` characters from a random place."""
        text = self._rng.choices(self._texts, self._lengths)[0]
        start = self._rng.randrange(max(1, len(text) - around))
        return list(dict.fromkeys(_WORD.findall(text, start, start + around)))
