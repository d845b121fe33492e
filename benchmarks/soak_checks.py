"""What a soak run must hold: right tokens, no growing memory, no pages left, no crash."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

# A server's first requests meet new shapes and fill caches. What rises later is looked at.
WARM_UP = 0.2
ALLOWED_RISE_MB = 64.0
# Of two tokens this close, in nats, rounding decides: a step over several tokens sums in another order. In float32 a
# difference of order is some 1e-5.
TIE_NATS = 1e-3


def first_difference(answer: Sequence[int], expected: Sequence[int]) -> int | None:
    """Return the place of the first token that is not the expected one, None where `answer` is its beginning.

    An answer longer than what is expected differs behind its end.
    """
    for place, token in enumerate(answer):
        if place >= len(expected) or token != expected[place]:
            return place
    return None


def memory_growth(samples: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Return how memory went over time.

    Args:
        samples: (seconds since the load began, resident MB).

    Returns:
        `start_mb`, `end_mb` (medians of the first and the last quarter after the warm-up), `rise_mb`, their
        difference, `last_rise_mb`, that of the last quarter, and `slope_mb_per_hour` of the line through all samples
        after the warm-up. `leak`: memory rose by more than `ALLOWED_RISE_MB` and its last quarter's rise was at least
        half the mean of a quarter, so it does not level off. Nothing but an empty dict for fewer than 8 samples.
    """
    if len(samples) < 8:
        return {}
    warm = samples[0][0] + WARM_UP * (samples[-1][0] - samples[0][0])
    kept = [sample for sample in samples if sample[0] >= warm]
    size = len(kept) / 4
    quarters = [
        statistics.median(mb for _, mb in kept[round(size * number) : round(size * (number + 1))])
        for number in range(4)
    ]
    rise, last_rise = quarters[3] - quarters[0], quarters[3] - quarters[2]
    slope = statistics.linear_regression([at for at, _ in kept], [mb for _, mb in kept]).slope
    return {
        "start_mb": round(quarters[0], 1),
        "end_mb": round(quarters[3], 1),
        "rise_mb": round(rise, 1),
        "last_rise_mb": round(last_rise, 1),
        "slope_mb_per_hour": round(3600 * slope, 1),
        "leak": rise > ALLOWED_RISE_MB and last_rise > rise / 6,
    }


def acceptance_length(before: Mapping[str, float], after: Mapping[str, float]) -> float | None:
    """Return the mean acceptance length between two readings of `/metrics`, None without drafts."""

    def counted(name: str) -> float:
        name = f"vllm:spec_decode_num_{name}_total"
        return after.get(name, 0.0) - before.get(name, 0.0)

    drafts = counted("drafts")
    return round(1 + counted("accepted_tokens") / drafts, 3) if drafts else None


def find_faults(record: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each thing that must not be in a soak run's record."""
    faults = []
    if record["wrong_tokens"]:
        faults.append(f"{record['wrong_tokens']} wrong tokens; see wrong_answers")
    if record["crashes"]:
        faults.append(f"crashed: {'; '.join(record['crashes'])}")
    if record["unexpected"]:
        first = record["unexpected"][0]
        count = record["num_unexpected"]
        faults.append(f"{count} requests ended in another way than they must; the first: {first}")
    if record["failed_steps"]:
        faults.append(f"drafting failed in {record['failed_steps']:.0f} steps; the server's log says why")
    if record["kv_usage_idle"] is None and not record["crashes"]:
        faults.append("the server does not say how many KV pages are in use")
    elif record["kv_usage_idle"]:
        faults.append(f"{record['kv_usage_idle']:.2%} of the KV pages are in use with no request left")
    if record["memory"].get("leak"):
        memory = record["memory"]
        faults.append(f"memory rose from {memory['start_mb']} to {memory['end_mb']} MB and does not level off")
    if not record["interrupted"] and not record["checked_tokens"]:
        faults.append("no token was checked")
    return faults


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` of the values lie, the nearest one."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def time_between_tokens(arrivals: Sequence[tuple[float, int]]) -> list[float]:
    """Return each token's seconds since the one before it, without the first; tokens that come together have 0.

    Args:
        arrivals: of one request: (time, number of tokens that came then).
    """
    gaps: list[float] = []
    for (before, _), (now, count) in itertools.pairwise(arrivals):
        gaps += [now - before, *[0.0] * (count - 1)]
    return gaps
