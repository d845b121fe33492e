"""What a report says: its sections of text, tables and plots, whatever they are rendered to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np

from qm_spec.bench.methods import NOISE_METHOD, REFERENCE_METHOD
from qm_spec.bench.report.acceptance_plots import acceptance_plots
from qm_spec.bench.report.drawing import STYLE, Plot
from qm_spec.bench.report.measurements import DRAFTED, Measured, Measurements
from qm_spec.bench.report.recommend import pareto_front, served
from qm_spec.bench.report.request_plots import request_plots
from qm_spec.bench.report.speed_plots import speed_plots
from qm_spec.bench.report.tasks import task_header, task_line, task_names, with_tasks
from qm_spec.bench.results.bootstrap import (
    CONFIDENCE,
    LATENCY,
    NO_DIFFERENCE,
    SPEED,
    TPOT,
    TTFT,
    Estimate,
    Metric,
    compare_requests,
    metric_value,
    pair_requests,
    verdict,
)
from qm_spec.bench.results.doubts import noise
from qm_spec.bench.results.file import RequestRow
from qm_spec.bench.results.table import category_tables, lossless_cell

_MISSING = "-"
_PERCENTILES = (50, 90, 99)
# Prompts of a failed shard that are named; the file has them all.
_MOST_NAMED = 5


@dataclass(frozen=True)
class Table:
    """Cells as they are shown; the first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass
class Section:
    """A part of the report under one heading."""

    title: str
    paragraphs: list[str] = field(default_factory=list)
    code: str = ""
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)


@dataclass(frozen=True)
class Fact:
    """A number that stands at the top: what it is, its value, and what to know about it."""

    name: str
    value: str
    remark: str


@dataclass(frozen=True)
class Report:
    """Everything that is said.

    Args:
        warnings: what makes the numbers doubtful or incomplete; shown first.
        subtitle: what was measured on what.
    """

    title: str
    subtitle: str
    facts: tuple[Fact, ...]
    warnings: tuple[str, ...]
    sections: tuple[Section, ...]


def build_report(results: dict[str, Any]) -> Report:
    """Return the report of a results file.

    Raises:
        ValueError: it holds no runs.
    """
    measurements = Measurements(results)
    if not measurements.all:
        failures = "; ".join(_failures(results)) or "none are listed"
        raise ValueError(f"report: the results must hold at least one run, got none (failures: {failures})")
    with matplotlib.rc_context(STYLE):
        speed, acceptance = list(speed_plots(measurements)), list(acceptance_plots(measurements))
        requests = list(request_plots(measurements))
    sections = [
        *_recommended_sections(measurements),
        Section("Results", [_conditions_text(measurements)], tables=[_summary(measurements)]),
        Section("Speed", plots=speed),
        *_task_sections(measurements),
        *_category_sections(measurements),
        _slower_section(measurements),
        Section("Acceptance", plots=acceptance),
        Section("Requests", tables=_latency_tables(measurements), plots=requests),
        _method_section(measurements),
    ]
    filled = tuple(one for one in sections if one.paragraphs or one.tables or one.plots)
    run = measurements.all[0].run
    environment = results["environment"]
    hardware = environment.get("gpu_model", environment["cpu_model"])
    prompts = results["provenance"].get("prompts", "unnamed prompts")
    return Report(
        title=f"Speculative decoding of {run['target']}",
        subtitle=f"{prompts} on {hardware}, {run['dtype']}",
        facts=tuple(_facts(measurements)),
        warnings=tuple(_warnings(measurements)),
        sections=filled,
    )


# Top of the page


def _facts(measurements: Measurements) -> Iterator[Fact]:
    fastest = max(
        (one for one in measurements.at_base() if one.setting.method != REFERENCE_METHOD and one.speedup),
        key=lambda one: one.speedup.value if one.speedup else 0.0,
        default=None,
    )
    if fastest is not None and fastest.speedup is not None:
        place = ", ".join(f"{axis.short} {axis.of(fastest.setting):g}" for axis in measurements.varied())
        yield Fact(
            f"speed of {fastest.setting.method}{f' ({place})' if place else ''}",
            f"{fastest.speedup.value:.2f}x",
            f"{fastest.speedup.interval(missing='no interval')}, plain decoding = 1",
        )
        if fastest.acceptance is not None:
            drafted = fastest.setting.num_speculative_tokens
            yield Fact("acceptance length", f"{fastest.acceptance.value:.2f}", f"of {drafted + 1} tokens at most")
        speedups = fastest.request_speedups
        if speedups:
            slower = sum(one < 1 for one in speedups)
            yield Fact("requests that got slower", f"{slower}", f"of {len(speedups)} with {fastest.setting.method}")
        if fastest.run["lossless"] is not None:
            told = "as plain decoding" if fastest.run["lossless"] else lossless_cell(fastest.run).removeprefix("no: ")
            yield Fact("same output", "yes" if fastest.run["lossless"] else "no", told)


def _failures(results: dict[str, Any]) -> list[str]:
    found = []
    for one in results.get("failures", ()):
        prompts = [str(name) for name in one.get("prompt_ids", [one["prompt_id"]] if "prompt_id" in one else [])]
        shown = ", ".join(prompts[:_MOST_NAMED]) + (", ..." if len(prompts) > _MOST_NAMED else "")
        place = (
            f" at {len(prompts)} prompts ({shown})" if len(prompts) > 1 else f" at prompt {shown}" if prompts else ""
        )
        found.append(f"{one['method']} failed{place}: {one['error']}")
    return found


def _warnings(measurements: Measurements) -> Iterator[str]:
    yield from _failures(measurements.results)
    if measurements.floors is None:
        yield (
            f"The noise floor is not known: {REFERENCE_METHOD} was measured once. With {NOISE_METHOD} beside it, "
            "differences that two runs of the same thing also show are told apart."
        )
    if not any(one.rows for one in measurements.all):
        yield (
            "The file lists no requests (schema version 1): there are no intervals, no percentiles and no comparison "
            "request by request. Measure again to get them."
        )
    for one in measurements.all:
        if one.run["repeats_identical"] is False:
            yield f"{one.setting}: the output changed from pass to pass; the numbers are those of the median pass."
        yield from noise(one.run)
        if one.run["lossless"] is False:
            yield f"{one.setting}: the output is not that of plain decoding ({lossless_cell(one.run)[4:]})."


# Tables


def _label(measurements: Measurements, one: Measured) -> list[str]:
    """Return the cells that tell a run from the others: the method, and every axis that varies."""
    cells = [one.setting.method]
    for axis in measurements.varied():
        value = axis.of(one.setting)
        plain = axis is DRAFTED and one.setting.method == REFERENCE_METHOD
        cells.append(_MISSING if plain else "whole" if value is None else f"{value:g}")
    return cells


def _label_header(measurements: Measurements) -> list[str]:
    return ["method", *(axis.short for axis in measurements.varied())]


def _number(value: float | None, form: str) -> str:
    return _MISSING if value is None else format(value, form)


def _conditions_text(measurements: Measurements) -> str:
    text = f"Conditions: {measurements.conditions(*measurements.varied())}."
    if measurements.floors is not None:
        floor = 100 * (measurements.floors[SPEED.name] - 1)
        text += f" Plain decoding measured twice differs by up to {floor:.1f} % in speed; less than that is noise."
    return text


def _summary(measurements: Measurements) -> Table:
    interval = f"{CONFIDENCE:.0%} interval"
    header = [
        *_label_header(measurements),
        "tokens/s",
        "speedup",
        interval,
        "accept length",
        interval,
        "accept rate",
        "tokens/step",
        "same output",
    ]
    rows = []
    for one in measurements.all:
        speedup, acceptance = one.speedup, one.acceptance
        plain = one.setting.method == REFERENCE_METHOD
        rows.append(
            [
                *_label(measurements, one),
                _number(one.run["output_tokens_per_s"], ".1f"),
                _number(speedup.value if speedup else None, ".2f"),
                _MISSING if plain or not speedup else speedup.interval(),
                _number(acceptance.value if acceptance else None, ".2f"),
                acceptance.interval() if acceptance else _MISSING,
                _number(one.run["acceptance_rate"], ".2f"),
                _number(one.run["tokens_per_step"], ".2f"),
                lossless_cell(one.run),
            ]
        )
    return Table(header, rows)


def _recommended_sections(measurements: Measurements) -> Iterator[Section]:
    """Yield what a finished sweep recommends, and the settings that no other beats."""
    found = measurements.results.get("recommendation")
    if not found:
        return
    speedup = Estimate(found["speedup"], found["speedup_low"], found["speedup_high"])
    interval = f" ({found['confidence']:.0%} interval {speedup.interval()})" if speedup.has_interval else ""
    text = (
        f"{found['method']} with K={found['num_speculative_tokens']}: speed-up {speedup.value:.2f}{interval}, the "
        f"geometric mean over {found['num_conditions']} conditions, the best of {found['num_candidates']} settings."
    )
    if found["method"] == REFERENCE_METHOD:
        text = "No speculation: nothing that was measured is faster on average."
    rows = [
        [
            *_label(measurements, one),
            _number(one.speedup.value if one.speedup else None, ".2f"),
            _number(one.run["output_tokens_per_s"], ".1f"),
        ]
        for one in pareto_front(served(measurements.all))
    ]
    header = [*_label_header(measurements), "speedup", "tokens/s"]
    caption = "Settings that no other beats in both concurrency and speed-up, at the same context and temperature."
    yield Section("Recommended setting", [text], found["command"], [Table(header, rows, caption)])


def _task_sections(measurements: Measurements) -> Iterator[Section]:
    of_spec_bench = measurements.results["provenance"].get("prompts") == "spec_bench"
    named = with_tasks if of_spec_bench else list[RequestRow]
    tasks = task_names(named([row for one in measurements.all for row in one.rows]))
    if not tasks:
        return
    rows = [
        task_line(one.setting.method, tasks, named(one.rows), named(one.plain))
        for one in measurements.at_base()
        if one.rows and one.setting.method != REFERENCE_METHOD
    ]
    caption = measurements.caption(
        "Speed-up of the mean speed of requests, and mean accepted tokens, as Spec-Bench's own script counts them."
    )
    yield Section("Tasks", tables=[Table(task_header(tasks), rows, caption)])


def _category_sections(measurements: Measurements) -> Iterator[Section]:
    """Yield what turns show of each category; files older than turns have no such numbers."""
    caption = (
        "Speed-up of the requests of a category with its interval over prompts, then acceptance length by tokens per "
        "step; "
    )
    tables = [
        Table(header, rows, f"{caption}{title}.")
        for title, header, rows in category_tables([one.run for one in measurements.all])
    ]
    if tables:
        yield Section("Categories", tables=tables)


def _slower_section(measurements: Measurements) -> Section:
    """List what is slower than plain decoding beyond the noise, and count what may be."""
    section = Section("What got slower")
    compared = [one for one in measurements.speculative if one.rows and one.plain]
    if not compared:
        slow = [str(one.setting) for one in measurements.speculative if one.speedup and one.speedup.value < 1]
        if slow:
            section.paragraphs.append(f"Slower than plain decoding as a whole: {'; '.join(slow)}.")
        return section
    lines = [line for one in compared for line in _slower_lines(measurements, one)]
    shown = [line for line in lines if line[-1] != NO_DIFFERENCE]
    if shown:
        header = [*_label_header(measurements), "what", "plain", "method", "change", "verdict"]
        caption = "A verdict needs an interval beyond the noise floor; a percentile has none."
        section.tables.append(Table(header, shown, caption))
    else:
        section.paragraphs.append("No method was shown to be slower than plain decoding in speed, latency or category.")
    if len(lines) > len(shown):
        section.paragraphs.append(f"Slower by less than the noise or the interval: {len(lines) - len(shown)} more.")
    counted = [
        [*_label(measurements, one), f"{sum(value < 1 for value in values)} of {len(values)}", f"{min(values):.2f}"]
        for one in compared
        if min(values := one.request_speedups, default=1) < 1
    ]
    if counted:
        header = [*_label_header(measurements), "requests that took longer", "lowest speedup of one"]
        section.tables.append(Table(header, counted))
    if len(counted) < len(compared):
        section.paragraphs.append(f"In {len(compared) - len(counted)} of {len(compared)} runs no request took longer.")
    return section


def _slower_lines(measurements: Measurements, one: Measured) -> Iterator[list[str]]:
    checks: list[tuple[str, Metric, list[RequestRow]]] = [
        (SPEED.name, SPEED, one.rows),
        (TTFT.name, TTFT, one.rows),
        (TPOT.name, TPOT, one.rows),
        *((task, SPEED, [row for row in one.rows if row.category == task]) for task in task_names(one.rows)),
    ]
    floors = measurements.floors or {}
    for name, metric, rows in checks:
        ratio = compare_requests(metric, one.plain, rows)
        if ratio is None or ratio.value == 1 or (ratio.value > 1) == metric.higher_is_better:
            continue
        ours, plain = pair_requests(rows, one.plain)
        form = f".{metric.digits}f"
        yield [
            *_label(measurements, one),
            name if metric.name == name else f"{metric.name}, {name}",
            _number(metric_value(metric, plain), form),
            _number(metric_value(metric, ours), form),
            f"{100 * (ratio.value - 1):+.1f}%",
            verdict(metric, ratio, floors.get(metric.name, 1.0)),
        ]
    plain_tail, tail = (
        1000 * float(np.percentile([row.latency_s for row in rows], 99)) for rows in (one.plain, one.rows)
    )
    if tail > plain_tail * floors.get(LATENCY.name, 1.0):
        change = f"{100 * (tail / plain_tail - 1):+.1f}%"
        yield [*_label(measurements, one), "latency ms, p99", f"{plain_tail:.1f}", f"{tail:.1f}", change, _MISSING]


def _latency_tables(measurements: Measurements) -> list[Table]:
    listed = [one for one in measurements.all if one.rows]
    if not listed:
        return []
    header = _label_header(measurements)
    for name in ("TTFT", "TPOT", "latency"):
        header += [f"{name} ms p{percentile}" for percentile in _PERCENTILES]
    rows = [
        [
            *_label(measurements, one),
            *_percentiles([row.ttft_s for row in one.rows]),
            *_percentiles([row.tpot_s for row in one.rows if row.tpot_s is not None]),
            *_percentiles([row.latency_s for row in one.rows]),
        ]
        for one in listed
    ]
    least = min(len(one.rows) for one in listed)
    caption = "Percentiles over requests."
    if least < 100:
        caption += f" Of {least} requests the 99th is close to the slowest one."
    return [Table(header, rows, caption)]


def _percentiles(seconds: Sequence[float]) -> list[str]:
    if not seconds:
        return [_MISSING] * len(_PERCENTILES)
    return [f"{1000 * value:.1f}" for value in np.percentile(seconds, _PERCENTILES)]


def _method_section(measurements: Measurements) -> Section:
    results = measurements.results
    environment, provenance = results["environment"], results["provenance"]
    rows = [
        ["command", results.get("command", _MISSING)],
        ["commit", str(provenance.get("commit") or "not a git checkout")],
        ["versions", ", ".join(f"{name} {version}" for name, version in environment["versions"].items())],
        ["processor", f"{environment['cpu_model']}, {environment['cpu_cores']} cores"],
        *([["GPU", environment["gpu_model"]]] if "gpu_model" in environment else []),
        ["operators", str(environment.get("operators", _MISSING))],
        ["prompts", f"{provenance.get('prompts', _MISSING)} (sha256 {str(provenance.get('prompts_sha256'))[:12]})"],
        ["seed, repeats", f"{provenance.get('seed', _MISSING)}, {provenance.get('repeats', _MISSING)}"],
    ]
    text = (
        f"Intervals hold with {CONFIDENCE:.0%} confidence what the same measurement on other prompts of this kind "
        "would give: prompts are drawn again with replacement, a method and plain decoding together. They do not cover "
        "other machines, models or kinds of text. Speed-up is output tokens per second of the whole engine by the same "
        "of plain decoding; acceptance length is the tokens per draft, the target's own token included."
    )
    if provenance.get("in_turns"):
        text += (
            " All engines were alive together, and each prompt, or some waves of requests in flight, was decoded by "
            "one method after the other: a speed-up compares times that stand next to each other, and is of every turn "
            "the median over the passes."
        )
    return Section("How it was measured", [text], tables=[Table(["what", "value"], rows)])
