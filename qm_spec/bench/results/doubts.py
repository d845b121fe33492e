"""What makes a benchmark's numbers doubtful, said in its notes and in the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from qm_spec.bench.methods import NOISE_METHOD, REFERENCE_METHOD

# Slowest to fastest; a quiet machine stays well below.
NOISY_SPREAD = 1.2
# Between two measurements of plain decoding.
_NOISY_REPETITION = 1.05


def doubts(runs: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield a sentence for each run whose passes disagree, or whose output is not plain decoding's in 16 bits.

    Args:
        runs: see `qm_spec.bench.results.records`.
    """
    flips = _target_flips(runs)
    for run in runs:
        name = run_name(run)
        if run["repeats_identical"] is False:
            yield f"{name} put out different tokens when repeated; its counts are those of the median pass"
        yield from noise(run)
        if run["lossless"] is False and run["method"] != NOISE_METHOD and run["dtype"] != "float32":
            own = flips.get(_setting(run))
            told = (
                f"the target's own at the same batch shapes differ in {own} ({NOISE_METHOD})"
                if own is not None
                else f"--methods {NOISE_METHOD},... would count the target's own flips"
            )
            yield (
                f"{name}: {run['num_prompts_different']} of {run['num_prompts']} outputs differ from "
                f"{REFERENCE_METHOD} in {run['dtype']}, where near ties flip; {told}"
            )


def run_name(run: dict[str, Any]) -> str:
    """Say which run is meant."""
    return (
        f"{run['method']} at {run['context_tokens']} tokens of context, concurrency {run['concurrency']}, temperature "
        f"{run['temperature']:g}"
    )


def noise(run: dict[str, Any]) -> Iterator[str]:
    """Yield what a run's passes and turns show of the machine's noise, nothing where they agree."""
    name = run_name(run)
    # In older files methods ran one after the other, so that a slow pass of one is no slow pass of another.
    what = "speed-up" if "speedup_per_pass" in run else "tokens/s"
    passes = run["speedup_per_pass"] if "speedup_per_pass" in run else run["output_tokens_per_s_per_pass"]
    if passes and max(passes) > NOISY_SPREAD * min(passes):
        yield (
            f"{name}: {what} {min(passes):.2f} to {max(passes):.2f} from pass to pass; the machine was busy, and no "
            "interval over prompts covers that"
        )
    if run["method"] == NOISE_METHOD and run["speedup"] is not None:
        differs = max(run["speedup"], 1 / run["speedup"])
        if differs > _NOISY_REPETITION:
            yield (
                f"{name}: speed-up {run['speedup']:.2f} where 1 is right, so a smaller difference than "
                f"{100 * (differs - 1):.0f} % between methods is noise"
            )
    slow, fast = run.get("tpot_ms_p90"), run.get("tpot_ms_p10")
    if run["method"] == REFERENCE_METHOD and slow and fast and slow > NOISY_SPREAD * fast:
        yield (
            f"{name} took {fast:.1f} to {slow:.1f} ms a token (10th and 90th percentile of turns): the machine's own "
            "speed changed, or the prompts' lengths differ much; methods stand next to each other in time, so their "
            "ratios suffer less than their tokens/s"
        )


def _setting(run: dict[str, Any]) -> tuple[Any, ...]:
    return run["temperature"], run["concurrency"], run["context_tokens"], run["context_cut"]


def _target_flips(runs: Sequence[dict[str, Any]]) -> dict[tuple[Any, ...], int]:
    return {_setting(run): run["num_prompts_different"] for run in runs if run["method"] == NOISE_METHOD}
