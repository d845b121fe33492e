"""What `qm-spec simulate` answers: steps over batch, context and K, and traffic over many replicas."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qm_spec.simulation.acceptance_rates import AcceptanceByContext
from qm_spec.simulation.hardware import Hardware
from qm_spec.simulation.shapes import EAGLE3, QUICKMERGE, DrafterShape, TargetShape
from qm_spec.simulation.steps import PREFILL_CHUNK, CostModel
from qm_spec.simulation.traffic import Percentiles, ReplicaSpeed, TrafficSettings, simulate_traffic

# K whose goodput comes this near to the best one's are told apart by latency: what is delivered in a stretch of
# time varies with what was left over from before.
_AS_GOOD = 0.97
Row = dict[str, Any]


@dataclass(frozen=True)
class Scenario:
    """Which machine serves which model with which drafter.

    Args:
        hardware: of each device.
        target: the model that is served.
        drafter: None where drafting costs the device nothing, as with n-grams.
        acceptance: of the drafter's tokens.
        dtype: of weights and arithmetic.
        tensor_parallel: devices of one replica.
        max_num_seqs: most requests in a step.
    """

    hardware: Hardware
    target: TargetShape
    drafter: DrafterShape | None
    acceptance: AcceptanceByContext
    dtype: str = "bfloat16"
    tensor_parallel: int = 1
    max_num_seqs: int = 256

    def model(self, drafter: DrafterShape | None) -> CostModel:
        """Return the cost model with a drafter."""
        return CostModel(self.hardware, self.target, drafter, self.dtype, self.tensor_parallel)


def check_depths(depths: Sequence[int], acceptance: AcceptanceByContext) -> None:
    """Check that the acceptance is known for every K.

    Raises:
        ValueError: it is not, or there is no K.
    """
    limit = acceptance.max_speculative_tokens
    if not depths or min(depths) < 1 or max(depths) > limit:
        raise ValueError(
            f"num_speculative_tokens: must lie in 1..{limit}, where {acceptance.source} knows the acceptance, got "
            f"{list(depths)}; record a run with more speculative tokens, or type more shares in"
        )


def predict_steps(
    scenario: Scenario, batches: Sequence[int], contexts: Sequence[int], depths: Sequence[int]
) -> list[Row]:
    """Predict decode steps for every context and batch, prompts left out.

    Args:
        scenario: machine, target, drafter, acceptance.
        batches: requests in a step.
        contexts: tokens behind each of them.
        depths: every K to predict; plain decoding is added.

    Returns:
        one row per context and batch. Where the batch does not fit the memory the row says how many do, and
        predicts nothing. `eagle3` is there for our drafter: EAGLE-3 of the target's sizes, as if as much of
        its drafts were accepted.

    Raises:
        ValueError: a number is out of range.
    """
    check_depths(depths, scenario.acceptance)
    for name, values in (("batch", batches), ("context", contexts)):
        if not values or min(values) < 1:
            raise ValueError(f"{name}: must be whole numbers from 1, got {list(values)}")
    own = scenario.model(scenario.drafter)
    rival = None
    if scenario.drafter is not None and scenario.drafter.kind == QUICKMERGE:
        rival = scenario.model(DrafterShape.for_target(EAGLE3, scenario.target))
    rows = []
    for context in contexts:
        capacity = own.capacity(context, speculative=True)
        for batch in batches:
            row: Row = {
                "context_tokens": context,
                "batch": batch,
                "batch_that_fits": capacity,
                "fits": batch <= capacity,
                "acceptance_measured_at_tokens": scenario.acceptance.at(context).context_tokens,
                "within_measured_contexts": scenario.acceptance.covers(context),
                "within_target_length": scenario.target.max_tokens is None or context <= scenario.target.max_tokens,
            }
            if row["fits"]:
                row["by_k"] = _by_depth(own, scenario.acceptance, batch, context, (0, *depths))
                row["best_k"] = max(row["by_k"], key=lambda one: one["tokens_per_s"])["num_speculative_tokens"]
                if rival is not None:
                    row["eagle3"] = _by_depth(rival, scenario.acceptance, batch, context, depths)
            rows.append(row)
    return rows


def _by_depth(
    model: CostModel, acceptance: AcceptanceByContext, batch: int, context: int, depths: Sequence[int]
) -> list[Row]:
    accepted = acceptance.at(context)
    plain_s = model.step(batch, context).total_s
    rows = []
    for depth in depths:
        step = model.step(batch, context, depth, accepted.draft_share)
        tokens = accepted.tokens_per_step(depth)
        parts = {f"{name.removesuffix('_s')}_ms": 1000 * seconds for name, seconds in dataclasses.asdict(step).items()}
        rows.append(
            {
                "num_speculative_tokens": depth,
                "step_ms": 1000 * step.total_s,
                **parts,
                "speculation_ms": 1000 * step.speculation_s,
                "tokens_per_step": tokens,
                "tokens_per_s": batch * tokens / step.total_s,
                "speedup": tokens * plain_s / step.total_s,
            }
        )
    return rows


def predict_traffic(
    scenario: Scenario, settings: TrafficSettings, context: int, depths: Sequence[int]
) -> dict[str, Any]:
    """Predict what the same traffic meets without speculation and with every K.

    Args:
        scenario: machine, target, drafter, acceptance.
        settings: of the traffic.
        context: tokens of every prompt.
        depths: every K to predict; plain decoding is added.

    Returns:
        the settings, the tokens per second that the requests ask for, a row per K, and `recommended_k`: among those
        within 3 % of the best goodput the one of the lowest mean latency.

    Raises:
        ValueError: a number is out of range, or not one request fits the memory.
    """
    check_depths(depths, scenario.acceptance)
    rows = [_traffic_row(scenario, settings, context, depth) for depth in (0, *depths)]
    best = max(row["goodput_tokens_per_s"] for row in rows)
    as_good = [row for row in rows if row["goodput_tokens_per_s"] >= _AS_GOOD * best]
    recommended = min(as_good, key=lambda row: row["mean_latency_s"])
    return {
        "settings": dataclasses.asdict(settings),
        "context_tokens": context,
        "offered_tokens_per_s": settings.arrival_rate * settings.output_tokens,
        "by_k": rows,
        "recommended_k": recommended["num_speculative_tokens"],
    }


def _traffic_row(scenario: Scenario, settings: TrafficSettings, context: int, depth: int) -> Row:
    model, accepted = scenario.model(scenario.drafter), scenario.acceptance.at(context)
    speculative = depth > 0
    capacity = min(model.capacity(context + settings.output_tokens, speculative), scenario.max_num_seqs)
    if capacity < 1:
        raise ValueError(
            f"traffic: not one request of {context} + {settings.output_tokens} tokens fits "
            f"{scenario.tensor_parallel} x {scenario.hardware.name} beside the weights; "
            "raise --tensor-parallel or lower --context"
        )
    prefill_s = model.prefill_s(context, speculative)
    # A request is on average half way through its output.
    middle = context + settings.output_tokens // 2
    speed = ReplicaSpeed(
        step_s=[model.step(n, middle, depth, accepted.draft_share).total_s for n in range(1, capacity + 1)],
        tokens_per_step=accepted.tokens_per_step(depth),
        prefill_s=prefill_s,
        chunk_s=prefill_s * min(1.0, PREFILL_CHUNK / context),
        prompts_per_step=max(1, PREFILL_CHUNK // context),
    )
    result = simulate_traffic(settings, speed)
    return {
        "num_speculative_tokens": depth,
        "max_batch": capacity,
        "mean_batch": result.mean_batch,
        "goodput_tokens_per_s": result.goodput_tokens_per_s,
        "throughput_tokens_per_s": result.throughput_tokens_per_s,
        "good_share": result.good_share,
        "mean_latency_s": result.mean_latency_s,
        "ttft_s": _plain(result.ttft),
        "tpot_s": _plain(result.tpot),
        "latency_s": _plain(result.latency),
        "left_at_last_arrival": result.left_at_last_arrival,
        "too_short": result.too_short,
    }


def _plain(percentiles: Percentiles | None) -> dict[str, float] | None:
    return dataclasses.asdict(percentiles) if percentiles is not None else None
