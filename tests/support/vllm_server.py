"""Run `vllm serve` with its engine in a process of its own, and ask it over HTTP."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qm_spec.bench.environment import engine_environment


@contextmanager
def server(target: Path, name: str, arguments: list[str], log: Path, max_model_len: int = 512) -> Iterator[str]:
    """Serve a target under a name until the block ends, in float32, and return the server's URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(target), *arguments),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", str(max_model_len), "--served-model-name", name),
    ]
    environment = {**engine_environment("cpu"), "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_SERVER_DEV_MODE": "1"}
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 600
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < deadline, log.read_text()[-4000:]
                time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def ask(url: str, body: dict[str, Any], **headers: str) -> urllib.request.Request:
    return urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json", **headers})


def post(url: str, body: dict[str, Any], **headers: str) -> Any:
    with urllib.request.urlopen(ask(url, body, **headers), timeout=300) as reply:
        return json.load(reply)


def stream(url: str, body: dict[str, Any]) -> Iterator[Any]:
    """Yield the events of a streamed answer; to leave the generator closes the connection."""
    with urllib.request.urlopen(ask(url, {**body, "stream": True}), timeout=300) as reply:
        for line in reply:
            event = line.decode().strip().removeprefix("data: ")
            if event and event != "[DONE]":
                yield json.loads(event)


def metrics(url: str, label: str = "") -> dict[str, float]:
    """Return the values of `/metrics`, summed over their labels; if one is given, of those alone that have it."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as reply:
        lines = reply.read().decode().splitlines()
    sums: dict[str, float] = {}
    for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#"):
        if label in name:
            sums[name.split("{")[0]] = sums.get(name.split("{")[0], 0.0) + float(value)
    return sums
