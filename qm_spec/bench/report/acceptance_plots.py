"""Plots of acceptance: by position in the draft, by category, by length of the context."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from qm_spec.bench.report.drawing import (
    Plot,
    category_plot,
    draw_intervals,
    interval_hint,
    legend_below,
    line_style,
    new_axes,
    sweep_plot,
)
from qm_spec.bench.report.measurements import CONTEXT, Measured, Measurements
from qm_spec.bench.report.tasks import task_names
from qm_spec.bench.results.bootstrap import ACCEPTANCE, Estimate, estimate
from qm_spec.bench.results.file import RequestRow

_LABEL = "tokens per draft and step"
_MOST_LENGTH_GROUPS = 5


def acceptance_plots(measurements: Measurements) -> Iterator[Plot]:
    """Yield the plots of the methods that drafted, none where nobody did."""
    drafted = [one for one in measurements.at_base() if one.run["num_drafts"]]
    if not drafted:
        return
    yield _position_plot(measurements, drafted)
    tasks = task_names([row for one in drafted for row in one.rows])
    if tasks:
        yield _category_plot(measurements, drafted, tasks)
    name = "acceptance-by-context"
    if CONTEXT in measurements.varied():
        title = "Acceptance length by context"
        plot = sweep_plot(measurements, CONTEXT, lambda one: one.acceptance, name=name, title=title, label=_LABEL)
        if plot is not None:
            yield plot
        return
    groups = length_groups([row.context_tokens for row in drafted[0].rows])
    if len(groups) > 1:
        yield _length_plot(measurements, drafted, groups, name)


def _position_plot(measurements: Measurements, drafted: Sequence[Measured]) -> Plot:
    figure, axes = new_axes()
    for one in drafted:
        rates = one.run["acceptance_per_position"]
        style = line_style(one.setting.method, measurements.methods)
        axes.plot(range(1, len(rates) + 1), rates, **style, label=one.setting.method)
    axes.set_xticks(range(1, max(len(one.run["acceptance_per_position"]) for one in drafted) + 1))
    axes.set_ylim(0, 1.02)
    axes.grid(axis="y")
    axes.set(xlabel="position in the draft", ylabel="share of drafts that keep it")
    legend_below(figure, axes)
    caption = measurements.caption("A token is kept only if those before it are.")
    return Plot("acceptance-by-position", "Acceptance by position", caption, figure)


def _points(rows: Sequence[Sequence[RequestRow]], shift: float) -> tuple[list[float], list[Estimate]]:
    """Return places and acceptance lengths of groups of requests; groups without a draft are left out."""
    found = [(place + shift, one) for place, group in enumerate(rows) if (one := estimate(ACCEPTANCE, group))]
    return [place for place, _ in found], [one for _, one in found]


def _category_plot(measurements: Measurements, drafted: Sequence[Measured], tasks: Sequence[str]) -> Plot:
    found = {
        one.setting.method: {
            task: value
            for task in tasks
            if (value := estimate(ACCEPTANCE, [row for row in one.rows if row.category == task])) is not None
        }
        for one in drafted
    }
    return category_plot(
        measurements,
        found,
        tasks,
        name="acceptance-by-category",
        title="Acceptance length by category",
        label=_LABEL,
        hint="The target's own token is counted.",
    )


def length_groups(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Cut lengths into at most 5 groups of about equal numbers, shortest and longest of each; none if all are alike."""
    if not lengths or max(lengths) < 1.5 * min(lengths):
        return []
    ordered = np.array(lengths)
    edges = np.unique(np.quantile(ordered, np.linspace(0, 1, _MOST_LENGTH_GROUPS + 1)).astype(int))
    groups = [(int(low) + (place > 0), int(high)) for place, (low, high) in enumerate(itertools.pairwise(edges))]
    return [(low, high) for low, high in groups if ((ordered >= low) & (ordered <= high)).any()]


def _length_plot(
    measurements: Measurements, drafted: Sequence[Measured], groups: Sequence[tuple[int, int]], name: str
) -> Plot:
    figure, axes = new_axes()
    drawn: list[Estimate] = []
    for number, one in enumerate(drafted):
        shift = 0.06 * (number - (len(drafted) - 1) / 2)
        rows = [[row for row in one.rows if low <= row.context_tokens <= high] for low, high in groups]
        places, estimates = _points(rows, shift)
        style = line_style(one.setting.method, measurements.methods)
        draw_intervals(axes, places, estimates, style, label=one.setting.method)
        drawn += estimates
    axes.set_xticks(range(len(groups)), [f"{low}-{high}" for low, high in groups], fontsize=8.5)
    axes.grid(axis="y")
    axes.set(xlabel="prompt length in tokens", ylabel=_LABEL)
    legend_below(figure, axes)
    caption = measurements.caption("Groups of about equal numbers of requests." + interval_hint(drawn))
    return Plot(name, "Acceptance length by prompt length", caption, figure)
