"""The soak run finds what it is for: wrong tokens, growing memory, pages that stay, a server that ends."""

from __future__ import annotations

import asyncio
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

pytest.importorskip("openai", reason="vLLM, which brings the client, is not installed: run ./install.sh")
pytest.importorskip("aiohttp", reason="vLLM, which brings the client, is not installed: run ./install.sh")

import soak
from serving import parse_metrics
from soak_checks import (
    acceptance_length,
    find_faults,
    first_difference,
    memory_growth,
    percentile,
    time_between_tokens,
)
from support.completion_server import LIMIT, VOCABULARY, CompletionServer, answer

NUM_TOKENS = 8


# Pieces


@pytest.mark.parametrize(
    ("written", "place"),
    [([], None), ([5, 6], None), ([5, 6, 7], None), ([5, 9, 7], 1), ([4], 0), ([5, 6, 7, 8], 3)],
)
def test_the_first_token_that_is_not_expected(written: list[int], place: int | None) -> None:
    assert first_difference(written, [5, 6, 7]) == place


def memory(rise: Any) -> list[tuple[float, float]]:
    noise = random.Random(0)
    return [(10.0 * i, 1000 + rise(i / 99) + noise.uniform(-5, 5)) for i in range(100)]


def test_memory_that_rises_steadily_is_a_leak() -> None:
    found = memory_growth(memory(lambda part: 300 * part))
    assert found["leak"] and found["rise_mb"] == pytest.approx(300 * 0.8 * 0.75, abs=15)
    assert found["slope_mb_per_hour"] == pytest.approx(300 * 3600 / 990, rel=0.05)
    assert found["end_mb"] - found["start_mb"] == pytest.approx(found["rise_mb"], abs=0.11)


@pytest.mark.parametrize(
    "rise",
    [
        lambda part: 0,
        # The warm-up, then caches that have filled.
        lambda part: 500 * min(1, 5 * part),
        lambda part: 300 * min(1, 2 * part),
        # Less than what is allowed, and what falls.
        lambda part: 40 * part,
        lambda part: -300 * part,
    ],
    ids=["flat", "warm-up", "levels off", "little", "falls"],
)
def test_memory_that_levels_off_is_none(rise: Any) -> None:
    assert not memory_growth(memory(rise))["leak"]


def test_a_few_samples_say_nothing_about_memory() -> None:
    assert memory_growth(memory(lambda part: 900 * part)[:7]) == {}


def test_acceptance_length_between_two_readings() -> None:
    before = parse_metrics(
        'vllm:spec_decode_num_drafts_total{engine="0"} 10\nvllm:spec_decode_num_accepted_tokens_total 20'
    )
    after = parse_metrics(
        "# TYPE x counter\n"
        'vllm:spec_decode_num_drafts_total{engine="0"} 20\nvllm:spec_decode_num_drafts_total{engine="1"} 10\n'
        "vllm:spec_decode_num_accepted_tokens_total 50"
    )
    assert acceptance_length(before, after) == 1 + 30 / 20
    assert acceptance_length(before, before) is None


def test_tokens_that_come_together_are_no_time_apart() -> None:
    assert time_between_tokens([(1.0, 2), (1.5, 1), (2.5, 3)]) == [0.5, 1.0, 0.0, 0.0]
    assert time_between_tokens([(1.0, 4)]) == []
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0 and percentile([1.0, 2.0], 0.99) == 2.0


SOUND = {
    "wrong_tokens": 0,
    "crashes": [],
    "unexpected": [],
    "num_unexpected": 0,
    "failed_steps": 0.0,
    "kv_usage_idle": 0.0,
    "memory": {"leak": False},
    "interrupted": False,
    "checked_tokens": 10,
}


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"wrong_tokens": 2}, "2 wrong tokens"),
        ({"crashes": ["server qm_spec ended with -9"]}, "crashed: server qm_spec ended with -9"),
        ({"unexpected": ["greedy: 500"], "num_unexpected": 40}, "40 requests ended in another way.*greedy: 500"),
        ({"failed_steps": 1.0}, "drafting failed in 1 steps"),
        ({"kv_usage_idle": 0.125}, "12.50% of the KV pages are in use"),
        ({"kv_usage_idle": None}, "does not say how many KV pages are in use"),
        ({"memory": {"leak": True, "start_mb": 1, "end_mb": 9}}, "memory rose from 1 to 9 MB"),
        ({"checked_tokens": 0}, "no token was checked"),
    ],
)
def test_every_fault_is_named(changed: dict[str, Any], sentence: str) -> None:
    assert find_faults(SOUND) == []
    (fault,) = find_faults({**SOUND, **changed})
    assert re.search(sentence, fault)


def test_the_last_two_prompts_reach_the_limit_and_half_share_a_beginning() -> None:
    pool = soak.make_pool(list(range(1000)), 20, LIMIT, NUM_TOKENS, seed=1)
    lengths = [len(prompt.ids) for prompt in pool]
    assert len(pool) == 20 and lengths[-2:] == [LIMIT - NUM_TOKENS, LIMIT - 1]
    assert min(lengths) >= 4 and max(lengths[:-2]) <= LIMIT - NUM_TOKENS
    # 9 of the first 18 begin at one of four places.
    assert len({prompt.ids[0] for prompt in pool[1:-2:2]}) == 4
    for text in ([1] * (LIMIT - 1), []):
        with pytest.raises(ValueError, match="--max-model-len 64 must be"):
            soak.make_pool(text, 20, LIMIT, NUM_TOKENS, seed=1)


# The whole load, on a server without a model


def soaked(tmp_path: Path, fault: str | None, most_requests: int = 200) -> dict[str, Any]:
    """Return the record of a run whose drafting server has a fault; plain decoding shares a tie's probabilities."""

    async def run() -> dict[str, Any]:
        drafting, plain = CompletionServer(fault), CompletionServer()
        if fault == "tie":
            # Never reaches its own tenth request with a changed token: it is asked for the truth.
            plain.fault = "tie"
            plain.requests = -(10**6) - 1
        async with drafting.serve("qm_spec") as ours, plain.serve("plain") as reference:
            # Prompts of one token may not repeat another's: what is expected depends on the length, too.
            pool = soak.make_pool([i % VOCABULARY for i in range(500)], 12, LIMIT, NUM_TOKENS, seed=0)
            if fault == "tie":
                for prompt in pool:
                    prompt.expected = answer(prompt.ids, min(NUM_TOKENS, LIMIT - len(prompt.ids)))
            return await soak.soak(
                ours,
                reference,
                pool,
                minutes=10,
                most_requests=most_requests,
                num_tokens=NUM_TOKENS,
                limit=LIMIT,
                seed=0,
                vocabulary=VOCABULARY,
                log=soak.Log(tmp_path / "log"),
            )

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 clients at once, each kind of request as often as the others, pauses cut short."""
    monkeypatch.setattr(soak, "LEVELS", (32,))
    monkeypatch.setattr(soak, "KINDS", dict.fromkeys(soak.KINDS, 1))
    monkeypatch.setattr(soak, "SAMPLE_S", 0.1)
    monkeypatch.setattr(soak, "IDLE_READINGS", 2)


def test_a_sound_server_has_no_faults(tmp_path: Path) -> None:
    record = soaked(tmp_path, None)
    assert find_faults(record) == []
    assert set(record["requests"]) == set(soak.KINDS) and record["num_requests"] == sum(record["requests"].values())
    assert record["checked_tokens"] > record["requests"]["greedy"]
    assert record["wrong_tokens"] == record["answers_parted_at_a_tie"] == 0
    bad = record["bad_requests"]
    assert set(bad) == {
        "wrong JSON: 400",
        "negative max_tokens: 400",
        "unknown model: 404",
        "empty messages: 400",
        "prompt one token above: 400",
    }
    assert sum(bad.values()) == record["requests"]["bad"] + record["requests"]["above"]
    assert record["acceptance_length"] == {"first_quarter": 3.0, "last_quarter": 3.0}
    json.dumps(record)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("wrong token", "wrong tokens"),
        ("short", "tokens for"),
        ("dies", "crashed: server qm_spec ended with -9"),
        ("leak", "50.00% of the KV pages"),
        ("takes bad", "negative max_tokens: status 200 for 400"),
        ("failed steps", "drafting failed in 3 steps"),
    ],
)
def test_a_fault_of_the_server_is_found(fault: str, sentence: str, tmp_path: Path) -> None:
    assert any(sentence in found for found in find_faults(soaked(tmp_path, fault)))


def test_a_tie_is_counted_apart_from_wrong_tokens(tmp_path: Path) -> None:
    record = soaked(tmp_path, "tie")
    assert record["answers_parted_at_a_tie"] > 0 and find_faults(record) == []


def test_an_interruption_leaves_a_record(tmp_path: Path) -> None:
    record = soaked(tmp_path, "interrupts", most_requests=10**9)
    assert record["interrupted"] and record["num_requests"] < 10**6 and record["checked_tokens"] > 0
    assert find_faults(record) == []


def test_speed_is_measured_in_turn(tmp_path: Path) -> None:
    async def run() -> list[dict[str, Any]]:
        async with CompletionServer(speed=4).serve("qm_spec") as ours, CompletionServer().serve("plain") as plain:
            prompts = [soak.Prompt([1, 2, 3])]
            return await soak.speed((ours, plain), prompts, [1, 4], 0.3, 2, soak.Log(tmp_path / "log"))

    rows = asyncio.run(run())
    assert [(row["server"], row["concurrency"]) for row in rows[:4]] == [
        ("plain", 1),
        ("qm_spec", 1),
        ("qm_spec", 1),
        ("plain", 1),
    ]
    # On a busy machine no token may come within so short a window.
    assert len(rows) == 8 and sum(row["output_tokens_per_s"] for row in rows) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--speed-only", "--no-speed"], "leave nothing to do"),
        (["--concurrency", "1,x"], "invalid literal"),
        (["--concurrency", "0"], "must be positive integers"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--max-model-len", "100000000"], "must be at least"),
    ],
)
def test_wrong_options_end_with_a_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app = typer.Typer(add_completion=False)
    app.command()(soak.main)
    with pytest.raises(SystemExit) as ended:
        app([*arguments, "--out", str(tmp_path / "out")])
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.vllm
@pytest.mark.long
def test_a_short_run_on_the_shipped_pair_is_sound(root: Path, tmp_path: Path) -> None:
    """Two servers, 20 seconds of load and a window of speed each."""
    command = [
        sys.executable,
        "benchmarks/soak.py",
        "--minutes",
        "0.33",
        "--num-prompts",
        "12",
        "--max-model-len",
        "512",
    ]
    speed = ["--concurrency", "1,4", "--window", "2", "--repeats", "1", "--out", str(tmp_path)]
    done = subprocess.run([*command, *speed], cwd=root, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    record = json.loads((tmp_path / "soak.json").read_text())
    assert record["faults"] == [] and record["soak"]["checked_tokens"] > 0 and record["soak"]["accepted_tokens"] > 0
    assert [row["server"] for row in record["speed"]] == ["plain", "qm_spec"] * 2
