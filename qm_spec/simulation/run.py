"""What the command line asks of a simulation, and its answer in tables and in one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from qm_spec.config import MergeConfig
from qm_spec.simulation.acceptance_rates import parse_acceptance
from qm_spec.simulation.hardware import Hardware, load_hardware
from qm_spec.simulation.prediction import Scenario, predict_steps, predict_traffic
from qm_spec.simulation.settings import Simulation
from qm_spec.simulation.shapes import EAGLE3, QUICKMERGE, DrafterShape, TargetShape, load_config
from qm_spec.simulation.tables import LABEL, format_tokens, steps_table, traffic_table, validation_table
from qm_spec.simulation.traffic import TrafficSettings
from qm_spec.simulation.validation import Served, predict_runs

# Enough to fill the replicas first and to measure them afterwards.
_REQUESTS_PER_REPLICA = 200
_LEAST_REQUESTS = 2000
_SUFFIXES = {"k": 1 << 10, "m": 1 << 20}
_NO_DRAFTER = "ngram"


def parse_counts(text: str, name: str) -> list[int]:
    """Read whole numbers such as "1,8,32", "4k,1M" (1024 and 1024 x 1024) or "1..8".

    Raises:
        ValueError: it is not a list of whole numbers from 1.
    """
    found: list[int] = []
    try:
        for part in text.split(","):
            first, dots, last = part.partition("..")
            found += range(_count(first), _count(last) + 1) if dots else [_count(first)]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ValueError(f"{name}: expected whole numbers from 1, as in 1,8,32 or 1..4 or 4k,1M, got {text!r}")
    return list(dict.fromkeys(found))


def _count(text: str) -> int:
    text = text.strip().lower()
    factor = _SUFFIXES.get(text[-1:], 1)
    return factor * int(text[:-1] if factor > 1 else text)


def _drafter(simulation: Simulation, target: TargetShape) -> DrafterShape | None:
    if simulation.method == _NO_DRAFTER:
        return None
    kind = EAGLE3 if simulation.method.startswith(EAGLE3) else QUICKMERGE
    if simulation.drafter is None:
        return DrafterShape.for_target(kind, target, MergeConfig())
    drafter = DrafterShape.from_config(load_config(simulation.drafter))
    if drafter.hidden_size != target.hidden_size:
        raise ValueError(
            f"drafter: its hidden_size must be the target's {target.hidden_size}, got {drafter.hidden_size}; "
            "pass the drafter of this target, or leave it out for one of the target's sizes"
        )
    return drafter


def simulate(simulation: Simulation, console: Console) -> dict[str, Any]:
    """Predict what was asked for, print it as tables and return it as plain values.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a value is out of range or files do not fit each other.
    """
    target = TargetShape.from_config(load_config(simulation.target_config))
    if simulation.max_num_seqs < 1:
        raise ValueError(f"max_num_seqs: must be at least 1, got {simulation.max_num_seqs}")
    scenario = Scenario(
        hardware=load_hardware(simulation.hardware),
        target=target,
        drafter=_drafter(simulation, target),
        acceptance=parse_acceptance(simulation.acceptance or "", simulation.method),
        dtype=simulation.dtype,
        tensor_parallel=simulation.tensor_parallel,
        max_num_seqs=simulation.max_num_seqs,
    )
    limit = scenario.acceptance.max_speculative_tokens
    depths = parse_counts(simulation.num_speculative_tokens or f"1..{limit}", "num_speculative_tokens")
    contexts = parse_counts(simulation.context, "context")
    answer: dict[str, Any] = {
        "kind": "prediction",
        "note": f"{LABEL}: a roofline model; its errors where it was checked stand in docs/results/simulation.md",
        "hardware": scenario.hardware.to_dict(),
        "dtype": simulation.dtype,
        "tensor_parallel": simulation.tensor_parallel,
        "method": simulation.method,
        "acceptance": {
            "source": scenario.acceptance.source,
            "measured": [
                {
                    "context_tokens": one.context_tokens,
                    "per_position": list(one.per_position),
                    "draft_share": one.draft_share,
                }
                for one in scenario.acceptance.measured
            ],
        },
        "steps": predict_steps(scenario, parse_counts(simulation.batch, "batch"), contexts, depths),
    }
    group = f"{simulation.tensor_parallel} x " if simulation.tensor_parallel > 1 else ""
    machine = f"{group}{scenario.hardware.name}, {simulation.dtype}"
    console.print(steps_table(answer["steps"], f"Decoding with {simulation.method} on {machine}"))
    if simulation.arrival_rate is not None:
        traffic = _traffic_settings(simulation, simulation.arrival_rate)
        answer["traffic"] = [predict_traffic(scenario, traffic, context, depths) for context in contexts]
        for found in answer["traffic"]:
            title = (
                f"{traffic.arrival_rate:g} requests/s to {traffic.replicas} x ({machine}), prompts of "
                f"{format_tokens(found['context_tokens'])}, outputs of {traffic.output_tokens} on average"
            )
            console.print(traffic_table(found, title))
    return answer


def _traffic_settings(simulation: Simulation, arrival_rate: float) -> TrafficSettings:
    ttft, tpot = simulation.ttft_limit_ms, simulation.tpot_limit_ms
    num_requests = simulation.num_requests
    if num_requests is None:
        num_requests = max(_LEAST_REQUESTS, _REQUESTS_PER_REPLICA * simulation.replicas)
    return TrafficSettings(
        arrival_rate=arrival_rate,
        replicas=simulation.replicas,
        num_requests=num_requests,
        output_tokens=simulation.output_tokens,
        ttft_limit_s=None if ttft is None else ttft / 1000,
        tpot_limit_s=None if tpot is None else tpot / 1000,
        seed=simulation.seed,
    )


def validate(
    results: Sequence[Path], target_config: Path, hardware: Hardware, drafter: Path | None, console: Console
) -> dict[str, Any]:
    """Predict the runs of results files, print each beside its measurement and return both.

    Args:
        results: files that `benchmarks/spec.py` wrote, or their folders.
        target_config: `config.json` of the target that was measured, or its folder.
        hardware: the machine that was measured.
        drafter: its config; one of the target's own sizes when None.
        console: to print to.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file holds nothing that can be predicted.
    """
    target = TargetShape.from_config(load_config(target_config))
    shape = DrafterShape.for_target(QUICKMERGE, target)
    if drafter is not None:
        shape = DrafterShape.from_config(load_config(drafter))
    served = Served(hardware, target, shape)
    answer: dict[str, Any] = {"kind": "validation of predictions", "hardware": hardware.to_dict(), "files": {}}
    for path in results:
        file = path / "results.json" if path.is_dir() else path
        rows = predict_runs(file, served)
        answer["files"][str(path)] = rows
        console.print(validation_table(rows, str(path)))
    return answer
