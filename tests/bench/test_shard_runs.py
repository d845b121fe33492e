"""Sharding, arrivals, counts per request, and what a benchmark makes of finished, stored and failed shards."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.sudden_death import run_until, stamps, wait_for_end

from qm_spec.bench.engine.metrics import DraftCounts
from qm_spec.bench.engine.shards import EngineSpec, ShardSpec, TokenPrompt, split_shard
from qm_spec.bench.engine.store import ShardStore
from qm_spec.bench.engine.worker import request_counts, run_requests
from qm_spec.bench.results.file import request_rows
from qm_spec.bench.runs.benchmark import Benchmark
from qm_spec.bench.settings import RaySettings

ENGINE = EngineSpec("target", None, "float32", 64, 1, True, 0)


def shard(num_prompts: int, **changes) -> ShardSpec:
    prompts = tuple(TokenPrompt(f"p{i}", (i,)) for i in range(num_prompts))
    return replace(ShardSpec(ENGINE, prompts, 3, 0.0, 1, 7, 1), **changes)


# Sharding


@given(num_prompts=st.integers(1, 60), num_parts=st.integers(1, 70))
def test_every_prompt_is_in_exactly_one_part(num_prompts, num_parts):
    whole = shard(num_prompts)
    parts = split_shard(whole, num_parts)
    assert len(parts) == min(num_prompts, num_parts)
    # In order and once each: contiguous parts.
    assert tuple(prompt for part in parts for prompt in part.prompts) == whole.prompts
    sizes = [len(part.prompts) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    # Request i samples with seed + i, wherever it is.
    assert [part.seed + i for part in parts for i in range(len(part.prompts))] == [7 + i for i in range(num_prompts)]


def test_parts_of_a_trace_begin_at_its_times():
    prompts = tuple(TokenPrompt(str(i), (i,), arrival_s=10.0 * i) for i in range(4))
    parts = split_shard(shard(4, prompts=prompts), 2)
    assert [[prompt.arrival_s for prompt in part.prompts] for part in parts] == [[0.0, 10.0], [0.0, 10.0]]


def test_no_parts_are_refused():
    with pytest.raises(ValueError, match="num_parts must be at least 1, got 0"):
        split_shard(shard(3), 0)


# The engine's side


class SlowEngine:
    """Takes a second per step and puts out one token per request and step."""

    def __init__(self, num_tokens: int) -> None:
        self.now = 0.0
        self.num_tokens = num_tokens
        self.running: dict[str, list[int]] = {}
        self.added: list[tuple[str, float]] = []

    def add_request(self, request_id, prompt, params):
        self.added.append((request_id, self.now))
        self.running[request_id] = []

    def step(self):
        self.now += 1.0
        found = []
        for request_id, token_ids in deque(self.running.items()):
            token_ids.append(0)
            finished = len(token_ids) == self.num_tokens
            output = SimpleNamespace(token_ids=list(token_ids))
            found.append(SimpleNamespace(request_id=request_id, outputs=[output], finished=finished))
            if finished:
                del self.running[request_id]
        return found

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_requests_of_a_trace_come_when_they_came():
    engine = SlowEngine(num_tokens=2)
    # The last row came first; the gap before 10 s is slept through.
    prompts = [TokenPrompt("a", (1,), arrival_s=0.5), TokenPrompt("b", (1,), arrival_s=10.0), TokenPrompt("c", (1,))]
    elapsed_s, results = run_requests(
        engine, prompts, lambda number: None, 2, clock=lambda: engine.now, sleep=engine.sleep
    )
    assert engine.added == [("2", 0.0), ("0", 1.0), ("1", 10.0)]
    assert elapsed_s == 12.0
    assert [result.arrival_s for result in results] == [0.5, 10.0, 0.0]
    # Half a second passed in the step that was under way.
    assert [result.ttft_s for result in results] == [1.5, 1.0, 1.0]


def test_waiting_for_room_counts_in_a_trace():
    engine = SlowEngine(num_tokens=2)
    prompts = [TokenPrompt(str(i), (1,), arrival_s=0.0) for i in range(2)]
    _, results = run_requests(engine, prompts, lambda number: None, 1, clock=lambda: engine.now, sleep=engine.sleep)
    assert [result.ttft_s for result in results] == [1.0, 3.0]
    assert [result.latency_s for result in results] == [2.0, 4.0]


def test_counts_of_a_request_follow_from_vllms_histogram():
    # 5 drafts of up to 3: none kept once, one kept twice, all three kept twice.
    metrics = SimpleNamespace(histogram=[1, 2, 0, 2], num_draft_tokens=14)
    found = request_counts(SimpleNamespace(spec_decode_metrics=metrics))
    assert found == DraftCounts(5, 14, 8, (4, 2, 2))
    assert request_counts(SimpleNamespace(spec_decode_metrics=None)) == DraftCounts()


# The store


def test_a_result_is_found_for_exactly_what_was_asked(tmp_path, results):
    store = ShardStore(tmp_path / "shards", resume=True)
    store.save("ngram", "cpu", shard(2), results)
    assert store.load("ngram", "cpu", shard(2)) == results
    assert store.load("ngram", "cpu", shard(2), number=1) is None
    assert store.load("none", "cpu", shard(2)) is None
    assert store.load("ngram", "cuda", shard(2)) is None
    assert store.load("ngram", "cpu", shard(3)) is None
    assert store.load("ngram", "cpu", shard(2, temperature=1.0)) is None
    assert ShardStore(tmp_path / "shards", resume=True).load("ngram", "cpu", shard(2)) == results
    assert ShardStore(tmp_path / "shards", resume=False).load("ngram", "cpu", shard(2)) is None


@pytest.fixture
def results():
    from support.fake_engine import decode

    from qm_spec.bench.engine.shards import ShardResult

    return [ShardResult("cpu", "float32", (decode(shard(2), method),)) for method in ("ngram", "none")]


# Benchmarks


def quiet(*event) -> None:
    """Report no progress."""


def test_rows_of_requests_add_up_to_the_run(benchmark_settings, engine_command):
    asked = benchmark_settings()
    run = Benchmark(asked).run(quiet, engine_command)["runs"][1]
    rows = request_rows(run)
    assert [row.prompt_id for row in rows] == ["p0", "p1", "p2", "p3", "p4"]
    assert [row.category for row in rows] == ["even", "odd", "even", "odd", "even"]
    for name in ("num_steps", "num_drafts", "num_draft_tokens", "num_accepted_tokens"):
        assert sum(getattr(row, name) for row in rows) == run[name]
    assert [row.num_drafts for row in rows] == [1, 2, 3, 4, 5]
    assert rows[0].latency_s == pytest.approx(0.01 + 4 * 0.002)


def test_a_resumed_benchmark_starts_no_engine_for_what_is_there(benchmark_settings, engine_command, starts, faults):
    faults(ngram="crash")
    first = Benchmark(benchmark_settings()).run(quiet, engine_command)
    assert [failure["method"] for failure in first["failures"]] == ["ngram"]
    faults()
    before = len(starts())
    again = Benchmark(benchmark_settings(resume=True))
    second = again.run(quiet, engine_command)
    # Plain decoding is measured again beside it, but its own run stays what it was.
    assert [start[0] for start in starts()[before:]] == 2 * ["none", "ngram"]
    assert (second["runs"][1]["num_passes"], second["runs"][1]["speedup"]) == (2, pytest.approx(2.0))
    assert second["failures"] == []
    assert second["runs"][0] == first["runs"][0]
    assert [run["method"] for run in second["runs"]] == ["none", "ngram"]
    assert any("10 of 20 parts were measured by an earlier run" in note for note in again.notes)
    # Without --resume all is measured again.
    before = len(starts())
    Benchmark(benchmark_settings()).run(quiet, engine_command)
    assert len(starts()) == before + 4


def test_an_interrupted_benchmark_goes_on_with_the_turns_that_are_left(
    benchmark_settings, engine_command, starts, turns
):
    def interrupt(name, state, done, total):
        if (name, done) == ("ngram", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Benchmark(benchmark_settings(repeats=1)).run(interrupt, engine_command)
    before = len(turns())
    runs = Benchmark(benchmark_settings(repeats=1, resume=True)).run(quiet, engine_command)["runs"]
    # Nobody had finished the third turn, so both take it again.
    assert {(method, prompt) for method, prompt, _ in turns()[before:]} == {
        (method, prompt) for method in ("none", "ngram") for prompt in ("p2", "p3", "p4")
    }
    assert [run["num_prompts"] for run in runs] == [5, 5]
    before = len(starts())
    assert Benchmark(benchmark_settings(repeats=1, resume=True)).run(quiet, engine_command)["runs"] == runs
    assert len(starts()) == before


def counted(results):
    """What does not depend on the clock."""
    return [
        (run["method"], run["num_drafts"], run["num_accepted_tokens"], run["num_output_tokens"], run["speedup"],
         run["lossless"], [(row["prompt_id"], row["num_drafts"]) for row in run["requests"]])
        for run in results["runs"]
    ]  # fmt: skip


@pytest.mark.parametrize("killed_at", [1, 6, 13])
def test_a_killed_benchmark_leaves_no_engine_and_goes_on_to_the_same_numbers(
    killed_at, benchmark_settings, engine_command, starts, turns
):
    """SIGKILL while a shard is measured, of 20; nothing can be tidied up then."""
    asked = benchmark_settings()
    whole = Benchmark(replace(asked, out=asked.out.with_name("whole"))).run(quiet, engine_command)
    before = len(turns())
    driver = multiprocessing.get_context("fork").Process(
        target=lambda: Benchmark(benchmark_settings()).run(quiet, engine_command)
    )
    driver.start()
    while len(turns()) < before + killed_at:
        assert driver.is_alive()
        time.sleep(0.001)
    driver.kill()
    driver.join()
    assert driver.exitcode == -signal.SIGKILL
    for _, pid, _, _ in starts():
        while Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
            time.sleep(0.01)
    resumed = Benchmark(benchmark_settings(resume=True)).run(quiet, engine_command)
    assert counted(resumed) == counted(whole) and resumed["failures"] == []
    again = len(turns())
    assert Benchmark(benchmark_settings(resume=True)).run(quiet, engine_command)["runs"] == resumed["runs"]
    assert len(turns()) == again


def settle(benchmark_settings, engine_command):
    """Go on to the end; return the results, which must say of no failure."""
    results = Benchmark(benchmark_settings(resume=True)).run(quiet, engine_command)
    assert results["failures"] == []
    return results


@pytest.mark.parametrize("seed", range(2))
def test_a_benchmark_killed_again_and_again_keeps_what_it_had_finished(
    seed, benchmark_settings, engine_command, starts
):
    """At random file operations: between a shard's result and its file, in the middle of `results.json`."""
    asked, chance = benchmark_settings(), random.Random(seed)
    whole = Benchmark(replace(asked, out=asked.out.with_name("whole"))).run(quiet, engine_command)
    num_killed, kept = 0, {}
    for _ in range(3):
        before = len(starts())
        num_killed += run_until(
            chance.randint(1, 40),
            asked.out,
            lambda: Benchmark(benchmark_settings(resume=True)).run(quiet, engine_command),
        )
        wait_for_end([int(start[1]) for start in starts()[before:]])
        now = stamps(asked.out / "shards", "*.json")
        # Of a turn in which one engine's result was saved and the other's was not, both are measured again.
        assert kept.keys() <= now.keys() and len(kept.items() - now.items()) <= 1
        kept = now
        if (asked.out / "results.json").exists():
            json.loads((asked.out / "results.json").read_text())
    assert num_killed > 1
    assert counted(settle(benchmark_settings, engine_command)) == counted(whole)
    assert len(kept.items() - stamps(asked.out / "shards", "*.json").items()) <= 1


@pytest.mark.parametrize(("seed", "victim"), [(0, "none"), (1, "ngram")])
def test_an_engine_killed_at_random_costs_its_turn_and_nothing_that_was_finished(
    seed, victim, benchmark_settings, engine_command, faults
):
    """SIGKILL in the middle of a shard, or of the line that tells its result."""
    asked, chance = benchmark_settings(), random.Random(seed)
    whole = Benchmark(replace(asked, out=asked.out.with_name("whole"))).run(quiet, engine_command)
    kept = {}
    for _ in range(2):
        # A warm-up is a shard, too.
        faults(**{victim: f"kill at {chance.randint(5, 16)}"})
        failures = Benchmark(benchmark_settings(resume=True)).run(quiet, engine_command)["failures"]
        assert all(one["method"] == victim and "SIGKILL" in one["error"] for one in failures)
        now = stamps(asked.out / "shards", "*.json")
        # Plain decoding that has failed leaves a turn of which the other's half is measured again.
        assert kept.keys() <= now.keys() and len(kept.items() - now.items()) <= 1
        kept = now
    faults()
    assert counted(settle(benchmark_settings, engine_command)) == counted(whole)
    assert kept.keys() <= stamps(asked.out / "shards", "*.json").keys()


def test_a_disk_that_fills_up_loses_no_finished_part(benchmark_settings, engine_command, turns, monkeypatch):
    asked = benchmark_settings()
    whole = Benchmark(replace(asked, out=asked.out.with_name("whole"))).run(quiet, engine_command)
    kept, fsync = [], os.fsync

    def full(number):
        if "/shards/" in os.readlink(f"/proc/self/fd/{number}"):
            kept.append(number)
        if len(kept) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        # A sentence and exit code 2 on the command line.
        with pytest.raises(OSError, match="No space left on device"):
            Benchmark(benchmark_settings()).run(quiet, engine_command)
    benchmark = Benchmark(benchmark_settings(resume=True))
    assert counted(benchmark.run(quiet, engine_command)) == counted(whole)
    assert any("parts were measured by an earlier run" in note for note in benchmark.notes)


def test_plain_decoding_twice_is_two_runs(benchmark_settings, engine_command):
    runs = Benchmark(benchmark_settings(methods=("none", "none-again"))).run(quiet, engine_command)["runs"]
    assert [(run["method"], run["num_speculative_tokens"]) for run in runs] == [("none", 0), ("none-again", 0)]


def test_a_part_without_its_reference_is_in_no_speedup(benchmark_settings):
    from support.fake_engine import decode

    from qm_spec.bench.engine.shards import ShardResult

    benchmark = Benchmark(benchmark_settings(ray=RaySettings(2)))
    plain, ngram = benchmark._measurements
    assert [len(part.prompts) for part in ngram.parts] == [2, 3]
    benchmark.settings.out.mkdir()
    for one in (plain, ngram):
        for number, part in enumerate(one.parts):
            if (one, number) != (plain, 1):
                # The second part of ngram would make the speed-up 2 by 2.2 if it counted.
                slower = 1.5 if number else 1.0
                result = decode(part, one.method)
                passes = (replace(result, elapsed_s=slower * result.elapsed_s),)
                benchmark.take((one, number), ShardResult("cpu", "float32", passes))
    # Plain decoding has not settled, so there is nothing to report yet.
    assert benchmark.results["runs"] == []
    benchmark.give_up([(plain, 1)], "engine was ended by SIGKILL; its log is there\nlast words")
    runs = benchmark.results["runs"]
    assert [(run["method"], run["num_prompts"]) for run in runs] == [("none", 2), ("ngram", 5)]
    assert (runs[1]["speedup"], runs[1]["lossless"]) == (2.0, True)
    (failure,) = json.loads((benchmark.settings.out / "results.json").read_text())["failures"]
    assert (failure["method"], failure["prompt_ids"]) == ("none", ["p2", "p3", "p4"])
    assert failure["error"] == "engine was ended by SIGKILL; its log is there"


def test_prompts_without_room_are_named_and_left_out_where_asked(benchmark_settings):
    with pytest.raises(ValueError, match=r"got 5 \+ 252 in prompt p4; lower .* leave such prompts out with skip_long"):
        Benchmark(benchmark_settings(max_tokens=252))
    benchmark = Benchmark(benchmark_settings(max_tokens=252, skip_long=True))
    assert [prompt.prompt_id for prompt in benchmark.shard_prompts[0]] == ["p0", "p1", "p2", "p3"]
    (failure,) = benchmark.results["failures"]
    assert (failure["method"], failure["prompt_id"]) == ("all", "p4")
    assert any("1 of 5 prompts do not fit" in note for note in benchmark.notes)
    with pytest.raises(ValueError, match="none of 5 fits"):
        Benchmark(benchmark_settings(max_tokens=256, skip_long=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_actors": 0}, "num_actors must be at least 1, got 0"),
        ({"max_tries": 0}, "max_tries must be at least 1, got 0"),
        ({"num_cpus": 0.0}, "num_cpus must be above 0, got 0"),
        ({"num_gpus": -1.0}, r"num_gpus must be 0 \(the CPU\) or above, got -1"),
    ],
)
def test_actors_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        RaySettings(**{"num_actors": 2, **changes})
