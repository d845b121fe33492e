"""Plots of speed-up: method by method, and over what a sweep varies."""

from __future__ import annotations

from collections.abc import Iterator

from qm_spec.bench.methods import REFERENCE_METHOD
from qm_spec.bench.report.drawing import (
    INK,
    Plot,
    category_plot,
    draw_intervals,
    interval_hint,
    line_style,
    name_rows,
    new_axes,
    sweep_plot,
)
from qm_spec.bench.report.measurements import Measured, Measurements
from qm_spec.bench.results.bootstrap import Estimate

_LABEL = "speed-up over plain decoding"


def speed_plots(measurements: Measurements) -> Iterator[Plot]:
    """Yield the speed-up of each method, then one plot per setting that varies."""
    compared = [
        (one, one.speedup)
        for one in measurements.at_base()
        if one.setting.method != REFERENCE_METHOD and one.speedup is not None
    ]
    if compared:
        yield _methods_plot(measurements, compared)
    by_category = {one.setting.method: _by_category(one) for one, _ in compared if one.run.get("categories")}
    if by_category:
        yield category_plot(
            measurements,
            by_category,
            list(dict.fromkeys(name for found in by_category.values() for name in found)),
            name="speedup-by-category",
            title="Speed-up by category",
            label=_LABEL,
            hint="Right of the dashed line is faster.",
            level=1.0,
        )
    for axis in measurements.varied():
        plot = sweep_plot(
            measurements,
            axis,
            lambda one: one.speedup,
            name=f"speedup-by-{axis.short}",
            title=f"Speed-up by {axis.name}",
            label=_LABEL,
            level=1.0,
        )
        if plot is not None:
            yield plot


def _by_category(one: Measured) -> dict[str, Estimate]:
    return {
        found["category"]: Estimate(found["speedup"], found["speedup_low"], found["speedup_high"])
        for found in one.run["categories"]
        if found["speedup"] is not None
    }


def _methods_plot(measurements: Measurements, compared: list[tuple[Measured, Estimate]]) -> Plot:
    figure, axes = new_axes(1.0 + 0.42 * len(compared))
    for place, (one, speedup) in enumerate(compared):
        style = {**line_style(one.setting.method, measurements.methods), "markersize": 7}
        draw_intervals(axes, [place], [speedup], style, horizontal=True)
        at = (speedup.value, place)
        axes.annotate(f"{speedup.value:.2f}x", at, (0, 8), textcoords="offset points", ha="center", fontsize=9)
    axes.axvline(1, color=INK, linewidth=0.9, linestyle="--")
    name_rows(axes, [one.setting.method for one, _ in compared])
    axes.margins(x=0.12)
    axes.set_xlabel(_LABEL)
    hint = "Right of the dashed line is faster." + interval_hint([speedup for _, speedup in compared])
    return Plot("speedup", "Speed-up over plain decoding", measurements.caption(hint), figure)
