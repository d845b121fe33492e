"""vLLM's server with our drafter: over HTTP it writes what the target does, has our metrics, and is switched off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.vllm_server import metrics, post, server

import qm_spec
from qm_spec.bench.acceptance.replay import write_continuations
from qm_spec.discovery import find_drafter

pytestmark = pytest.mark.vllm

TARGET = Path(qm_spec.__file__).parent / "zoo" / "novels" / "target"
NUM_TOKENS = 32
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"


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


def complete(url: str, ids: list[int], rank: str | None = None, **fields: Any) -> list[int]:
    """Return what is written behind a prompt, by a rank of data parallelism if one is named."""
    body = {"model": "novels", "prompt": ids, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    headers = {} if rank is None else {"X-data-parallel-rank": rank}
    answer = post(f"{url}/v1/completions", {**body, "return_token_ids": True, **fields}, **headers)
    return answer["choices"][0]["token_ids"]


def test_a_server_has_metrics_of_its_engines_process_and_is_switched_off(
    texts: list[tuple[list[int], list[int]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for by name. `vllm_xargs` for a request, `/collective_rpc` for the engine."""
    # Else a busy machine may draft nothing in so few steps.
    monkeypatch.setenv("QM_SPEC_ADAPT", "0")
    with server(TARGET, "novels", ["--speculative-model", "qm_spec"], tmp_path / "log") as url:
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
    assert drafted[accepted] == drafted[ACCEPTED] > 0
    assert off[accepted] == drafted[accepted] == engine_off[accepted]
    assert not stats["drafting"] and sum(stats["accepted_tokens"].values()) == off[accepted]


def test_serve_by_speculative_config_over_http(texts: list[tuple[list[int], list[int]]], tmp_path: Path) -> None:
    config = {"method": "eagle3", "model": str(find_drafter(TARGET)), "num_speculative_tokens": 2}
    with server(TARGET, "novels", ["--speculative-config", json.dumps(config)], tmp_path / "log") as url:
        for prompt, text in texts:
            assert complete(url, prompt) == text


@pytest.mark.long
def test_on_two_replicas_it_writes_the_same(
    texts: list[tuple[list[int], list[int]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data parallelism: an engine for each rank, both of which draft."""
    monkeypatch.setenv("QM_SPEC_ADAPT", "0")
    arguments = ["--speculative-model", "qm_spec", "--data-parallel-size", "2"]
    with server(TARGET, "novels", arguments, tmp_path / "log") as url:
        for rank in ("0", "1"):
            for prompt, text in texts:
                assert complete(url, prompt, rank=rank) == text
        accepted = {rank: metrics(url, f'engine="{rank}"')[ACCEPTED] for rank in ("0", "1")}
    assert all(accepted.values()), accepted
