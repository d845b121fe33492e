"""What the plots of a report have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qm_spec.bench import methods as registry
from qm_spec.bench.methods import REFERENCE_METHOD
from qm_spec.bench.report.measurements import Axis, Measured, Measurements
from qm_spec.bench.results.bootstrap import CONFIDENCE, Estimate

INK = "#1b1f24"
_FAINT = "#b9c0ca"
STYLE: Any = {
    "svg.fonttype": "none",
    # The same results give the same file.
    "svg.hashsalt": "qm_spec",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": _FAINT,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": _FAINT,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_WIDTH_INCHES = 5.0
_HEIGHT_INCHES = 3.2


@dataclass(frozen=True)
class Plot:
    """A figure with its words.

    Args:
        name: of its file, and of its place in a page.
        title: what it shows.
        caption: under which conditions, and how to read it.
        figure: drawn under `STYLE`.
    """

    name: str
    title: str
    caption: str
    figure: Figure


def line_style(method: str, methods: Sequence[str]) -> dict[str, Any]:
    """Return the colour, marker and line of a method, the same in every plot.

    Args:
        methods: all of the report.
    """
    return {**registry.line_style(method, methods), "markersize": 5, "linewidth": 1.6}


def new_axes(height: float = _HEIGHT_INCHES) -> tuple[Figure, Axes]:
    """Return an empty figure of a report's width, `height` inches high."""
    figure = Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
    axes = figure.subplots()
    axes.set_axisbelow(True)
    return figure, axes


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Write names beside the rows 0, 1, ... of a plot, the first one at the top."""
    axes.set_yticks(range(len(names)), list(names))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x")


def legend_below(figure: Figure, axes: Axes) -> None:
    """Explain the methods under the axes, where there is more than one."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, columnspacing=1.2, handletextpad=0.5)


def draw_intervals(
    axes: Axes,
    places: Sequence[float],
    estimates: Sequence[Estimate],
    style: dict[str, Any],
    *,
    label: str | None = None,
    horizontal: bool = False,
) -> None:
    """Draw values with their intervals at places along the other axis; horizontal ones are not joined by a line."""
    values = [one.value for one in estimates]
    lengths = [
        [max(0.0, one.value - (one.value if one.low is None else one.low)) for one in estimates],
        [max(0.0, (one.value if one.high is None else one.high) - one.value) for one in estimates],
    ]
    bars = {"elinewidth": 1, "capsize": 2, "label": label}
    if horizontal:
        axes.errorbar(values, places, xerr=lengths, **{**style, **bars, "linestyle": ""})
    else:
        axes.errorbar(places, values, yerr=lengths, **{**style, **bars})


def category_plot(
    measurements: Measurements,
    found: Mapping[str, Mapping[str, Estimate]],
    categories: Sequence[str],
    *,
    name: str,
    title: str,
    label: str,
    hint: str,
    level: float | None = None,
) -> Plot:
    """Draw a row per category with a point per method.

    Args:
        found: estimates by method and category; categories that a method lacks are left out.
        categories: from the top.
        label: of the values.
        hint: for readers.
        level: where a dashed line stands.
    """
    figure, axes = new_axes(1.3 + (0.22 + 0.13 * len(found)) * len(categories))
    drawn: list[Estimate] = []
    for number, (method, by_category) in enumerate(found.items()):
        shift = 0.16 * (number - (len(found) - 1) / 2)
        points = [(place + shift, by_category[one]) for place, one in enumerate(categories) if one in by_category]
        estimates = [one for _, one in points]
        style = line_style(method, measurements.methods)
        draw_intervals(axes, [place for place, _ in points], estimates, style, label=method, horizontal=True)
        drawn += estimates
    if level is not None:
        axes.axvline(level, color=INK, linewidth=0.9, linestyle="--")
    name_rows(axes, categories)
    axes.set_xlabel(label)
    legend_below(figure, axes)
    return Plot(name, title, measurements.caption(hint + interval_hint(drawn)), figure)


def interval_hint(estimates: Sequence[Estimate]) -> str:
    """Say what the bars are, where there are any."""
    return f" Bars are {CONFIDENCE:.0%} intervals." if any(one.has_interval for one in estimates) else ""


def sweep_plot(
    measurements: Measurements,
    axis: Axis,
    value: Callable[[Measured], Estimate | None],
    *,
    name: str,
    title: str,
    label: str,
    level: float | None = None,
) -> Plot | None:
    """Draw a line per method over the values of `axis`.

    Args:
        value: of a run; runs for which it is None are left out.
        label: of the values.
        level: where a dashed line stands.

    Returns:
        None where no method has a value.
    """
    values = measurements.values(axis)
    series: dict[str, list[tuple[int, Estimate]]] = {}
    for one in measurements.at_base(axis):
        found, point = value(one), axis.of(one.setting)
        if one.setting.method != REFERENCE_METHOD and found is not None and point is not None:
            series.setdefault(one.setting.method, []).append((values.index(point), found))
    if not series:
        return None
    figure, axes = new_axes()
    for number, (method, points) in enumerate(series.items()):
        points.sort(key=lambda point: point[0])
        # Side by side, so that intervals do not hide each other.
        shift = 0.06 * (number - (len(series) - 1) / 2)
        style = line_style(method, measurements.methods)
        draw_intervals(axes, [place + shift for place, _ in points], [one for _, one in points], style, label=method)
    if level is not None:
        axes.axhline(level, color=INK, linewidth=0.9, linestyle="--")
    axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
    axes.set_xlim(-0.4, len(values) - 0.6)
    axes.grid(axis="y")
    axes.set(xlabel=axis.name, ylabel=label)
    legend_below(figure, axes)
    hint = interval_hint([one for points in series.values() for _, one in points])
    return Plot(name, title, measurements.caption(hint.strip(), axis), figure)
