"""Whether drafting pays: what steps with and without drafts have taken, against the tokens they have brought."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

# Steps whose median is a cost; their mean would follow every hiccup of the machine.
_COSTS = 9
# Steps whose mean is what drafts bring.
_GAINS = 64
# Costs of a kind of step are taken as known from so many on.
_FEW = 3
# Until all costs are known, every so many steps is one of a kind that is not; once they are, few are, so that they stay
# true. Where it does not pay to draft the most, that is tried now and then, as texts change.
_LEARN_EVERY, _CHECK_EVERY, _TRY_EVERY = 4, 256, 16

# How drafts are made, and the place of their numbers among the ways to choose from: steps that differ in it differ in
# what they cost and bring.
Kind = tuple[Hashable, int]
_PLAIN: Kind = (None, 0)


def _latest(number: int) -> Callable[[], defaultdict[Kind, deque[float]]]:
    return lambda: defaultdict(lambda: deque(maxlen=number))


@dataclass
class _Load:
    """Steps of about the same work: their number, and the latest ones' seconds."""

    seconds: defaultdict[Kind, deque[float]] = field(default_factory=_latest(_COSTS))
    num_steps: int = 0
    num_refused: int = 0


@dataclass
class _Step:
    """One step, from the drafting for it on."""

    requests: list[object]
    began: float
    drafting_s: float = 0.0
    ended: float = 0.0
    load: _Load | None = None
    kind: Kind = _PLAIN
    # Tokens drafted for each request.
    widths: Sequence[int] = ()
    # Those of it and of all ways that draft less.
    ways: dict[Kind, Sequence[int]] = field(default_factory=dict)


class Payoff:
    """Decides before each step of an engine what to draft for it, on host times: for devices that a step waits for.

    To verify K drafts costs little where a step waits for weights, and up to K times as much where it computes: in
    large batches, and with attention over a long context. Nothing about a machine is assumed; all kinds of steps are
    timed, each number of requests and length of context (in powers of two) by itself. What is decided changes speed
    only: a target verifies whatever is drafted.

    Call `begin`, `choose` and `end` in this order around the drafting for each step.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._loads: defaultdict[tuple[int, int], _Load] = defaultdict(_Load)
        self._gains = _latest(_GAINS)()
        self._step: _Step | None = None

    def begin(self, requests: Sequence[object], rows: Sequence[int], kept: Sequence[int]) -> None:
        """Note the step that has just ended.

        Args:
            requests: of the batch, known by identity.
            rows: tokens that each of them read in this step, drafts included.
            kept: those of them that were verified.
        """
        now, last = self._clock(), self._step
        self._step = _Step(list(requests), now)
        # Others have read a prompt, or are the first of their requests.
        if (
            last is not None
            and last.load is not None
            and list(rows) == [1 + width for width in last.widths]
            and [id(one) for one in last.requests] == [id(one) for one in requests]
        ):
            last.load.seconds[last.kind].append(last.drafting_s + now - last.ended)
            for kind, widths in last.ways.items():
                brought = (min(number, 1 + width) for number, width in zip(kept, widths, strict=True))
                self._gains[kind].append(statistics.mean(brought))

    def choose(self, how: Hashable, ways: Sequence[Sequence[int]], num_tokens: int) -> Sequence[int]:
        """Return how many tokens to draft for each request: one of the ways, or none for all.

        Args:
            how: the drafts would be made.
            ways: numbers for each request, at least 1; the most first, and every way drafts the beginning of the one
                before it.
            num_tokens: that the batch attends to, all requests together.
        """
        step = self._step
        assert step is not None, "begin comes first"
        load = step.load = self._loads[len(step.requests).bit_length(), num_tokens.bit_length()]
        kinds: list[Kind] = [(how, place) for place in range(len(ways))]
        step.kind = self._choose(load, kinds)
        if step.kind == _PLAIN:
            step.widths = [0] * len(step.requests)
        else:
            place = step.kind[1]
            step.widths = ways[place]
            step.ways = dict(zip(kinds[place:], ways[place:], strict=True))
        return step.widths

    def end(self) -> None:
        """Note that the drafting is over."""
        step = self._step
        assert step is not None, "begin comes first"
        step.ended = self._clock()
        step.drafting_s = step.ended - step.began

    def _choose(self, load: _Load, kinds: list[Kind]) -> Kind:
        load.num_steps += 1
        most, *less = kinds
        if len(load.seconds[most]) < _FEW:
            return most
        unknown = [kind for kind in (_PLAIN, *less) if len(load.seconds[kind]) < _FEW]
        if unknown:
            return most if load.num_steps % _LEARN_EVERY else unknown[0]
        # Of two that are as fast, the one that drafts less.
        ranked = sorted((_PLAIN, *reversed(kinds)), key=lambda kind: self._rate(load, kind), reverse=True)
        best = ranked[0]
        if best != most:
            load.num_refused += 1
            if load.num_refused % _TRY_EVERY == 0:
                return most
            ranked.remove(most)
        others = ranked[1:]
        if others and load.num_steps % _CHECK_EVERY == 0:
            return others[load.num_steps // _CHECK_EVERY % len(others)]
        return best

    def _rate(self, load: _Load, kind: Kind) -> float:
        """Tokens of a request per second."""
        gain = 1.0 if kind == _PLAIN else statistics.mean(self._gains[kind])
        return gain / statistics.median(load.seconds[kind])
