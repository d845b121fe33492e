"""Confidence intervals by resampling prompts, and what two measurements of the same prompts show.

Every number compared here is a ratio of sums over requests, such as output tokens by seconds. A resample draws as many
prompts as there are, with replacement; a sum over it is one row of a matrix product. Two measurements of the same
prompts are resampled together, so what prompts differ in among themselves cancels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from qm_spec.bench.results.file import RequestRow

CONFIDENCE = 0.95
RESAMPLES = 10_000
NO_DIFFERENCE = "no difference shown"
# With fewer prompts no interval keeps its promise.
MIN_PROMPTS = 5
# Resamples in which a ratio is not defined, such as those without a single draft, up to which the rest may stand.
_MAX_UNDEFINED = 0.01
# Weights held at once.
_CHUNK = 4_000_000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A measured value and its confidence interval; no bounds where there are too few prompts for one."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def has_interval(self) -> bool:
        """Whether both bounds are known."""
        return self.low is not None and self.high is not None

    def interval(self, form: Callable[[float], str] = "{:.2f}".format, missing: str = "-") -> str:
        """Return the bounds as text, such as "0.97 to 1.03"."""
        if self.low is None or self.high is None:
            return missing
        return f"{form(self.low)} to {form(self.high)}"

    def scaled(self, factor: float) -> Estimate:
        """Return the estimate in another unit."""
        return Estimate(
            factor * self.value,
            None if self.low is None else factor * self.low,
            None if self.high is None else factor * self.high,
        )


class Resamples:
    """Sums of per-prompt columns over resampled prompts.

    Args:
        columns: `[n]` numbers per prompt, by name.
        seed: of the draws; the same seed and number of prompts draw the same prompts.
        num_resamples: how many.

    Raises:
        ValueError: there are no columns, or they differ in length.
    """

    def __init__(self, columns: Mapping[str, Floats], seed: int = 0, num_resamples: int = RESAMPLES) -> None:
        lengths = {len(column) for column in columns.values()}
        if len(lengths) != 1:
            raise ValueError(f"Resamples: columns must have one length, got {sorted(lengths) or 'no columns'}")
        (self.num_prompts,) = lengths
        self._place = {name: place for place, name in enumerate(columns)}
        self._columns = np.stack(list(columns.values()), axis=1).astype(np.float64)
        self._seed = seed
        self._num_resamples = num_resamples

    @cached_property
    def _resampled(self) -> Floats:
        """`[resamples, columns]` sums."""
        n, wanted = self.num_prompts, self._num_resamples
        if wanted * n <= _CHUNK:
            return _weights(n, wanted, self._seed) @ self._columns
        step = max(1, _CHUNK // n)
        rng = np.random.default_rng((self._seed, n))
        sizes = [min(step, wanted - begin) for begin in range(0, wanted, step)]
        return np.concatenate([_drawn(rng, n, size) @ self._columns for size in sizes])

    def ratio(self, exponents: Mapping[str, int], confidence: float = CONFIDENCE) -> Estimate | None:
        """Estimate a product of powers of sums, such as `{"tokens": 1, "seconds": -1}`.

        The interval holds the quantiles of the resamples, moved outwards as far as Student's t with n - 1 degrees of
        freedom and n instead of n - 1 in the variance lie outside the normal distribution: plain quantiles are too
        narrow for few prompts.

        Returns:
            None where the ratio of the whole is not defined or 0.

        Source: Hesterberg 2015, "What Teachers Should Know about the Bootstrap", section 5.3 (expanded percentile).
        """
        powers = np.array(list(exponents.values()), dtype=np.float64)

        def product(sums: Floats) -> Floats:
            return np.prod(np.where(sums > 0, sums, np.nan) ** powers, axis=-1)

        return self._estimate(list(exponents), product, confidence)

    def share(self, part: str, whole: str, confidence: float = CONFIDENCE) -> Estimate | None:
        """Estimate the sum of a column that may be of either sign by that of another; see `ratio` for the interval.

        Returns:
            None where the whole is not positive.
        """

        def quotient(sums: Floats) -> Floats:
            return sums[..., 0] / np.where(sums[..., 1] > 0, sums[..., 1], np.nan)

        return self._estimate([part, whole], quotient, confidence)

    def _estimate(
        self, names: Sequence[str], function: Callable[[Floats], Floats], confidence: float
    ) -> Estimate | None:
        """Estimate a function of columns' sums, `[..., columns]`, that is NaN where it is not defined."""
        places = [self._place[name] for name in names]
        value = float(function(self._columns[:, places].sum(axis=0)))
        if math.isnan(value):
            return None
        if self.num_prompts < MIN_PROMPTS:
            return Estimate(value)
        resampled = function(self._resampled[:, places])
        defined = ~np.isnan(resampled)
        if 1 - defined.mean() > _MAX_UNDEFINED:
            return Estimate(value)
        tail = _expanded_tail(self.num_prompts, confidence)
        low, high = np.quantile(resampled[defined], [tail, 1 - tail])
        return Estimate(value, float(low), float(high))


def _drawn(rng: np.random.Generator, n: int, size: int) -> Floats:
    """How often each of n prompts stands in each of `size` resamples, `[size, n]`."""
    return rng.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)


@lru_cache(maxsize=4)
def _weights(n: int, size: int, seed: int) -> Floats:
    """Kept, since a report resamples the same number of prompts again and again."""
    return _drawn(np.random.default_rng((seed, n)), n, size)


def _expanded_tail(n: int, confidence: float) -> float:
    outer = math.sqrt(n / (n - 1)) * float(stdtrit(n - 1, 0.5 + confidence / 2))
    return statistics.NormalDist().cdf(-outer)


def estimate_mean(values: Sequence[float], seed: int = 0) -> Estimate:
    """Estimate the mean of one number of either sign per prompt or window.

    Give it differences within windows: then what windows have in common cancels.
    """
    columns = {"sum": np.array(values, dtype=np.float64), "count": np.ones(len(values))}
    found = Resamples(columns, seed).share("sum", "count")
    assert found is not None
    return found


@dataclass(frozen=True)
class Metric:
    """A number that is compared.

    Args:
        name: with its unit, as tables show it.
        exponents: of the sums of `request_columns` that it is made of.
        higher_is_better: the direction of "better".
        words: for better and for worse.
        timed: whether it depends on the clock, and so has a noise floor.
        unit: factor from the sums' units to the name's.
        digits: after the decimal point in tables.
    """

    name: str
    exponents: Mapping[str, int]
    higher_is_better: bool
    words: tuple[str, str] = ("faster", "slower")
    timed: bool = True
    unit: float = 1.0
    digits: int = 1


# Of a request in flight. With as many in flight, it stands to the engine's throughput as 1 to their number.
SPEED = Metric("tokens/s per request", {"tokens": 1, "latency": -1}, True)
TTFT = Metric("TTFT ms", {"ttft": 1, "requests": -1}, False, unit=1000)
TPOT = Metric("TPOT ms", {"decoding": 1, "further": -1}, False, unit=1000, digits=2)
LATENCY = Metric("latency ms", {"latency": 1, "requests": -1}, False, unit=1000)
ACCEPTANCE = Metric("accept length", {"verified": 1, "drafts": -1}, True, ("longer", "shorter"), timed=False, digits=2)
METRICS = (SPEED, TTFT, TPOT, LATENCY, ACCEPTANCE)


def request_columns(rows: Sequence[RequestRow], prefix: str = "") -> dict[str, Floats]:
    """Return what `METRICS` are made of, one number per request, under names that begin with `prefix`."""
    named = {
        "requests": [1.0 for _ in rows],
        "tokens": [row.output_tokens for row in rows],
        "latency": [row.latency_s for row in rows],
        "ttft": [row.ttft_s for row in rows],
        "further": [max(0, row.output_tokens - 1) for row in rows],
        "decoding": [(row.tpot_s or 0.0) * max(0, row.output_tokens - 1) for row in rows],
        "drafts": [row.num_drafts for row in rows],
        # Each draft's accepted tokens and the target's own one behind them.
        "verified": [row.num_drafts + row.num_accepted_tokens for row in rows],
    }
    return {prefix + name: np.array(values, dtype=np.float64) for name, values in named.items()}


def metric_value(metric: Metric, rows: Sequence[RequestRow]) -> float | None:
    """Return a metric of one measurement in its own unit; None where it is not defined, as without drafts."""
    columns = request_columns(rows)
    sums = {name: float(columns[name].sum()) for name in metric.exponents}
    if min(sums.values()) <= 0:
        return None
    return metric.unit * math.prod(sums[name] ** power for name, power in metric.exponents.items())


def speedup_value(rows: Sequence[RequestRow], plain: Sequence[RequestRow]) -> float | None:
    """Return how many times as fast as plain decoding requests ran; None where one of them is not defined."""
    speed, reference = metric_value(SPEED, rows), metric_value(SPEED, plain)
    return None if speed is None or reference is None else speed / reference


def estimate(metric: Metric, rows: Sequence[RequestRow], seed: int = 0) -> Estimate | None:
    """Return `metric_value` with its interval."""
    if not rows:
        return None
    found = Resamples(request_columns(rows), seed).ratio(metric.exponents)
    return found.scaled(metric.unit) if found else None


def pair_requests(
    ours: Sequence[RequestRow], theirs: Sequence[RequestRow]
) -> tuple[list[RequestRow], list[RequestRow]]:
    """Return the requests of prompts that both sides finished, in the order of `ours`.

    A prompt counts as the same if its id and its length in tokens are.
    """
    by_prompt = {(row.prompt_id, row.context_tokens): row for row in theirs}
    pairs = [(row, by_prompt.get((row.prompt_id, row.context_tokens))) for row in ours]
    return [row for row, other in pairs if other is not None], [other for _, other in pairs if other is not None]


class PairedRequests:
    """Two measurements of the same prompts, or four: each beside plain decoding of its own.

    Args:
        before, after: requests, matched one by one; see `pair_requests`.
        before_plain, after_plain: plain decoding of the same prompts, matched alike, for `speedup_ratio`.
    """

    def __init__(
        self,
        before: Sequence[RequestRow],
        after: Sequence[RequestRow],
        before_plain: Sequence[RequestRow] = (),
        after_plain: Sequence[RequestRow] = (),
        *,
        seed: int = 0,
        num_resamples: int = RESAMPLES,
    ) -> None:
        self.num_prompts = len(before)
        columns = {**request_columns(before, "before "), **request_columns(after, "after ")}
        if before_plain and after_plain:
            columns |= {
                **request_columns(before_plain, "before plain "),
                **request_columns(after_plain, "after plain "),
            }
        self._resamples = Resamples(columns, seed, num_resamples)

    def ratio(self, metric: Metric) -> Estimate | None:
        """Estimate the metric after by the metric before."""
        return self._resamples.ratio(
            {f"after {name}": power for name, power in metric.exponents.items()}
            | {f"before {name}": -power for name, power in metric.exponents.items()}
        )

    def speedup_ratio(self) -> Estimate | None:
        """Estimate the speed-up over plain decoding after by the one before; the machine's own speed cancels."""
        signs = {"after ": 1, "after plain ": -1, "before ": -1, "before plain ": 1}
        return self._resamples.ratio(
            {side + name: sign * power for side, sign in signs.items() for name, power in SPEED.exponents.items()}
        )


def compare_requests(
    metric: Metric, before: Sequence[RequestRow], after: Sequence[RequestRow], seed: int = 0
) -> Estimate | None:
    """Estimate a metric of `after` by that of `before` over the prompts that both finished."""
    ours, theirs = pair_requests(before, after)
    return PairedRequests(ours, theirs, seed=seed).ratio(metric) if ours else None


def noise_floor(ratios: Sequence[Estimate | None]) -> float:
    """Return the factor, at least 1, up to which measurements of the same thing differ.

    Args:
        ratios: of a metric measured twice under the same conditions, one per setting; the far ends of their
            intervals count, or the values where they have none.
    """
    known = [one for one in ratios if one is not None]
    ends = [end for one in known for end in (one.low or one.value, one.high or one.value)]
    return max((max(end, 1 / end) for end in ends), default=1.0)


def verdict(metric: Metric, ratio: Estimate | None, floor: float = 1.0) -> str:
    """Say what a ratio of after by before shows.

    Args:
        floor: see `noise_floor`; a difference within it is none.

    Returns:
        One of the metric's words where the whole interval lies beyond the floor, else "no difference shown"; "too few
        prompts" where there is no interval.
    """
    if ratio is None or ratio.low is None or ratio.high is None:
        return "too few prompts"
    better, worse = metric.words if metric.higher_is_better else metric.words[::-1]
    if ratio.low > floor:
        return better
    if ratio.high < 1 / floor:
        return worse
    return NO_DIFFERENCE
