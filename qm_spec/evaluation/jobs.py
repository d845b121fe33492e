"""Shards that share an engine: run in a process of their own, one job after the other on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from qm_spec.evaluation.methods import engine_without_far_memory, method_environment
from qm_spec.evaluation.process import ENGINE_COMMAND, EngineError, engine_events
from qm_spec.evaluation.settings import WINDOW_METHOD
from qm_spec.evaluation.shards import ShardSpec

Event = dict[str, Any]
# Takes a job's number and what happened in it: the engine's own events (see `qm_spec.evaluation.engine`), "starting"
# before them, "retried" with "error" where the rest of the job is tried again, and "failed" with "error" and "shards",
# the numbers of those that are given up.
OnEvent = Callable[[int, Event], None]


@dataclass(frozen=True)
class EngineJob:
    """Shards with one engine.

    Args:
        name: of its log, without the suffix.
        method: decides the engine's environment.
        device: "cpu" or "cuda".
        shards: measured in this order; their `engine` is the same.
    """

    name: str
    method: str
    device: str
    shards: tuple[ShardSpec, ...]


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
    with tempfile.TemporaryDirectory(prefix="qm_spec-") as folder:
        shards = job.shards
        if job.method == WINDOW_METHOD:
            engine = engine_without_far_memory(shards[0].engine, Path(folder) / "drafter")
            shards = tuple(replace(shard, engine=engine) for shard in shards)
        environment = method_environment(job.method, job.device)
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
