"""Jobs mapped over Ray actors: one engine process per actor, dead actors replaced, nothing measured twice or lost."""

from __future__ import annotations

import math
import os
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qm_spec.bench.engine.jobs import EngineJob, Event, OnEvent, job_events
from qm_spec.bench.engine.process import ENGINE_COMMAND, EngineError
from qm_spec.bench.environment import available_cores
from qm_spec.bench.settings import RaySettings

# Of a log, which travels to the driver.
_LOG_BYTES = 1 << 20


class EngineWorker:
    """What an actor does. The engine is a process of its own, so the actor outlives its crash."""

    def run(self, job: EngineJob, command: Sequence[str]) -> Iterator[Event]:
        """Yield the engine's events and at last `{"event": "ended", "reason", "log"}`; the reason is None for success.

        Args:
            command: of the engine.
        """
        with tempfile.TemporaryDirectory(prefix="qm_spec-") as folder:
            log = Path(folder) / "engine.log"
            reason = None
            try:
                yield from job_events(job, log, command)
            except EngineError as error:
                reason = error.reason
            yield {"event": "ended", "reason": reason, "log": log.read_bytes()[-_LOG_BYTES:]}


@dataclass
class _Task:
    """A job's shards that still have to be measured, and how often the first of them has been tried in vain."""

    number: int
    job: EngineJob
    waiting: list[int]
    failed_tries: int = 0


@dataclass
class _Attempt:
    """A task that an actor works on; `shards` are the numbers in the job of those that it was given."""

    task: _Task
    actor: Any
    events: Any
    shards: tuple[int, ...]
    engine_ready: bool = False


class RayRunner:
    """Runs jobs on a pool of actors, and is a context in which there is a cluster.

    A shard whose engine or actor fails is handed to an actor again, until it has been tried `max_tries` times. Where
    this process is connected to a cluster already, it stays so.

    Args:
        worker: the class of the actors.

    Raises:
        ValueError: a cluster started here lacks the GPUs.
        ConnectionError: there is no cluster at the address.
        ModuleNotFoundError: Ray is not installed.
    """

    def __init__(self, settings: RaySettings, worker: type = EngineWorker) -> None:
        self._settings = settings
        self._worker = worker
        self._owns_cluster = False

    def __enter__(self) -> RayRunner:
        import ray

        if not ray.is_initialized():
            handler = signal.getsignal(signal.SIGTERM)
            self._connect()
            self._owns_cluster = True
            # Ray has set its own, which would end this process before its results are written.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._owns_cluster:
            import ray

            ray.shutdown()

    def _connect(self) -> None:
        import ray

        settings = self._settings
        # Nobody has asked for reports to Ray's makers.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        if settings.address is not None:
            try:
                ray.init(address=settings.address, **quiet)
            except ConnectionError as error:
                raise ConnectionError(
                    f"ray: there must be a cluster at {settings.address}, got: {_first_line(error)}; start one with "
                    "ray start --head. One that asks for a token wants RAY_AUTH_MODE=token and the token here too"
                ) from error
            return
        # By default Ray's workers, and so the engines, give way to every other process.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # As many actors as were asked for, also on a machine with fewer cores.
        cores = max(available_cores(), math.ceil(settings.num_actors * settings.num_cpus))
        ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
        needed, found = settings.num_actors * settings.num_gpus, ray.cluster_resources().get("GPU", 0)
        if needed > found:
            ray.shutdown()
            raise ValueError(
                f"ray: {settings.num_actors} actors with {settings.num_gpus:g} GPUs each need {needed:g}, found "
                f"{found:g}; lower num_gpus or the number of actors, or pass the address of a cluster"
            )

    def describe(self) -> dict[str, Any]:
        """Return what a record of the measurement says about the cluster."""
        import ray

        resources = ray.cluster_resources()
        return {
            "num_actors": self._settings.num_actors,
            "num_cpus_per_actor": self._settings.num_cpus,
            "num_gpus_per_actor": self._settings.num_gpus,
            "num_nodes": sum(node["Alive"] for node in ray.nodes()),
            "cluster_cpus": resources.get("CPU", 0),
            "cluster_gpus": resources.get("GPU", 0),
        }

    def run_jobs(
        self, jobs: Sequence[EngineJob], logs: Path, on_event: OnEvent, command: Sequence[str] = ENGINE_COMMAND
    ) -> None:
        """Run jobs side by side, in their order as actors become free; see `qm_spec.bench.engine.jobs.run_jobs`."""
        import ray

        waiting = deque(_Task(number, job, list(range(len(job.shards)))) for number, job in enumerate(jobs))
        attempts: list[_Attempt] = []
        idle: list[Any] = []
        try:
            while waiting or attempts:
                while waiting and len(attempts) < self._settings.num_actors:
                    task = waiting.popleft()
                    attempts.append(self._start(task, idle.pop() if idle else self._actor(), command))
                    on_event(task.number, {"event": "starting"})
                (stream, *_), _ = ray.wait([one.events for one in attempts], fetch_local=False)
                attempt = next(one for one in attempts if one.events is stream)
                try:
                    event = ray.get(next(stream))
                except StopIteration:
                    attempts.remove(attempt)
                    idle.append(attempt.actor)
                except ray.exceptions.RayError as error:
                    attempts.remove(attempt)
                    ray.kill(attempt.actor)
                    self._failed(attempt, f"the actor failed: {_first_line(error)}", waiting, on_event)
                else:
                    self._observe(attempt, event, logs, waiting, on_event)
        finally:
            # Their engines end with them.
            for actor in (*idle, *(one.actor for one in attempts)):
                ray.kill(actor)

    def _actor(self) -> Any:
        import ray

        options = {"num_cpus": self._settings.num_cpus, "num_gpus": self._settings.num_gpus, "max_restarts": 0}
        return ray.remote(self._worker).options(**options).remote()

    @staticmethod
    def _start(task: _Task, actor: Any, command: Sequence[str]) -> _Attempt:
        shards = tuple(task.waiting)
        job = replace(task.job, shards=tuple(task.job.shards[number] for number in shards))
        return _Attempt(task, actor, actor.run.options(num_returns="streaming").remote(job, tuple(command)), shards)

    def _observe(self, attempt: _Attempt, event: Event, logs: Path, waiting: deque[_Task], on_event: OnEvent) -> None:
        task = attempt.task
        if event["event"] == "ended":
            log = logs / f"{task.job.name}.log"
            log.write_bytes(event["log"])
            if event["reason"] is not None:
                self._failed(attempt, str(EngineError(event["reason"], log)), waiting, on_event)
            return
        attempt.engine_ready = True
        if "shard" in event:
            event = {**event, "shard": attempt.shards[event["shard"]]}
        if event["event"] == "result":
            task.waiting.remove(event["shard"])
            task.failed_tries = 0
        on_event(task.number, event)

    def _failed(self, attempt: _Attempt, error: str, waiting: deque[_Task], on_event: OnEvent) -> None:
        """Hand the rest of a task to the next actor; give up the shard that has been tried too often."""
        task = attempt.task
        if not task.waiting:
            return
        task.failed_tries += 1
        if task.failed_tries < self._settings.max_tries:
            on_event(task.number, {"event": "retried", "error": error})
        else:
            # An engine that does not start will not do so for the next shard either.
            given_up = task.waiting[: 1 if attempt.engine_ready else None]
            error = f"tried {task.failed_tries} times; {error}"
            on_event(task.number, {"event": "failed", "shards": given_up, "error": error})
            task.waiting = task.waiting[len(given_up) :]
            task.failed_tries = 0
        if task.waiting:
            waiting.appendleft(task)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
