"""Plots of single requests: how latencies and speed-ups are distributed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from qm_spec.bench.methods import REFERENCE_METHOD
from qm_spec.bench.report.drawing import INK, Plot, legend_below, line_style, name_rows, new_axes
from qm_spec.bench.report.measurements import Measured, Measurements

# Of the golden ratio: dots that follow each other stand apart.
_GOLDEN_ANGLE = 2.39996


def request_plots(measurements: Measurements) -> Iterator[Plot]:
    """Yield the plots of runs that list their requests."""
    listed = [one for one in measurements.at_base() if one.rows]
    if not listed:
        return
    whole = {one.setting.method: [row.latency_s for row in one.rows] for one in listed}
    yield _times_plot(measurements, whole, "latency", "Latency of whole requests", "latency in ms")
    first = {one.setting.method: [row.ttft_s for row in one.rows] for one in listed}
    yield _times_plot(measurements, first, "ttft", "Time to the first token", "time to the first token in ms")
    compared = [one for one in listed if one.setting.method != REFERENCE_METHOD and one.request_speedups]
    if compared:
        yield _strip_plot(measurements, compared)


def _times_plot(measurements: Measurements, seconds: dict[str, list[float]], name: str, title: str, label: str) -> Plot:
    """Draw for each method the share of requests that took no longer than a time."""
    figure, axes = new_axes()
    for method, values in seconds.items():
        times = np.sort(1000 * np.array(values))
        shares = np.arange(len(times) + 1) / len(times)
        style = line_style(method, measurements.methods) | {"marker": "", "fillstyle": "full"}
        axes.step([times[0], *times], shares, where="post", label=method, **style)
    axes.set(xlabel=label, ylabel="share of requests", ylim=(0, 1.02))
    axes.set_xlim(left=0)
    axes.grid()
    legend_below(figure, axes)
    return Plot(name, title, measurements.caption("Further left is faster."), figure)


def _strip_plot(measurements: Measurements, compared: Sequence[Measured]) -> Plot:
    figure, axes = new_axes(1.0 + 0.55 * len(compared))
    for place, one in enumerate(compared):
        speedups = one.request_speedups
        heights = place + 0.26 * np.sin(_GOLDEN_ANGLE * np.arange(len(speedups)))
        colour = line_style(one.setting.method, measurements.methods)["color"]
        axes.scatter(speedups, heights, s=12, color=colour, alpha=0.55, linewidths=0)
        middle = float(np.median(speedups))
        axes.plot([middle, middle], [place - 0.36, place + 0.36], color=INK, linewidth=1.8, solid_capstyle="butt")
    axes.axvline(1, color=INK, linewidth=0.9, linestyle="--")
    name_rows(axes, [one.setting.method for one in compared])
    axes.set_xlabel("speed-up of each request")
    hint = "A dot is a request, the bar their median; left of the dashed line is slower."
    return Plot("requests", "Speed-up request by request", measurements.caption(hint), figure)
