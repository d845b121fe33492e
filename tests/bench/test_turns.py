"""Engines in turn: who decodes what when, and what is made of times that stand next to each other."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_engine import decode

from qm_spec.bench.engine.capacity import engines_at_once, kv_cache_bytes
from qm_spec.bench.engine.shards import EngineSpec, PassResult, RequestResult, ShardSpec, TokenPrompt
from qm_spec.bench.methods import METHODS, Method
from qm_spec.bench.results import turns as paired
from qm_spec.bench.results.doubts import doubts
from qm_spec.bench.results.table import category_tables
from qm_spec.bench.results.turns import Turn
from qm_spec.bench.runs.benchmark import Benchmark
from qm_spec.bench.runs.plan import Measurement, plan_rounds
from qm_spec.bench.settings import Sweep


def quiet(*event) -> None:
    """Report no progress."""


# Who decodes what when


def test_each_prompt_is_decoded_by_all_before_the_next_one(benchmark_settings, engine_command, turns):
    Benchmark(benchmark_settings(methods=("none", "ngram", "ngram-16"))).run(quiet, engine_command)
    found = turns()
    forwards = ["none", "ngram", "ngram-16"]
    # Turned round from prompt to prompt, and from pass to pass, so that nobody always comes after the same one.
    orders = [forwards[::-1], forwards, forwards[::-1], forwards, forwards[::-1]]
    orders += [order[::-1] for order in orders]
    expected = [(method, f"p{number % 5}") for number, order in enumerate(orders) for method in order]
    assert [(method, prompt) for method, prompt, _ in found] == expected
    processes = [process for _, _, process in found]
    assert len(set(processes)) == 6 and set(processes[:15]).isdisjoint(processes[15:])


def test_several_requests_in_flight_take_turns_by_waves(benchmark_settings, engine_command, turns, monkeypatch):
    monkeypatch.setattr("qm_spec.bench.runs.plan._WAVES_PER_TURN", 1)
    Benchmark(benchmark_settings(concurrency=2, repeats=1)).run(quiet, engine_command)
    assert [(method, prompts) for method, prompts, _ in turns()] == [
        ("ngram", "p0"),
        ("none", "p0"),
        ("none", "p1,p2"),
        ("ngram", "p1,p2"),
        ("ngram", "p3,p4"),
        ("none", "p3,p4"),
    ]


def test_every_setting_is_warmed_up_on_each_engine_before_its_first_turn(benchmark_settings):
    benchmark = Benchmark(benchmark_settings(sweep=Sweep(concurrency=(1, 2))))
    engines = {}
    for one in benchmark._measurements:
        engines.setdefault(one.engine_name, []).append(one)
    first, second = plan_rounds(engines, 2, None)
    assert first.engines == second.engines == ("none", "ngram")
    assert first.turns == ((0, None), *((0, part) for part in range(5)), (1, None), (1, 0))
    assert engines["ngram"][0].warm_up.repeats == 0 and engines["ngram"][0].warm_up.warm_up
    assert not any(part.warm_up for one in benchmark._measurements for part in one.parts)


def test_a_trace_keeps_its_pace():
    prompts = tuple(TokenPrompt(str(number), (1,), arrival_s=float(number)) for number in range(9))
    spec = ShardSpec(EngineSpec("t", None, "float32", 8, 1, True, 0), prompts, 1, 0.0, 1, 0, 3)
    one = Measurement("none", "none", None, spec, False)
    one.split_for_turns()
    assert [part.prompts for part in one.parts] == [prompts]


def test_engines_that_do_not_fit_run_in_groups_each_with_its_own_plain_decoding(
    benchmark_settings, engine_command, turns
):
    asked = benchmark_settings(methods=("none", "ngram", "ngram-16"), engines_at_once=2, repeats=1)
    runs = Benchmark(asked).run(quiet, engine_command)["runs"]
    groups = [{method for method, _, _ in turns()[:10]}, {method for method, _, _ in turns()[10:]}]
    assert groups == [{"none", "ngram"}, {"none", "ngram-16"}]
    assert [(run["method"], run["num_prompts"]) for run in runs] == [("none", 5), ("ngram", 5), ("ngram-16", 5)]
    assert [run["speedup"] for run in runs] == pytest.approx([1, 2, 2])


def test_a_failing_engine_leaves_the_turns_to_the_others(benchmark_settings, engine_command, faults, turns):
    faults(ngram="crash at 3")
    benchmark = Benchmark(benchmark_settings(methods=("none", "ngram", "ngram-16"), repeats=2))
    runs = {run["method"]: run for run in benchmark.run(quiet, engine_command)["runs"]}
    assert [(one["num_prompts"], one["num_passes"]) for one in runs.values()] == [(5, 2), (3, 1), (5, 2)]
    assert runs["ngram"]["speedup"] == pytest.approx(2)
    # It has failed, so it is not started again.
    assert len({process for method, _, process in turns() if method == "ngram"}) == 1
    assert [one["method"] for one in benchmark.results["failures"]] == ["ngram"]


# What sets no scale


def test_what_slows_the_machine_at_the_start_changes_no_speedup(benchmark_settings, engine_command, faults):
    # Six shards ten times slower: two turns of three. Engine after engine, plain decoding alone would have had them.
    faults(all="slow start")
    asked = benchmark_settings(methods=("none", "ngram", "ngram-16"), repeats=1)
    benchmark = Benchmark(asked)
    runs = benchmark.run(quiet, engine_command)["runs"]
    for run in runs[1:]:
        assert (run["speedup"], run["speedup_low"], run["speedup_high"]) == pytest.approx((2, 2, 2))
        assert run["decode_speedup"] == pytest.approx(2)
    # Tokens per second do suffer, and that is said.
    assert runs[0]["output_tokens_per_s"] < 1
    assert any("the machine's own speed changed" in note for note in benchmark.notes)


@pytest.mark.parametrize("slow", ["none", "ngram"])
def test_an_engine_that_is_slow_in_one_pass_sets_no_scale(benchmark_settings, engine_command, faults, slow):
    faults(**{slow: "slow first process"})
    benchmark = Benchmark(benchmark_settings(repeats=3))
    _, run = benchmark.run(quiet, engine_command)["runs"]
    assert (run["speedup"], run["speedup_low"], run["speedup_high"]) == pytest.approx((2, 2, 2))
    assert run["speedup_per_pass"] == pytest.approx([20 if slow == "none" else 0.2, 2, 2])
    assert any("from pass to pass" in note for note in benchmark.notes)


def test_outputs_that_go_on_behind_their_end_are_counted(benchmark_settings, engine_command):
    def notes(**changes):
        benchmark = Benchmark(benchmark_settings(methods=("none",), **changes))
        # Token 5 ends a text; outputs begin with tokens 0 to 4 and count upwards.
        benchmark._config.eos_token_id = 5
        benchmark.run(quiet, engine_command)
        return [note for note in benchmark.notes if "end-of-text" in note]

    (note,) = notes()
    # That of p0 ends before it, and that of p1 with it.
    assert note.startswith("3 of 5 outputs of none go on behind an end-of-text token")
    assert notes(stop_at_eos=True) == notes(max_tokens=1) == []


def test_plain_decoding_that_differs_from_itself_tells_the_noise(benchmark_settings, engine_command):
    benchmark = Benchmark(benchmark_settings(methods=("none", "none-again"), repeats=1))
    _, again = benchmark.run(quiet, engine_command)["runs"]
    assert list(doubts([again])) == []
    (told,) = doubts([{**again, "speedup": 0.8}])
    assert "none-again" in told and "a smaller difference than 25 % between methods is noise" in told


# A method is one record


def test_a_method_is_added_by_one_record(benchmark_settings, engine_command, monkeypatch, tmp_path):
    configure = lambda depth, drafter: {"method": "mine", "num_speculative_tokens": depth}  # noqa: E731
    mine = Method(
        "mine", "something new", configure, "#123456", "o", num_speculative_tokens=7, environment={"MINE": "1"}
    )
    monkeypatch.setitem(METHODS, "mine", mine)
    asked = benchmark_settings(methods=("none", "mine"), sweep=Sweep(concurrency=(1, 2)))
    benchmark = Benchmark(asked)
    runs = benchmark.run(quiet, engine_command)["runs"]
    assert [(run["method"], run["num_speculative_tokens"]) for run in runs[2:]] == 2 * [("mine", 7)]
    assert (asked.out / "speedup.png").exists()
    assert benchmark.recommendation.command.startswith("MINE=1 vllm serve")
    from qm_spec.bench.report.render import write_report

    page, _ = write_report(asked.out)
    assert "mine" in page.read_text()


def test_a_baseline_may_have_a_name_of_its_own(benchmark_settings, engine_command, tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"theirs=.* must be a folder with config.json and"):
        Benchmark(benchmark_settings(baselines={"theirs": folder}))
    (folder / "config.json").write_text(json.dumps({"num_speculative_tokens": 3}))
    (folder / "model.safetensors").touch()
    runs = Benchmark(benchmark_settings(baselines={"theirs": folder})).run(quiet, engine_command)["runs"]
    assert [(run["method"], run["num_speculative_tokens"]) for run in runs] == [
        ("none", 0),
        ("ngram", 4),
        ("theirs", 3),
    ]
    (folder / "config.json").write_text(json.dumps({"num_speculative_tokens": 3, "target_fingerprint": "0" * 16}))
    with pytest.raises(ValueError, match=r"theirs=.* was trained for the target with fingerprint 0000"):
        Benchmark(benchmark_settings(baselines={"theirs": folder}))


# Categories and flips


def test_each_category_has_its_own_numbers(benchmark_settings, engine_command):
    runs = Benchmark(benchmark_settings()).run(quiet, engine_command)["runs"]
    even, odd = runs[1]["categories"]
    assert (even["category"], even["num_prompts"], even["num_prompts_different"]) == ("even", 3, 0)
    assert (odd["category"], odd["num_prompts"]) == ("odd", 2)
    # Half of what is drafted is accepted: one token of each draft's two.
    assert (even["acceptance_length"], even["tokens_per_step"]) == (2.0, 1.0)
    assert [one["speedup"] for one in (even, odd)] == pytest.approx([2, 2])
    ((title, header, rows),) = category_tables(runs)
    assert title == "temperature 0, concurrency 1, 3 tokens of context"
    assert header == ["category", "prompts", "none", "ngram"]
    assert [row[0] for row in rows] == ["even", "odd", "(slowest)"]
    assert rows[0][3] == "2.00, 2.00 / 1.00"


def test_in_16_bits_flips_are_set_beside_the_targets_own(benchmark_settings, engine_command, faults):
    faults(ngram="differ")
    for methods, told in (
        (("none", "none-again", "ngram"), "differ in 0 (none-again)"),
        (("none", "ngram"), "--methods none-again,... would count"),
    ):
        benchmark = Benchmark(benchmark_settings(methods=methods, dtype="bfloat16"))
        benchmark.run(quiet, engine_command)
        (note,) = benchmark.notes
        assert "5 of 5 outputs differ from none in bfloat16" in note and told in note


# Statistics


def pass_of(seconds, num_tokens=5, first=0.5):
    """Make a pass of one request."""
    request = RequestResult("a", tuple(range(num_tokens)), num_tokens, first, (seconds - first) / (num_tokens - 1))
    return PassResult(seconds, decode(SPEC, "none").counts, (request,))


SPEC = ShardSpec(EngineSpec("t", None, "float32", 8, 1, True, 0), (TokenPrompt("a", (1,)),), 5, 0.0, 1, 0, 1)


def turn_of(*pairs):
    return Turn(SPEC.prompts, tuple((pass_of(ours), plain and pass_of(plain)) for ours, plain in pairs))


seconds = st.floats(0.6, 50)
# The first estimate draws the resamples.
slow_at_first = settings(deadline=None)


@slow_at_first
@given(st.lists(st.lists(st.tuples(seconds, seconds), min_size=1, max_size=4), min_size=1, max_size=6))
def test_a_speedup_and_its_inverse_agree_turn_by_turn(pairs):
    for some in pairs:
        forth, back = turn_of(*some).speedup, turn_of(*((b, a) for a, b in some)).speedup
        assert forth * back == pytest.approx(1)


@slow_at_first
@given(st.lists(st.tuples(seconds, seconds), min_size=1, max_size=8))
def test_with_one_pass_the_speedup_is_the_ratio_of_total_times(pairs):
    turns = [turn_of(pair) for pair in pairs]
    ours, plain = (sum(side) for side in zip(*pairs, strict=True))
    assert paired.speedup(turns).value == pytest.approx(plain / ours)
    assert paired.request_speedup(turns).value == pytest.approx(plain / ours)
    assert paired.speedup_per_pass(turns) == pytest.approx([plain / ours])


@slow_at_first
@given(st.lists(st.floats(1.2, 5), min_size=5, max_size=9))
def test_a_drift_from_turn_to_turn_leaves_the_speedup(drift):
    turns = [turn_of((1.0 * pace, 3.0 * pace), (1.1 * pace, 3.3 * pace)) for pace in drift]
    found = paired.speedup(turns)
    assert (found.value, found.low, found.high) == pytest.approx((3, 3, 3))


def test_a_turn_without_plain_decoding_is_in_no_ratio():
    turns = [turn_of((1.0, 2.0)), turn_of((1.0, None))]
    assert paired.speedup(turns).value == pytest.approx(2)
    assert turns[1].speedup is None and turns[1].request_speedups() == [None]
    assert paired.speedup(turns[1:]) is None and paired.first_token_delay_ms(turns[1:]) is None


def test_decoding_alone_leaves_the_first_token_out():
    ours, plain = pass_of(4.5, first=4.0), pass_of(5.0, first=4.0)
    turns = [Turn(SPEC.prompts, ((ours, plain),))]
    assert paired.speedup(turns).value == pytest.approx(5 / 4.5)
    assert paired.request_speedup(turns, paired.after_first_token).value == pytest.approx(1 / 0.5)
    late = replace(ours, requests=(replace(ours.requests[0], ttft_s=4.25),))
    assert paired.first_token_delay_ms([Turn(SPEC.prompts, ((late, plain),))]) == pytest.approx(250)


def test_intervals_over_prompts_hold_what_they_promise():
    rng = np.random.default_rng(0)
    truth, held, trials = 2.0, 0, 200
    for _ in range(trials):
        turns = []
        for _ in range(12):
            ours = rng.uniform(0.8, 1.6)
            pace = rng.uniform(1, 1.5)
            # Mean ratio 2, weighted by our own time, whatever the machine does meanwhile.
            turns.append(turn_of((ours * pace, ours * pace * truth * (1 + rng.uniform(-0.4, 0.4)))))
        found = paired.speedup(turns)
        held += found.low <= truth <= found.high
    assert 0.9 <= held / trials <= 0.99


# Memory


def test_a_cache_holds_the_longest_requests_that_meet():
    config = SimpleNamespace(num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=30, hidden_size=576)
    token = 2 * 3 * 64 * (30 + 2) * 4
    found = kv_cache_bytes(config, [100, 5000, 6000, 200], 2, 128, "float32")
    assert found == int(1.25 * token * (11_000 + 2 * (128 + 128)))
    assert kv_cache_bytes(config, [100, 5000, 6000, 200], 2, 128, "bfloat16") == math.ceil(found / 2)
    # No cache is tiny, and a config of another kind leaves it to vLLM.
    assert kv_cache_bytes(config, [10], 1, 10, "float32") == 1 << 28
    assert kv_cache_bytes(SimpleNamespace(), [10], 1, 10, "float32") is None


def test_as_many_engines_as_fit_but_never_plain_decoding_alone(monkeypatch):
    monkeypatch.setattr("qm_spec.bench.engine.capacity.free_bytes", lambda device: 100)
    assert engines_at_once(20, "cpu") == 4
    assert engines_at_once(80, "cpu") == 2
