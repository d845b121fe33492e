"""Results of language modelling over a reduced context: means with intervals, tables, a plot, a document."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qm_spec.bench.reduction import METHODS
from qm_spec.bench.reduction.language_model import NONE, WHOLE, Score, run_name
from qm_spec.bench.results.bootstrap import estimate_mean
from qm_spec.bench.results.table import align_table, difference_cell

Row = dict[str, Any]
REFERENCE = "quickmerge"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"

# Okabe and Ito's palette. QuickMerge++ and its variants are blue, pruning is dashed.
_STYLES: dict[str, tuple[str, str, str]] = {
    "quickmerge": ("#0072B2", "o", "-"),
    "quickmerge-inverse": ("#56B4E9", "v", "-"),
    "quickmerge-norm": ("#56B4E9", "^", "-"),
    "quickmerge-kmeans": ("#56B4E9", "D", "-"),
    "quickmerge-causal": ("#56B4E9", "<", "-"),
    "quickmerge-recent": ("#0072B2", "*", "-"),
    "tome": ("#E69F00", "s", "-"),
    "kmeans": ("#009E73", "P", "-"),
    "uniform": ("#D55E00", "h", "-"),
    "uniform-recent": ("#D55E00", "*", "-"),
    "random-merge": ("#CC79A7", "X", "-"),
    "random": ("#CC79A7", "x", "--"),
    "topk-norm": ("#999999", "+", "--"),
    "window": ("#000000", "d", "--"),
}


def summarise(windows: Sequence[Mapping[str, Score]], methods: Sequence[str], ratios: Sequence[float]) -> list[Row]:
    """Return a row per method and ratio, the whole context (`1x`) first and none at all second.

    Args:
        windows: the scores of each, see `score_window`; all of the same number of tokens.
        methods: names.
        ratios: C / K.

    Returns:
        rows with `nats` per token, `perplexity`, `accuracy`; `nats_more` and `accuracy_more` than `1x`
        with their 95 % intervals; and, lower = better, `cost_share`: the share of the whole context's
        worth (`none` minus `1x`) that is lost, 0 at `1x` and 1 at `none`.
    """
    names = {WHOLE: (WHOLE, 1.0), NONE: (NONE, math.inf)}
    names |= {run_name(method, ratio): (method, ratio) for method in methods for ratio in ratios}
    nats, accuracy = per_token(windows, names)
    mean = {name: sum(values) / len(values) for name, values in nats.items()}
    worth = mean[NONE] - mean[WHOLE]
    rows = []
    for name, (method, ratio) in names.items():
        more, accuracy_more = _minus(nats[name], nats[WHOLE]), _minus(accuracy[name], accuracy[WHOLE])
        rows.append(
            {
                "method": method,
                "ratio": None if math.isinf(ratio) else ratio,
                "nats": mean[name],
                "perplexity": math.exp(mean[name]),
                "accuracy": sum(accuracy[name]) / len(windows),
                "nats_more": mean[name] - mean[WHOLE],
                "nats_more_interval": _interval(more),
                "accuracy_more": sum(accuracy_more) / len(windows),
                "accuracy_more_interval": _interval(accuracy_more),
                "cost_share": (mean[name] - mean[WHOLE]) / worth,
            }
        )
    return rows


def compare(windows: Sequence[Mapping[str, Score]], methods: Sequence[str], ratios: Sequence[float]) -> list[Row]:
    """Return nats of QuickMerge++ minus those of each other method, with intervals; below 0 = it is better."""
    if REFERENCE not in methods:
        return []
    rows = []
    for ratio in ratios:
        reference = run_name(REFERENCE, ratio)
        others = {run_name(method, ratio): method for method in methods if method != REFERENCE}
        nats, _ = per_token(windows, [reference, *others])
        for name, method in others.items():
            difference = _minus(nats[reference], nats[name])
            rows.append(
                {
                    "method": method,
                    "ratio": ratio,
                    "nats_difference": sum(difference) / len(difference),
                    "interval": _interval(difference),
                }
            )
    return rows


def per_token(
    windows: Sequence[Mapping[str, Score]], names: Sequence[str] | Mapping[str, Any]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return nats per token and accuracy of each window, by name."""
    nats = {name: [window[name].nats / window[name].num_tokens for window in windows] for name in names}
    accuracy = {name: [window[name].correct / window[name].num_tokens for window in windows] for name in names}
    return nats, accuracy


def _interval(differences: Sequence[float]) -> tuple[float | None, float | None]:
    found = estimate_mean(differences)
    return found.low, found.high


def _minus(values: Sequence[float], others: Sequence[float]) -> list[float]:
    return [value - other for value, other in zip(values, others, strict=True)]


def quality_table(rows: Sequence[Row], accuracy: bool = False) -> str:
    """Return methods by ratios: perplexity and what is lost of the context's worth, or the accuracy."""
    whole, none, *reduced = rows
    ratios = sorted({row["ratio"] for row in reduced})
    cells = {(row["method"], row["ratio"]): _quality_cell(row, accuracy) for row in reduced}
    methods = list(dict.fromkeys(row["method"] for row in reduced))
    body = [[_label(method), *(cells[method, ratio] for ratio in ratios)] for method in methods]
    form = "{accuracy:.2%}" if accuracy else "{perplexity:.2f}"
    ends = [
        ["whole context (1x)", *[form.format(**whole)] * len(ratios)],
        ["no context", *[_quality_cell(none, accuracy)] * len(ratios)],
    ]
    return align_table(["method", *(f"{ratio:g}x" for ratio in ratios)], [*ends, *body])


def _quality_cell(row: Row, accuracy: bool) -> str:
    if accuracy:
        return f"{row['accuracy']:.2%} ({difference_cell(row['accuracy_more'], row['accuracy_more_interval'], 100, 1)})"
    nats = difference_cell(row["nats_more"], row["nats_more_interval"])
    return f"{row['perplexity']:.2f} ({nats}; {row['cost_share']:.0%})"


def comparison_table(rows: Sequence[Row]) -> str:
    """Return nats of QuickMerge++ minus those of each method, by ratio; bold where the interval excludes 0."""
    ratios = sorted({row["ratio"] for row in rows})
    cells = {}
    for row in rows:
        text = difference_cell(row["nats_difference"], row["interval"])
        low, high = row["interval"]
        cells[row["method"], row["ratio"]] = f"**{text}**" if low is not None and (low > 0 or high < 0) else text
    methods = list(dict.fromkeys(row["method"] for row in rows))
    body = [[_label(method), *(cells[method, ratio] for ratio in ratios)] for method in methods]
    return align_table(["quickmerge minus", *(f"{ratio:g}x" for ratio in ratios)], body)


def cost_table(rows: Sequence[Row]) -> str:
    """Return methods by ratios: time of prefill, time of a decode step and peak memory over those of 1x."""
    whole, *reduced = rows
    ratios = sorted({row["ratio"] for row in reduced})
    cells = {}
    for row in reduced:
        peak = "-" if row["peak_ratio"] is None else f"{row['peak_ratio']:.2f}"
        prefill, decode = row["prefill_ratio_quartiles"][1], row["decode_ratio_quartiles"][1]
        cells[row["method"], row["ratio"]] = f"{prefill:.2f} / {decode:.2f} / {peak}"
    kv_ratio = {row["ratio"]: row["kv_ratio"] for row in reduced}
    methods = list(dict.fromkeys(row["method"] for row in reduced))
    body = [[_label(method), *(cells[method, ratio] for ratio in ratios)] for method in methods]
    peak = "-" if whole["peak_bytes"] is None else f"{whole['peak_bytes'] / 1e6:.0f} MB"
    top = f"{whole['prefill_ms']:.0f} ms / {whole['decode_ms_per_token']:.1f} ms / {peak}"
    kv = [f"{whole['kv_bytes'] / 1e6:.1f} MB x {kv_ratio[ratio]:.2f}" for ratio in ratios]
    ends = [["whole context (1x)", *[top] * len(ratios)], ["keys and values, all methods", *kv]]
    return align_table(["method", *(f"{ratio:g}x" for ratio in ratios)], [*ends, *body])


def _label(method: str) -> str:
    return method if METHODS[method].merges else f"{method} (prunes)"


def draw(results: Row, file: Path) -> None:
    """Draw what is lost against the ratio, a panel per depth, and the time of prefill beside it."""
    depths, costs = results["quality"], results["costs"]
    figure = Figure(figsize=(4.6 * (len(depths) + bool(costs)) + 2, 4.6), layout="constrained")
    panels = figure.subplots(1, len(depths) + bool(costs), squeeze=False)[0]
    settings = results["settings"]
    figure.suptitle(
        f"Context of {settings['context']} tokens reduced, continuation of {settings['continuation']} whole; "
        f"{settings['num_windows']} windows, 95 % intervals",
        fontsize=10,
    )
    for axes, part in zip(panels, depths, strict=False):
        _quality_panel(axes, part["rows"], part["depth"])
    if costs:
        _cost_panel(panels[-1], costs[0])
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right center")
    figure.savefig(file, dpi=150)


def _panel(axes: Axes, ratios: Sequence[float]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xticks(ratios, [f"{ratio:g}x" for ratio in ratios])
    axes.set_xlim(ratios[0] - 0.2, ratios[-1] + 0.4)
    axes.set_xlabel("reduction of the context")


def _quality_panel(axes: Axes, rows: Sequence[Row], depth: int) -> None:
    none, reduced = rows[1], rows[2:]
    ratios = sorted({row["ratio"] for row in reduced})
    methods = list(dict.fromkeys(row["method"] for row in reduced))
    _panel(axes, [1.0, *ratios])
    for i, method in enumerate(methods):
        mine = [row for row in reduced if row["method"] == method]
        # Side by side, so that intervals do not hide each other.
        shift = 0.02 * (i - (len(methods) - 1) / 2)
        more = [row["nats_more"] for row in mine]
        # No bounds are NaN, and drawn as none.
        errors = np.abs(np.array([row["nats_more_interval"] for row in mine], dtype=np.float64).T - more)
        colour, marker, line = _STYLES[method]
        axes.errorbar(
            [row["ratio"] + shift for row in mine],
            more,
            errors,
            color=colour,
            marker=marker,
            linestyle=line,
            linewidth=1,
            elinewidth=0.6,
            markersize=5,
            label=_label(method),
        )
    axes.axhline(none["nats_more"], color="black", linestyle=":", linewidth=1)
    axes.text(0.02, none["nats_more"], "no context", fontsize=8, va="bottom", transform=axes.get_yaxis_transform())
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel("nats per token above the whole context")
    axes.set_title(f"reduced after {depth} layers" if depth else "embeddings reduced", fontsize=9)


def _cost_panel(axes: Axes, part: Row) -> None:
    reduced = part["rows"][1:]
    ratios = sorted({row["ratio"] for row in reduced})
    _panel(axes, [1.0, *ratios])
    for method in dict.fromkeys(row["method"] for row in reduced):
        mine = [row for row in reduced if row["method"] == method]
        colour, marker, line = _STYLES[method]
        times = [row["prefill_ratio_quartiles"][1] for row in mine]
        axes.plot([row["ratio"] for row in mine], times, color=colour, marker=marker, linestyle=line, linewidth=1)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("prefill time over that of the whole context")
    axes.set_title(f"{part['model']}, {part['context']} tokens, after {part['depth']} layers", fontsize=9)


def write_tables(tables: str, file: Path) -> None:
    """Put the tables between the marks of a Markdown file; what stands around them stays."""
    text = file.read_text(encoding="utf-8") if file.exists() else f"{BEGIN}\n{END}\n"
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2] if rest else "\n"
    partial = file.with_suffix(".partial")
    partial.write_text(f"{head}{BEGIN}\n{tables}\n{END}{tail}", encoding="utf-8")
    partial.replace(file)
