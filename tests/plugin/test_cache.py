"""Outputs stay plain decoding's whatever becomes of the KV cache: shared, merged, evicted, preempted, aborted, full."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: run ./install.sh")

from support.engine_series import run_series, texts
from transformers import AutoTokenizer

import qm_spec

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("most_drafts")]

ZOO = Path(qm_spec.__file__).parent / "zoo" / "novels"
TARGET = str(ZOO / "target")
NUM_TOKENS, BLOCK, MAX_MODEL_LEN = 40, 32, 2304
# Room for one request of the most tokens, and for less than half of what eight at a time want.
FEW_PAGES = MAX_MODEL_LEN // BLOCK + 2
# In decoding a group comes to its next level behind 128, 256, 512, 1024 and 2048 tokens. It is 16 tokens long.
LEVELS = (130, 260, 520, 1030, 2060)
CROWD = (300, 310, 330, 350, 370, 390, 400, 420, 300, 350, 400, 450)
ABORTED = {1: 6, 2: 1, 4: 12}
GREEDY = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
STREAMED = {**GREEDY, "output_kind": "DELTA"}
BATCHES = ("levels", "shared", "crowd", "crowd again", "aborts", "end")


def novel_tokens(count: int) -> list[list[int]]:
    """Return the token ids of the shipped prompts' whole texts, 3000 tokens and more each."""
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    lines = (ZOO / "prompts.jsonl").read_text().splitlines()[:count]
    return [tokenizer(json.loads(line)["text"])["input_ids"] for line in lines]


def make_batches() -> dict[str, Any]:
    novels = novel_tokens(12)
    levels = [[novel[:length], GREEDY] for novel, length in zip(novels, LEVELS, strict=False)]
    first = novels[5]
    # One beside the first request, the others when it has gone and left its pages, merged up to its last token.
    shared = [first[:700], first[:300] + novels[6][:50], first[:140] + novels[7][:30], first[:700], first[:690]]
    crowd = [[novel[:length], GREEDY] for novel, length in zip(novels, CROWD, strict=True)]
    # The third is aborted while its prompt is read, in pieces.
    aborted = [novels[number][:length] for number, length in enumerate((100, 200, 1200, 64, 300, 40))]
    left = (3, 18, 1)
    return {
        "levels": {"requests": levels},
        "shared": {"requests": [[prompt, GREEDY] for prompt in shared], "arrivals": [0, 10, 60, 60, 60]},
        "crowd": {"requests": crowd},
        "crowd again": {"requests": crowd},
        "aborts": {
            "requests": [[prompt, STREAMED] for prompt in aborted],
            "arrivals": [0, 0, 0, 0, 2, 14],
            "aborts": ABORTED,
        },
        "end": {
            "requests": [
                *([novels[number][: MAX_MODEL_LEN - tokens], GREEDY] for number, tokens in enumerate(left)),
                [novels[3][:50], GREEDY],
            ]
        },
    }


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    batches = make_batches()
    assert (*batches,) == BATCHES
    common = {
        "model": TARGET,
        "max_model_len": MAX_MODEL_LEN,
        "block_size": BLOCK,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
    }
    ours: dict[str, Any] = {"speculative_config": {"model": "qm_spec"}}
    cached, few = {"enable_prefix_caching": True}, {"num_gpu_blocks_override": FEW_PAGES}
    engines = {
        "plain": {"enable_prefix_caching": False},
        "plain, cached": cached,
        "cached": {**ours, **cached},
        "few pages": {**ours, **cached, **few},
        "few pages, not cached": {**ours, **few, "enable_prefix_caching": False},
    }
    runs = run_series(tmp_path_factory.mktemp("cache"), engines, [*batches.values()], common)
    return SimpleNamespace(runs=runs, prompts={name: batch["requests"] for name, batch in batches.items()})


def batch_of(ran: Any, engine: str, name: str) -> Any:
    return ran.runs[engine]["batches"][BATCHES.index(name)]


def counted(ran: Any, engine: str, counter: str) -> list[float]:
    """Return by batch what a counter of vLLM's has risen by."""
    values = [0.0, *(batch["counters"][f"vllm:{counter}"] for batch in ran.runs[engine]["batches"])]
    return [after - before for before, after in pairwise(values)]


OURS = pytest.mark.parametrize("engine", ["cached", "few pages", "few pages, not cached"])


@OURS
@pytest.mark.parametrize("name", ["levels", "shared", "crowd", "crowd again"])
def test_outputs_are_plain_decodings(ran: Any, engine: str, name: str) -> None:
    plain, answers = texts(batch_of(ran, "plain", name)), texts(batch_of(ran, engine, name))
    assert answers == plain
    assert all(len(text) == NUM_TOKENS for (text,) in plain)
    assert counted(ran, engine, "spec_decode_num_accepted_tokens")[BATCHES.index(name)] > len(plain) * 5


@OURS
def test_outputs_up_to_the_models_last_token_are_plain_decodings(ran: Any, engine: str) -> None:
    answers = texts(batch_of(ran, engine, "end"))
    assert answers == texts(batch_of(ran, "plain", "end"))
    lengths = [len(prompt) + len(text) for (prompt, _), (text,) in zip(ran.prompts["end"], answers, strict=True)]
    assert lengths == [MAX_MODEL_LEN, MAX_MODEL_LEN, MAX_MODEL_LEN, 50 + NUM_TOKENS]


@OURS
def test_an_aborted_request_leaves_the_others_as_they_are(ran: Any, engine: str) -> None:
    whole = [
        [
            [token for piece in answer for output in piece["outputs"] for token in output["token_ids"]]
            for answer in batch_of(ran, name, "aborts")["answers"]
        ]
        for name in ("plain", engine)
    ]
    for number, (plain, ours) in enumerate(zip(*whole, strict=True)):
        if number in ABORTED:
            # How far it came hangs on what was accepted.
            assert ours[: len(plain)] == plain[: len(ours)], number
            assert len(ours) < NUM_TOKENS
        else:
            assert ours == plain and len(ours) == NUM_TOKENS, number
    assert whole[1][2] == [] and len(whole[1][1]) > 1


@OURS
def test_all_pages_come_back(ran: Any, engine: str) -> None:
    assert [batch["pages_lost"] for batch in ran.runs[engine]["batches"]] == [0] * len(BATCHES)


def test_requests_were_preempted_evicted_and_shared(ran: Any) -> None:
    """Else equal outputs would say nothing of that."""
    crowd = BATCHES.index("crowd")
    for engine in ("few pages", "few pages, not cached"):
        assert ran.runs[engine]["num_blocks"] == FEW_PAGES
        assert counted(ran, engine, "num_preemptions")[crowd] > 0, engine
    assert not any(counted(ran, "cached", "num_preemptions"))
    hits = {engine: counted(ran, engine, "prefix_cache_hits") for engine in ran.runs}
    assert not any(hits["plain"] + hits["few pages, not cached"])
    assert hits["cached"][BATCHES.index("shared")] > 1400
    assert hits["cached"] == hits["plain, cached"], "the draft layer costs no hit"
    # The crowd is in the cache where pages were not taken from it.
    assert hits["few pages"][crowd + 1] < 0.5 * hits["cached"][crowd + 1]


def test_the_draft_layer_takes_its_share_of_the_pages(ran: Any) -> None:
    """20 layers with one head of 64 numbers, and one with two of 32 and 16 bytes a head, in float32."""
    plain, ours = (ran.runs[engine]["num_blocks"] for engine in ("plain, cached", "cached"))
    layer = 2 * 64 * 4
    assert ours / plain == pytest.approx(20 * layer / (21 * layer + 2 * 16), rel=0.002)


@pytest.mark.long
def test_acceptance_behind_a_prefix_hit_is_that_of_a_cold_start(tmp_path: Path) -> None:
    """Within 2 %, over 96 prompts. Their pages are merged as they were when the first answers ended."""
    novels = novel_tokens(32)
    prompts = [
        novel[start : start + 200 + 7 * number] for number, novel in enumerate(novels) for start in (0, 500, 1000)
    ]
    batch = {"requests": [[prompt, {**GREEDY, "max_tokens": 64}] for prompt in prompts]}
    common = {"model": TARGET, "max_model_len": 1024, "block_size": BLOCK, "max_num_seqs": 8}
    ours = {"speculative_config": {"model": "qm_spec"}, "enable_prefix_caching": True}
    runs = run_series(tmp_path, {"cached": ours}, [batch, batch], common)
    ran = SimpleNamespace(runs=runs)
    assert texts(runs["cached"]["batches"][0]) == texts(runs["cached"]["batches"][1])
    hits, drafts, accepted = (
        counted(ran, "cached", name)
        for name in ("prefix_cache_hits", "spec_decode_num_drafts", "spec_decode_num_accepted_tokens")
    )
    assert hits[0] == 0 and hits[1] > 0.9 * sum(len(prompt) for prompt in prompts)
    cold, warm = (1 + tokens / steps for tokens, steps in zip(accepted, drafts, strict=True))
    assert warm == pytest.approx(cold, rel=0.02)
