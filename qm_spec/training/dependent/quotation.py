"""Prose that quotes itself."""

from __future__ import annotations

from qm_spec.training.dependent.kind import Kind
from qm_spec.training.dependent.manuscript import Fact


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
