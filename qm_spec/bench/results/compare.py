"""Two results files side by side: for each setting and metric the difference, its interval and a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qm_spec.bench.methods import NOISE_METHOD, REFERENCE_METHOD, find_method
from qm_spec.bench.results.bootstrap import (
    CONFIDENCE,
    METRICS,
    SPEED,
    Estimate,
    Metric,
    PairedRequests,
    compare_requests,
    metric_value,
    noise_floor,
    pair_requests,
    speedup_value,
    verdict,
)
from qm_spec.bench.results.file import RequestRow, request_rows
from qm_spec.bench.results.table import align_table

Results = dict[str, Any]
Run = dict[str, Any]

SPEEDUP = Metric("speedup", SPEED.exponents, True, digits=2)


@dataclass(frozen=True, order=True)
class Setting:
    """What was measured: runs of equal settings answer the same question.

    Args:
        num_speculative_tokens: 0 for plain decoding.
        context_tokens: the length that prompts were cut to; None for whole prompts.
    """

    method: str
    num_speculative_tokens: int
    temperature: float
    concurrency: int
    context_tokens: int | None
    max_tokens: int

    @classmethod
    def of(cls, run: Run, method: str | None = None) -> Setting:
        """Return a run's setting; with `method` the one under which that method was measured beside it."""
        name = method or run["method"]
        return cls(
            method=name,
            num_speculative_tokens=0 if find_method(name).is_plain else run["num_speculative_tokens"],
            temperature=run["temperature"],
            concurrency=run["concurrency"],
            context_tokens=run["context_tokens"] if run["context_cut"] else None,
            max_tokens=run["max_tokens"],
        )

    def __str__(self) -> str:
        parts = [self.method]
        if self.num_speculative_tokens:
            parts.append(f"K={self.num_speculative_tokens}")
        if self.context_tokens is not None:
            parts.append(f"context {self.context_tokens}")
        parts += [f"concurrency {self.concurrency}", f"temperature {self.temperature:g}"]
        return ", ".join(parts)


@dataclass(frozen=True)
class Comparison:
    """One metric of one setting in both files.

    Args:
        before, after: the metric over the prompts of both, in its own unit.
        ratio: after by before, with its interval.
        verdict: see `statistics.verdict`.
    """

    setting: Setting
    metric: Metric
    num_prompts: int
    before: float
    after: float
    ratio: Estimate
    verdict: str


@dataclass(frozen=True)
class CompareReport:
    """All comparisons of two files, and what a reader must know about them."""

    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]


def runs_by_setting(results: Results) -> dict[Setting, Run]:
    """Return the runs of a file by their settings; of two runs of one setting the later."""
    return {Setting.of(run): run for run in results["runs"]}


def noise_floors(results: Results) -> dict[str, float] | None:
    """Return by metric how far plain decoding measured twice differs; None where it was measured once."""
    runs = runs_by_setting(results)
    twice = [
        (request_rows(runs[Setting.of(run, REFERENCE_METHOD)]), request_rows(run))
        for setting, run in runs.items()
        if setting.method == NOISE_METHOD and Setting.of(run, REFERENCE_METHOD) in runs
    ]
    if not any(first and second for first, second in twice):
        return None
    return {
        metric.name: noise_floor([compare_requests(metric, first, second) for first, second in twice])
        for metric in METRICS
        if metric.timed
    }


def compare_results(before: Results, after: Results, seed: int = 0) -> CompareReport:
    """Compare two files setting by setting over the prompts that both finished.

    A verdict needs an interval that lies beyond the larger noise floor of the two files. Speeds of two files differ
    also by what else their machines did; the speed-up over plain decoding in the same file does not.

    Args:
        seed: of the resampling.

    Raises:
        ValueError: the files were measured on different prompts, share no setting, or hold no requests.
    """
    _check_prompts(before, after)
    old, new = runs_by_setting(before), runs_by_setting(after)
    shared = [setting for setting in old if setting in new and setting.method != NOISE_METHOD]
    notes = [
        f"only in {name}: {setting}"
        for name, runs, others in (("A", old, new), ("B", new, old))
        for setting in runs
        if setting not in others and setting.method != NOISE_METHOD
    ]
    if not shared:
        raise ValueError(
            "compare: the files must share a setting, got none in common (" + "; ".join(notes) + "); measure both with "
            "the same methods, K, temperature, concurrency, contexts and max_tokens"
        )
    floors = [noise_floors(results) for results in (before, after)]
    unknown = [name for name, one in zip("AB", floors, strict=True) if one is None]
    if unknown:
        notes.append(
            f"the noise floor is not known in {' and '.join(unknown)}: measure "
            f"{NOISE_METHOD} beside {REFERENCE_METHOD}; until then a small difference may be the machine's"
        )
    floor = {
        metric.name: max((one[metric.name] for one in floors if one), default=1.0) for metric in METRICS if metric.timed
    }
    comparisons: list[Comparison] = []
    for setting in shared:
        ours, theirs = pair_requests(request_rows(old[setting]), request_rows(new[setting]))
        most = max(old[setting]["num_prompts"], new[setting]["num_prompts"])
        if len(ours) < most:
            notes.append(f"{setting}: {len(ours)} of {most} prompts are in both files with the same length")
        if ours:
            plain = [runs.get(Setting.of(old[setting], REFERENCE_METHOD)) for runs in (old, new)]
            comparisons += _compare(setting, ours, theirs, plain, floor, seed)
    if not comparisons:
        raise ValueError(
            "compare: both files must list the requests of a shared setting, got none; results of schema version 1 "
            "do not list them: measure again"
        )
    return CompareReport(tuple(comparisons), tuple(notes))


def _check_prompts(before: Results, after: Results) -> None:
    hashes = [results.get("provenance", {}).get("prompts_sha256") for results in (before, after)]
    if None not in hashes and hashes[0] != hashes[1]:
        raise ValueError(
            f"compare: both files must be measured on the same prompts, got prompts_sha256 {hashes[0][:12]} and "
            f"{hashes[1][:12]}; measure both with the same workload"
        )


def _compare(
    setting: Setting,
    ours: Sequence[RequestRow],
    theirs: Sequence[RequestRow],
    plain: Sequence[Run | None],
    floor: dict[str, float],
    seed: int,
) -> list[Comparison]:
    paired = PairedRequests(ours, theirs, seed=seed)
    found = []
    for metric in METRICS:
        old, new, ratio = metric_value(metric, ours), metric_value(metric, theirs), paired.ratio(metric)
        if old is not None and new is not None and ratio is not None:
            said = verdict(metric, ratio, floor.get(metric.name, 1.0))
            found.append(Comparison(setting, metric, len(ours), old, new, ratio, said))
    if setting.method != REFERENCE_METHOD and plain[0] is not None and plain[1] is not None:
        found[:0] = _compare_speedups(setting, ours, theirs, (plain[0], plain[1]), floor[SPEED.name], seed)
    return found


def _compare_speedups(
    setting: Setting,
    ours: Sequence[RequestRow],
    theirs: Sequence[RequestRow],
    plain: tuple[Run, Run],
    floor: float,
    seed: int,
) -> list[Comparison]:
    """Compare over the prompts that all four measurements finished."""
    first = {row.prompt_id: row for row in request_rows(plain[0])}
    second = {row.prompt_id: row for row in request_rows(plain[1])}
    fours = [
        (our, their, first[our.prompt_id], second[our.prompt_id])
        for our, their in zip(ours, theirs, strict=True)
        if our.prompt_id in first and our.prompt_id in second
    ]
    if not fours:
        return []
    before, after, before_plain, after_plain = (list(column) for column in zip(*fours, strict=True))
    old, new = speedup_value(before, before_plain), speedup_value(after, after_plain)
    ratio = PairedRequests(before, after, before_plain, after_plain, seed=seed).speedup_ratio()
    if old is None or new is None or ratio is None:
        return []
    return [Comparison(setting, SPEEDUP, len(fours), old, new, ratio, verdict(SPEEDUP, ratio, floor))]


def format_comparisons(report: CompareReport) -> str:
    """Return the comparisons as one Markdown table per setting, aligned for a terminal, and the notes below."""
    blocks = []
    for setting in dict.fromkeys(one.setting for one in report.comparisons):
        rows = [one for one in report.comparisons if one.setting == setting]
        table = align_table(
            ("metric", "A", "B", "B by A", f"{CONFIDENCE:.0%} interval", "verdict"), [_cells(row) for row in rows]
        )
        blocks.append(f"{setting} ({rows[0].num_prompts} prompts)\n\n{table}")
    blocks += [f"note: {note}" for note in report.notes]
    return "\n\n".join(blocks)


def _cells(row: Comparison) -> list[str]:
    form = f".{row.metric.digits}f"
    return [
        row.metric.name,
        format(row.before, form),
        format(row.after, form),
        _change(row.ratio.value),
        row.ratio.interval(_change),
        row.verdict,
    ]


def _change(ratio: float) -> str:
    # Plus 0 turns a rounded -0 into 0.
    return f"{round(100 * (ratio - 1), 1) + 0.0:+.1f}%"
