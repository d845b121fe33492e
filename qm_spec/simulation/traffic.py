"""Requests that arrive at many replicas: queues, prompts read beside decoding, and batches that slow everyone down."""

from __future__ import annotations

import heapq
import math
import random
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TrafficSettings:
    """What arrives, and what counts as served well.

    Args:
        arrival_rate: requests per second over all replicas, at random times (Poisson).
        replicas: engines; a request goes to one with the fewest requests.
        num_requests: that arrive in all.
        output_tokens: mean of the outputs' lengths, which are drawn geometrically.
        ttft_limit_s: a request that waits longer for its first token does not count as good; None for no limit.
        tpot_limit_s: the same for the mean time of its further tokens.
        seed: of arrivals and lengths.

    Raises:
        ValueError: a value is out of range.
    """

    arrival_rate: float
    replicas: int
    num_requests: int
    output_tokens: int
    ttft_limit_s: float | None = None
    tpot_limit_s: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.arrival_rate < math.inf:
            raise ValueError(f"traffic: arrival_rate must be requests per second above 0, got {self.arrival_rate}")
        for name in ("replicas", "num_requests", "output_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"traffic: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("ttft_limit_s", "tpot_limit_s"):
            limit = getattr(self, name)
            if limit is not None and not limit > 0:
                raise ValueError(f"traffic: {name} must be above 0, got {limit}")


@dataclass(frozen=True)
class ReplicaSpeed:
    """How fast one replica is.

    Args:
        step_s: seconds of a decode step with 1, 2, 3... requests; its length is the most that run at once.
        tokens_per_step: of each request, on average.
        prefill_s: seconds of reading a prompt alone.
        chunk_s: seconds that a chunk of a prompt adds to a step.
        prompts_per_step: short prompts that a step reads together when several wait.

    Raises:
        ValueError: there is no room for a request, or a time is not above 0.
    """

    step_s: Sequence[float]
    tokens_per_step: float
    prefill_s: float
    chunk_s: float
    prompts_per_step: int = 1

    def __post_init__(self) -> None:
        if not self.step_s or self.prompts_per_step < 1:
            raise ValueError(
                "traffic: a replica must have room for one request and read one prompt at a time, "
                f"got step_s={list(self.step_s)} and prompts_per_step={self.prompts_per_step}"
            )
        if min(*self.step_s, self.tokens_per_step, self.prefill_s, self.chunk_s) <= 0:
            raise ValueError("traffic: step_s, tokens_per_step, prefill_s and chunk_s must all be above 0")


@dataclass(frozen=True)
class Percentiles:
    """Of a time over requests, seconds."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles | None:
        """Return them, interpolated between neighbours; None where there is no value."""
        if not values:
            return None
        if len(values) == 1:
            return cls(*(3 * [values[0]]))
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        return cls(cuts[49], cuts[94], cuts[98])


@dataclass(frozen=True)
class RequestTimes:
    """What became of a request, seconds since the beginning.

    Args:
        output_tokens: of its output.
        arrival_s: when it came.
        first_token_s: when its prompt had been read.
        finish_s: when it had all its tokens.
    """

    output_tokens: int
    arrival_s: float
    first_token_s: float
    finish_s: float

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Time per further token; None where there is only one."""
        return (self.finish_s - self.first_token_s) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def latency_s(self) -> float:
        """From arrival to the last token."""
        return self.finish_s - self.arrival_s

    def tokens_between(self, begin_s: float, end_s: float) -> float:
        """Count the tokens that came in a stretch of time, those after the first as if evenly spread."""
        found = float(begin_s < self.first_token_s <= end_s)
        if self.finish_s > self.first_token_s:
            overlap_s = min(end_s, self.finish_s) - max(begin_s, self.first_token_s)
            found += (self.output_tokens - 1) * max(0.0, overlap_s) / (self.finish_s - self.first_token_s)
        return found


@dataclass(frozen=True)
class TrafficResult:
    """What a run of traffic came to.

    Requests that arrive in the first half only fill the replicas: percentiles are of the others. Throughput and
    goodput count the tokens that come between then and the last arrival.

    Args:
        settings: that were asked for.
        requests: in order of arrival; all of them finish.
        mean_batch: requests decoding at a replica while it decodes any, over time.
        request_seconds: requests in the system, integrated over time.
        left_at_last_arrival: requests in the system when the last one came; grows with the run if overloaded.
    """

    settings: TrafficSettings
    requests: tuple[RequestTimes, ...]
    mean_batch: float
    request_seconds: float
    left_at_last_arrival: int

    @property
    def _counted(self) -> tuple[RequestTimes, ...]:
        return self.requests[len(self.requests) // 2 :]

    def _is_good(self, request: RequestTimes) -> bool:
        ttft, tpot = self.settings.ttft_limit_s, self.settings.tpot_limit_s
        in_time = ttft is None or request.ttft_s <= ttft
        return in_time and (tpot is None or request.tpot_s is None or request.tpot_s <= tpot)

    def _tokens_per_s(self, only_good: bool) -> float:
        begin_s, end_s = self._counted[0].arrival_s, self.requests[-1].arrival_s
        if end_s <= begin_s:
            begin_s, end_s = 0.0, max(request.finish_s for request in self.requests)
        wanted = (request for request in self.requests if not only_good or self._is_good(request))
        return sum(request.tokens_between(begin_s, end_s) for request in wanted) / (end_s - begin_s)

    @property
    def throughput_tokens_per_s(self) -> float:
        """Output tokens per second of all replicas."""
        return self._tokens_per_s(only_good=False)

    @property
    def goodput_tokens_per_s(self) -> float:
        """Output tokens per second of requests within every limit."""
        return self._tokens_per_s(only_good=True)

    @property
    def too_short(self) -> bool:
        """Whether arrivals end too soon to say what the replicas settle at: within 5 of their p95 latencies."""
        latency = self.latency
        return latency is not None and self.requests[-1].arrival_s < 5 * latency.p95

    @property
    def good_share(self) -> float:
        """Share of the counted requests within every limit."""
        return sum(self._is_good(request) for request in self._counted) / len(self._counted)

    @property
    def mean_latency_s(self) -> float:
        """Of the counted requests."""
        return statistics.fmean(request.latency_s for request in self._counted)

    @property
    def ttft(self) -> Percentiles | None:
        """Time to the first token."""
        return Percentiles.of([request.ttft_s for request in self._counted])

    @property
    def tpot(self) -> Percentiles | None:
        """Time per further token."""
        return Percentiles.of([request.tpot_s for request in self._counted if request.tpot_s is not None])

    @property
    def latency(self) -> Percentiles | None:
        """From arrival to the last token."""
        return Percentiles.of([request.latency_s for request in self._counted])


class _Replica:
    """One engine: a queue, at most one prompt being read, and requests that decode at one common speed.

    `service` counts the tokens that a request would have got had it decoded from the beginning, so one heap of
    what each needs serves all of them, whatever the speed has been in between.
    """

    def __init__(self, speed: ReplicaSpeed) -> None:
        self.speed = speed
        self.now_s = 0.0
        self.service = 0.0
        self.waiting: deque[int] = deque()
        self.reading: int | None = None
        self.reading_left_s = 0.0
        self.decoding: list[tuple[float, int]] = []
        self.version = 0
        self.decoding_request_s = 0.0
        self.decoding_s = 0.0

    @property
    def num_requests(self) -> int:
        return len(self.waiting) + (self.reading is not None) + len(self.decoding)

    def _rates(self) -> tuple[float, float]:
        """Return tokens per second of each decoding request, and seconds of reading done per second."""
        running = len(self.decoding)
        if not running:
            return 0.0, 1.0
        step_s = self.speed.step_s[running - 1]
        if self.reading is None:
            return self.speed.tokens_per_step / step_s, 0.0
        # A step then holds everyone's rows and a chunk of the prompt, or several short prompts. Those are read one
        # after the other here, each in its part of the step.
        together = min(self.speed.prompts_per_step, 1 + len(self.waiting), len(self.speed.step_s) - running)
        chunks_s = together * self.speed.chunk_s
        whole_s = step_s + chunks_s
        return self.speed.tokens_per_step / whole_s, chunks_s / whole_s

    def advance(self, now_s: float) -> None:
        elapsed_s = now_s - self.now_s
        tokens_per_s, reading_share = self._rates()
        self.service += tokens_per_s * elapsed_s
        if self.reading is not None:
            self.reading_left_s -= reading_share * elapsed_s
        if self.decoding:
            self.decoding_request_s += len(self.decoding) * elapsed_s
            self.decoding_s += elapsed_s
        self.now_s = now_s

    def admit(self) -> None:
        """Begin to read the next prompt if there is one and room for it."""
        if self.reading is None and self.waiting and len(self.decoding) < len(self.speed.step_s):
            self.reading, self.reading_left_s = self.waiting.popleft(), self.speed.prefill_s

    def next_event(self) -> tuple[float, bool] | None:
        """Return when the prompt or the first request is done, and whether it is the prompt; None if idle."""
        tokens_per_s, reading_share = self._rates()
        events = []
        if self.reading is not None:
            events.append((self.now_s + max(0.0, self.reading_left_s) / reading_share, True))
        if self.decoding:
            events.append((self.now_s + max(0.0, self.decoding[0][0] - self.service) / tokens_per_s, False))
        return min(events, default=None)


def simulate_traffic(settings: TrafficSettings, speed: ReplicaSpeed) -> TrafficResult:
    """Run requests through the replicas until all have finished.

    Every request has the same prompt length, and gets the mean number of tokens per step: percentiles do not
    show that drafts fare better on some requests than on others.

    Args:
        settings: of the traffic.
        speed: of each replica.
    """
    draw = random.Random(settings.seed)
    arrivals, lengths = [], []
    clock_s = 0.0
    # log(1 - p) of a geometric length whose mean is 1 / p.
    log_more = math.log1p(-1 / settings.output_tokens) if settings.output_tokens > 1 else -math.inf
    for _ in range(settings.num_requests):
        clock_s += draw.expovariate(settings.arrival_rate)
        arrivals.append(clock_s)
        lengths.append(1 + int(math.log(1 - draw.random()) / log_more))
    first_token_s, finish_s = [math.nan] * len(arrivals), [math.nan] * len(arrivals)

    replicas = [_Replica(speed) for _ in range(settings.replicas)]
    least = [(0, number) for number in range(settings.replicas)]
    events: list[tuple[float, int, int, bool]] = []
    in_system, last_s, request_seconds = 0, 0.0, 0.0

    def schedule(number: int) -> None:
        replica = replicas[number]
        replica.version += 1
        replica.admit()
        heapq.heappush(least, (replica.num_requests, number))
        event = replica.next_event()
        if event is not None:
            heapq.heappush(events, (event[0], number, replica.version, event[1]))

    def happens(now_s: float, change: int) -> None:
        nonlocal in_system, last_s, request_seconds
        request_seconds += in_system * (now_s - last_s)
        in_system, last_s = in_system + change, now_s

    def least_loaded() -> int:
        while least[0][0] != replicas[least[0][1]].num_requests:
            heapq.heappop(least)
        return least[0][1]

    def run_until(end_s: float) -> None:
        while events and events[0][0] <= end_s:
            now_s, number, version, prompt_done = heapq.heappop(events)
            replica = replicas[number]
            if version != replica.version:
                continue
            replica.advance(now_s)
            finished = None
            if prompt_done and replica.reading is not None:
                request, replica.reading = replica.reading, None
                first_token_s[request] = now_s
                if lengths[request] == 1:
                    finished = request
                else:
                    heapq.heappush(replica.decoding, (replica.service + lengths[request] - 1, request))
            else:
                _, finished = heapq.heappop(replica.decoding)
            if finished is not None:
                finish_s[finished] = now_s
                happens(now_s, -1)
            schedule(number)

    for request, arrival_s in enumerate(arrivals):
        run_until(arrival_s)
        happens(arrival_s, 1)
        number = least_loaded()
        replicas[number].advance(arrival_s)
        replicas[number].waiting.append(request)
        schedule(number)
    left = in_system
    run_until(math.inf)

    decoding_s = sum(replica.decoding_s for replica in replicas)
    return TrafficResult(
        settings=settings,
        requests=tuple(RequestTimes(*row) for row in zip(lengths, arrivals, first_token_s, finish_s, strict=True)),
        mean_batch=sum(replica.decoding_request_s for replica in replicas) / decoding_s if decoding_s else 0.0,
        request_seconds=request_seconds,
        left_at_last_arrival=left,
    )
