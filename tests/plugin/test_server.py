"""vLLM's server with our drafter: over HTTP it writes what the target does, has our metrics, and is switched off."""

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

import pytest
import torch

import qm_spec
from qm_spec.bench.acceptance.replay import write_continuations
from qm_spec.bench.environment import engine_environment
from qm_spec.discovery import find_drafter

pytestmark = pytest.mark.vllm

TARGET = Path(qm_spec.__file__).parent / "zoo" / "novels" / "target"
NUM_TOKENS = 32


@pytest.fixture(scope="module")
def texts() -> list[tuple[list[int], list[int]]]:
    """Two prompts and what the target writes behind them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    lines = (TARGET.parent / "prompts.jsonl").read_text().splitlines()[:2]
    prompts = [
        tokenizer(json.loads(line)["text"])["input_ids"][:length] for line, length in zip(lines, (60, 300), strict=True)
    ]
    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    return list(zip(prompts, write_continuations(target, prompts, NUM_TOKENS), strict=True))


@contextmanager
def server(arguments: list[str], log: Path) -> Iterator[str]:
    """Run `vllm serve`, with the engine in a process of its own, and return its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(TARGET), *arguments),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "512", "--served-model-name", "novels"),
    ]
    environment = {**engine_environment("cpu"), "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_SERVER_DEV_MODE": "1"}
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 300
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


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as reply:
        return json.load(reply)


def complete(url: str, ids: list[int], **fields: Any) -> list[int]:
    body = {"model": "novels", "prompt": ids, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    answer = post(f"{url}/v1/completions", {**body, "return_token_ids": True, **fields})
    return answer["choices"][0]["token_ids"]


def metrics(url: str) -> dict[str, float]:
    """Return the counters of `/metrics`, summed over their labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as reply:
        lines = reply.read().decode().splitlines()
    sums: dict[str, float] = {}
    for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#"):
        sums[name.split("{")[0]] = sums.get(name.split("{")[0], 0.0) + float(value)
    return sums


def test_a_server_has_metrics_of_its_engines_process_and_is_switched_off(
    texts: list[tuple[list[int], list[int]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for by name. `vllm_xargs` for a request, `/collective_rpc` for the engine."""
    # Else a busy machine may draft nothing in so few steps.
    monkeypatch.setenv("QM_SPEC_ADAPT", "0")
    with server(["--speculative-model", "qm_spec"], tmp_path / "log") as url:
        for prompt, text in texts:
            assert complete(url, prompt) == text
        drafted = metrics(url)
        prompt, text = texts[0]
        assert complete(url, prompt, vllm_xargs={"qm_spec": "off"}) == text
        off = metrics(url)
        (stats,) = post(f"{url}/collective_rpc", {"method": "qm_spec_drafting", "args": ["off"]})["results"]
        assert complete(url, prompt) == text
        engine_off = metrics(url)
    accepted = "qm_spec:accepted_tokens_total"
    assert drafted[accepted] == drafted["vllm:spec_decode_num_accepted_tokens_total"] > 0
    assert off[accepted] == drafted[accepted] == engine_off[accepted]
    assert not stats["drafting"] and sum(stats["accepted_tokens"].values()) == off[accepted]


def test_serve_by_speculative_config_over_http(texts: list[tuple[list[int], list[int]]], tmp_path: Path) -> None:
    config = {"method": "eagle3", "model": str(find_drafter(TARGET)), "num_speculative_tokens": 2}
    with server(["--speculative-config", json.dumps(config)], tmp_path / "log") as url:
        for prompt, text in texts:
            assert complete(url, prompt) == text
