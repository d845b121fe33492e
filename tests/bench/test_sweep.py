"""Sweeps: reading them, running them with engines of a script, and what is recommended of made-up results."""

from __future__ import annotations

import json
import shlex

import pytest
from support.synthetic_results import made_up_results, made_up_rows, made_up_run

from qm_spec.bench.engine.shards import EngineSpec
from qm_spec.bench.report.measurements import Measurements
from qm_spec.bench.report.recommend import format_front, pareto_front, recommend, serve_command
from qm_spec.bench.runs.benchmark import Benchmark
from qm_spec.bench.settings import Sweep
from qm_spec.bench.sweep import parse_sweep
from qm_spec.cli.evaluate import run_with_progress


def test_values_are_lists_and_ranges():
    assert parse_sweep(["num_speculative_tokens=1..3,8 temperature=0,0.5", "concurrency=1,8"]) == Sweep(
        num_speculative_tokens=(1, 2, 3, 8), temperature=(0.0, 0.5), concurrency=(1, 8)
    )
    assert parse_sweep([]) == Sweep()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("depth=1", "each of concurrency, context_lengths, .* may be given once as NAME=VALUES, got 'depth=1'"),
        ("concurrency=1 concurrency=2", "may be given once"),
        ("concurrency=two", "sweep: concurrency: must be integers like 1,2,8 or 1..8, got 'two'"),
        ("concurrency=1.5", "must be integers"),
        ("temperature=warm", "must be numbers like"),
        ("concurrency", "must be different numbers like 1,2,8 or 1..8, got ''"),
        ("concurrency=4..1", "must be different numbers"),
        ("concurrency=1,2,1", "must be different numbers"),
    ],
)
def test_other_values_are_refused(entry, message):
    with pytest.raises(ValueError, match=message):
        parse_sweep([entry])


def test_a_sweep_measures_every_combination_with_one_engine_per_depth(
    benchmark_settings, engine_command, starts, monkeypatch, capsys
):
    sweep = Sweep(num_speculative_tokens=(1, 2), temperature=(0.0, 1.0), concurrency=(1, 2))
    asked = benchmark_settings(sweep=sweep)
    benchmark = Benchmark(asked)
    monkeypatch.setattr(Benchmark.run, "__defaults__", (engine_command,))
    assert run_with_progress(benchmark) == 0
    results = json.loads((asked.out / "results.json").read_text())
    found = [
        (run["method"], run["num_speculative_tokens"], run["temperature"], run["concurrency"])
        for run in results["runs"]
    ]
    assert found == [
        (method, depth, temperature, concurrency)
        for method, depth in (("none", 0), ("ngram", 1), ("ngram", 2))
        for temperature in (0.0, 1.0)
        for concurrency in (1, 2)
    ]
    # Plain decoding drafts nothing, so it runs once for both depths; each run is compared under its own conditions.
    # New engines for each of two passes.
    assert [start[0] for start in starts()] == 2 * ["none", "ngram", "ngram"]
    assert {run["speedup"] for run in results["runs"]} == {1.0, 2.0}
    best = results["recommendation"]
    assert (best["method"], best["speedup"], best["num_candidates"], best["num_conditions"]) == ("ngram", 2.0, 3, 4)
    output = capsys.readouterr().out
    header = [cell.strip() for cell in output.splitlines()[0].strip("|").split("|")]
    assert header[:4] == ["method", "K", "temperature", "concurrency"]
    assert output.splitlines()[-1] == best["command"]


def made_up_sweep():
    """K = 4 is faster alone, K = 2 with 8 requests in flight, and at 32 nothing is."""
    seconds = {1: {2: 0.010, 4: 0.008}, 8: {2: 0.012, 4: 0.018}, 32: {2: 0.028, 4: 0.040}}
    runs = []
    for concurrency, by_depth in seconds.items():
        plain = made_up_rows("none", concurrency=concurrency)
        runs.append(made_up_run("none", plain, plain, concurrency=concurrency))
        for depth, seconds_per_step in by_depth.items():
            rows = made_up_rows("qm_spec", seconds_per_step=seconds_per_step, concurrency=concurrency)
            run = made_up_run("qm_spec", rows, plain, concurrency=concurrency)
            runs.append({**run, "num_speculative_tokens": depth})
    return made_up_results(*runs)


def engine(depth: int, *, enforce_eager: bool = False) -> EngineSpec:
    config = {"method": "eagle3", "model": "my drafter", "num_speculative_tokens": depth} if depth else None
    return EngineSpec("/somewhere/target", config, "auto", 512, 32, enforce_eager, 0)


ENGINES = {("none", 0): engine(0), ("qm_spec", 2): engine(2), ("qm_spec", 4): engine(4)}


def test_the_front_holds_what_nothing_beats():
    front = pareto_front(Measurements(made_up_sweep()).all)
    found = [(one.setting.concurrency, one.setting.method, one.setting.num_speculative_tokens) for one in front]
    assert found == [(1, "qm_spec", 4), (8, "qm_spec", 2), (32, "none", 0)]
    lines = format_front(made_up_sweep()).splitlines()
    assert len(lines) == 2 + 3
    assert all("-" in rule for rule in lines[1].strip("|").split("|"))


def test_the_recommendation_is_the_best_mean_with_its_interval():
    results = made_up_sweep()
    best = recommend(results, "target", ENGINES)
    speedups = [run["speedup"] for run in results["runs"] if run["num_speculative_tokens"] == 2]
    assert (best.method, best.num_speculative_tokens, best.num_candidates, best.num_conditions) == ("qm_spec", 2, 3, 3)
    assert best.speedup.value == pytest.approx((speedups[0] * speedups[1] * speedups[2]) ** (1 / 3))
    assert best.speedup.low < best.speedup.value < best.speedup.high
    assert "is not shown" not in str(best)
    words = shlex.split(best.command)
    assert words[:7] == ["vllm", "serve", "target", "--dtype", "float32", "--max-num-seqs", "32"]
    assert json.loads(words[8]) == ENGINES["qm_spec", 2].speculative_config


def test_the_command_serves_what_was_measured():
    assert serve_command("none", engine(0, enforce_eager=True), "a b", "bfloat16", 4) == (
        "vllm serve 'a b' --dtype bfloat16 --max-num-seqs 4 --enforce-eager"
    )
    assert serve_command("qm_spec-lookup", engine(2), "t", "bfloat16", 4).startswith("QM_SPEC_LOOKUP=")


def test_what_slows_down_is_not_recommended():
    plain = made_up_rows("none")
    slow = made_up_rows("qm_spec", seconds_per_step=0.1)
    runs = made_up_run("none", plain, plain), made_up_run("qm_spec", slow, plain)
    best = recommend(made_up_results(*runs), "target", ENGINES)
    assert (best.method, best.command) == ("none", serve_command("none", engine(0), "target", "float32", 1))
    assert str(best).startswith("recommended: no speculation")


def test_a_difference_within_the_interval_is_not_called_faster():
    plain = made_up_rows("none", num_prompts=6)
    rows = made_up_rows("qm_spec", seconds_per_step=0.0245, noise=0.3, num_prompts=6)
    run = made_up_run("qm_spec", rows, plain)
    # Whatever the noise has made of the speed-up: 1.01, and an interval on both sides of 1.
    run = {**run, "speedup": 1.01}
    best = recommend(made_up_results(made_up_run("none", plain, plain), run), "target", ENGINES)
    assert best.speedup.low < 1 < best.speedup.high
    assert "that it is faster at all is not shown" in str(best)


def test_what_was_not_measured_everywhere_is_no_candidate():
    results = made_up_sweep()
    results["runs"] = [run for run in results["runs"] if (run["num_speculative_tokens"], run["concurrency"]) != (2, 8)]
    assert recommend(results, "target", ENGINES).num_speculative_tokens != 2
    results["runs"] = []
    assert recommend(results, "target", ENGINES) is None
