"""`vllm serve` as a process: start, stop, metrics, memory."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_S = 600.0
# Under this name both servers know their model.
MODEL = "soak"


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Args:
        name: the method, in records and logs.
        url: without a slash at its end.
        process: of the API server; the engine is a child of it.
        log: what it has written so far.
    """

    name: str
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def alive(self) -> bool:
        """Whether server and engine run; an engine that ends takes its server along."""
        return self.process.poll() is None

    def metrics(self) -> dict[str, float]:
        """Return the values of `/metrics`, summed over their labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as reply:
            return parse_metrics(reply.read().decode())

    def resident_mb(self) -> dict[str, float]:
        """Return the resident memory of each of its processes, in MB; pages that they share count in each."""
        import psutil

        found: dict[str, float] = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            for process in [own, *own.children(recursive=True)]:
                # vLLM names its own: VLLM::EngineCore, VLLM::Worker.
                name = (
                    "server"
                    if process is own
                    else (process.cmdline() or ["ended"])[0].removeprefix("VLLM::").split("/")[-1]
                )
                found[name] = round(found.get(name, 0.0) + process.memory_info().rss / 1e6, 1)
        return found


def parse_metrics(text: str) -> dict[str, float]:
    """Return the values of a page in Prometheus' format, summed over their labels."""
    sums: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            name = name.split("{")[0]
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums


@contextmanager
def serve(
    name: str, target: Path, arguments: Sequence[str], log: Path, *, dtype: str, max_model_len: int, device: str
) -> Iterator[Server]:
    """Run `vllm serve`, with the engine in a process of its own, until the block ends.

    Raises:
        OSError: it ended before it answered, or did not answer within `START_S` seconds.
    """
    from qm_spec.bench.environment import engine_environment

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(target)),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL),
        *("--dtype", dtype, "--max-model-len", str(max_model_len), "--enforce-eager", *arguments),
    ]
    environment = {
        **engine_environment(device),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        # By default it closes a connection after 5 idle seconds, as the client does; a request sent just then is lost.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",
    }
    with log.open("wb") as stream:
        # In a session of its own: Ctrl-C is for the client, which stops the server when it has its numbers.
        process = subprocess.Popen(
            command, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
    server = Server(name, f"http://127.0.0.1:{port}", process, log)
    try:
        _wait(server)
        yield server
    finally:
        _stop(process)


def _wait(server: Server) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            urllib.request.urlopen(f"{server.url}/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            if not server.alive or time.monotonic() > deadline:
                tail = server.log.read_text(errors="replace")[-2000:]
                raise OSError(f"server {server.name} did not start; the end of {server.log}:\n{tail}") from None
            time.sleep(1)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
