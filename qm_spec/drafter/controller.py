"""How many tokens to draft for each request of the next step, so that a batch is never slower than without drafts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from qm_spec.drafter.acceptance import AcceptanceRates
from qm_spec.drafter.linear_cost import LinearCost
from qm_spec.drafter.suffix_index import MAX_LENGTH

# Features of a step's seconds, see `Controller._features`: tokens verified, and whether there are drafts at all.
_ROWS, _VERIFY = 1, 4
# Plain steps that are timed before anything is drafted.
_FIRST_STEPS = 3
# Drafts must promise so much more than plain decoding: estimates are not better than that.
_LEAST_GAIN = 1.015
# And each draft token so much more than the time it takes to verify it.
_LEAST_WORTH = 1.1
# What drafting may lose against plain decoding: so much at once, in seconds, and so much of the time after that. Over
# any minute that is 1.5 %, which leaves something for what is known too late.
_ALLOWANCE_S, _ALLOWANCE_SHARE = 0.5, 0.006
# Trials leave so much of that for what turns out worse than expected.
_LEAST_FOR_TRIALS = 0.2
# Plain decoding is timed again where what drafts gain is less than so many standard deviations of its estimate, and
# after so many steps in any case; nothing is tried while the estimate is less sure than that.
_SURE_DEVIATIONS, _PLAIN_EVERY, _MOST_UNSURE = 2.0, 500, 0.1
# A single step that took so many times as long as expected was late by the machine's doing.
_MOST_LATE = 1.5
# Where nothing is drafted, nothing is decided behind the next step either, then behind two, four and so on up to so
# many: a decision and what comes with it take up to a tenth of a small target's step.
_MOST_REST = 8
# Drafts of one request that its own acceptance must outweigh, and steps after which they are forgotten.
_OWN_WEIGHT, _OWN_FADE = 6.0, 1 - 1 / 200
# Acceptance before anything is known: of the prior's drafts, and of copies by the length of their match.
_PRIOR_RATE, _COPY_RATE, _COPY_RATE_PER_TOKEN = 0.6, 0.5, 0.05
# Seconds between two reports.
_REPORT_S = 10.0
# Share of the steps of late that draft from which on drafting is reported as on, and as off.
_ON, _OFF, _REGIME_FADE = 0.7, 0.3, 0.97


@dataclass(frozen=True, slots=True)
class Candidate:
    """What may be drafted for one request.

    Attributes:
        request: known by identity.
        most: tokens worth drafting: what it may still write, less the token that verification brings.
        copied: token ids that suffix lookup found; empty where it found nothing.
        match: length of the suffix that was found, in tokens.
        sampled: its temperature is above 0.
    """

    request: object
    most: int
    copied: Sequence[int] = ()
    match: int = 0
    sampled: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What to draft for one step.

    Attributes:
        widths: tokens of each request.
        copies: which requests draft what suffix lookup found; the others draft by the prior.
        num_drafts: K, tokens that the prior drafts for the batch; 0 where it is not run.
        num_tokens: expected of the step, one or more for each request.
        seconds: expected of the step and the drafting for it.
    """

    widths: Sequence[int]
    copies: Sequence[bool]
    num_drafts: int
    num_tokens: float
    seconds: float


class Estimates(Protocol):
    """What a policy may know of the batch: see `Controller`."""

    def plain(self) -> Plan:
        """Return the plan that drafts nothing."""
        ...

    def best(self, upper: bool = False) -> Plan:
        """Return the plan of the most expected tokens per second, by upper bounds of acceptance if asked."""
        ...

    def unsure(self) -> float:
        """Return the standard deviation of a plain step's time over its expectation."""
        ...


Policy = Callable[[Estimates], Plan]


@dataclass(slots=True)
class _Request:
    """A request of the last step: what was planned for it, and its own acceptance."""

    request: object
    candidate: Candidate
    width: int = 0
    copies: bool = False
    expected: float = 0.0
    accepted: float = 0.0

    def factor(self) -> float:
        """Its acceptance over that of all requests."""
        return (self.accepted + _OWN_WEIGHT) / (self.expected + _OWN_WEIGHT)


class Controller:
    """Decides before each step of an engine what to draft for it, on host times: for devices that a step waits for.

    To verify K drafts costs little where a step waits for weights, and up to K times as much where it computes. Nothing
    about a machine is assumed. A step's seconds are fitted as a linear function of the tokens it verifies, its requests
    and their context, the drafting's of K and of requests times K; acceptance is estimated by position, for the prior's
    drafts and for copies by the length of their match. So what one load has taught holds for the others. Of all plans
    the one of most expected tokens per second is taken. What that costs where it is wrong, and what it costs to learn,
    is charged to an allowance, and nothing is drafted where that is used up.

    What is decided changes speed only: a target verifies whatever is drafted. Call `begin`, `plan` and `end` in this
    order around the drafting for each step, but for those behind which it rests.

    Args:
        num_drafts: K, the most tokens that the prior drafts.
        num_copied: the most that are copied.
        clock: seconds.
        policy: what chooses; by default the rule above.
        report: takes a line of text when drafting is turned on or off.
    """

    def __init__(
        self,
        num_drafts: int,
        num_copied: int,
        clock: Callable[[], float] = time.perf_counter,
        policy: Policy | None = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._clock, self._policy, self._report = clock, policy or self._decide, report
        self._prior = {sampled: AcceptanceRates(_PRIOR_RATE, num_drafts) for sampled in (False, True)}
        self._copies = [
            AcceptanceRates(_COPY_RATE + _COPY_RATE_PER_TOKEN * length, max(num_copied, 1))
            for length in range(MAX_LENGTH + 1)
        ]
        # Numbers of drafts by the prior, 0 included.
        self._longest = num_drafts + 1
        self._step_cost: LinearCost | None = None
        self._draft_cost: LinearCost | None = None
        self._first: list[tuple[int, int, float, float]] = []
        self._requests: dict[int, _Request] = {}
        self._candidates: Sequence[Candidate] = ()
        self._num_tokens = 0
        self._last: Plan | None = None
        self._began = self._ended = 0.0
        self._number = self._plain_number = 0
        # Steps of a rest, of these the ones to come, and the ones that are over.
        self._rest = self._rest_left = self._rested = 0
        self._allowance = _ALLOWANCE_S
        self._late = False
        self._drafting = 0.0
        self._regime: bool | None = None
        self._reported = float("-inf")

    # What has happened

    def rests(self) -> bool:
        """Return whether nothing is to be decided behind the step that has ended, since nothing was drafted of late.

        Ask where the step had the requests of the one before and read one token of each. After a rest `begin`, `plan`
        and `end` are left out.
        """
        if not self._rest_left:
            return False
        self._rest_left -= 1
        self._rested += 1
        return True

    def begin(
        self, requests: Sequence[object], num_rows: Sequence[int], num_verified: Sequence[int], newest: Sequence[int]
    ) -> None:
        """Note the step that has just ended.

        Args:
            requests: of the batch, known by identity.
            num_rows: tokens that each of them read in this step, drafts included.
            num_verified: those of them that were verified.
            newest: the token behind these.
        """
        now = self._clock()
        rested, self._rested, self._rest_left = self._rested, 0, 0
        self._number += 1 + rested
        known = [self._requests.get(id(request)) for request in requests]
        decoded = [one is not None and rows <= 1 + one.width for one, rows in zip(known, num_rows, strict=True)]
        if not rested:
            # What would have been copied a while ago says nothing of the newest token.
            self._note_acceptance(known, decoded, num_rows, num_verified, newest)
        # Others have read a prompt, or waited for a request.
        if (
            requests
            and all(decoded)
            and self._last is not None
            and not (rested and len(requests) < len(self._candidates))
        ):
            self._note_times(sum(num_rows), len(requests), sum(num_verified), now - self._ended, 1 + rested)
        self._began = now

    def end(self) -> None:
        """Note that the drafting is over."""
        self._ended = self._clock()

    def _note_acceptance(
        self,
        known: Sequence[_Request | None],
        decoded: Sequence[bool],
        num_rows: Sequence[int],
        num_verified: Sequence[int],
        newest: Sequence[int],
    ) -> None:
        seen: dict[int, tuple[AcceptanceRates, list[tuple[int, int]]]] = {}
        for one, right, rows, verified, token in zip(known, decoded, num_rows, num_verified, newest, strict=True):
            if one is None or not right:
                continue
            one.expected *= _OWN_FADE
            one.accepted *= _OWN_FADE
            drafted, accepted = rows - 1, verified - 1
            if drafted:
                rates = self._rates(one.candidate, one.copies)
                for position in range(min(accepted + 1, drafted)):
                    one.expected += rates.expected[position]
                    one.accepted += position < accepted
            elif one.candidate.match:
                # What would have been copied is judged by what the target wrote.
                rates = self._rates(one.candidate, True)
                drafted, accepted = 1, int(token == one.candidate.copied[0])
            else:
                continue
            seen.setdefault(id(rates), (rates, []))[1].append((drafted, accepted))
        for rates, pairs in seen.values():
            rates.observe(pairs, self._number)

    def _note_times(
        self, num_rows: int, num_requests: int, num_verified: int, seconds_since: float, num_steps: int
    ) -> None:
        assert self._last is not None
        step_s, draft_s = seconds_since / num_steps, self._ended - self._began
        if step_s < 0 or draft_s < 0:
            # The clock was put back. As the fastest of the first steps this would end all drafting.
            return
        # Of the requests that were drafted for some have ended since.
        num_drafts, num_drafting = self._last.num_drafts, len(self._candidates)
        if self._step_cost is None or self._draft_cost is None:
            self._first.append((num_requests, self._num_tokens, step_s, draft_s))
            if len(self._first) == _FIRST_STEPS:
                self._start()
            return
        plain_s = self._plain_s(num_requests)
        expected_s = self._step_s(num_rows, num_requests) + self._draft_s(num_drafts, num_drafting)
        self._step_cost.measure(self._features(num_rows, num_requests), step_s)
        self._draft_cost.measure((1, num_drafting, num_drafts, num_drafts * num_drafting), draft_s)
        seconds = step_s + draft_s
        late, self._late = self._late, seconds > _MOST_LATE * expected_s
        if self._late and not late:
            seconds = _MOST_LATE * expected_s
        self._allowance += _ALLOWANCE_SHARE * (seconds + (num_steps - 1) * step_s)
        if num_rows > num_requests or num_drafts:
            self._allowance += plain_s * num_verified / num_requests - seconds
        else:
            self._plain_number = self._number
        self._allowance = min(self._allowance, _ALLOWANCE_S)

    def _start(self) -> None:
        """Begin the fits, from the fastest of the first steps: what else is not known is taken to cost little."""
        num_requests, num_tokens, step_s, draft_s = min(self._first, key=lambda first: first[2])
        each, token = step_s / num_requests, step_s / max(num_tokens, 1)
        self._step_cost = LinearCost(
            (0.8 * step_s, 0.05 * each, 0.1 * each, 0.05 * token, 0.01 * step_s),
            (0.5 * step_s, 0.4 * each, 0.4 * each, 0.2 * token, 0.05 * step_s),
        )
        self._draft_cost = LinearCost(
            (0.8 * draft_s, 0.2 * draft_s / num_requests, 0.02 * step_s, 0.01 * each),
            (0.5 * draft_s, 0.5 * draft_s / num_requests, 0.3 * step_s, 0.2 * each),
        )
        for requests, tokens, step, draft in self._first:
            self._step_cost.measure((1, requests, requests, tokens, 0), step)
            self._draft_cost.measure((1, requests, 0, 0), draft)

    # What will happen

    def plan(self, candidates: Sequence[Candidate], num_tokens: int) -> Plan:
        """Return what to draft for the next step.

        Args:
            candidates: one for each request of the batch.
            num_tokens: that the batch attends to, all requests together.
        """
        self._candidates, self._num_tokens = candidates, num_tokens
        before, self._requests = self._requests, {}
        for candidate in candidates:
            one = before.get(id(candidate.request))
            if one is None or one.request is not candidate.request:
                one = _Request(candidate.request, candidate)
            one.candidate = candidate
            self._requests[id(candidate.request)] = one
        plan = self.plain() if self._step_cost is None else self._policy(self)
        for one, width, copies in zip(self._requests.values(), plan.widths, plan.copies, strict=True):
            one.width, one.copies = width, copies
        self._rest = 0 if any(plan.widths) else min(2 * self._rest or 1, _MOST_REST)
        self._rest_left = self._rest
        self._last = plan
        return plan

    def plain(self) -> Plan:
        """Return the plan that drafts nothing."""
        size = len(self._candidates)
        seconds = 0.0 if self._step_cost is None else self._plain_s(size)
        return Plan([0] * size, [False] * size, 0, size, seconds)

    def unsure(self) -> float:
        """Return the standard deviation of a plain step's time over its expectation."""
        size = len(self._candidates)
        assert self._step_cost is not None
        return self._step_cost.deviation(self._features(size, size)) / self._plain_s(size)

    def best(self, upper: bool = False) -> Plan:
        """Return the plan of the most expected tokens per second.

        A draft token is worth verifying if its probability to be accepted, over the time it takes, is above the tokens
        per second of the whole batch. These are not known before, so they start from plain decoding's and are improved
        (Dinkelbach 1967); K, which the prior drafts for all, is tried from 0 up by what it adds to the batch.

        Args:
            upper: take upper bounds of acceptance and lower ones of what drafts cost, as if all were as good as it may
                be. What was measured last on a busy machine would else never be measured again.
        """
        size = len(self._candidates)
        assert self._step_cost is not None and self._draft_cost is not None
        plain_s, decided_s = self._plain_s(size), self._step_s(size, size) + self._draft_s(0, size)
        if upper:
            token_s, predict = self._step_cost.least((0, 1, 0, 0, 0)), self._draft_cost.least
            # Of the first draft token the whole is better known than its two parts.
            verify_s = max(self._step_cost.least((0, 1, 0, 0, 1)) - token_s, 0.0)
        else:
            token_s, predict = self._token_s(), self._draft_cost.predict
            verify_s = self._step_cost.slope(_VERIFY)
        draft_s = [max(predict((0, 0, number, number * size)), 0.0) for number in range(self._longest)]
        rate = size / plain_s
        copies, reaches = self._reaches(upper, _LEAST_WORTH * token_s * rate)
        while True:
            least = _LEAST_WORTH * token_s * rate
            num_tokens, num_copied, widths = float(size), 0, []
            gains, counts = [0.0] * (self._longest - 1), [0] * (self._longest - 1)
            for copy, reach in zip(copies, reaches, strict=True):
                width = 0
                for chance in reach:
                    if chance <= least:
                        break
                    if copy:
                        num_tokens += chance
                    else:
                        gains[width] += chance
                        counts[width] += 1
                    width += 1
                if copy:
                    num_copied += width
                widths.append(width)
            seconds = decided_s + num_copied * token_s + verify_s * bool(num_copied)
            best = num_tokens / seconds, 0, num_tokens, seconds
            seconds += verify_s * (not num_copied)
            for position, gain in enumerate(gains):
                num_tokens += gain
                seconds += counts[position] * token_s
                total = seconds + draft_s[position + 1]
                if num_tokens > best[0] * total:
                    best = num_tokens / total, position + 1, num_tokens, total
            better, num_drafts, num_tokens, seconds = best
            if better <= 1.001 * rate:
                break
            rate = better
        widths = [
            width if copy or width < num_drafts else num_drafts for width, copy in zip(widths, copies, strict=True)
        ]
        return Plan(widths, copies, num_drafts, num_tokens, seconds)

    def _reaches(self, upper: bool, least: float) -> tuple[list[bool], list[list[float]]]:
        """Return which requests draft copies, and of each the chances above `least` that a draft token is accepted."""
        copies, reaches, bounds = [], [], {}
        for one in self._requests.values():
            candidate, factor = one.candidate, one.factor()
            rates, copy, most = self._prior[candidate.sampled], False, self._longest - 1
            if candidate.match:
                copied = self._rates(candidate, True)
                if copied.expected[0] >= rates.expected[0] * factor:
                    rates, copy, most = copied, True, len(candidate.copied)
            expected = rates.expected
            if upper:
                if id(rates) not in bounds:
                    bounds[id(rates)] = rates.upper(self._number)
                expected = bounds[id(rates)]
            chance, reach = 1.0, []
            for rate in expected[: min(most, candidate.most)]:
                if factor * rate < 1.0:
                    chance *= factor * rate
                if chance <= least:
                    break
                reach.append(chance)
            copies.append(copy)
            reaches.append(reach)
        return copies, reaches

    def _rates(self, candidate: Candidate, copies: bool) -> AcceptanceRates:
        return self._copies[min(candidate.match, MAX_LENGTH)] if copies else self._prior[candidate.sampled]

    def _token_s(self) -> float:
        assert self._step_cost is not None
        return self._step_cost.slope(_ROWS)

    def _step_s(self, num_rows: int, num_requests: int) -> float:
        assert self._step_cost is not None
        return max(self._step_cost.predict(self._features(num_rows, num_requests)), 1e-6)

    def _features(self, num_rows: int, num_requests: int) -> tuple[int, int, int, int, int]:
        """What a step's seconds are linear in; verification costs something of its own, however few the drafts."""
        return 1, num_rows, num_requests, self._num_tokens, int(num_rows > num_requests)

    def _draft_s(self, num_drafts: int, num_requests: int) -> float:
        assert self._draft_cost is not None
        return max(self._draft_cost.predict((1, num_requests, num_drafts, num_drafts * num_requests)), 0.0)

    def _plain_s(self, num_requests: int) -> float:
        """What a step takes where nothing pays: hardly ever is something decided behind it."""
        return self._step_s(num_requests, num_requests) + self._draft_s(0, num_requests) / (1 + _MOST_REST)

    # What is decided

    def _decide(self, estimates: Estimates) -> Plan:
        plain, best = estimates.plain(), estimates.best()
        gain = best.num_tokens / best.seconds / (plain.num_tokens / plain.seconds)
        unsure = estimates.unsure()
        drafts = gain > _LEAST_GAIN
        self._note_regime(plain, best, drafts and self._allowance > 0)
        if drafts:
            num_since = self._number - self._plain_number
            sure = num_since == 0 or (num_since < _PLAIN_EVERY and gain - 1 > _SURE_DEVIATIONS * unsure)
            return best if sure and self._allowance > 0 else plain
        # Texts change, so drafts are tried where the allowance pays for them if none is accepted.
        if unsure > _MOST_UNSURE or self._allowance < _LEAST_FOR_TRIALS * _ALLOWANCE_S:
            return plain
        trial = estimates.best(upper=True)
        return trial if trial.seconds - plain.seconds < self._allowance else plain

    def _note_regime(self, plain: Plan, best: Plan, drafts: bool) -> None:
        first = self._regime is None
        self._drafting = float(drafts) if first else _REGIME_FADE * self._drafting + (1 - _REGIME_FADE) * drafts
        now = self._began
        regime = self._drafting > (_OFF if self._regime else _ON)
        if (regime == self._regime) or now - self._reported < _REPORT_S:
            return
        self._regime, self._reported = regime, now
        size = len(self._candidates)
        load = f"{size} request{'s' * (size != 1)}"
        if regime:
            num_copied = sum(width for width, copies in zip(best.widths, best.copies, strict=True) if copies)
            self._report(
                f"drafting on with {load}: {sum(best.widths)} tokens, {num_copied} of them copied, for "
                f"{best.num_tokens / size:.2f} tokens a step and request in {1e3 * best.seconds:.1f} ms; plain "
                f"decoding takes {1e3 * plain.seconds:.1f} ms for 1"
            )
        else:
            rate = sum(self._prior[one.sampled].expected[0] for one in self._candidates) / size
            draft_s = self._draft_s(1, size) - self._draft_s(0, size)
            self._report(
                f"drafting off with {load}: one draft token each would bring {rate:.2f} tokens a step and request and "
                f"take {1e3 * (draft_s + size * self._token_s()):.1f} ms; plain decoding takes "
                f"{1e3 * plain.seconds:.1f} ms for 1"
            )
