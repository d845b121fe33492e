"""How far `qm-spec simulate` is off where it can be checked, and where the overheads of its machines come from."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from qm_spec.provenance import write_record
from qm_spec.simulation.hardware import Hardware, load_hardware
from qm_spec.simulation.run import validate
from qm_spec.simulation.shapes import EAGLE3, DrafterShape, TargetShape, load_config
from qm_spec.simulation.steps import CostModel

ROOT = Path(__file__).resolve().parents[1]
NOVELS = ROOT / "qm_spec" / "zoo" / "novels"
RECORDS = ROOT / "docs" / "results"
LLAMA_8B = RECORDS / "simulation" / "llama-8b.json"


@dataclass(frozen=True)
class Profile:
    """Parts of a decode step, ms of CPU time: docs/results/profile-step.md, 256 tokens, K = 4."""

    target: float
    sampling: float
    scheduling: float
    drafting: float = 0.0
    draft_steps: float = 0.0

    @property
    def whole(self) -> float:
        """All of it; the medians of the parts need not add up to the median of the whole."""
        return self.target + self.sampling + self.scheduling + self.drafting


PROFILE_CONTEXT, PROFILE_DEPTH = 256, 4
PLAIN = Profile(target=5.36, sampling=0.06, scheduling=1.28)
SPECULATIVE = Profile(target=6.42, sampling=0.25, scheduling=1.91, drafting=1.16, draft_steps=0.68)

# Llama-3.1-8B on one H100, MT-bench, one request: K, acceptance length, ms per output token.
# Source: vllm-project/vllm issue 20780, July 2025. The lengths of its prompts and outputs are not given there.
PUBLISHED_CONTEXT = 256
PUBLISHED_PLAIN_MS = 7.07
PUBLISHED_EAGLE3 = (
    (2, 2.36, 4.32),
    (3, 2.79, 4.09),
    (4, 3.08, 4.05),
    (5, 3.32, 4.13),
    (6, 3.46, 4.20),
    (7, 3.54, 4.29),
)
PUBLISHED_EAGLE1 = (
    (2, 2.10, 4.37),
    (3, 2.29, 4.29),
    (4, 2.39, 4.48),
    (5, 2.43, 4.71),
    (6, 2.45, 4.94),
    (7, 2.47, 5.20),
)
EAGLE3_HEAD = 32000

# Runs of benchmarks/spec.py, on two threads.
RUNS = ("spec-cpu", "spec-cpu-long")


def two_threads(hardware: Hardware) -> Hardware:
    """Return the shipped CPU with what both its cores reached by benchmarks/bench_kernels.py (commit 7863b77)."""
    return replace(
        hardware,
        name="two cores of an AMD EPYC (AVX-512)",
        flops_per_s={"float32": 186652980241.7136},
        memory_bytes_per_s=38708676086.510445,
    )


def without_overheads(hardware: Hardware) -> Hardware:
    """Return a device whose host takes no time."""
    return replace(hardware, step_overhead_s=0, layer_overhead_s=0, speculation_overhead_s=0, draft_overhead_s=0)


def shipped_pair() -> tuple[TargetShape, DrafterShape]:
    """Return the sizes of the shipped target and its drafter."""
    return (
        TargetShape.from_config(load_config(NOVELS / "target")),
        DrafterShape.from_config(load_config(NOVELS / "drafter")),
    )


def overheads_of_profile(hardware: Hardware) -> dict[str, float]:
    """Return a CPU's overheads: what the profile shows of its parts beyond their rooflines, seconds.

    The target's 5 rows instead of 1 are no overhead; that part of the profile is left to be predicted.
    """
    target, drafter = shipped_pair()
    model = CostModel(without_overheads(hardware), target, drafter, "float32")
    plain = model.step(1, PROFILE_CONTEXT)
    forward_ms = 1000 * (plain.weights_s + plain.attention_s + plain.head_s)
    whole, update = (1000 * model.draft_s(1, PROFILE_CONTEXT, depth) for depth in (PROFILE_DEPTH, 1))
    pass_ms = (whole - update) / (PROFILE_DEPTH - 1)
    aside_ms = SPECULATIVE.drafting - SPECULATIVE.draft_steps
    return {
        "step_overhead_s": (PLAIN.scheduling + PLAIN.sampling) / 1000,
        "layer_overhead_s": (PLAIN.target - forward_ms) / target.num_layers / 1000,
        "speculation_overhead_s": (
            SPECULATIVE.scheduling
            + SPECULATIVE.sampling
            - PLAIN.scheduling
            - PLAIN.sampling
            + aside_ms
            - (update - pass_ms)
        )
        / 1000,
        # The drafter's weights come from a cache, faster than the memory's roofline: nothing is left for the host.
        "draft_overhead_s": max(0.0, SPECULATIVE.draft_steps / PROFILE_DEPTH - pass_ms) / 1000,
    }


def published_model(hardware: Hardware, draft_vocab_size: int) -> CostModel:
    """Return Llama-3.1-8B with a drafter of EAGLE-3's sizes."""
    target = TargetShape.from_config(load_config(LLAMA_8B))
    drafter = replace(DrafterShape.for_target(EAGLE3, target), draft_vocab_size=draft_vocab_size)
    return CostModel(hardware, target, drafter)


def overheads_of_publication(hardware: Hardware) -> dict[str, float]:
    """Return a GPU's overheads from three published points: no speculation, and EAGLE-3 at K = 2 and 7, seconds."""
    model = published_model(without_overheads(hardware), EAGLE3_HEAD)
    step_s = PUBLISHED_PLAIN_MS / 1000 - model.step(1, PUBLISHED_CONTEXT).total_s
    (first, *_), (last, *_) = PUBLISHED_EAGLE3[0], PUBLISHED_EAGLE3[-1]
    beyond = {
        depth: tokens * tpot_ms / 1000 - step_s - model.step(1, PUBLISHED_CONTEXT, depth).total_s
        for depth, tokens, tpot_ms in (PUBLISHED_EAGLE3[0], PUBLISHED_EAGLE3[-1])
    }
    pass_s = (beyond[last] - beyond[first]) / (last - first)
    return {
        "step_overhead_s": step_s,
        "layer_overhead_s": 0.0,
        "speculation_overhead_s": beyond[first] - first * pass_s,
        "draft_overhead_s": pass_s,
    }


def compare_profile(hardware: Hardware) -> list[dict[str, Any]]:
    """Return the parts of a step: measured, predicted, and whether its overhead was fitted on it, ms."""
    target, drafter = shipped_pair()
    model = CostModel(hardware, target, drafter, "float32")
    rows = []
    for name, profile, depth in (("none", PLAIN, 0), ("qm_spec", SPECULATIVE, PROFILE_DEPTH)):
        step = model.step(1, PROFILE_CONTEXT, depth)
        layers_s = target.num_layers * hardware.layer_overhead_s
        predicted = {
            "target forward": step.weights_s + step.attention_s + step.head_s + layers_s,
            "whole step": step.total_s,
        }
        measured = {"target forward": profile.target, "whole step": profile.whole}
        for part, seconds in predicted.items():
            rows.append(
                {
                    "method": name,
                    "part": part,
                    "measured_ms": measured[part],
                    "predicted_ms": 1000 * seconds,
                    "error": 1000 * seconds / measured[part] - 1,
                    "fitted": name == "none",
                }
            )
    return rows


def compare_publication(hardware: Hardware) -> list[dict[str, Any]]:
    """Return the published points: measured and predicted ms per token, and whether the point was fitted."""
    rows = []
    target_vocab = TargetShape.from_config(load_config(LLAMA_8B)).vocab_size
    # EAGLE-1 has one layer of nearly these sizes too, and the target's whole head.
    for name, points, vocab in (
        ("EAGLE-3", PUBLISHED_EAGLE3, EAGLE3_HEAD),
        ("EAGLE-1", PUBLISHED_EAGLE1, target_vocab),
    ):
        model = published_model(hardware, vocab)
        plain_ms = 1000 * model.step(1, PUBLISHED_CONTEXT).total_s
        for depth, tokens, tpot_ms in points:
            predicted = 1000 * model.step(1, PUBLISHED_CONTEXT, depth).total_s / tokens
            rows.append(
                {
                    "method": name,
                    "num_speculative_tokens": depth,
                    "measured_tpot_ms": tpot_ms,
                    "predicted_tpot_ms": predicted,
                    "measured_speedup": PUBLISHED_PLAIN_MS / tpot_ms,
                    "predicted_speedup": plain_ms / predicted,
                    "error": predicted / tpot_ms - 1,
                    "fitted": name == "EAGLE-3" and depth in (points[0][0], points[-1][0]),
                }
            )
    return rows


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    return table


def main(
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the comparison as JSON.")] = None,
) -> None:
    """Compare predictions with the recorded runs, the recorded profile and published numbers; nothing is measured.

    Example: python benchmarks/simulation.py --out docs/results/simulation.json
    """
    console = Console(width=150)
    cpu, h100 = load_hardware("cpu"), load_hardware("h100")
    fitted = {"cpu": overheads_of_profile(cpu), "h100": overheads_of_publication(h100)}
    console.print("Overheads fitted, seconds:", json.dumps(fitted, indent=1))
    records = [RECORDS / name for name in RUNS]
    answer = validate(records, NOVELS / "target", two_threads(cpu), NOVELS / "drafter", console)
    answer["files"] = {str(Path(name).relative_to(ROOT)): rows for name, rows in answer["files"].items()}
    answer["fitted_overheads"] = fitted
    answer["profile"], answer["published"] = compare_profile(cpu), compare_publication(h100)
    console.print(_table("Profile of a step, ms (docs/results/profile-step.md)", answer["profile"]))
    console.print(_table("Published: Llama-3.1-8B on one H100 (vllm issue 20780)", answer["published"]))
    if out is not None:
        write_record(out, answer)


if __name__ == "__main__":
    typer.run(main)
