"""The simulation: closed forms, what must rise and fall, requests that are neither lost nor made up, bad input."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from qm_spec.cli import app
from qm_spec.config import MergeConfig
from qm_spec.simulation import measure
from qm_spec.simulation.acceptance_rates import Acceptance, AcceptanceByContext, parse_acceptance
from qm_spec.simulation.hardware import Hardware, load_hardware, shipped_hardware
from qm_spec.simulation.prediction import Scenario, predict_steps, predict_traffic
from qm_spec.simulation.run import parse_counts
from qm_spec.simulation.shapes import EAGLE3, QUICKMERGE, DrafterShape, TargetShape, load_config
from qm_spec.simulation.steps import PREFILL_CHUNK, CostModel
from qm_spec.simulation.traffic import (
    Percentiles,
    ReplicaSpeed,
    RequestTimes,
    TrafficResult,
    TrafficSettings,
    simulate_traffic,
)
from qm_spec.simulation.validation import Served, predict_runs

ROOT = Path(__file__).resolve().parents[2]
NOVELS = ROOT / "qm_spec" / "zoo" / "novels"
RECORDS = ROOT / "docs" / "results"
LLAMA_8B = TargetShape.from_config(load_config(RECORDS / "simulation" / "llama-8b.json"))
LLAMA_70B = TargetShape.from_config(load_config(RECORDS / "simulation" / "llama-70b.json"))
OURS = DrafterShape.for_target(QUICKMERGE, LLAMA_8B)
THEIRS = DrafterShape.for_target(EAGLE3, LLAMA_8B)

# One resource at a time: the other costs nothing.
MEMORY_BOUND = Hardware("memory", "test", {"bfloat16": 1e30}, memory_bytes_per_s=1e12, memory_bytes=1e15)
COMPUTE_BOUND = Hardware("compute", "test", {"bfloat16": 1e12}, memory_bytes_per_s=1e30, memory_bytes=1e15)
TYPED = AcceptanceByContext("typed in", (Acceptance((0.8, 0.6, 0.5, 0.4)),))


def scenario(**changes) -> Scenario:
    return replace(Scenario(load_hardware("h100"), LLAMA_8B, OURS, TYPED), **changes)


# Sizes


def test_weights_are_those_of_the_published_models():
    # The published counts of parameters, less the norms' vectors.
    assert LLAMA_8B.stored_weights == 8_030_261_248 - 65 * 4096
    tied = replace(LLAMA_8B, tied_head=True)
    assert tied.stored_weights == LLAMA_8B.stored_weights - 4096 * 128256
    assert LLAMA_70B.stored_weights == 70_553_706_496 - 161 * 8192


@pytest.mark.parametrize("kind", [QUICKMERGE, EAGLE3])
def test_a_drafters_weights_are_those_of_its_module(kind):
    from qm_spec.drafter.eagle3 import Eagle3Config, Eagle3Drafter
    from qm_spec.drafter.prior import QuickMergePrior
    from qm_spec.drafter.prior_config import QuickMergeConfig

    sizes = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 100,
    }
    with torch.device("meta"):
        model = (
            QuickMergePrior(QuickMergeConfig(**sizes)) if kind == QUICKMERGE else Eagle3Drafter(Eagle3Config(**sizes))
        )
    shape = DrafterShape.from_config(model.config.to_dict())
    assert shape.kind == kind
    assert shape.stored_weights == sum(one.numel() for one in model.parameters() if one.dim() == 2)


def test_the_shipped_pair_is_read():
    assert TargetShape.from_config(load_config(NOVELS / "target")).tied_head
    drafter = DrafterShape.from_config(load_config(NOVELS / "drafter"))
    assert (drafter.num_heads, drafter.num_kv_heads, drafter.head_dim) == (6, 2, 32)
    assert drafter.attended(4096) == MergeConfig().entries_attended(4096)
    assert DrafterShape.for_target(EAGLE3, LLAMA_8B).attended(4096) == 4096


# Steps


def test_where_memory_binds_a_step_takes_its_bytes():
    model = CostModel(MEMORY_BOUND, LLAMA_8B)
    weights = 32 * LLAMA_8B.layer_weights + 4096 * 128256
    assert model.step(1, 0).total_s == pytest.approx(2 * weights / 1e12, rel=1e-12)
    # 32 layers of 8 heads of 128, keys and values, two bytes.
    with_context = 2 * weights + 4 * 1000 * 32 * 2 * 8 * 128 * 2
    assert model.step(4, 1000).total_s == pytest.approx(with_context / 1e12, rel=1e-12)


def test_where_arithmetic_binds_a_step_takes_its_operations():
    model = CostModel(COMPUTE_BOUND, LLAMA_8B)
    weights = 32 * LLAMA_8B.layer_weights + 4096 * 128256
    rows = 3 * 5
    attention = 4 * 32 * 32 * 128 * rows * 1000
    assert model.step(3, 1000, 4).total_s == pytest.approx((2 * weights * rows + attention) / 1e12, rel=1e-12)


def test_the_shares_of_the_peaks_divide_the_rates():
    slower = replace(MEMORY_BOUND, memory_share=0.5)
    assert CostModel(slower, LLAMA_8B).step(1, 0).total_s == 2 * CostModel(MEMORY_BOUND, LLAMA_8B).step(1, 0).total_s
    slower = replace(COMPUTE_BOUND, compute_share=0.5)
    assert CostModel(slower, LLAMA_8B).step(1, 0).total_s == 2 * CostModel(COMPUTE_BOUND, LLAMA_8B).step(1, 0).total_s


def test_our_drafter_reads_its_entries_and_eagle3_every_token():
    context, depth = 1 << 20, 4
    grown = {}
    for drafter in (OURS, THEIRS):
        model = CostModel(MEMORY_BOUND, LLAMA_8B, drafter)
        grown[drafter.kind] = model.draft_s(2, context, depth) - model.draft_s(2, 0, depth)
    entry = 8 * 2 * 128 * 2
    merged = MergeConfig().entries_attended(context)
    assert grown[QUICKMERGE] == pytest.approx(depth * 2 * merged * (entry + 8 * 16) / 1e12, rel=1e-6)
    assert grown[EAGLE3] == pytest.approx(depth * 2 * context * entry / 1e12, rel=1e-6)


def test_overheads_come_on_top_of_the_roofline():
    hardware = replace(
        MEMORY_BOUND,
        step_overhead_s=0.5,
        layer_overhead_s=0.25,
        speculation_overhead_s=0.125,
        draft_overhead_s=2.0,
    )
    bare, with_host = CostModel(MEMORY_BOUND, LLAMA_8B, OURS), CostModel(hardware, LLAMA_8B, OURS)
    assert with_host.step(1, 9).total_s - bare.step(1, 9).total_s == pytest.approx(0.5 + 32 * 0.25)
    added = with_host.step(1, 9, 3).total_s - bare.step(1, 9, 3).total_s
    assert added == pytest.approx(0.5 + 32 * 0.25 + 0.125 + 3 * 2.0)
    # A drafter that costs the device nothing makes no passes.
    added = (
        CostModel(hardware, LLAMA_8B).step(1, 9, 3).total_s - CostModel(MEMORY_BOUND, LLAMA_8B).step(1, 9, 3).total_s
    )
    assert added == pytest.approx(0.5 + 32 * 0.25 + 0.125)


def test_tensor_parallel_ranks_share_the_bytes_and_exchange_states():
    linked = replace(MEMORY_BOUND, interconnect_bytes_per_s=1e11, interconnect_latency_s=1e-5)
    one, four = CostModel(linked, LLAMA_8B).step(2, 500), CostModel(linked, LLAMA_8B, tensor_parallel=4).step(2, 500)
    assert one.communication_s == 0
    for part in ("weights_s", "attention_s", "head_s"):
        assert getattr(four, part) == pytest.approx(getattr(one, part) / 4)
    # A ring moves 2 (p - 1) / p of the states, twice per layer.
    assert four.communication_s == pytest.approx(64 * (1.5 * 2 * 4096 * 2 / 1e11 + 1e-5))
    # 8 key/value heads on 16 ranks: each rank holds a copy of one.
    sixteen = CostModel(linked, LLAMA_8B, tensor_parallel=16).step(2, 500)
    assert sixteen.attention_s == pytest.approx(one.attention_s / 8)


def test_a_prompt_takes_half_of_the_square_however_it_is_cut():
    model = CostModel(COMPUTE_BOUND, LLAMA_8B)
    num_tokens = 3 * PREFILL_CHUNK + 100
    flops = 2 * 32 * LLAMA_8B.layer_weights * num_tokens + 2 * LLAMA_8B.head_weights
    flops += 4 * 32 * 32 * 128 * num_tokens**2 / 2
    assert model.prefill_s(num_tokens) == pytest.approx(flops / 1e12, rel=1e-12)
    drafting = CostModel(COMPUTE_BOUND, LLAMA_8B, OURS)
    assert drafting.prefill_s(num_tokens) == model.prefill_s(num_tokens)
    added = drafting.prefill_s(num_tokens, speculative=True) - model.prefill_s(num_tokens)
    assert added == pytest.approx(2 * num_tokens * (3 * 4096**2 + 2 * 4096 * 1024) / 1e12, rel=1e-6)


def test_as_many_requests_fit_as_the_memory_left_by_the_weights_holds():
    weights, request = 2 * LLAMA_8B.stored_weights, 1000 * 2 * 32 * 8 * 128 * 2
    hardware = replace(MEMORY_BOUND, memory_bytes=(weights + 7.5 * request) / 0.9)
    assert CostModel(hardware, LLAMA_8B).capacity(1000, speculative=False) == 7
    # The drafter's weights and pages are memory that no request has.
    assert CostModel(hardware, LLAMA_8B, OURS).capacity(1000, speculative=False) == 7
    assert CostModel(hardware, LLAMA_8B, OURS).capacity(1000, speculative=True) < 7
    assert CostModel(replace(hardware, memory_bytes=weights), LLAMA_8B).capacity(1, speculative=False) == 0


sizes = st.tuples(st.integers(1, 300), st.integers(0, 1 << 20), st.integers(0, 8))


@given(
    where=sizes,
    more=sizes,
    hardware=st.sampled_from(["h100", "h200"]),
    drafter=st.sampled_from([None, OURS, THEIRS]),
    tensor_parallel=st.sampled_from([1, 2, 8]),
)
@settings(max_examples=60, deadline=None)
def test_more_work_never_takes_less_time(where, more, hardware, drafter, tensor_parallel):
    model = CostModel(load_hardware(hardware), LLAMA_8B, drafter, tensor_parallel=tensor_parallel)
    before = model.step(*where).total_s
    for axis in range(3):
        if drafter is OURS and axis == 1:
            # Where a group is merged, more context leaves fewer entries; the target's own part still grows.
            continue
        grown = list(where)
        grown[axis] += more[axis]
        assert model.step(*grown).total_s >= before * (1 - 1e-12)
    longer = model.step(where[0], where[1] + more[1], where[2])
    assert longer.attention_s >= model.step(*where).attention_s
    faster = replace(model.hardware, memory_bytes_per_s=2 * model.hardware.memory_bytes_per_s)
    assert replace(model, hardware=faster).step(*where).total_s <= before
    assert model.step(*where).total_s >= model.step(*where, draft_share=0.5).total_s


@given(batch=st.integers(1, 300), context=st.integers(0, 1 << 20))
@settings(max_examples=30, deadline=None)
def test_a_larger_batch_never_yields_fewer_tokens_per_second(batch, context):
    model = CostModel(load_hardware("h100"), LLAMA_8B, OURS)
    for depth in (0, 3):
        alone, beside = model.step(batch, context, depth).total_s, model.step(batch + 1, context, depth).total_s
        assert (batch + 1) / beside >= batch / alone * (1 - 1e-12)


# Acceptance and predictions of steps


def test_without_speculation_the_speedup_is_one():
    for row in predict_steps(scenario(), [1, 64], [100, 4096], [1, 4]):
        plain = row["by_k"][0]
        assert plain["num_speculative_tokens"] == 0
        assert plain["speedup"] == 1.0
        assert plain["tokens_per_s"] == row["batch"] / (plain["step_ms"] / 1000)


def test_free_drafts_that_are_all_kept_multiply_the_speed_of_a_memory_bound_target():
    kept = AcceptanceByContext("typed in", (Acceptance((1.0, 1.0, 1.0)),))
    free = scenario(hardware=MEMORY_BOUND, drafter=None, acceptance=kept)
    (row,) = predict_steps(free, [1], [1000], [3])
    assert row["by_k"][1]["speedup"] == pytest.approx(4)
    # Where arithmetic binds, four rows take four times as long, and nothing is won.
    (row,) = predict_steps(replace(free, hardware=COMPUTE_BOUND), [1], [1000], [3])
    assert row["by_k"][1]["speedup"] == pytest.approx(1)


def test_what_nobody_accepts_only_costs():
    none_kept = AcceptanceByContext("typed in", (Acceptance((0.0, 0.0)),))
    for row in predict_steps(scenario(acceptance=none_kept), [1, 64], [1000], [1, 2]):
        assert row["best_k"] == 0
        assert all(one["speedup"] < 1 for one in row["by_k"][1:])


def test_speculation_gains_less_where_a_large_batch_fills_the_arithmetic():
    rows = predict_steps(scenario(hardware=replace(load_hardware("h100"), memory_bytes=1e15)), [1, 2048], [100], [4])
    assert rows[1]["by_k"][1]["speedup"] < 1 < rows[0]["by_k"][1]["speedup"]


def test_a_batch_that_does_not_fit_is_not_predicted():
    (row,) = predict_steps(scenario(), [8], [1 << 20], [1])
    assert not row["fits"]
    assert row["batch_that_fits"] == 0
    assert "by_k" not in row


def test_eagle3_stands_beside_our_drafter_only():
    (row,) = predict_steps(scenario(), [1], [1 << 17], [4])
    assert row["eagle3"][0]["draft_ms"] > row["by_k"][1]["draft_ms"]
    (row,) = predict_steps(scenario(drafter=THEIRS), [1], [1 << 17], [4])
    assert "eagle3" not in row


def test_expected_tokens_are_one_and_the_kept_shares():
    accepted = Acceptance((0.8, 0.5), draft_share=0.5)
    assert [accepted.tokens_per_step(depth) for depth in range(3)] == [1, 1.4, 1.65]
    with pytest.raises(ValueError, match=r"K = 0\.\.2, got 3; record a run"):
        accepted.tokens_per_step(3)


def test_recorded_acceptance_is_taken_from_the_nearest_length():
    found = parse_acceptance(str(RECORDS / "spec-cpu-long"), "qm_spec")
    assert [one.context_tokens for one in found.measured] == [1024, 3000]
    assert found.at(1).context_tokens == found.at(1500).context_tokens == 1024
    assert found.at(2000).context_tokens == found.at(1 << 20).context_tokens == 3000
    assert found.covers(1024)
    assert not found.covers(1023)
    runs = json.loads((RECORDS / "spec-cpu-long" / "results.json").read_text())["runs"]
    for run in runs:
        if run["method"] == "qm_spec":
            at = found.at(run["context_tokens"])
            assert at.tokens_per_step(4) == pytest.approx(run["acceptance_length"])
            assert at.draft_share == 1


def test_a_drafter_that_often_has_nothing_to_say_is_taken_as_such():
    found = parse_acceptance(str(RECORDS / "spec-cpu"), "ngram").at(256)
    # 136 drafts in 774 steps, of which 8 read a prompt.
    assert found.draft_share == 136 / 766


# Traffic

SPEED = ReplicaSpeed(step_s=[0.01, 0.011, 0.012, 0.013], tokens_per_step=2.0, prefill_s=0.05, chunk_s=0.02)


def traffic(**changes) -> TrafficResult:
    speed = changes.pop("speed", SPEED)
    wanted = {"arrival_rate": 20.0, "replicas": 3, "num_requests": 400, "output_tokens": 40, "seed": 7}
    return simulate_traffic(TrafficSettings(**{**wanted, **changes}), speed)


@given(
    rate=st.floats(0.1, 500),
    replicas=st.integers(1, 12),
    output_tokens=st.integers(1, 60),
    room=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_requests_are_neither_lost_nor_made_up(rate, replicas, output_tokens, room, seed):
    speed = replace(SPEED, step_s=SPEED.step_s[:room])
    result = traffic(
        speed=speed, arrival_rate=rate, replicas=replicas, num_requests=120, output_tokens=output_tokens, seed=seed
    )
    assert len(result.requests) == 120
    for request in result.requests:
        assert request.output_tokens >= 1
        # Nobody reads a prompt or decodes faster than alone; a nan would fail here, too.
        assert request.first_token_s >= request.arrival_s + 0.05 - 1e-9
        alone_s = (request.output_tokens - 1) * 0.01 / 2
        assert request.finish_s >= request.first_token_s + alone_s - 1e-9
    # Little's law, exactly: requests in the system over time are the latencies.
    assert result.request_seconds == pytest.approx(sum(one.latency_s for one in result.requests), rel=1e-9)
    assert 0 <= result.mean_batch <= room + 1e-9
    assert 1 <= result.left_at_last_arrival <= 120


def test_a_request_alone_takes_its_prompt_and_its_steps():
    result = traffic(arrival_rate=1e-3, num_requests=50)
    for request in result.requests:
        assert request.ttft_s == pytest.approx(0.05)
        assert request.latency_s == pytest.approx(0.05 + (request.output_tokens - 1) * 0.01 / 2)
    assert result.mean_batch == pytest.approx(1)


def test_a_prompt_is_read_beside_decoding_at_the_cost_of_both():
    # Two requests at once on one replica: the second prompt shares every step with the first request's rows.
    speed = ReplicaSpeed(step_s=[0.01, 0.01], tokens_per_step=1.0, prefill_s=1.0, chunk_s=0.01)
    result = simulate_traffic(TrafficSettings(1e9, 1, 2, 10**6), speed)
    first, second = result.requests
    assert first.first_token_s == pytest.approx(1, abs=1e-6)
    assert second.first_token_s == pytest.approx(3, abs=1e-6)


def test_short_prompts_that_wait_share_a_step():
    # While the first request decodes, two prompts of a second each wait; a step of 1 s holds one of them, or both.
    for prompts_per_step, second_s, third_s in ((1, 3.0, 5.0), (2, 2.5, 4.5)):
        speed = ReplicaSpeed([1.0, 1.0, 1.0], 1e-3, prefill_s=1.0, chunk_s=1.0, prompts_per_step=prompts_per_step)
        result = simulate_traffic(TrafficSettings(1e9, 1, 3, 10**6), speed)
        found = [request.first_token_s for request in result.requests]
        assert found == pytest.approx([1.0, second_s, third_s], abs=1e-6)


def test_overloaded_replicas_serve_what_they_can():
    ceiling = 4 * 2.0 / 0.013
    busy = traffic(arrival_rate=1e4, replicas=1, num_requests=3000, speed=replace(SPEED, prefill_s=1e-6, chunk_s=1e-6))
    tokens, end_s = sum(one.output_tokens for one in busy.requests), max(one.finish_s for one in busy.requests)
    assert tokens / end_s == pytest.approx(ceiling, rel=0.02)
    assert busy.throughput_tokens_per_s < ceiling
    assert busy.too_short
    # A prompt takes a step at least, during which its place does not decode.
    assert 3.7 < busy.mean_batch <= 4
    assert busy.left_at_last_arrival > 2900


def test_a_thousand_replicas_take_one_request_each_before_any_takes_two():
    result = traffic(replicas=1000, num_requests=1000, arrival_rate=1e6)
    assert all(request.ttft_s == pytest.approx(0.05) for request in result.requests)
    assert traffic(replicas=999, num_requests=1000, arrival_rate=1e6).requests[-1].ttft_s > 0.09


def test_outputs_are_as_long_as_asked_on_average():
    result = traffic(num_requests=20000, arrival_rate=1000.0, replicas=50)
    # The mean of so many geometric lengths lies within five standard errors, but for 1 seed in a million.
    assert sum(one.output_tokens for one in result.requests) / 20000 == pytest.approx(40, abs=5 * 40 / math.sqrt(20000))
    rate = 20000 / result.requests[-1].arrival_s
    assert rate == pytest.approx(1000, rel=5 / math.sqrt(20000))
    assert {one.output_tokens for one in traffic(output_tokens=1).requests} == {1}


def test_one_seed_gives_one_answer():
    assert traffic() == traffic()
    assert traffic(seed=8).requests != traffic().requests


def test_goodput_leaves_out_who_waited_too_long():
    free = traffic()
    assert free.goodput_tokens_per_s == free.throughput_tokens_per_s
    assert free.good_share == 1
    waits = [one.ttft_s for one in free.requests[200:]]
    bound = sorted(waits)[100]
    limited = traffic(ttft_limit_s=bound)
    assert limited.requests == free.requests
    assert limited.good_share == sum(wait <= bound for wait in waits) / 200 < 1
    assert limited.goodput_tokens_per_s < limited.throughput_tokens_per_s == free.throughput_tokens_per_s
    assert traffic(tpot_limit_s=1e-9).good_share < 0.2


def test_replicas_with_room_deliver_what_is_asked_for():
    result = traffic(num_requests=20000, arrival_rate=20.0)
    # Lengths and arrivals are drawn: the half that counts holds about 10000 of them.
    assert result.throughput_tokens_per_s == pytest.approx(20 * 40, rel=0.08)
    assert not result.too_short


def test_tokens_are_counted_when_they_come():
    request = RequestTimes(output_tokens=11, arrival_s=0.0, first_token_s=2.0, finish_s=4.0)
    assert [request.tokens_between(*span) for span in ((0, 2), (0, 3), (3, 4), (0, 9), (5, 9))] == [1, 6, 5, 11, 0]
    assert RequestTimes(1, 0.0, 2.0, 2.0).tokens_between(0, 9) == 1


def test_percentiles_lie_between_neighbours():
    assert Percentiles.of([float(n) for n in range(101)]) == Percentiles(50.0, 95.0, 99.0)
    assert Percentiles.of([3.0]) == Percentiles(3.0, 3.0, 3.0)
    assert Percentiles.of([]) is None


def test_speculation_is_recommended_where_it_serves_and_only_there():
    arrivals = TrafficSettings(arrival_rate=200.0, replicas=10, num_requests=4000, output_tokens=64)
    found = predict_traffic(scenario(), arrivals, 1000, [1, 4])
    assert [row["num_speculative_tokens"] for row in found["by_k"]] == [0, 1, 4]
    assert found["recommended_k"] == 4
    useless = AcceptanceByContext("typed in", (Acceptance((0.0,)),))
    assert predict_traffic(scenario(acceptance=useless), arrivals, 1000, [1])["recommended_k"] == 0


# Against measurements


def test_what_the_model_itself_foretells_is_predicted_without_error(tmp_path):
    served = Served(load_hardware("cpu"), TargetShape.from_config(load_config(NOVELS / "target")), OURS)
    run = {
        "method": "none",
        "dtype": "float32",
        "context_tokens": 100,
        "concurrency": 1,
        "num_prompts": 2,
        "max_tokens": 50,
        "num_output_tokens": 100,
        "num_steps": 100,
        "num_drafts": 0,
        "num_speculative_tokens": 0,
        "acceptance_per_position": [],
        "speedup": 1.0,
    }
    model = served.model("none", "float32")
    step_s, prompt_s = model.step(1, 125).total_s, model.prefill_s(100)
    run |= {"ttft_ms_p50": 1000 * prompt_s, "tpot_ms_p50": 1000 * step_s}
    run["output_tokens_per_s"] = 100 / (2 * prompt_s + 98 * step_s)
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"runs": [run, {**run, "method": "other"}]}))
    (row,) = predict_runs(file, served)
    errors = [row[f"{name}_error"] for name in ("tokens_per_s", "ttft_ms", "tpot_ms")]
    assert errors == pytest.approx([0, 0, 0], abs=1e-12)
    # Plain decoding's speed-up over itself is no prediction.
    assert row["speedup_error"] is None
    file.write_text(json.dumps({"runs": []}))
    with pytest.raises(ValueError, match="has no run of none, ngram"):
        predict_runs(file, served)


def test_the_record_of_the_errors_is_what_the_model_gives_today(tmp_path):
    import simulation

    simulation.main(out=tmp_path / "simulation.json")
    recorded, found = (
        json.loads(file.read_text()) for file in (RECORDS / "simulation.json", tmp_path / "simulation.json")
    )
    assert found["files"].keys() == recorded["files"].keys()
    for part in ("files", "profile", "published"):
        assert flat(found[part]) == pytest.approx(flat(recorded[part]), rel=1e-9)
    # The machines' files hold what the fit gives.
    for name, fitted in found["fitted_overheads"].items():
        assert {key: getattr(load_hardware(name), key) for key in fitted} == pytest.approx(fitted, abs=1e-8)


def flat(value) -> list[float]:
    if isinstance(value, dict | list):
        return [number for one in (value.values() if isinstance(value, dict) else value) for number in flat(one)]
    return [float(value)] if isinstance(value, int | float) else []


# Hardware


def test_the_shipped_machines_are_valid_and_survive_writing(tmp_path):
    assert shipped_hardware() == ["cpu", "h100", "h200"]
    for name in shipped_hardware():
        load_hardware(name).write(tmp_path / "machine.json")
        assert load_hardware(str(tmp_path / "machine.json")) == load_hardware(name)


def test_a_measured_machine_has_its_rates_and_no_overheads(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "_COPIED_BYTES", 1 << 16)
    monkeypatch.setattr(measure, "_MATRIX", {"cpu": 16, "cuda": 16})
    found = measure.measure_hardware("here", repeats=2)
    assert found.memory_bytes_per_s > 0
    assert found.flops_per_s.keys() == {"float32"}
    assert found.step_overhead_s == 0
    with pytest.raises(ValueError, match="must be cpu, or cuda where torch finds a GPU, got tpu"):
        measure.measure_hardware("here", device="tpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_bytes_per_s": 0}, "memory_bytes_per_s must be a number above 0, got 0"),
        ({"memory_bytes": "80GB"}, "memory_bytes must be a number above 0, got '80GB'"),
        ({"flops_per_s": {}}, "must name dtypes out of"),
        ({"flops_per_s": {"int3": 1.0}}, "must name dtypes out of .* got .'int3'"),
        ({"flops_per_s": 5}, "flops_per_s must map dtypes to rates, got 5"),
        ({"flops_per_s": {"float32": float("inf")}}, "flops_per_s of float32 must be a number above 0, got inf"),
        ({"memory_share": 1.5}, "memory_share must be above 0 and at most 1, got 1.5"),
        ({"compute_share": 0}, "compute_share must be above 0 and at most 1, got 0"),
        ({"step_overhead_s": -1}, "step_overhead_s must be seconds from 0, got -1"),
        ({"interconnect_bytes_per_s": -1}, "interconnect_bytes_per_s must be a number above 0, got -1"),
        ({"bandwidth": 1}, r"unknown settings \['bandwidth'\], missing ones \[\]"),
    ],
)
def test_a_bad_hardware_file_is_refused(changes, message, tmp_path):
    file = tmp_path / "machine.json"
    file.write_text(json.dumps({**load_hardware("h100").to_dict(), **changes}))
    with pytest.raises(ValueError, match=message):
        load_hardware(str(file))


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be a whole number from 1, got 0"),
        ({"num_attention_heads": "many"}, "num_attention_heads must be a whole number from 1, got 'many'"),
        ({"num_key_value_heads": 5}, "key/value heads must divide query heads, got 5 and 32"),
        ({"num_local_experts": 8}, "num_local_experts is not simulated, because its experts"),
        ({"kv_lora_rank": 512}, "kv_lora_rank is not simulated"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not simulated"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "only layers of full_attention .* got sliding_attention",
        ),
    ],
)
def test_a_target_that_the_model_does_not_describe_is_refused(changes, message):
    config = load_config(RECORDS / "simulation" / "llama-8b.json")
    with pytest.raises(ValueError, match=message):
        TargetShape.from_config({**config, **changes})
    with pytest.raises(ValueError, match="hidden_size, vocab_size missing; pass the"):
        TargetShape.from_config(
            {key: value for key, value in config.items() if key not in ("hidden_size", "vocab_size")}
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("arrival_rate", 0.0),
        ("arrival_rate", math.inf),
        ("replicas", 0),
        ("num_requests", 0),
        ("output_tokens", 0),
        ("ttft_limit_s", 0.0),
        ("tpot_limit_s", -1.0),
    ],
)
def test_bad_traffic_is_refused(name, value):
    with pytest.raises(ValueError, match=f"traffic: {name} must be"):
        traffic(**{name: value})


def test_a_replica_without_room_is_refused():
    with pytest.raises(ValueError, match="room for one request"):
        ReplicaSpeed([], 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="prompts_per_step=0"):
        ReplicaSpeed([0.1], 1.0, 1.0, 1.0, 0)
    with pytest.raises(ValueError, match="must all be above 0"):
        ReplicaSpeed([0.1], 0.0, 1.0, 1.0)
    arrivals = TrafficSettings(1.0, 1, 1, 1)
    with pytest.raises(ValueError, match=r"not one request of 1048576 \+ 1 tokens fits 1 x H100"):
        predict_traffic(scenario(), arrivals, 1 << 20, [1])


@pytest.mark.parametrize("arguments", [(0, 1, 0), (1, -1, 0), (1, 1, -1), (1, 1, 1, 1.5)])
def test_a_step_out_of_range_is_refused(arguments):
    with pytest.raises(ValueError, match="batch must be at least 1"):
        CostModel(load_hardware("h100"), LLAMA_8B).step(*arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1,8,32", [1, 8, 32]), ("1..4", [1, 2, 3, 4]), ("4k, 1M", [4096, 1 << 20]), ("2,1..3", [2, 1, 3])],
)
def test_counts_are_read_as_typed(text, expected):
    assert parse_counts(text, "batch") == expected


@pytest.mark.parametrize("text", ["", "0", "-1", "a", "1,,2", "4..1", "1.5", "k"])
def test_counts_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="batch: expected whole numbers from 1, as in"):
        parse_counts(text, "batch")


# The command


def run(*arguments: str):
    return CliRunner().invoke(
        app, ["simulate", "--target-config", str(RECORDS / "simulation" / "llama-8b.json"), *arguments]
    )


def test_the_command_labels_what_it_prints_and_writes_what_it_shows(tmp_path):
    out = tmp_path / "prediction.json"
    common = [
        "--acceptance",
        "0.8,0.6",
        "--batch",
        "1,4",
        "--context",
        "1k",
        "--arrival-rate",
        "5",
        "--num-requests",
        "50",
    ]
    shown = run(*common, "--out", str(out))
    assert shown.exit_code == 0, shown.output
    # A table of steps and one of traffic.
    assert shown.stdout.count("PREDICTION, not measured") == 2
    as_json = run(*common, "--json")
    answer = json.loads(as_json.stdout)
    assert answer == json.loads(out.read_text())
    assert answer["kind"] == "prediction"
    assert [row["batch"] for row in answer["steps"]] == [1, 4]
    assert answer["traffic"][0]["recommended_k"] in (0, 1, 2)


def test_the_command_compares_with_a_record():
    target, drafter = str(NOVELS / "target"), str(NOVELS / "drafter")
    arguments = ["simulate", "--target-config", target, "--drafter", drafter, "--hardware", "cpu", "--json"]
    found = CliRunner().invoke(app, [*arguments, "--validate", str(RECORDS / "spec-cpu")])
    (rows,) = json.loads(found.stdout)["files"].values()
    assert [row["method"] for row in rows] == ["none", "ngram", "qm_spec", "qm_spec-window"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --acceptance to predict with or --validate"),
        (["--acceptance", "what"], "neither a results.json, nor a folder with one, nor shares"),
        (["--acceptance", "0.5,0.6"], "must lie in 0..1 and never rise"),
        (["--acceptance", "nan"], "must lie in 0..1 and never rise"),
        (["--acceptance", "0.5", "--num-speculative-tokens", "2"], r"must lie in 1\.\.1.*got \[2\]; record a run"),
        (["--acceptance", "0.5", "--hardware", "abacus"], "neither one of cpu, h100, h200 nor a file"),
        (["--acceptance", "0.5", "--dtype", "int3"], "H100 SXM has no rate for int3"),
        (["--acceptance", "0.5", "--tensor-parallel", "3"], "must divide the target's 32 heads, got 3"),
        (
            ["--acceptance", "0.5", "--hardware", "cpu", "--dtype", "float32", "--tensor-parallel", "2"],
            "no interconnect",
        ),
        (["--acceptance", "0.5", "--drafter", str(NOVELS / "drafter")], "must be the target's 4096, got 192"),
        (
            ["--acceptance", str(RECORDS / "spec-cpu"), "--method", "magic"],
            "no run of magic that drafted; it has ngram",
        ),
        (["--acceptance", "0.5", "--max-num-seqs", "0"], "max_num_seqs: must be at least 1, got 0"),
        (["--acceptance", "0.5", "--arrival-rate", "0"], "arrival_rate must be requests per second above 0"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message):
    found = run(*arguments)
    assert isinstance(found.exception, ValueError | OSError)
    assert re.search(message, str(found.exception)), str(found.exception)
