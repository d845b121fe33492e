"""Prediction against what was measured: the runs of a results file, predicted from sizes and rates alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qm_spec.bench.methods import METHODS, OURS, REFERENCE_METHOD, find_method
from qm_spec.config import MergeConfig
from qm_spec.discovery.files import read_json
from qm_spec.simulation.acceptance_rates import Acceptance
from qm_spec.simulation.hardware import Hardware
from qm_spec.simulation.shapes import DrafterShape, TargetShape
from qm_spec.simulation.steps import CostModel

_EMPTIED = MergeConfig(schedule=(0,))
Row = dict[str, Any]


@dataclass(frozen=True)
class Served:
    """What a results file was measured with, as far as the file does not say it.

    Args:
        hardware: the machine.
        target: the model that was served.
        drafter: of the methods `qm_spec` and `qm_spec-window`.
    """

    hardware: Hardware
    target: TargetShape
    drafter: DrafterShape

    def model(self, method: str, dtype: str) -> CostModel:
        """Return the cost model of a method."""
        drafter: DrafterShape | None = self.drafter
        record = find_method(method)
        if record.without_far_memory and self.drafter.merge is not None:
            drafter = replace(self.drafter, merge=replace(self.drafter.merge, schedule=_EMPTIED.schedule))
        elif record.drafter != OURS:
            drafter = None
        return CostModel(self.hardware, self.target, drafter, dtype)


def predict_runs(file: Path, served: Served) -> list[Row]:
    """Predict every run of a results file whose method the model describes.

    The measured acceptance is taken as given; times are predicted.

    Returns:
        rows with `measured_...` and `predicted_...` values of tokens per second, speed-up over `none` at the
        same length, time to the first token and time per further token, and `..._error`, predicted over
        measured minus 1.

    Raises:
        ValueError: the file has no run that can be predicted.
    """
    # The others run what the model does not describe, such as the operators without their kernels.
    simulated = [one.name for one in METHODS.values() if one.simulated]
    runs = [run for run in read_json(file).get("runs", []) if run["method"] in simulated]
    if not runs:
        raise ValueError(f"validate: {file} has no run of {', '.join(simulated)}")
    predicted = [(run, _predict(run, served)) for run in runs]
    plain = {
        (run["context_tokens"], run["concurrency"]): found["tokens_per_s"]
        for run, found in predicted
        if run["method"] == REFERENCE_METHOD
    }
    rows = []
    for run, times in predicted:
        found: dict[str, float | None] = dict(times)
        reference = plain.get((run["context_tokens"], run["concurrency"]))
        # Plain decoding's own speed-up is 1 by definition, and would only flatter the mean error.
        speculative = run["method"] != REFERENCE_METHOD
        found["speedup"] = times["tokens_per_s"] / reference if reference and speculative else None
        measured = {
            "tokens_per_s": run["output_tokens_per_s"],
            "speedup": run["speedup"] if speculative else None,
            "ttft_ms": run["ttft_ms_p50"],
            "tpot_ms": run["tpot_ms_p50"],
        }
        row: Row = {name: run[name] for name in ("method", "context_tokens", "concurrency", "num_speculative_tokens")}
        for name, value in measured.items():
            guess = found[name]
            row[f"measured_{name}"], row[f"predicted_{name}"] = value, guess
            row[f"{name}_error"] = guess / value - 1 if value and guess is not None else None
        rows.append(row)
    return rows


def _predict(run: Row, served: Served) -> dict[str, float]:
    model = served.model(run["method"], run["dtype"])
    depth, speculative = run["num_speculative_tokens"], run["num_drafts"] > 0
    tokens_per_step, draft_share = 1.0, 0.0
    if speculative:
        drafting_steps = run["num_steps"] - run["num_prompts"]
        accepted = Acceptance(
            tuple(run["acceptance_per_position"]), draft_share=min(1.0, run["num_drafts"] / drafting_steps)
        )
        tokens_per_step, draft_share = accepted.tokens_per_step(depth), accepted.draft_share
    context = run["context_tokens"] + run["max_tokens"] // 2
    batch = min(run["concurrency"], run["num_prompts"])
    step_s = model.step(batch, context, depth, draft_share).total_s
    prefill_s = model.prefill_s(run["context_tokens"], speculative)
    decode_steps = (run["num_output_tokens"] - run["num_prompts"]) / tokens_per_step / batch
    return {
        "tokens_per_s": run["num_output_tokens"] / (run["num_prompts"] * prefill_s + decode_steps * step_s),
        "ttft_ms": 1000 * prefill_s,
        "tpot_ms": 1000 * step_s / tokens_per_step,
    }


def mean_absolute_error(rows: Sequence[Row], name: str) -> float | None:
    """Return the mean of the errors' absolute values, None where no row has one."""
    errors = [abs(row[f"{name}_error"]) for row in rows if row[f"{name}_error"] is not None]
    return sum(errors) / len(errors) if errors else None
