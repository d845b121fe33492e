"""What to take of a sweep: the settings that no other beats, and the one to serve with."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from qm_spec.bench.engine.shards import EngineSpec
from qm_spec.bench.methods import REFERENCE_METHOD, find_method
from qm_spec.bench.report.measurements import Measured, Measurements
from qm_spec.bench.results.bootstrap import CONFIDENCE, Estimate, Floats, Resamples, request_columns
from qm_spec.bench.results.table import align_table


def served(measured: Sequence[Measured]) -> list[Measured]:
    """Return the runs of methods that a server would be run with; others are there for comparison."""
    return [one for one in measured if find_method(one.setting.method).served]


def pareto_front(measured: Sequence[Measured]) -> list[Measured]:
    """Return what is not beaten: nothing else serves at least as many requests at once at least as much faster.

    Two settings are compared only at the same context and temperature.
    """
    return [one for one in measured if not any(_beats(other, one) for other in measured)]


def _beats(one: Measured, other: Measured) -> bool:
    if _traffic(one) != _traffic(other) or one.speedup is None or other.speedup is None:
        return False
    ours, theirs = ((each.setting.concurrency, each.speedup.value) for each in (one, other) if each.speedup)
    return all(a >= b for a, b in zip(ours, theirs, strict=True)) and ours != theirs


def _traffic(one: Measured) -> tuple[int | None, float]:
    return one.setting.context_tokens, one.setting.temperature


def format_front(results: dict[str, Any]) -> str:
    """Return the Pareto front of speed-up against concurrency as a table, with tokens/s of the whole engine."""
    measured = served(Measurements(results).all)
    rows = [
        [
            one.setting.method,
            str(one.setting.num_speculative_tokens),
            "whole" if one.setting.context_tokens is None else str(one.setting.context_tokens),
            f"{one.setting.temperature:g}",
            str(one.setting.concurrency),
            f"{one.speedup.value:.2f}" if one.speedup else "-",
            one.speedup.interval() if one.speedup else "-",
            f"{one.run['output_tokens_per_s']:.1f}",
        ]
        for one in pareto_front(measured)
    ]
    header = ("method", "K", "context", "temperature", "concurrency", "speedup", f"{CONFIDENCE:.0%} interval")
    return align_table((*header, "tokens/s"), rows)


@dataclass(frozen=True)
class Recommendation:
    """The method and depth of the highest geometric mean of speed-ups over all that was swept.

    Args:
        speedup: that mean; the interval is over prompts, drawn alike under all conditions. The best of many looks
            better than it is, which no interval of its own shows.
        num_candidates: methods and depths that it was chosen from, plain decoding included.
        num_conditions: combinations of concurrency, context and temperature.
        command: the server's.
    """

    method: str
    num_speculative_tokens: int
    speedup: Estimate
    num_candidates: int
    num_conditions: int
    command: str

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict for the results file."""
        return {
            "method": self.method,
            "num_speculative_tokens": self.num_speculative_tokens,
            "speedup": self.speedup.value,
            "speedup_low": self.speedup.low,
            "speedup_high": self.speedup.high,
            "confidence": CONFIDENCE,
            "num_candidates": self.num_candidates,
            "num_conditions": self.num_conditions,
            "command": self.command,
        }

    def __str__(self) -> str:
        if self.method == REFERENCE_METHOD:
            return f"recommended: no speculation; nothing that was measured is faster on average\n{self.command}"
        shown = "" if self.speedup.low is None else f", {CONFIDENCE:.0%} interval {self.speedup.interval()}"
        unsure = (
            "" if self.speedup.low is not None and self.speedup.low > 1 else "; that it is faster at all is not shown"
        )
        return (
            f"recommended: {self.method} with K={self.num_speculative_tokens}, speed-up {self.speedup.value:.2f}"
            f"{shown} (geometric mean of {self.num_conditions} conditions, best of {self.num_candidates} "
            f"settings){unsure}\n{self.command}"
        )


def recommend(
    results: dict[str, Any], target: str, engines: Mapping[tuple[str, int], EngineSpec]
) -> Recommendation | None:
    """Choose among the methods and depths that were measured under all conditions.

    Args:
        target: folder of the target, as the server is to be given it.
        engines: what was measured, by method and depth.

    Returns:
        None where nothing was measured under all conditions.
    """
    measured = served(Measurements(results).all)
    conditions = {_condition(one) for one in measured}
    ordered = sorted(measured, key=_candidate)
    candidates = {
        name: runs
        for name, group in groupby(ordered, key=_candidate)
        if len(runs := list(group)) == len(conditions) and all(one.speedup for one in runs)
    }
    if not candidates:
        return None
    (method, depth), runs = max(candidates.items(), key=lambda item: _mean_speedup(item[1]))
    return Recommendation(
        method=method,
        num_speculative_tokens=depth,
        speedup=_estimated(runs),
        num_candidates=len(candidates),
        num_conditions=len(conditions),
        command=serve_command(
            method,
            engines[method, depth],
            target,
            results["environment"]["dtype"],
            max(one.setting.concurrency for one in runs),
        ),
    )


def _candidate(one: Measured) -> tuple[str, int]:
    return one.setting.method, one.setting.num_speculative_tokens


def _condition(one: Measured) -> tuple[int, int | None, float]:
    return one.setting.concurrency, *_traffic(one)


def _mean_speedup(runs: Sequence[Measured]) -> float:
    return math.prod(one.speedup.value for one in runs if one.speedup) ** (1 / len(runs))


def _estimated(runs: Sequence[Measured]) -> Estimate:
    """Estimate the geometric mean over the prompts that every run and its plain decoding finished."""
    value = _mean_speedup(runs)
    sides = [{row.prompt_id: row for row in rows} for one in runs for rows in (one.rows, one.plain)]
    shared = [name for name in sides[0] if all(name in side for side in sides)]
    if not shared:
        return Estimate(value)
    columns: dict[str, Floats] = {}
    exponents: dict[str, int] = {}
    for number, side in enumerate(sides):
        columns |= request_columns([side[name] for name in shared], f"{number} ")
        sign = -1 if number % 2 else 1
        exponents |= {f"{number} tokens": sign, f"{number} latency": -sign}
    found = Resamples(columns).ratio(exponents)
    if found is None or found.low is None or found.high is None:
        return Estimate(value)
    root = 1 / len(runs)
    # As `Measured.speedup`: the value is the engine's throughput, the interval that of the requests' own speeds.
    scale = value / found.value**root
    return Estimate(value, scale * found.low**root, scale * found.high**root)


def serve_command(method: str, engine: EngineSpec, target: str, dtype: str, max_num_seqs: int) -> str:
    """Return the line that serves a target as it was measured."""
    words = ["vllm", "serve", target, "--dtype", dtype, "--max-num-seqs", str(max_num_seqs)]
    if engine.enforce_eager:
        words.append("--enforce-eager")
    if engine.speculative_config is not None:
        words += ["--speculative-config", json.dumps(engine.speculative_config)]
    environment = [f"{name}={shlex.quote(value)}" for name, value in find_method(method).environment.items()]
    return " ".join([*environment, shlex.join(words)])
