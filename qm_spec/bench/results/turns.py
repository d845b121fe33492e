"""What turns tell: the same prompts decoded by a method and, next to it in time, by plain decoding.

A turn lasts seconds, so a machine whose speed drifts changes both sides alike, and only their ratio is taken. Of each
ratio the median over the passes counts, so that what disturbed one pass sets no scale. Over prompts, ratios are
weighted by the method's own time, which makes them the ratio of total times.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from qm_spec.bench.engine.metrics import OutputDifference, compare_outputs
from qm_spec.bench.engine.shards import PassResult, RequestResult, TokenPrompt
from qm_spec.bench.results.bootstrap import Estimate, Floats, Resamples

# Takes a request; returns tokens and the seconds that they took.
Work = Callable[[RequestResult], tuple[int, float]]


def whole_request(request: RequestResult) -> tuple[int, float]:
    """Return all tokens of a request and its latency, the reading of the prompt included."""
    return len(request.token_ids), request.latency_s


def after_first_token(request: RequestResult) -> tuple[int, float]:
    """Return the tokens behind the first and their time: decoding alone."""
    return len(request.token_ids) - 1, request.latency_s - request.ttft_s


@dataclass(frozen=True)
class Turn:
    """Some prompts, decoded by a method and in the same turn by plain decoding, once in each pass.

    Args:
        prompts: in the order of the passes' requests.
        passes: at least one: the method's, and plain decoding's or None where that failed.
    """

    prompts: tuple[TokenPrompt, ...]
    passes: tuple[tuple[PassResult, PassResult | None], ...]

    @property
    def median_pass(self) -> PassResult:
        """The method's pass of median wall time, the faster of the middle two where their number is even."""
        ordered = sorted((ours for ours, _ in self.passes), key=lambda one: one.elapsed_s)
        return ordered[(len(ordered) - 1) // 2]

    @property
    def compared(self) -> list[tuple[PassResult, PassResult]]:
        """The passes that plain decoding has as well."""
        return [(ours, plain) for ours, plain in self.passes if plain is not None]

    @property
    def speedup(self) -> float | None:
        """Tokens per second of wall time by plain decoding's, median over the passes; None where it has none."""
        return _middle(ours.output_tokens_per_s / plain.output_tokens_per_s for ours, plain in self.compared)

    def request_speedups(self, work: Work = whole_request) -> list[float | None]:
        """Return for each prompt the speed of its request by plain decoding's, median over the passes."""
        return [
            _middle(
                _speed(work(ours.requests[number])) / _speed(work(plain.requests[number]))
                for ours, plain in self.compared
                if all(min(work(one.requests[number])) > 0 for one in (ours, plain))
            )
            for number in range(len(self.prompts))
        ]

    def differences(self) -> list[OutputDifference]:
        """Return for each prompt how the outputs of all passes differ from plain decoding's in the same turn."""
        ours, plain = (
            [[one.outputs[number] for one in side] for number in range(len(self.prompts))]
            for side in ([ours for ours, _ in self.compared], [plain for _, plain in self.compared])
        )
        return [compare_outputs(*sides) for sides in zip(ours, plain, strict=True)]


def _speed(work: tuple[int, float]) -> float:
    tokens, seconds = work
    return tokens / seconds


def _middle(ratios: Iterable[float]) -> float | None:
    """Return the median, between two the geometric mean: a ratio and its inverse are then treated alike."""
    logarithms = [math.log(ratio) for ratio in ratios]
    return math.exp(statistics.median(logarithms)) if logarithms else None


def throughput_speedup(turns: Sequence[Turn]) -> float | None:
    """Return how many times plain decoding's tokens per second the engine put out; None where nothing is compared."""
    known = [(one.speedup, one.median_pass.elapsed_s) for one in turns]
    pairs = [(speedup, seconds) for speedup, seconds in known if speedup is not None]
    return sum(a * b for a, b in pairs) / sum(b for _, b in pairs) if pairs else None


def request_speedup(turns: Sequence[Turn], work: Work = whole_request, category: str | None = None) -> Estimate | None:
    """Estimate how many times as fast as in plain decoding requests ran, with an interval over prompts.

    Args:
        category: of the prompts that count; None for all.

    Returns:
        None where no request is compared.
    """
    ratios, seconds = [], []
    for turn in turns:
        requests = turn.median_pass.requests
        for prompt, request, ratio in zip(turn.prompts, requests, turn.request_speedups(work), strict=True):
            if ratio is not None and category in (None, prompt.category):
                ratios.append(ratio)
                seconds.append(work(request)[1])
    if not ratios:
        return None
    ours: Floats = np.array(seconds)
    # The time that plain decoding would have taken while the machine was as fast as in our median pass.
    return Resamples({"plain": ours * np.array(ratios), "ours": ours}).ratio({"plain": 1, "ours": -1})


def speedup(turns: Sequence[Turn]) -> Estimate | None:
    """Estimate the engine's speed-up: the value is that of its wall time, the interval that of its requests.

    With one request in flight both are the same; with several, wall time also counts slots that run empty, and the
    interval is scaled to it.
    """
    value, requests = throughput_speedup(turns), request_speedup(turns)
    if value is None or requests is None:
        return None
    return requests.scaled(value / requests.value)


def speedup_per_pass(turns: Sequence[Turn]) -> list[float]:
    """Return for each pass the ratio of total speeds over the turns that have it; what they differ by is noise."""
    found = []
    for number in range(max(len(one.compared) for one in turns)):
        pairs = [one.compared[number] for one in turns if number < len(one.compared)]
        ours, plain = (
            sum(one.num_output_tokens for one in side) / sum(one.elapsed_s for one in side)
            for side in zip(*pairs, strict=True)
        )
        found.append(ours / plain)
    return found


def first_token_delay_ms(turns: Sequence[Turn]) -> float | None:
    """Return by how much first tokens come later than plain decoding's: of each request and pass, the median."""
    delays = [
        1000 * (one.ttft_s - other.ttft_s)
        for turn in turns
        for ours, plain in turn.compared
        for one, other in zip(ours.requests, plain.requests, strict=True)
    ]
    return statistics.median(delays) if delays else None


def pace_ms(turns: Sequence[Turn]) -> tuple[float, float] | None:
    """Return the 10th and 90th percentile over turns and passes of the time per further token."""
    paces = [
        1000 * statistics.median(times)
        for turn in turns
        for ours, _ in turn.passes
        if (times := [one.tpot_s for one in ours.requests if one.tpot_s is not None])
    ]
    if not paces:
        return None
    low, high = np.percentile(paces, (10, 90))
    return float(low), float(high)
