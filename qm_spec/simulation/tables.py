"""Predictions as rich tables; every title says that they are predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from qm_spec.simulation.validation import mean_absolute_error

Row = dict[str, Any]
LABEL = "PREDICTION, not measured"


def _table(title: str, columns: Sequence[str], caption: str | None = None) -> Table:
    table = Table(title=f"{title} ({LABEL})", caption=caption, title_justify="left", caption_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def format_tokens(count: int) -> str:
    """Return 131072 as 128k, 1048576 as 1M, and other numbers as they are."""
    for size, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if count % size == 0:
            return f"{count // size}{letter}"
    return str(count)


def steps_table(rows: Sequence[Row], title: str) -> Table:
    """Lay out what `predict_steps` returned."""
    shown = next((row for row in rows if row["fits"]), None)
    depths = [one["num_speculative_tokens"] for one in shown["by_k"][1:]] if shown else []
    has_rival = shown is not None and "eagle3" in shown
    columns = ["context", "batch", "none ms", *(f"x K={depth}" for depth in depths), "best K", "ms", "speculating"]
    columns += ["tokens/s", *(["x EAGLE-3"] if has_rival else [])]
    notes = ["x: speed-up of decoding over no speculation. speculating: share of the step at the best K."]
    if has_rival:
        notes.append("EAGLE-3: at the best K of its own, as if as much of its drafts were accepted.")
    if not all(row["within_measured_contexts"] for row in rows):
        notes.append("*: acceptance was not measured at this length; the nearest measured length stands in.")
    if not all(row["within_target_length"] for row in rows):
        notes.append("+: longer than the target's config declares.")
    table = _table(title, columns, " ".join(notes))
    for row in rows:
        marks = ("" if row["within_measured_contexts"] else "*") + ("" if row["within_target_length"] else "+")
        cells = [format_tokens(row["context_tokens"]) + marks, str(row["batch"])]
        if not row["fits"]:
            table.add_row(*cells, f"{row['batch_that_fits'] or 'none'} fit")
            continue
        by_depth = {one["num_speculative_tokens"]: one for one in row["by_k"]}
        best = by_depth[row["best_k"]]
        cells.append(f"{by_depth[0]['step_ms']:.2f}")
        cells += [f"{by_depth[depth]['speedup']:.2f}" for depth in depths]
        cells += [str(row["best_k"]), f"{best['step_ms']:.2f}", f"{best['speculation_ms'] / best['step_ms']:.0%}"]
        cells.append(f"{best['tokens_per_s']:.0f}")
        if has_rival:
            cells.append(f"{max(one['speedup'] for one in row['eagle3']):.2f}")
        table.add_row(*cells)
    return table


def traffic_table(prediction: Row, title: str) -> Table:
    """Lay out what `predict_traffic` returned."""
    columns = ["K", "goodput tokens/s", "in limits", "batch", "TTFT s p50", "p95", "p99"]
    columns += ["TPOT ms p50", "p95", "p99", "latency s p50", "p95", "p99", "left at the end"]
    caption = (
        f"Recommended K: {prediction['recommended_k']}. Asked for: {prediction['offered_tokens_per_s']:.0f} tokens/s. "
        "batch: mean while decoding. left: requests in the system when the last one came."
    )
    short = [str(row["num_speculative_tokens"]) for row in prediction["by_k"] if row["too_short"]]
    if short:
        caption += (
            f" With K = {', '.join(short)} the replicas are overloaded, or arrivals end before they settle: "
            "raise --num-requests to see which."
        )
    table = _table(title, columns, caption)
    for row in prediction["by_k"]:
        cells = [str(row["num_speculative_tokens"]), f"{row['goodput_tokens_per_s']:.0f}", f"{row['good_share']:.0%}"]
        cells.append(f"{row['mean_batch']:.1f}")
        for name, scale, form in (("ttft_s", 1, ".3f"), ("tpot_s", 1000, ".2f"), ("latency_s", 1, ".2f")):
            values = row[name]
            cells += ["-"] * 3 if values is None else [format(scale * value, form) for value in values.values()]
        table.add_row(*cells, str(row["left_at_last_arrival"]))
    return table


def validation_table(rows: Sequence[Row], title: str) -> Table:
    """Lay out what `predict_runs` returned."""
    columns = ["method", "context", "K"]
    names = {"tokens_per_s": "tokens/s", "speedup": "speed-up", "ttft_ms": "TTFT ms", "tpot_ms": "TPOT ms"}
    for label in names.values():
        columns += [label, "predicted", "error"]
    means = {label: mean_absolute_error(rows, name) for name, label in names.items()}
    caption = "Mean absolute error: " + ", ".join(
        f"{label} {'-' if mean is None else format(mean, '.0%')}" for label, mean in means.items()
    )
    table = _table(title, columns, caption)
    for row in rows:
        cells = [row["method"], format_tokens(row["context_tokens"]), str(row["num_speculative_tokens"])]
        for name in names:
            form = ".2f" if name in ("speedup", "tpot_ms") else ".1f"
            values = (row[f"measured_{name}"], row[f"predicted_{name}"])
            cells += ["-" if value is None else format(value, form) for value in values]
            error = row[f"{name}_error"]
            cells.append("-" if error is None else f"{error:+.0%}")
        table.add_row(*cells)
    return table
