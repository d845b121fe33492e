"""The plots of a report."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qm_spec.evaluation.report.measurements import (
    CONCURRENCY,
    CONTEXT,
    DRAFTED,
    TEMPERATURE,
    Axis,
    Measured,
    Measurements,
)
from qm_spec.evaluation.report.svg import INK, STYLE
from qm_spec.evaluation.results import RequestRow
from qm_spec.evaluation.settings import METHODS, REFERENCE_METHOD
from qm_spec.evaluation.spec_bench import task_names
from qm_spec.evaluation.statistics import ACCEPTANCE, Estimate, estimate, pair_requests

# Okabe and Ito's palette, which colour-blind readers can tell apart; methods that METHODS does not list come last.
PALETTE = ("#999999", "#E69F00", "#0072B2", "#56B4E9", "#009E73", "#D55E00", "#CC79A7")
_MARKERS = "s^oDvPX"
# The same colours where they would be too dark on a dark page.
DARK_PALETTE = {"#0072B2": "#4BA3E3", "#009E73": "#2CC295", "#D55E00": "#F28A45"}
_WIDTH_INCHES = 5.0
_HEIGHT_INCHES = 3.2
_MOST_LENGTH_GROUPS = 5

Value = Callable[[Measured], "Estimate | None"]


@dataclass(frozen=True)
class Plot:
    """A figure with its words.

    Args:
        name: of its file, and of its ids in a page.
        title: what it shows.
        caption: under which conditions, and how to read it.
        figure: drawn under `STYLE`.
    """

    name: str
    title: str
    caption: str
    figure: Figure


def _look(method: str, methods: Sequence[str]) -> dict[str, Any]:
    order = [*METHODS, *(name for name in methods if name not in METHODS)]
    place = order.index(method) % len(PALETTE)
    return {"color": PALETTE[place], "marker": _MARKERS[place]}


def draw_plots(measurements: Measurements) -> list[Plot]:
    """Return every plot that the measurements give rise to, in the order of the report."""
    with matplotlib.rc_context(STYLE):
        return [
            *_speed_plots(measurements),
            *_acceptance_plots(measurements),
            *_request_plots(measurements),
        ]


def _axes(height: float = _HEIGHT_INCHES) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
    axes = figure.subplots()
    axes.set_axisbelow(True)
    return figure, axes


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, columnspacing=1.2, handletextpad=0.5)


def _errors(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Distances from the values to the ends of their intervals; 0 where there is none."""
    below = [max(0.0, one.value - (one.value if one.low is None else one.low)) for one in estimates]
    above = [max(0.0, (one.value if one.high is None else one.high) - one.value) for one in estimates]
    return [below, above]


# Speed


def _speedup(one: Measured) -> Estimate | None:
    return one.speedup


def _acceptance(one: Measured) -> Estimate | None:
    return one.acceptance


def _speed_plots(measurements: Measurements) -> Iterator[Plot]:
    at_base = [one for one in measurements.at_base() if one.setting.method != REFERENCE_METHOD and one.speedup]
    if at_base:
        figure, axes = _axes(1.0 + 0.42 * len(at_base))
        for place, one in enumerate(at_base):
            assert one.speedup is not None
            look = _look(one.setting.method, measurements.methods)
            axes.errorbar(
                one.speedup.value, place, xerr=_errors([one.speedup]), **look, linestyle="", markersize=7, capsize=3
            )
            axes.annotate(
                f"{one.speedup.value:.2f}x",
                (one.speedup.value, place),
                (0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
        axes.axvline(1, color=INK, linewidth=0.9, linestyle="--")
        axes.set_yticks(range(len(at_base)), [one.setting.method for one in at_base])
        axes.set_ylim(len(at_base) - 0.4, -0.7)
        axes.margins(x=0.12)
        axes.grid(axis="x")
        axes.set_xlabel("speed-up over plain decoding")
        yield Plot(
            "speedup",
            "Speed-up over plain decoding",
            measurements.caption("Right of the dashed line is faster; bars are 95 % intervals."),
            figure,
        )
    titles = {
        CONCURRENCY: "concurrency",
        CONTEXT: "context length",
        TEMPERATURE: "temperature",
        DRAFTED: "drafted tokens",
    }
    for axis in measurements.varied():
        yield from _sweep_plot(
            measurements,
            axis,
            _speedup,
            f"speedup-by-{titles[axis].replace(' ', '-')}",
            f"Speed-up by {titles[axis]}",
            "speed-up over plain decoding",
            1.0,
        )


def _sweep_plot(
    measurements: Measurements, axis: Axis, value: Value, name: str, title: str, label: str, level: float | None
) -> Iterator[Plot]:
    """Draw a line per method over the values of `axis`, and a dashed one at `level`."""
    values = measurements.values(axis)
    series: dict[str, list[tuple[int, Estimate]]] = {}
    for one in measurements.at_base(axis):
        found, point = value(one), axis.of(one.setting)
        if one.setting.method != REFERENCE_METHOD and found is not None and point is not None:
            series.setdefault(one.setting.method, []).append((values.index(point), found))
    if not series:
        return
    figure, axes = _axes()
    for number, (method, points) in enumerate(series.items()):
        points.sort(key=lambda point: point[0])
        estimates = [one for _, one in points]
        # Side by side, so that intervals do not hide each other.
        shift = 0.06 * (number - (len(series) - 1) / 2)
        axes.errorbar(
            [place + shift for place, _ in points],
            [one.value for one in estimates],
            yerr=_errors(estimates),
            **_look(method, measurements.methods),
            markersize=5,
            linewidth=1.6,
            elinewidth=1,
            capsize=2,
            label=method,
        )
    if level is not None:
        axes.axhline(level, color=INK, linewidth=0.9, linestyle="--")
    axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
    axes.set_xlim(-0.4, len(values) - 0.6)
    axes.grid(axis="y")
    axes.set(xlabel=axis.name, ylabel=label)
    _legend_below(figure, axes)
    yield Plot(name, title, measurements.caption("Bars are 95 % intervals.", axis), figure)


# Acceptance


def _acceptance_plots(measurements: Measurements) -> Iterator[Plot]:
    drafted = [one for one in measurements.at_base() if one.run["num_drafts"]]
    if not drafted:
        return
    figure, axes = _axes()
    for one in drafted:
        rates = one.run["acceptance_per_position"]
        axes.plot(
            range(1, len(rates) + 1),
            rates,
            **_look(one.setting.method, measurements.methods),
            markersize=5,
            linewidth=1.6,
            label=one.setting.method,
        )
    axes.set_xticks(range(1, max(len(one.run["acceptance_per_position"]) for one in drafted) + 1))
    axes.set_ylim(0, 1.02)
    axes.grid(axis="y")
    axes.set(xlabel="position in the draft", ylabel="share of drafts that keep it")
    _legend_below(figure, axes)
    yield Plot(
        "acceptance-by-position",
        "Acceptance by position",
        measurements.caption("A token is kept only if those before it are."),
        figure,
    )
    yield from _category_plot(measurements, drafted)
    if CONTEXT in measurements.varied():
        yield from _sweep_plot(
            measurements,
            CONTEXT,
            _acceptance,
            "acceptance-by-context",
            "Acceptance length by context",
            "tokens per draft and step",
            None,
        )
    else:
        yield from _length_plot(measurements, drafted)


def _category_plot(measurements: Measurements, drafted: Sequence[Measured]) -> Iterator[Plot]:
    tasks = task_names([row for one in drafted for row in one.rows])
    if not tasks:
        return
    figure, axes = _axes(1.3 + (0.22 + 0.13 * len(drafted)) * len(tasks))
    for number, one in enumerate(drafted):
        shift = 0.16 * (number - (len(drafted) - 1) / 2)
        points = [
            (place + shift, found)
            for place, task in enumerate(tasks)
            if (found := estimate(ACCEPTANCE, [row for row in one.rows if row.category == task])) is not None
        ]
        axes.errorbar(
            [found.value for _, found in points],
            [place for place, _ in points],
            xerr=_errors([found for _, found in points]),
            **_look(one.setting.method, measurements.methods),
            linestyle="",
            markersize=5,
            elinewidth=1,
            capsize=2,
            label=one.setting.method,
        )
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.grid(axis="x")
    axes.set_xlabel("tokens per draft and step")
    _legend_below(figure, axes)
    yield Plot(
        "acceptance-by-category",
        "Acceptance length by category",
        measurements.caption("The target's own token is counted; bars are 95 % intervals."),
        figure,
    )


def _length_groups(rows: Sequence[RequestRow]) -> list[tuple[int, int]]:
    """Cut prompt lengths into groups of about equal numbers, first and last length of each; none if all are alike."""
    lengths = np.array([row.context_tokens for row in rows])
    if not len(lengths) or lengths.max() < 1.5 * lengths.min():
        return []
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, _MOST_LENGTH_GROUPS + 1)).astype(int))
    groups = [(int(low) + (place > 0), int(high)) for place, (low, high) in enumerate(itertools.pairwise(edges))]
    return [(low, high) for low, high in groups if ((lengths >= low) & (lengths <= high)).any()]


def _length_plot(measurements: Measurements, drafted: Sequence[Measured]) -> Iterator[Plot]:
    groups = _length_groups(drafted[0].rows)
    if len(groups) < 2:
        return
    figure, axes = _axes()
    for number, one in enumerate(drafted):
        shift = 0.06 * (number - (len(drafted) - 1) / 2)
        points = [
            (place + shift, found)
            for place, (low, high) in enumerate(groups)
            if (found := estimate(ACCEPTANCE, [row for row in one.rows if low <= row.context_tokens <= high]))
        ]
        axes.errorbar(
            [place for place, _ in points],
            [found.value for _, found in points],
            yerr=_errors([found for _, found in points]),
            **_look(one.setting.method, measurements.methods),
            markersize=5,
            linewidth=1.6,
            elinewidth=1,
            capsize=2,
            label=one.setting.method,
        )
    axes.set_xticks(range(len(groups)), [f"{low}-{high}" for low, high in groups], fontsize=8.5)
    axes.grid(axis="y")
    axes.set(xlabel="prompt length in tokens", ylabel="tokens per draft and step")
    _legend_below(figure, axes)
    yield Plot(
        "acceptance-by-context",
        "Acceptance length by prompt length",
        measurements.caption("Groups of about equal numbers of requests; bars are 95 % intervals."),
        figure,
    )


# Requests


def _request_plots(measurements: Measurements) -> Iterator[Plot]:
    at_base = [one for one in measurements.at_base() if one.rows]
    if not at_base:
        return
    for name, title, label, seconds in (
        ("latency", "Latency of whole requests", "latency in ms", lambda row: row.latency_s),
        ("ttft", "Time to the first token", "time to the first token in ms", lambda row: row.ttft_s),
    ):
        figure, axes = _axes()
        for one in at_base:
            times = np.sort([1000 * seconds(row) for row in one.rows])
            axes.step(
                [times[0], *times],
                np.arange(len(times) + 1) / len(times),
                where="post",
                color=_look(one.setting.method, measurements.methods)["color"],
                linewidth=1.6,
                label=one.setting.method,
            )
        axes.set(xlabel=label, ylabel="share of requests", ylim=(0, 1.02))
        axes.set_xlim(left=0)
        axes.grid()
        _legend_below(figure, axes)
        yield Plot(name, title, measurements.caption("Further left is faster."), figure)
    yield from _strip_plot(measurements, at_base)


def request_speedups(one: Measured) -> list[float]:
    """Return how many times as fast each request ran as in plain decoding."""
    ours, theirs = pair_requests(one.rows, one.plain)
    return [
        (row.output_tokens / row.latency_s) / (plain.output_tokens / plain.latency_s)
        for row, plain in zip(ours, theirs, strict=True)
    ]


def _strip_plot(measurements: Measurements, at_base: Sequence[Measured]) -> Iterator[Plot]:
    compared = [(one, request_speedups(one)) for one in at_base if one.setting.method != REFERENCE_METHOD]
    compared = [(one, speedups) for one, speedups in compared if speedups]
    if not compared:
        return
    figure, axes = _axes(1.0 + 0.55 * len(compared))
    for place, (one, speedups) in enumerate(compared):
        look = _look(one.setting.method, measurements.methods)
        # Spread by their order, the same in every drawing.
        heights = place + 0.26 * np.sin(np.arange(len(speedups)) * 2.399)
        axes.scatter(speedups, heights, s=12, color=look["color"], alpha=0.55, linewidths=0)
        middle = float(np.median(speedups))
        axes.plot([middle, middle], [place - 0.36, place + 0.36], color=INK, linewidth=1.8, solid_capstyle="butt")
    axes.axvline(1, color=INK, linewidth=0.9, linestyle="--")
    axes.set_yticks(range(len(compared)), [one.setting.method for one, _ in compared])
    axes.set_ylim(len(compared) - 0.45, -0.55)
    axes.grid(axis="x")
    axes.set_xlabel("speed-up of each request")
    yield Plot(
        "requests",
        "Speed-up request by request",
        measurements.caption("A dot is a request, the bar their median; left of the dashed line is slower."),
        figure,
    )
