"""Benchmarks over two local Ray actors; their engines are played by `support/fake_engine.py`, or are vLLM."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from support.sudden_death import stamps

import qm_spec
from qm_spec.bench.engine.jobs import EngineJob, run_jobs
from qm_spec.bench.engine.metrics import DraftCounts
from qm_spec.bench.engine.ray_runner import EngineWorker, RayRunner
from qm_spec.bench.engine.shards import EngineSpec, PassResult, ShardResult, ShardSpec, TokenPrompt, split_shard
from qm_spec.bench.runs.benchmark import Benchmark
from qm_spec.bench.settings import RaySettings, Sweep

ray = pytest.importorskip("ray", reason="the runner needs Ray: pip install 'qm_spec[eval]'")

TWO = RaySettings(2, num_cpus=0.5)


@pytest.fixture(scope="module", autouse=True)
def cluster(most_drafts):
    """Connect this process once; the benchmarks find it connected and leave it so.

    Actors have the environment of when it was connected.
    """
    with RayRunner(TWO):
        yield
    assert not ray.is_initialized()


def quiet(*event) -> None:
    """Report no progress."""


def counted(results: dict) -> list[tuple]:
    """What does not depend on the clock or on who did the work."""
    return [
        (run["method"], run["concurrency"], run["num_drafts"], run["num_accepted_tokens"], run["num_output_tokens"],
         run["speedup"], run["lossless"], [(row["prompt_id"], row["num_drafts"]) for row in run["requests"]])
        for run in results["runs"]
    ]  # fmt: skip


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.02)


def test_a_killed_actor_loses_nothing(benchmark_settings, engine_command, faults, starts):
    sweep = Sweep(concurrency=(1, 2))
    alone = Benchmark(benchmark_settings(sweep=sweep)).run(quiet, engine_command)
    before = len(starts())
    # Engines of ngram put out their first shard, and wait before the second one.
    faults(ngram="wait")
    killed = []

    def kill_once(name, state, done, total):
        # Four shards of ngram are two requests, or three, times two repeats.
        if name == "ngram" and done >= 10 and not killed:
            method, engine, actor, _ = starts()[-1]
            assert method == "ngram"
            killed.append(int(engine))
            os.kill(int(actor), signal.SIGKILL)
            wait_for(lambda: not is_running(int(engine)))
            Path(engine_command[1]).with_name("go").touch()

    benchmark = Benchmark(benchmark_settings(sweep=sweep, ray=TWO))
    results = benchmark.run(kill_once, engine_command)
    assert killed
    assert results["failures"] == []
    assert counted(results) == counted(alone)
    # Others may say that times are unsteady, as they are on a busy machine.
    for beginning in (
        "with Ray each engine measures by itself, not in turn",
        "ngram: handed to another actor, since the actor failed: ",
    ):
        assert sum(note.startswith(beginning) for note in benchmark.notes) == 1, benchmark.notes
    # Two parts each, and one engine again for the shard that the dead actor had not finished.
    assert [start[0] for start in starts()[before:]].count("ngram") == 3
    assert results["environment"]["ray"]["num_actors"] == 2
    assert json.loads((benchmark.settings.out / "results.json").read_text()) == results

    # What is on disk is not measured again.
    before = len(starts())
    resumed = Benchmark(benchmark_settings(sweep=sweep, ray=TWO, resume=True)).run(quiet, engine_command)
    assert resumed["runs"] == results["runs"]
    assert len(starts()) == before


@pytest.mark.parametrize("seed", range(2))
def test_actors_killed_at_random_moments_lose_nothing(seed, benchmark_settings, engine_command, starts):
    """Two of them, each at a random event of the run: while its engine starts, measures or tells."""
    chance = random.Random(seed)
    alone = Benchmark(benchmark_settings()).run(quiet, engine_command)
    before, moments, killed, events = len(starts()), sorted(chance.sample(range(2, 14), 2)), [], 0

    def kill_sometimes(name, state, done, total):
        nonlocal events
        events += 1
        alive = [int(actor) for _, _, actor, _ in starts()[before:] if is_running(int(actor))]
        # An event in which none is at work waits for the next one.
        if len(killed) < len(moments) and events >= moments[len(killed)] and alive:
            killed.append(chance.choice(alive))
            os.kill(killed[-1], signal.SIGKILL)

    asked = benchmark_settings(ray=TWO)
    results = Benchmark(asked).run(kill_sometimes, engine_command)
    assert len(killed) == 2 and results["failures"] == []
    assert counted(results) == counted(alone)
    kept = stamps(asked.out / "shards", "*.json")
    assert Benchmark(benchmark_settings(ray=TWO, resume=True)).run(quiet, engine_command)["runs"] == results["runs"]
    assert kept == stamps(asked.out / "shards", "*.json")


def test_a_shard_that_always_fails_is_named_and_in_no_number(benchmark_settings, engine_command, faults, starts):
    faults(ngram="crash at 3")
    asked = benchmark_settings(ray=TWO)
    benchmark = Benchmark(asked)
    plain, ngram = benchmark.run(quiet, engine_command)["runs"]
    assert (plain["num_prompts"], ngram["num_prompts"]) == (5, 2)
    assert [row["prompt_id"] for row in ngram["requests"]] == ["p0", "p1"]
    assert ngram["num_drafts"] == 1 + 2
    # Both over the two prompts.
    assert ngram["speedup"] == 2.0
    (failure,) = benchmark.results["failures"]
    assert failure["error"].startswith("tried 3 times; engine ended with exit code 1 with 0 of 1 parts measured")
    assert failure["prompt_ids"] == ["p2", "p3", "p4"]
    assert "no such layer" in (asked.out / "logs" / "ngram.1.log").read_text()
    assert [start[0] for start in starts()].count("ngram") == 1 + 3


def test_an_interruption_ends_the_engines_and_keeps_what_is_finished(
    benchmark_settings, engine_command, faults, starts
):
    faults(ngram="hang")
    asked = benchmark_settings(ray=TWO)

    def interrupt(name, state, done, total):
        if name == "ngram" and state == "warming up" and [start[0] for start in starts()].count("ngram") == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Benchmark(asked).run(interrupt, engine_command)
    wait_for(lambda: not any(is_running(int(start[1])) for start in starts()))
    assert [run["method"] for run in json.loads((asked.out / "results.json").read_text())["runs"]] == ["none"]
    assert ray.is_initialized()


def test_a_local_cluster_without_the_gpus_is_refused(monkeypatch):
    ended = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 1.0})
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    with pytest.raises(ValueError, match=r"3 actors with 0\.5 GPUs each need 1\.5, found 1; lower num_gpus"):
        RayRunner(RaySettings(3, num_gpus=0.5)).__enter__()
    assert ended


def test_a_worker_reports_how_its_engine_ended(benchmark_settings, engine_command, faults):
    benchmark = Benchmark(benchmark_settings())
    (job, *_), _ = benchmark._jobs()
    events = list(EngineWorker().run(job, engine_command))
    assert [event["event"] for event in events] == ["ready", "progress", "result", "ended"]
    assert events[-1]["reason"] is None
    faults(none="crash")
    ended = list(EngineWorker().run(job, engine_command))[-1]
    assert ended["reason"] == "engine ended with exit code 1 with 0 of 1 parts measured"
    assert b"no such layer" in ended["log"]


@pytest.mark.vllm
def test_two_actors_count_what_one_worker_counts(tmp_path):
    target = Path(qm_spec.__file__).parent / "zoo" / "novels" / "target"
    engine = EngineSpec(str(target), qm_spec.speculative_config(target), "float32", 512, 1, True, 0)
    prompts = tuple(
        TokenPrompt(str(start), tuple((start + 7 * i) % 4000 + 10 for i in range(40))) for start in (1, 50, 99, 7)
    )
    whole = ShardSpec(engine, prompts, 32, 0.0, 1, 0, 1)

    def measured(run, *shards) -> list[PassResult]:
        found = {}

        def keep(number, event):
            assert event["event"] != "failed", event["error"]
            if event["event"] == "result":
                found[number] = ShardResult.from_json(event["result"])

        run([EngineJob(f"qm_spec.{i}", "qm_spec", "cpu", (one,)) for i, one in enumerate(shards)], tmp_path, keep)
        return [found[number].passes[0] for number in range(len(shards))]

    (one,) = measured(run_jobs, whole)
    two = measured(RayRunner(TWO).run_jobs, *split_shard(whole, 2))
    assert [output for part in two for output in part.outputs] == one.outputs
    assert sum((part.counts for part in two), DraftCounts()) == one.counts
    assert one.counts.accepted_tokens > 0
    both = [request for part in two for request in part.requests]
    assert [request.counts for request in both] == [request.counts for request in one.requests]
    # vLLM's counts of requests add up to its counters.
    assert sum((request.counts for request in one.requests), DraftCounts()) == one.counts
