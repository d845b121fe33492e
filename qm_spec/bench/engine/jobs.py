"""Shards that share an engine: in a process of their own, one job after the other or all in turn on this machine."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from qm_spec.bench.engine.process import ENGINE_COMMAND, EngineError, engine_events
from qm_spec.bench.engine.shards import ShardResult, ShardSpec
from qm_spec.bench.methods import find_method, without_far_memory

Event = dict[str, Any]
# Takes a job's number and what happened in it: the engine's own events (see `qm_spec.bench.engine.worker`), "starting"
# before them, "retried" with "error" where the rest of the job is tried again, and "failed" with "error" and "shards",
# the numbers of those that are given up.
OnEvent = Callable[[int, Event], None]

# Threads of an engine that has just ended its work wait for more of it this long, and longer, at full speed.
REST_S = 1.2


@dataclass(frozen=True)
class EngineJob:
    """Shards with one engine.

    Args:
        name: of its log, without the suffix.
        method: decides the engine's environment.
        device: "cpu" or "cuda".
        shards: measured in this order; their `engine` is the same.
        as_served: see `environment.engine_environment`.
    """

    name: str
    method: str
    device: str
    shards: tuple[ShardSpec, ...]
    as_served: bool = False


def share_jobs(
    shards: Sequence[ShardSpec], missing: Sequence[int], num_jobs: int, method: str, device: str
) -> tuple[list[EngineJob], list[Sequence[int]]]:
    """Share the missing shards among at most `num_jobs` engines, contiguous ones each.

    Returns:
        The jobs, and for each the numbers of its shards.
    """
    num_jobs = min(len(missing), num_jobs)
    bounds = [job * len(missing) // num_jobs for job in range(num_jobs + 1)] if num_jobs else [0]
    places = [missing[begin:end] for begin, end in pairwise(bounds)]
    jobs = [
        EngineJob(f"engine.{job}", method, device, tuple(shards[one] for one in numbers))
        for job, numbers in enumerate(places)
    ]
    return jobs, places


def job_events(job: EngineJob, log: Path, command: Sequence[str] = ENGINE_COMMAND) -> Generator[Event]:
    """Run a job here and yield its engine's events.

    Args:
        log: takes what the engine prints.
        command: of the engine; see `engine_events`.

    Raises:
        EngineError: the engine ended early.
    """
    method = find_method(job.method)
    with tempfile.TemporaryDirectory(prefix="qm_spec-") as folder:
        shards = job.shards
        if method.without_far_memory:
            asked = shards[0].engine.speculative_config
            assert asked is not None
            drafter = without_far_memory(Path(asked["model"]), Path(folder) / "drafter")
            engine = replace(shards[0].engine, speculative_config={**asked, "model": str(drafter)})
            shards = tuple(replace(shard, engine=engine) for shard in shards)
        environment = method.engine_environment(job.device, as_served=job.as_served)
        with closing(engine_events(shards, Path(folder), log, environment, command)) as events:
            yield from events


def run_jobs(jobs: Sequence[EngineJob], logs: Path, on_event: OnEvent, command: Sequence[str] = ENGINE_COMMAND) -> None:
    """Run jobs one after the other on this machine; one that fails does not stop the next.

    Args:
        logs: an existing folder for the engines' logs.
    """
    for number, job in enumerate(jobs):
        waiting = list(range(len(job.shards)))
        on_event(number, {"event": "starting"})
        try:
            with closing(job_events(job, logs / f"{job.name}.log", command)) as events:
                for event in events:
                    if event["event"] == "result":
                        waiting.remove(event["shard"])
                    on_event(number, event)
        except EngineError as error:
            on_event(number, {"event": "failed", "shards": waiting, "error": str(error)})


def take_turns(
    jobs: Sequence[EngineJob],
    logs: Path,
    on_event: OnEvent,
    command: Sequence[str] = ENGINE_COMMAND,
    *,
    backwards: bool = False,
) -> Generator[tuple[int, dict[int, ShardResult]]]:
    """Run jobs at the same time: shard i by one engine after the other, before any engine begins shard i + 1.

    The order is turned round from shard to shard, so that no engine always comes after the same one. One that fails
    does not stop the others. Closing the iterator ends all engines.

    Args:
        jobs: with equally many shards.
        logs: an existing folder for the engines' logs.
        backwards: begin with the last job.

    Yields:
        After each turn its number and the results by job, of those that have not failed.
    """
    with ExitStack() as stack:
        engines: dict[int, Generator[Event]] = {}

        def wait_for(number: int, kind: str) -> Event | None:
            """Let an engine go on to its next event of a kind; None if it fails on the way."""
            try:
                for event in engines[number]:
                    on_event(number, event)
                    if event["event"] == kind:
                        return event
            except EngineError as error:
                del engines[number]
                left = list(range(turn, len(jobs[number].shards)))
                on_event(number, {"event": "failed", "shards": left, "error": str(error)})
            return None

        turn = 0
        for number, job in enumerate(jobs):
            on_event(number, {"event": "starting"})
            engines[number] = stack.enter_context(closing(job_events(job, logs / f"{job.name}.log", command)))
            wait_for(number, "ready")
        for turn in range(len(jobs[0].shards)):
            results = {}
            for number in sorted(engines, reverse=(turn % 2 == 1) != backwards):
                time.sleep(REST_S if len(engines) > 1 else 0)
                event = wait_for(number, "result")
                if event is not None:
                    results[number] = ShardResult.from_json(event["result"])
            if not engines:
                return
            yield turn, results
