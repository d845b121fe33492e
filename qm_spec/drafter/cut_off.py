"""Where drafts stop paying as batches grow, decided without timing a step: by what they are expected to bring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# Steps in a row that draft before an expectation is theirs: chances of drafts reach the host two steps later.
_LAG = 3
# Expectations that a decision needs, and how many of the newest are about averaged.
_LEAST, _MEMORY = 8, 16
# Steps without drafts behind a first decision against them; each further one in a row doubles it, up to the most.
_REST, _MOST_REST = 64, 1024


@dataclass
class _Size:
    """What is known of batches of about one size.

    Attributes:
        gain: running mean of the expectations.
        number: of expectations in it.
        rest: steps still to go without drafts.
        refusals: decisions against drafts in a row.
    """

    gain: float = 1.0
    number: int = 0
    rest: int = 0
    refusals: int = 0


class CutOff:
    """Says for each step whether to draft behind it.

    Drafting rests for a batch size, counted in powers of two, whose drafts are expected to cost more than they bring.
    It is tried again later, as texts change: of a useless drafter's steps at most 11 of 75 draft, later 11 of 1035.

    Args:
        report: is told each change of mind.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._sizes: dict[int, _Size] = {}
        self._drafting = 0

    def drafts(self, num_requests: int, gain: float | None) -> bool:
        """Return whether to draft behind a step.

        Args:
            num_requests: of the step.
            gain: tokens per second that the step was expected to bring with its drafts, over those of a step without;
                None where nothing is known.
        """
        size = self._sizes.setdefault(num_requests.bit_length(), _Size())
        if size.rest:
            size.rest -= 1
            self._drafting = 0
            return False
        if gain is not None and self._drafting >= _LAG:
            size.number += 1
            size.gain += (gain - size.gain) / min(size.number, _MEMORY)
        self._drafting += 1
        if size.number < _LEAST:
            return True
        if size.gain < 1:
            self._begin_rest(size, num_requests)
            return False
        if size.refusals:
            size.refusals = 0
            self._report(f"drafts pay again with about {num_requests} requests: {size.gain:.2f} times as many tokens")
        return True

    def _begin_rest(self, size: _Size, num_requests: int) -> None:
        if not size.refusals:
            self._report(
                f"drafts do not pay with about {num_requests} requests: {size.gain:.2f} times as many tokens a second "
                "are expected of them; such steps draft nothing and are tried again now and then"
            )
        size.rest = min(_REST << size.refusals, _MOST_REST) - 1
        size.refusals += 1
        size.number, size.gain = 0, 1.0
        self._drafting = 0
