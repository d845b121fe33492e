"""Seconds of work as a linear function of its size, fitted as the work is done."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Variance that each coefficient gains with a measurement, as a share of its prior's: what is not measured again is
# uncertain again after so many.
_DRIFT = 1 / 20_000
# A lower bound takes off so many standard deviations.
_DEVIATIONS = 2.0
# A measurement counts as at most so many standard deviations off; a machine's hiccup is many more.
_MOST_DEVIATIONS = 3.0
# As many such in a row are no hiccup: something has changed, and all is fitted anew from where it is.
_CHANGE = 3
# Noise of a measurement over its expectation: where it starts, the least, and how fast the estimate follows.
_FIRST_NOISE, _LEAST_NOISE, _NOISE_RATE = 0.1, 0.02, 0.05


class LinearCost:
    """A robust recursive fit: a Kalman filter whose coefficients drift, and whose surprises are clipped (Huber 1964).

    A lasting change of the machine is taken in after three measurements.

    Args:
        mean: prior of each coefficient, in seconds per unit of its feature.
        deviation: standard deviation of each; features that are never told apart share by it.
    """

    def __init__(self, mean: Sequence[float], deviation: Sequence[float]) -> None:
        self._coefficients = list(mean)
        self._most = [value * value for value in deviation]
        self._noise = _FIRST_NOISE
        self._variance: list[list[float]] = []
        # Measurements in a row that were too long, or negative if too short.
        self._clipped = 0
        self._forget()

    def predict(self, features: Sequence[float]) -> float:
        """Return the seconds to expect."""
        return sum(map(float.__mul__, self._coefficients, map(float, features)))

    def slope(self, feature: int) -> float:
        """Return the seconds that one more unit of a feature takes, never negative."""
        return max(self._coefficients[feature], 0.0)

    def least(self, features: Sequence[float]) -> float:
        """Return the seconds that so many more units take at the least, by what is not sure about them."""
        return max(self.predict(features) - _DEVIATIONS * self.deviation(features), 0.0)

    def deviation(self, features: Sequence[float]) -> float:
        """Return the standard deviation of `predict`, in seconds, without the noise of one measurement."""
        return math.sqrt(max(sum(map(float.__mul__, self._toward(features), map(float, features))), 0.0))

    def measure(self, features: Sequence[float], seconds: float) -> None:
        """Take a measurement in."""
        size = len(self._most)
        if abs(self._clipped) == _CHANGE:
            self._forget()
        variance = self._variance
        for i, most in enumerate(self._most):
            variance[i][i] += most * _DRIFT
            if variance[i][i] > most:
                shrink = math.sqrt(most / variance[i][i])
                for j in range(size):
                    variance[i][j] *= shrink
                    variance[j][i] *= shrink
        expected = self.predict(features)
        scale = max(expected, 0.1 * seconds)
        toward = self._toward(features)
        unsure = sum(map(float.__mul__, toward, map(float, features)))
        total = unsure + (self._noise * scale) ** 2
        most_off = _MOST_DEVIATIONS * math.sqrt(total)
        surprise = min(max(seconds - expected, -most_off), most_off)
        if abs(surprise) < most_off:
            self._clipped = 0
        else:
            self._clipped = max(self._clipped, 0) + 1 if surprise > 0 else min(self._clipped, 0) - 1
        for i in range(size):
            gain = toward[i] / total
            self._coefficients[i] += gain * surprise
            row = variance[i]
            for j in range(size):
                row[j] -= gain * toward[j]
        # Of the surprise, what the coefficients' own uncertainty does not explain.
        seen = abs(surprise) / scale * math.sqrt(1 - unsure / total)
        self._noise = max(self._noise + _NOISE_RATE * (1.25 * seen - self._noise), _LEAST_NOISE)

    def _forget(self) -> None:
        """Be as unsure of the coefficients as at first."""
        self._clipped = 0
        self._variance = [
            [most if i == j else 0.0 for j in range(len(self._most))] for i, most in enumerate(self._most)
        ]

    def _toward(self, features: Sequence[float]) -> list[float]:
        floats = [float(value) for value in features]
        return [sum(map(float.__mul__, row, floats)) for row in self._variance]
