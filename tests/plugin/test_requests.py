"""Requests of every kind have the outputs of plain decoding, each kind alone and all of them in one batch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: run ./install.sh")

from support.engine_series import run_series
from transformers import AutoTokenizer

import qm_spec

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("most_drafts")]

ZOO = Path(qm_spec.__file__).parent / "zoo" / "novels"
TARGET = str(ZOO / "target")
NUM_TOKENS, MAX_NUM_SEQS = 32, 8
LENGTHS = (12, 40, 150)
# Many come to their `min_tokens` by a draft, with a stop token behind it.
REACHED, REACHING = (2, 3, 4, 5), 24
# Of the values of logprobs, in float32: rounding in another order.
TOLERANCE = 1e-4
SEEDED = {"temperature": 0.9, "seed": 11}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Anne", "Tom"]}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
STOP = [" and", ". ", " was"]
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "streaming": {"output_kind": "DELTA"},
    "streaming with logprobs": {"output_kind": "DELTA", "logprobs": 2},
    "few tokens": {"max_tokens": 2},
    "logprobs": {"logprobs": 5},
    "logprobs of sampled tokens": {"logprobs": 0, **SEEDED},
    "prompt_logprobs": {"prompt_logprobs": 3},
    "stop strings": {"stop": STOP},
    "stop strings that are kept": {"stop": STOP, "include_stop_str_in_output": True},
    "stop strings in a stream": {"stop": STOP, "output_kind": "DELTA"},
    # Filled in by the tokenizer: of `STOP`.
    "stop token ids": {"stop_token_ids": "stop"},
    "min_tokens": {"stop_token_ids": "stop", "min_tokens": 9},
    "min_tokens of sampled tokens": {"stop_token_ids": "stop", "min_tokens": 9, **SEEDED},
    "seeds": SEEDED,
    "n": {**SEEDED, "n": 3},
    "top_k and top_p": {**SEEDED, "top_k": 20, "top_p": 0.8},
    "penalties": {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
    "penalties of sampled tokens": {"frequency_penalty": 0.9, "top_k": 50, **SEEDED},
    "bad_words": {"bad_words": ["the", "of the", "and", "a little", "had been"]},
    "allowed_token_ids": {"allowed_token_ids": [*range(5, 4096, 3)]},
    "all at once": {
        **SEEDED,
        "logprobs": 3,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "bad_words": ["the"],
        "min_tokens": 5,
        "stop_token_ids": "stop",
        "ignore_eos": False,
    },
    "JSON schema": {"structured_outputs": {"json": SCHEMA}, "ignore_eos": False},
    "sampled JSON schema": {"structured_outputs": {"json": SCHEMA}, "ignore_eos": False, **SEEDED},
    "regex": {"structured_outputs": {"regex": "[a-z ]{60}"}, "ignore_eos": False},
    "choice": {"structured_outputs": {"choice": ["the sea", "the seaside house", "rain"]}, "ignore_eos": False},
}
# Of a greedy request vLLM drops `min_p`.
REFUSED = {"min_p": {"min_p": 0.1, **SEEDED}, "logit_bias": {"logit_bias": {"5": 1.0}}}
# Any processor of vLLM's that is none of the engine's own list.
CUSTOM = "vllm.v1.sample.logits_processor.builtin:MinPLogitsProcessor"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every kind alone, then all in one batch in which they begin and end one after the other."""
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    lines = (ZOO / "prompts.jsonl").read_text().splitlines()[:REACHING]
    novels = [tokenizer(json.loads(line)["text"])["input_ids"] for line in lines]
    prompts = [novel[:length] for novel, length in zip(novels, LENGTHS, strict=False)]
    stops = [tokenizer(text)["input_ids"][0] for text in STOP]

    def requests(settings: dict[str, Any]) -> list[Any]:
        settings = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True, **settings}
        if settings.get("stop_token_ids") == "stop":
            settings["stop_token_ids"] = stops
        return [[prompt, settings] for prompt in prompts]

    kinds = {name: requests(settings) for name, settings in KINDS.items()}
    together = [request for asked in kinds.values() for request in asked]
    batches = [{"requests": asked} for asked in kinds.values()]
    batches.append({"requests": together, "arrivals": [number // 2 for number in range(len(together))]})
    refused = [{"requests": requests(settings)[:1]} for settings in REFUSED.values()]
    common_words = [tokenizer(text)["input_ids"][0] for text in (" the", ",", " and", " of", " to", " a", " in", ".")]
    ending = {"temperature": 0, "max_tokens": 12, "stop_token_ids": common_words}
    reached = {
        "requests": [
            [novel[: 20 + number], {**ending, "min_tokens": least}]
            for least in REACHED
            for number, novel in enumerate(novels)
        ]
    }
    common = {"model": TARGET, "max_model_len": 256, "max_num_seqs": MAX_NUM_SEQS}
    ours = {"speculative_config": {"model": "qm_spec", "num_speculative_tokens": 4}}
    engines = {
        "plain": {"batches": [*batches, reached]},
        # Copies of up to 16 tokens, and 4 drawn ones.
        "copies": {"speculative_config": {"model": "qm_spec"}, "batches": batches + refused},
        "certain": {"speculative_config": {**ours["speculative_config"], "draft_sample_method": "greedy"}},
        "one draft": {"speculative_config": {"model": "qm_spec", "num_speculative_tokens": 1}, "batches": [reached]},
        "custom": {**ours, "logits_processors": [CUSTOM], "batches": []},
    }
    runs = run_series(tmp_path_factory.mktemp("requests"), engines, batches, common)
    return SimpleNamespace(runs=runs, prompts=prompts, tokenizer=tokenizer, stops=stops)


def whole(answer: list[Any]) -> dict[str, Any]:
    """Put together what was handed out of one request, in one piece or in many: of each of its outputs, by index."""
    outputs: dict[int, dict[str, Any]] = {}
    for piece in answer:
        for output in piece["outputs"]:
            into = outputs.setdefault(output["index"], {"token_ids": [], "text": "", "logprobs": []})
            into["token_ids"] += output["token_ids"]
            into["text"] += output["text"]
            into["logprobs"] += output["logprobs"] or []
            into |= {name: output[name] for name in ("finish_reason", "stop_reason")}
    return {"outputs": outputs, "prompt_logprobs": answer[0]["prompt_logprobs"] or []}


def check_logprobs(ours: list[Any], plain: list[Any], where: str) -> None:
    """Assert the same tokens at each position, with values that rounding explains."""
    assert len(ours) == len(plain), where
    for one, other in zip(ours, plain, strict=True):
        if one is None or other is None:
            assert one == other, where
            continue
        assert one.keys() == other.keys(), where
        assert all(math.isclose(one[token], other[token], rel_tol=0, abs_tol=TOLERANCE) for token in one), where


def check(answers: list[Any], plain: list[Any], where: str) -> None:
    assert len(answers) == len(plain) > 0
    for number, pair in enumerate(zip(answers, plain, strict=True)):
        ours, theirs = whole(pair[0]), whole(pair[1])
        place = f"{where}, prompt {number}"
        assert ours["outputs"].keys() == theirs["outputs"].keys(), place
        check_logprobs(ours["prompt_logprobs"], theirs["prompt_logprobs"], place)
        for index, output in ours["outputs"].items():
            expected = theirs["outputs"][index]
            check_logprobs(output.pop("logprobs"), expected.pop("logprobs"), place)
            assert output == expected, place


def of_kind(ran: Any, engine: str, kind: str) -> list[Any]:
    return ran.runs[engine]["batches"][[*KINDS].index(kind)]["answers"]


@pytest.mark.parametrize("engine", ["copies", "certain"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_alone_has_the_outputs_of_plain_decoding(ran: Any, engine: str, kind: str) -> None:
    check(of_kind(ran, engine, kind), of_kind(ran, "plain", kind), kind)


@pytest.mark.parametrize("engine", ["plain", "copies", "certain"])
def test_all_kinds_in_one_batch_have_the_outputs_that_each_has_alone(ran: Any, engine: str) -> None:
    answers = ran.runs[engine]["batches"][len(KINDS)]["answers"]
    for place, kind in enumerate(KINDS):
        first = place * len(LENGTHS)
        check(answers[first : first + len(LENGTHS)], of_kind(ran, "plain", kind), f"{kind} among others")


@pytest.mark.parametrize("engine", ["copies", "certain"])
def test_each_kind_accepts_drafts_and_gives_its_pages_back(ran: Any, engine: str) -> None:
    """Where nothing is drafted nothing is tested."""
    batches = ran.runs[engine]["batches"]
    before = 0
    for kind, batch in zip([*KINDS, "all"], batches, strict=False):
        accepted = batch["counters"]["vllm:spec_decode_num_accepted_tokens"]
        assert accepted > before or kind in ("few tokens", "choice"), kind
        assert batch["pages_lost"] == 0, kind
        before = accepted


def test_min_tokens_that_a_draft_reaches_end_where_they_end_without(ran: Any) -> None:
    plain, ours = (ran.runs[engine]["batches"][-1]["answers"] for engine in ("plain", "one draft"))
    check(ours, plain, "min_tokens")
    ended = [whole(answer)["outputs"][0]["token_ids"] for answer in plain]
    assert sum(len(text) == least + 1 for text, least in zip(ended, sorted(REACHED * REACHING), strict=True)) > 10


def outputs(ran: Any, kind: str) -> list[dict[str, Any]]:
    return [output for answer in of_kind(ran, "certain", kind) for output in whole(answer)["outputs"].values()]


def test_several_tokens_come_at_once_in_a_stream(ran: Any) -> None:
    for answer in of_kind(ran, "copies", "streaming"):
        pieces = [piece["outputs"][0] for piece in answer]
        assert 2 < len(pieces) < NUM_TOKENS, "several pieces, some of several tokens"
        assert max(len(piece["token_ids"]) for piece in pieces) > 1


def test_settings_have_their_effect(ran: Any) -> None:
    """Else equal outputs would say nothing of them."""
    greedy, stops = [output["token_ids"] for output in outputs(ran, "greedy")], set(ran.stops)
    assert all(len(text) == NUM_TOKENS for text in greedy)
    for kind in ("seeds", "penalties", "bad_words", "allowed_token_ids", "regex"):
        assert not any(output["token_ids"] in greedy for output in outputs(ran, kind)), kind
    samples = [output["token_ids"] for output in outputs(ran, "n")]
    assert len(samples) == 3 * len(LENGTHS) == len({tuple(sample) for sample in samples})
    for kind in ("stop strings", "stop strings in a stream"):
        assert {output["finish_reason"] for output in outputs(ran, kind)} >= {"stop"}, kind
        assert not any(stop in output["text"] for output in outputs(ran, kind) for stop in STOP), kind
    assert any(output["text"].endswith(tuple(STOP)) for output in outputs(ran, "stop strings that are kept"))
    early = [output["token_ids"] for output in outputs(ran, "stop token ids")]
    assert any(len(text) < 9 and text[-1] in stops for text in early)
    for output in outputs(ran, "min_tokens"):
        assert len(output["token_ids"]) >= 9 and not stops & set(output["token_ids"][:9])
    for output in outputs(ran, "bad_words"):
        assert not {" the", " and", " of the"} & set(output["text"].split(" "))
    assert all(token % 3 == 2 for output in outputs(ran, "allowed_token_ids") for token in output["token_ids"])


def test_structured_outputs_follow_their_grammar(ran: Any) -> None:
    pytest.importorskip("xgrammar", reason="vLLM's backend for structured outputs is not installed")
    for output in outputs(ran, "choice"):
        assert output["text"] in KINDS["choice"]["structured_outputs"]["choice"]
    finished = [output for output in outputs(ran, "JSON schema") if output["finish_reason"] == "stop"]
    assert all(json.loads(output["text"])["name"] in ("Anne", "Tom") for output in finished)
    assert all(output["text"].lstrip().startswith("{") for output in outputs(ran, "JSON schema"))


def test_vllm_refuses_min_p_and_logit_bias_beside_a_drafter(ran: Any) -> None:
    batches = ran.runs["copies"]["batches"][len(KINDS) + 1 :]
    for batch in batches:
        (message,) = batch["refused"]
        assert "min_p and logit_bias" in message and "speculative" in message
    assert len(batches) == len(REFUSED)


def test_vllm_refuses_custom_logits_processors_beside_a_drafter(ran: Any) -> None:
    assert "logits processors are not supported" in ran.runs["custom"]["error"]
