"""The runs of a results file, looked up by setting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qm_spec.bench.methods import NOISE_METHOD, REFERENCE_METHOD, method_order
from qm_spec.bench.results.bootstrap import ACCEPTANCE, SPEED, Estimate, compare_requests, estimate, pair_requests
from qm_spec.bench.results.compare import Setting, noise_floors, runs_by_setting
from qm_spec.bench.results.file import RequestRow, request_rows

Run = dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """A setting that a sweep varies.

    Args:
        name: as axes of plots show it.
        short: as tables show it.
        of: its value in a run's setting; None where the prompts were not cut.
    """

    name: str
    short: str
    of: Callable[[Setting], float | None]


CONTEXT = Axis("context in tokens", "context", lambda setting: setting.context_tokens)
CONCURRENCY = Axis("concurrency", "concurrency", lambda setting: setting.concurrency)
TEMPERATURE = Axis("temperature", "temperature", lambda setting: setting.temperature)
DRAFTED = Axis("drafted tokens K", "K", lambda setting: setting.num_speculative_tokens)
AXES = (CONTEXT, CONCURRENCY, TEMPERATURE, DRAFTED)


@dataclass(frozen=True)
class Measured:
    """One run with its requests, beside plain decoding under the same conditions."""

    run: Run
    setting: Setting
    rows: list[RequestRow]
    plain: list[RequestRow]

    @cached_property
    def speedup(self) -> Estimate | None:
        """Speed over plain decoding's, as `turns.speedup` estimates it.

        Files older than turns have no interval: there it is that of the paired requests' speeds, scaled to the ratio of
        throughputs.
        """
        value = self.run["speedup"]
        if value is not None and "speedup_low" in self.run:
            return Estimate(value, self.run["speedup_low"], self.run["speedup_high"])
        paired = compare_requests(SPEED, self.plain, self.rows)
        if value is None:
            return paired
        return paired.scaled(value / paired.value) if paired else Estimate(value)

    @cached_property
    def acceptance(self) -> Estimate | None:
        """Acceptance length by vLLM's counters, with the interval of the requests' own."""
        value = self.run["acceptance_length"]
        if value is None:
            return None
        found = estimate(ACCEPTANCE, self.rows)
        return found.scaled(value / found.value) if found else Estimate(value)

    @cached_property
    def request_speedups(self) -> list[float]:
        """How many times as fast as in plain decoding each request ran; none where the file lists no requests."""
        if any(row.speedup is not None for row in self.rows):
            return [row.speedup for row in self.rows if row.speedup is not None]
        ours, theirs = pair_requests(self.rows, self.plain)
        return [
            (row.output_tokens / row.latency_s) / (plain.output_tokens / plain.latency_s)
            for row, plain in zip(ours, theirs, strict=True)
        ]


def _order(setting: Setting) -> tuple[float, ...]:
    """Each method stands below plain decoding under the same conditions."""
    conditions = (setting.context_tokens or 0, setting.concurrency, setting.temperature)
    return (*conditions, method_order(setting.method), setting.num_speculative_tokens)


class Measurements:
    """All runs of a results file.

    Attributes:
        all: every run but the repetition of plain decoding, by conditions, then methods in the order of `METHODS`.
        floors: see `noise_floors`.
    """

    def __init__(self, results: dict[str, Any]) -> None:
        self.results = results
        runs = runs_by_setting(results)
        self.floors = noise_floors(results)
        found = []
        for setting, run in runs.items():
            plain = runs.get(Setting.of(run, REFERENCE_METHOD), {})
            if setting.method != NOISE_METHOD:
                found.append(Measured(run, setting, request_rows(run), request_rows(plain)))
        self.all: list[Measured] = sorted(found, key=lambda one: _order(one.setting))

    @cached_property
    def methods(self) -> list[str]:
        """Names of the methods in order."""
        return list(dict.fromkeys(one.setting.method for one in self.all))

    @cached_property
    def speculative(self) -> list[Measured]:
        """Every run of a method that speculates."""
        return [one for one in self.all if one.setting.method != REFERENCE_METHOD]

    def values(self, axis: Axis) -> list[float]:
        """Return the values of an axis among the runs that have it, sorted; plain decoding has no K."""
        among = self.speculative if axis is DRAFTED else self.all
        return sorted({value for one in among if (value := axis.of(one.setting)) is not None})

    def at_base(self, *free: Axis) -> list[Measured]:
        """Return the runs at the smallest value of every axis, but those in `free`, and of each method the best K.

        The best K is that of the highest speed at each point; with `DRAFTED` in `free`, all stay.
        """
        fixed = [axis for axis in AXES if axis is not DRAFTED and axis not in free]
        base = {axis.name: values[0] for axis in fixed if (values := self.values(axis))}
        kept = [one for one in self.all if all(axis.of(one.setting) == base.get(axis.name) for axis in fixed)]
        if DRAFTED in free:
            return kept
        best: dict[tuple[Any, ...], Measured] = {}
        for one in kept:
            point = (one.setting.method, *(axis.of(one.setting) for axis in free))
            if point not in best or best[point].run["output_tokens_per_s"] < one.run["output_tokens_per_s"]:
                best[point] = one
        return list(best.values())

    def conditions(self, *free: Axis) -> str:
        """Say what all runs of `at_base(*free)` have in common."""
        setting = self.at_base(*free)[0].setting
        run = self.at_base(*free)[0].run
        parts = [f"{run['num_prompts']} prompts", f"{setting.max_tokens} output tokens"]
        if CONTEXT not in free:
            context = setting.context_tokens
            parts.append(f"{context} tokens of context" if context else "whole prompts")
        if TEMPERATURE not in free:
            parts.append(f"temperature {setting.temperature:g}")
        if CONCURRENCY not in free:
            parts.append(f"concurrency {setting.concurrency}")
        if DRAFTED not in free:
            drafted = sorted({one.setting.num_speculative_tokens for one in self.at_base(*free)} - {0})
            if len(self.values(DRAFTED)) > 1:
                parts.append("the fastest K of each method")
            elif drafted:
                parts.append(f"K={drafted[0]}")
        return ", ".join(parts)

    def caption(self, hint: str, *free: Axis) -> str:
        """Return a hint for readers, behind the conditions where they differ from run to run."""
        return f"{self.conditions(*free)}. {hint}".rstrip() if self.varied() else hint

    def varied(self) -> Sequence[Axis]:
        """Return the axes with more than one value."""
        return [axis for axis in AXES if len(self.values(axis)) > 1]
