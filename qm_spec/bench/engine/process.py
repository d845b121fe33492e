"""The process of one engine: started, listened to, and ended whatever happens to it or to who started it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from qm_spec.bench.engine.shards import ShardSpec

ENGINE_COMMAND = (sys.executable, "-m", "qm_spec.bench.engine.worker")
_POLL_S = 0.1
_END_S = 15.0
_LOG_TAIL_LINES = 15


class EngineError(RuntimeError):
    """An engine process ended before it had measured everything; the message holds the end of its log.

    Attributes:
        reason: the message without the log.
    """

    def __init__(self, reason: str, log: Path) -> None:
        self.reason = reason
        super().__init__(f"{reason}; its log is {log} and ends with:\n{_tail(log)}")


def end_with_parent() -> None:
    """End this process's group as soon as the process that started it is gone, even if that one was killed.

    To be called by the leader of a group, such as `engine_events` starts.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_S)
        os.killpg(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def engine_events(
    shards: Sequence[ShardSpec],
    folder: Path,
    log: Path,
    environment: Mapping[str, str],
    command: Sequence[str] = ENGINE_COMMAND,
) -> Generator[dict[str, Any]]:
    """Run shards that share an engine in a new process and yield its events as they come; see `engine` for them.

    The engine begins a shard when the event after "ready" or the last "result" is asked for, so who listens to several
    engines lets them measure in turn. Closing the iterator ends the process.

    Args:
        folder: an existing empty folder for the two files that the processes talk through.
        log: takes everything that the engine prints.
        environment: the process's whole environment.
        command: is called with the two files' paths.

    Raises:
        EngineError: the process failed or left a shard out.
    """
    job, events = folder / "job.json", folder / "events.jsonl"
    job.write_text(json.dumps([shard.to_json() for shard in shards]), encoding="utf-8")
    events.touch()
    num_results = 0
    with log.open("wb") as output, events.open(encoding="utf-8") as stream:
        process = subprocess.Popen(
            [*command, str(job), str(events)],
            stdin=subprocess.PIPE,
            bufsize=0,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            # A group of its own: the terminal's Ctrl-C reaches the benchmark, which then ends the group.
            start_new_session=True,
        )
        assert process.stdin is not None
        try:
            unfinished_line = ""
            running = True
            while running:
                # Asked before reading, so that a last line written before the end is still read.
                running = process.poll() is None
                lines = (unfinished_line + stream.read()).split("\n")
                unfinished_line = lines.pop()
                for event in map(json.loads, lines):
                    num_results += event["event"] == "result"
                    yield event
                    if event["event"] in ("ready", "result"):
                        _let_go_on(process.stdin)
                if running:
                    time.sleep(_POLL_S)
        finally:
            _end_group(process)
            process.stdin.close()
    if process.returncode != 0 or num_results != len(shards):
        raise EngineError(
            f"engine {_ending(process.returncode)} with {num_results} of {len(shards)} parts measured", log
        )


def _let_go_on(engine_input: IO[bytes]) -> None:
    """Tell an engine that waits before a shard to begin; one that has ended or has no shard left does not listen."""
    with suppress(BrokenPipeError):
        engine_input.write(b"\n")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the process and the helpers that it started; an engine that ignores a request is killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _ending(returncode: int) -> str:
    if returncode < 0:
        return f"was ended by {signal.Signals(-returncode).name}"
    return f"ended with exit code {returncode}"


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-_LOG_TAIL_LINES:]) or "(nothing)"
