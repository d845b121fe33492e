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
# Until the cost of decoding without drafts is known, every so many steps is one; once it is, few are, so that it stays
# true. Where drafting does not pay, it is tried now and then, as texts change.
_LEARN_EVERY, _CHECK_EVERY, _TRY_EVERY = 4, 256, 16

# How drafts are made, and how many: steps that differ in it differ in what they cost and bring.
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


class Payoff:
    """Decides before each step of an engine whether to draft for it, on host times: for devices that a step waits for.

    To verify K drafts costs little where a step waits for weights, and up to K times as much where it computes: in
    large batches, and with attention over a long context. Nothing about a machine is assumed; both kinds of steps are
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
            and set(rows) == {1 + last.kind[1]}
            and [id(one) for one in last.requests] == [id(one) for one in requests]
        ):
            last.load.seconds[last.kind].append(last.drafting_s + now - last.ended)
            self._gains[last.kind].append(statistics.mean(kept))

    def choose(self, how: Hashable, num_drafts: int, num_tokens: int) -> int:
        """Return how many tokens to draft for each request: `num_drafts` or none.

        Args:
            how: the drafts would be made.
            num_drafts: K, at least 1.
            num_tokens: that the batch attends to, all requests together.
        """
        step = self._step
        assert step is not None, "begin comes first"
        load = step.load = self._loads[len(step.requests).bit_length(), num_tokens.bit_length()]
        step.kind = (how, num_drafts) if self._pays(load, (how, num_drafts)) else _PLAIN
        return step.kind[1]

    def end(self) -> None:
        """Note that the drafting is over."""
        step = self._step
        assert step is not None, "begin comes first"
        step.ended = self._clock()
        step.drafting_s = step.ended - step.began

    def _pays(self, load: _Load, kind: Kind) -> bool:
        load.num_steps += 1
        plain, drafted = load.seconds[_PLAIN], load.seconds[kind]
        if len(drafted) < _FEW:
            return True
        if len(plain) < _FEW:
            return load.num_steps % _LEARN_EVERY != 0
        if statistics.mean(self._gains[kind]) * statistics.median(plain) > statistics.median(drafted):
            return load.num_steps % _CHECK_EVERY != 0
        load.num_refused += 1
        return load.num_refused % _TRY_EVERY == 0
