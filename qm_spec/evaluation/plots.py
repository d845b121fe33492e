"""`acceptance.png` and `speedup.png` of a benchmark's runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qm_spec.evaluation.methods import line_style, method_order

Run = dict[str, Any]

_DPI = 150


def write_plots(runs: Sequence[Run], folder: Path) -> None:
    """Draw both plots into `folder`.

    Raises:
        ValueError: there are no runs.
    """
    if not runs:
        raise ValueError("write_plots: runs must hold at least one run, got none")
    _save(_acceptance_figure(runs), folder / "acceptance.png")
    _save(_speedup_figure(runs), folder / "speedup.png")


def _save(figure: Figure, file: Path) -> None:
    figure.savefig(file, dpi=_DPI)


def _contexts(runs: Sequence[Run]) -> list[int]:
    return sorted({run["context_tokens"] for run in runs})


def _methods(runs: Sequence[Run]) -> list[str]:
    return sorted({run["method"] for run in runs}, key=lambda name: (method_order(name), name))


def _conditions(runs: Sequence[Run]) -> str:
    run = runs[0]
    return (
        f"{run['num_prompts']} prompts, {run['max_tokens']} tokens each, temperature {run['temperature']:g}, "
        f"concurrency {run['concurrency']}, {run['dtype']}"
    )


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _acceptance_figure(runs: Sequence[Run]) -> Figure:
    """By position for the shortest context; with several contexts, acceptance length over them as well."""
    contexts = _contexts(runs)
    panels = 2 if len(contexts) > 1 else 1
    figure = Figure(figsize=(6.4 if panels == 1 else 10.5, 4.2), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    figure.suptitle(f"Acceptance of drafted tokens\n{_conditions(runs)}", fontsize=10)
    drafted = [run for run in runs if run["num_drafts"]]
    _positions_panel(axes[0], [run for run in drafted if run["context_tokens"] == contexts[0]], contexts[0])
    if panels == 2:
        _lengths_panel(axes[1], drafted, contexts)
    return figure


def _positions_panel(axes: Axes, runs: Sequence[Run], context: int) -> None:
    _clean(axes)
    axes.set(xlabel="position in the draft", ylabel="share of drafts that keep it", ylim=(0, 1.02))
    axes.set_title(f"by position, {context} tokens of context", fontsize=9)
    if not runs:
        axes.text(0.5, 0.5, "no method drafted a token", ha="center", transform=axes.transAxes)
        return
    methods = _methods(runs)
    for run in runs:
        rates = run["acceptance_per_position"]
        axes.plot(
            range(1, len(rates) + 1),
            rates,
            **line_style(run["method"], methods),
            label=f"{run['method']} (length {run['acceptance_length']:.2f})",
        )
    axes.set_xticks(range(1, max(len(run["acceptance_per_position"]) for run in runs) + 1))
    axes.legend(frameon=False)


def _lengths_panel(axes: Axes, runs: Sequence[Run], contexts: Sequence[int]) -> None:
    _clean(axes)
    axes.set(xlabel="context in tokens", ylabel="acceptance length", xscale="log")
    axes.set_title("by context, bonus token included", fontsize=9)
    methods = _methods(runs)
    for method in methods:
        points = sorted((run["context_tokens"], run["acceptance_length"]) for run in runs if run["method"] == method)
        axes.plot(*zip(*points, strict=True), **line_style(method, methods), label=method)
    axes.set_xticks(contexts, [str(context) for context in contexts])
    axes.minorticks_off()
    axes.set_ylim(bottom=1)


def _speedup_figure(runs: Sequence[Run]) -> Figure:
    """Bars of speed-up; where plain decoding failed there is nothing to compare with, so bars of tokens/s."""
    key, label = "speedup", "speed-up against none"
    if all(run["speedup"] is None for run in runs):
        key, label = "output_tokens_per_s", "output tokens/s"
    contexts, methods = _contexts(runs), _methods(runs)
    figure = Figure(figsize=(max(6.4, 1.2 + 0.75 * len(contexts) * len(methods)), 4.2), layout="constrained")
    axes = figure.subplots()
    figure.suptitle(f"Decoding speed\n{_conditions(runs)}", fontsize=10)
    _clean(axes)
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        mine = [run for run in runs if run["method"] == method and run[key] is not None]
        places = [contexts.index(run["context_tokens"]) + (i - (len(methods) - 1) / 2) * width for run in mine]
        colour = line_style(method, methods)["color"]
        bars = axes.bar(places, [run[key] for run in mine], 0.92 * width, color=colour, label=method)
        axes.bar_label(bars, fmt="%.2f" if key == "speedup" else "%.0f", fontsize=8, padding=2)
    if key == "speedup":
        axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set(xlabel="context in tokens", ylabel=label)
    axes.set_xticks(range(len(contexts)), [str(context) for context in contexts])
    axes.margins(y=0.12)
    axes.legend(frameon=False, ncols=min(len(methods), 3), loc="upper center", bbox_to_anchor=(0.5, -0.15))
    return figure
