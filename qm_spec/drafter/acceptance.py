"""How probably a draft token is accepted, by its position behind the last verified token."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Steps and trials after which an observation counts 1/e: the newest texts tell, and of them enough.
_STEPS, _TRIALS = 400, 150
# The long run, towards which few observations are drawn, counts as so many.
_WEIGHT, _LONG_TRIALS = 4.0, 1500
# An upper bound adds so many standard deviations, and so many trials that might have been accepted.
_DEVIATIONS, _UNSEEN = 2.0, 2.0
# No draft is sure.
_MOST = 0.98


class AcceptanceRates:
    """Probabilities that the token at each position is accepted if all before it are.

    Each is a Beta posterior over recent trials; its prior is the long run, and that of a position hardly ever tried the
    position before it. So what is learnt with few drafts says what to expect of more.

    Args:
        first: what to expect before anything is known, 0..1.
        num_positions: K.

    Attributes:
        expected: the probabilities by position.
    """

    def __init__(self, first: float, num_positions: int) -> None:
        # Of each position, trials and hits.
        self._recent = [[0.0, 0.0] for _ in range(num_positions)]
        self._long_run = [[0.0, 0.0] for _ in range(num_positions)]
        self._first = first
        self._step = 0
        self.expected: list[float] = []
        self._estimate()

    def observe(self, verified: Sequence[tuple[int, int]], step: int) -> None:
        """Note the drafts of one step.

        Args:
            verified: of each request the tokens drafted, at least 1, and of these the ones accepted.
            step: its number.
        """
        self._fade(self._recent, math.exp(-(step - self._step) / _STEPS - len(verified) / _TRIALS))
        self._fade(self._long_run, math.exp(-len(verified) / _LONG_TRIALS))
        self._step = step
        for drafted, accepted in verified:
            for position in range(min(accepted + 1, drafted)):
                for counts in (self._recent[position], self._long_run[position]):
                    counts[0] += 1
                    counts[1] += position < accepted
        self._estimate()

    def upper(self, step: int) -> list[float]:
        """Return what the probabilities may be by now at the most: the longer nothing was tried, the more."""
        fade, bounds = math.exp(-(step - self._step) / _STEPS), []
        for (trials, _), rate in zip(self._recent, self.expected, strict=True):
            weight = fade * trials + _WEIGHT
            bounds.append(min(rate + _DEVIATIONS * math.sqrt(rate * (1 - rate) / weight) + _UNSEEN / weight, _MOST))
        return bounds

    @staticmethod
    def _fade(counts: list[list[float]], factor: float) -> None:
        for pair in counts:
            pair[0] *= factor
            pair[1] *= factor

    def _estimate(self) -> None:
        before, shift, self.expected = self._first, 1.0, []
        for (trials, hits), (long_trials, long_hits) in zip(self._recent, self._long_run, strict=True):
            before = (long_hits + _WEIGHT * before) / (long_trials + _WEIGHT)
            # A text that does better or worse of late does so at later positions too.
            rate = (hits + _WEIGHT * min(before * shift, 1.0)) / (trials + _WEIGHT)
            shift = rate / max(before, 1e-6)
            self.expected.append(min(rate, _MOST))
