"""A decoding engine on a clock of its own, for what decides how many tokens it drafts."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from qm_spec.drafter.controller import Candidate, Controller

NUM_DRAFTS, NUM_COPIED = 4, 16


@dataclass(frozen=True)
class Machine:
    """What steps cost, in ms.

    Attributes:
        step: of a step.
        row: of each token that it verifies.
        request: of each request.
        context: of each 1000 tokens attended to.
        draft: of each draft step of the prior.
        draft_row: of each request in it.
        verify: of a step that verifies drafts, however few; more where they are sampled.
        noise: relative standard deviation.
        hiccup_ms: of a pause, one every 3 seconds or so.
        slow: from when to when, in seconds, all takes half as long again.
        busy: from when to when others use the processor: one to five times as long, and half of the passes later.
    """

    step: float
    row: float
    request: float
    context: float
    draft: float
    draft_row: float
    verify: float = 0.0
    noise: float = 0.04
    hiccup_ms: float = 0.0
    slow: tuple[float, float] = (0.0, 0.0)
    busy: tuple[float, float] = (0.0, 0.0)

    def step_ms(self, num_rows: int, num_requests: int, num_tokens: int) -> float:
        """Return what a step costs on average."""
        verify = self.verify if num_rows > num_requests else 0.0
        return self.step + self.row * num_rows + self.request * num_requests + self.context * num_tokens / 1000 + verify

    def draft_ms(self, num_drafts: int, num_requests: int) -> float:
        """Return what drafting costs on average, noting the verified tokens included."""
        return 0.3 + 0.02 * num_requests + num_drafts * (self.draft + self.draft_row * num_requests)

    def rest_ms(self, num_requests: int) -> float:
        """Return what an engine that can draft costs behind a step where nothing is decided."""
        return 0.05 + 0.005 * num_requests


@dataclass(frozen=True)
class Text:
    """How drafts are accepted.

    Attributes:
        rates: of the prior's at each position, if all before were.
        copy_share: of the steps of a request that find a match.
        copy_rate: of copied tokens.
        spread: by how much requests differ, as a factor up and down.
    """

    rates: Sequence[float]
    copy_share: float = 0.0
    copy_rate: float = 0.0
    spread: float = 1.0


@dataclass
class Request:
    """One that is being answered."""

    factor: float
    left: int
    num_tokens: int
    match: int = 0


@dataclass
class Engine:
    """Runs the same number of requests at all times; a new one reads its prompt where one has ended."""

    machine: Machine
    text: Text
    concurrency: int
    seed: int = 0
    answer: int = 150
    now: float = 0.0
    requests: list[Request] = field(default_factory=list)
    # Seconds, and tokens written by then.
    history: list[tuple[float, int]] = field(default_factory=lambda: [(0.0, 0)])
    num_steps: int = 0
    num_drafted_steps: int = 0

    def __post_init__(self) -> None:
        self.random = Random(self.seed)
        self.hiccup = 3.0

    def pass_(self, ms: float) -> None:
        """Let time pass that work takes."""
        machine = self.machine
        ms *= max(0.7, self.random.gauss(1.0, machine.noise))
        if machine.slow[0] <= self.now < machine.slow[1]:
            ms *= 1.5
        if machine.busy[0] <= self.now < machine.busy[1]:
            ms = ms * self.random.uniform(1, 5) + self.random.choice((0, self.random.uniform(5, 60)))
        self.now += ms / 1e3
        if machine.hiccup_ms and self.now > self.hiccup:
            self.now += machine.hiccup_ms / 1e3
            # At the same times for all who are compared.
            self.hiccup += 2.9

    def run(self, seconds: float, widths: int | Controller) -> Engine:
        """Go on, with so many drafts by the prior for each request, or as a controller decides."""
        planned, copies = [0] * self.concurrency, [False] * self.concurrency
        tokens = self.history[-1][1]
        text, end, left = self.text, self.now + seconds, False
        while self.now < end:
            joined = 0
            while len(self.requests) < self.concurrency:
                factor = math.exp(self.random.uniform(-1, 1) * math.log(text.spread))
                self.requests.append(Request(factor, self.random.randrange(self.answer // 2, self.answer), 200))
                planned.append(0)
                copies.append(False)
                joined += 1
            size = self.concurrency
            planned, copies = planned[-size:], copies[-size:]
            # A prompt of 200 tokens in the step.
            rows = [1 + width for width in planned]
            total = sum(request.num_tokens for request in self.requests)
            self.pass_(self.machine.step_ms(sum(rows), size, total) + joined * 10.0)
            rows = [1 + width for width in planned[: size - joined]] + [200] * joined
            verified, newest = [], []
            for row, (request, width, copy) in enumerate(zip(self.requests, planned, copies, strict=True)):
                accepted = 0
                while accepted < width and self.random.random() < (
                    text.copy_rate if copy else min(text.rates[accepted] * request.factor, 0.97)
                ):
                    accepted += 1
                is_new = row >= size - joined
                # Of what might have been copied, the first token is 1.
                newest.append(int(request.match > 0 and self.random.random() < text.copy_rate))
                verified.append(200 if is_new else 1 + accepted)
                written = min(1 + accepted, request.left)
                request.left -= written
                request.num_tokens += written
                tokens += written
                request.match = self.random.randrange(4, 9) if self.random.random() < text.copy_share else 0
            self.history.append((self.now, tokens))
            self.num_steps += 1
            same = not joined and not left
            if isinstance(widths, Controller) and same and all(row == 1 for row in rows) and widths.rests():
                planned, copies = [0] * size, [False] * size
                self.pass_(self.machine.rest_ms(size))
            elif isinstance(widths, Controller):
                widths.begin(self.requests, rows, verified, newest)
                plan = widths.plan([self._candidate(request) for request in self.requests], total)
                planned, copies = list(plan.widths), list(plan.copies)
                self.pass_(self.machine.draft_ms(plan.num_drafts, size))
                widths.end()
            else:
                planned, copies = [min(widths, max(request.left - 1, 0)) for request in self.requests], [False] * size
                # Plain decoding has no drafter.
                self.pass_(self.machine.draft_ms(widths, size) if widths else 0.0)
            self.num_drafted_steps += any(planned)
            going = [row for row, request in enumerate(self.requests) if request.left > 0]
            left = len(going) < size
            self.requests = [self.requests[row] for row in going]
            planned, copies = [planned[row] for row in going], [copies[row] for row in going]
        return self

    def _candidate(self, request: Request) -> Candidate:
        copied = [1] * min(2 * request.match, NUM_COPIED)
        return Candidate(request, max(request.left - 1, 0), copied, request.match)

    def tokens(self, start: float, end: float) -> float:
        """Return how many tokens were written between two times."""
        return self._written(end) - self._written(start)

    def _written(self, when: float) -> float:
        place = bisect_right(self.history, (when, math.inf)) - 1
        (before, tokens), (after, more) = self.history[place], self.history[min(place + 1, len(self.history) - 1)]
        return tokens if after == before else tokens + (more - tokens) * (when - before) / (after - before)


def controlled(engine: Engine, **settings: Any) -> Controller:
    """Return a controller on an engine's clock."""
    return Controller(NUM_DRAFTS, NUM_COPIED, clock=lambda: engine.now, **settings)
