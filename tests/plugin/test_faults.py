"""What breaks around an engine costs drafts or a start, with a sentence; never a token."""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import MODEL, Server, serve
from support.offline_engine import OFFLINE
from support.simulated_engine import NUM_COPIED, NUM_DRAFTS, Engine, Machine, Text

import qm_spec
from qm_spec.bench.environment import engine_environment
from qm_spec.drafter.controller import Controller

NOVELS = Path(qm_spec.__file__).parent / "zoo" / "novels"
TARGET = NOVELS / "target"
NUM_TOKENS = 40


@pytest.fixture(scope="module")
def texts() -> list[tuple[list[int], list[int]]]:
    """Two prompts and what the target writes behind them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qm_spec.bench.acceptance.replay import write_continuations

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    lines = (NOVELS / "prompts.jsonl").read_text().splitlines()[:2]
    prompts = [
        tokenizer(json.loads(line)["text"])["input_ids"][:length] for line, length in zip(lines, (60, 300), strict=True)
    ]
    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    return list(zip(prompts, write_continuations(target, prompts, NUM_TOKENS), strict=True))


@pytest.fixture
def drafter(tmp_path: Path) -> Path:
    """A copy of the shipped pair's drafter that may be damaged."""
    return Path(shutil.copytree(NOVELS / "drafter", tmp_path / "drafter"))


def run_engine(folder: Path, prompts: list[list[int]], environment: dict[str, str], **arguments: Any) -> Any:
    """Return the answers of an engine in a process of its own, None where it ended before, its log and exit code."""
    job, result = folder / "job.json", folder / "result.json"
    request = {
        "prompts": [{"prompt_token_ids": ids} for ids in prompts],
        "sampling": {"temperature": 0, "max_tokens": NUM_TOKENS},
    }
    engine = {"model": str(TARGET), "max_model_len": 512, **arguments}
    job.write_text(json.dumps({"engine": engine, "requests": [request]}))
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(job), str(result)],
        env={**engine_environment("cpu"), "VLLM_LOGGING_LEVEL": "INFO", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    return json.loads(result.read_text()) if result.exists() else None, done.stdout, done.returncode


def spoil(drafter: Path, value: float) -> None:
    """Put a value into the first seventh of each weight."""
    from safetensors.torch import load_file, save_file

    file = drafter / "model.safetensors"
    weights = load_file(file)
    for weight in weights.values():
        if weight.is_floating_point():
            weight.view(-1)[: max(1, weight.numel() // 7)] = value
    save_file(weights, file)


# The drafter's folder


@pytest.mark.vllm
@pytest.mark.parametrize(
    "value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.long)], ids=["NaN", "infinite"]
)
def test_weights_that_are_not_finite_cost_drafts_and_no_token(
    value: float, drafter: Path, texts: list[tuple[list[int], list[int]]], tmp_path: Path
) -> None:
    spoil(drafter, value)
    prompts, expected = [list(column) for column in zip(*texts, strict=True)]
    config = {"method": "eagle3", "model": str(drafter)}
    always = {"QM_SPEC_ADAPT": "0", "QM_SPEC_LOOKUP": "0"}
    found, log, code = run_engine(tmp_path, prompts, always, speculative_config=config)
    assert code == 0, log[-4000:]
    assert found["answers"] == [expected]
    assert "weights hold values that are not finite, in " in log and "Traceback" not in log
    assert found["counters"][0]["vllm:spec_decode_num_accepted_tokens"] == 0, "or they were drafts by something else"


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(shutil.rmtree, "does not exist; restore that folder", marks=pytest.mark.long),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "is corrupt or truncated"),
    ],
    ids=["deleted", "truncated"],
)
def test_a_server_does_not_start_with_a_damaged_drafter_and_says_the_way_out(
    damage: Callable[[Path], None], message: str, drafter: Path
) -> None:
    """Between two starts, say by a copy that broke off."""
    damage(drafter)
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(TARGET), "--speculative-model", drafter]
    done = subprocess.run(
        command, env=engine_environment("cpu"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert done.returncode == 1, done.stdout[-3000:]
    # What is printed last is what is read.
    last = done.stdout.strip().splitlines()[-1]
    assert message in last and str(drafter) in last, done.stdout[-3000:]


# Memory


@pytest.mark.vllm
@pytest.mark.long
def test_a_cache_that_is_too_small_is_named_with_what_to_lower_as_without_us(tmp_path: Path) -> None:
    """The drafter's layer needs pages too: the message still says which setting to change."""
    logs = []
    for config in (None, qm_spec.speculative_config(TARGET)):
        found, log, code = run_engine(
            tmp_path,
            [[1, 2, 3]],
            {"VLLM_CPU_KVCACHE_SPACE": "0"},
            kv_cache_memory_bytes=1 << 20,
            speculative_config=config,
        )
        assert found is None and code == 1, log[-3000:]
        logs.append(log)
    for log in logs:
        assert "max_model_len" in log and "KV cache" in log, log[-3000:]


# Processes


def complete(server: Server, ids: list[int]) -> list[int]:
    body = {"model": MODEL, "prompt": ids, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps({**body, "return_token_ids": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as reply:
        return json.load(reply)["choices"][0]["token_ids"]


@pytest.mark.vllm
@pytest.mark.long
def test_two_servers_count_for_themselves_and_one_outlives_the_killed_engine_of_the_other(
    texts: list[tuple[list[int], list[int]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    monkeypatch.setenv("QM_SPEC_ADAPT", "0")
    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 512, "device": "cpu"}
    ours = ["--speculative-model", "qm_spec"]
    (prompt, expected), (other_prompt, other_expected) = texts
    drafts, accepted = "qm_spec:drafts_total", "qm_spec:accepted_tokens_total"
    with (
        serve("first", TARGET, ours, tmp_path / "first", **options) as first,
        serve("second", TARGET, ours, tmp_path / "second", **options) as second,
    ):
        assert complete(first, prompt) == expected
        counted = first.metrics()
        assert counted[accepted] > 0 and second.metrics().get(drafts, 0) == 0
        assert complete(second, other_prompt) == other_expected
        assert first.metrics()[drafts] == counted[drafts] and second.metrics()[accepted] > 0
        for process in psutil.Process(first.process.pid).children(recursive=True):
            process.send_signal(signal.SIGKILL)
        # The server sees it and ends; with which code is vLLM's own (0 in 0.32).
        first.process.wait(120)
        with pytest.raises((urllib.error.URLError, OSError)):
            complete(first, prompt)
        assert complete(second, prompt) == expected


@pytest.mark.vllm
@pytest.mark.long
@pytest.mark.parametrize("victim", ["VLLM::EngineCore", "VLLM::Worker"])
def test_a_server_whose_process_is_killed_under_load_ends_and_a_new_one_answers_the_same(
    victim: str, texts: list[tuple[list[int], list[int]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL behind a random number of answers. Whoever waits gets an error, and what came before was right."""
    import psutil

    monkeypatch.setenv("QM_SPEC_ADAPT", "0")
    chance = random.Random(victim)
    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 512, "device": "cpu"}
    ours = ["--speculative-model", "qm_spec"]

    def load(server: Server, number: int, right: list[bool], errors: list[Exception]) -> None:
        prompt, expected = texts[number % len(texts)]
        while True:
            try:
                right.append(complete(server, prompt) == expected)
            except (OSError, http.client.HTTPException) as error:
                errors.append(error)
                return

    right, errors = list[bool](), list[Exception]()
    with serve("killed", TARGET, ours, tmp_path / "killed", **options) as server:
        clients = [
            threading.Thread(target=load, args=(server, number, right, errors), daemon=True) for number in range(4)
        ]
        for client in clients:
            client.start()
        least = chance.randint(1, 9)
        while len(right) < least:
            assert not errors and server.alive
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3))
        processes = psutil.Process(server.process.pid).children(recursive=True)
        (one,) = (process for process in processes if victim in process.cmdline())
        one.send_signal(signal.SIGKILL)
        for client in clients:
            client.join(120)
        assert not any(client.is_alive() for client in clients), "a client hangs"
        server.process.wait(120)
        _, alive = psutil.wait_procs(processes, timeout=60)
        assert not alive, "it leaves no process behind"
    assert len(errors) == len(clients) and len(right) >= least and all(right)
    with serve("new", TARGET, ours, tmp_path / "new", **options) as server:
        for prompt, expected in texts:
            assert complete(server, prompt) == expected


# Surroundings


@pytest.mark.parametrize("hours", [1, -1])
@pytest.mark.parametrize("when", [0.05, 20.0], ids=["in the first steps", "later"])
def test_a_clock_that_jumps_does_not_leave_the_controller_slower_than_plain_decoding(hours: int, when: float) -> None:
    """It reads one that does not jump; where a machine's does, after a pause, a step is out of all proportion."""
    machine = Machine(step=12.6, row=0.15, request=0.65, context=0.1, draft=0.4, draft_row=0.06)
    text = Text([0.75, 0.7, 0.65, 0.6], spread=1.3)
    speeds = {}
    for jumps in (False, True):
        engine = Engine(machine, text, 1)

        def clock(engine: Engine = engine, jumps: bool = jumps) -> float:
            return engine.now + (3600 * hours if jumps and engine.now > when else 0)

        engine.run(62, Controller(NUM_DRAFTS, NUM_COPIED, clock=clock))
        speeds[jumps] = engine.tokens(when, when + 40)
    plain = Engine(machine, text, 1).run(62, 0)
    assert speeds[True] > plain.tokens(when, when + 40)
    assert speeds[True] > 0.9 * speeds[False]


@pytest.mark.parametrize("home", ["/proc", "/dev/null", "/nowhere/at/all"])
def test_a_home_folder_that_cannot_be_written_stops_nobody(home: str, tmp_path: Path) -> None:
    code = f"""
import qm_spec
print(qm_spec.speculative_config({str(TARGET)!r})["model"])
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("QM_SPEC", "XDG"))}
    environment |= {"HOME": home, "PYTHONPATH": str(Path(qm_spec.__file__).parents[1])}
    for command in (["-c", code], ["-m", "qm_spec", "doctor", "--target", str(TARGET)]):
        done = subprocess.run(
            [sys.executable, *command], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
        assert str(NOVELS / "drafter") in done.stdout
