"""Tool calls, streams, stop strings and several outputs over HTTP: what a client reads is the same with a drafter.

The server runs vLLM's `AsyncLLM`, with the engine in a process beside it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: run ./install.sh")

from support.vllm_server import metrics, post, server, stream

import qm_spec

pytestmark = [pytest.mark.vllm, pytest.mark.long]

TARGET = Path(qm_spec.__file__).parent / "zoo" / "novels" / "target"
MODEL, MAX_MODEL_LEN, NUM_TOKENS = "novels", 4096, 48
# The shipped target has no template of its own, and has never seen a tool.
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Find a person.",
        # Has vLLM hold the model to the schema, which this one would not keep to by itself.
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"name": {"enum": ["Anne", "Tom"]}, "about": {"type": "string", "pattern": "^[a-z ]{30}$"}},
            "required": ["name", "about"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "look_up"}}
# Has the model write what a model trained on this format does, for vLLM's parser to find.
WRITES_CALL = {"regex": r'Well\. <tool_call>\{"name": "look_up", "arguments": \{"about": "[a-z ]{40}"\}\}</tool_call>'}
CALLS: dict[str, dict[str, Any]] = {
    "named": {"tool_choice": NAMED},
    "required": {"tool_choice": "required"},
    "auto": {"tool_choice": "auto", "structured_outputs": WRITES_CALL},
    "auto, and no call": {"tool_choice": "auto"},
}
STOP = [" and", ". ", " was"]
TEXTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "stop strings": {"stop": STOP},
    "stop strings that are kept": {"stop": STOP, "include_stop_str_in_output": True},
    "n": {"n": 3, "temperature": 0.9, "seed": 11},
}


def chat(fields: dict[str, Any]) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Who was the old man at the house by the sea?"}]
    common = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 120, "tools": [TOOL]}
    # Else it fills the call with line breaks, which JSON allows without end.
    return {**common, "frequency_penalty": 2, **fields}


def called(answer: dict[str, Any]) -> dict[str, Any]:
    """Return what a client reads of a chat's answer: its text, its calls, why it ended."""
    (choice,) = answer["choices"]
    calls = [call["function"] for call in choice["message"].get("tool_calls") or []]
    return {"text": choice["message"]["content"] or "", "calls": calls, "finish_reason": choice["finish_reason"]}


def called_in_stream(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """Join the pieces of a streamed chat to what `called` returns."""
    text, calls, finish_reason = "", {}, None
    for event in stream(url, body):
        for choice in event["choices"]:
            finish_reason = choice["finish_reason"] or finish_reason
            text += choice["delta"].get("content") or ""
            for piece in choice["delta"].get("tool_calls") or []:
                call = calls.setdefault(piece["index"], {"name": "", "arguments": ""})
                for name in call:
                    call[name] += piece["function"].get(name) or ""
    return {"text": text, "calls": list(calls.values()), "finish_reason": finish_reason}


def meant(answer: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the calls without the spaces in their JSON, which vLLM keeps in a stream alone."""
    return [(call["name"], json.loads(call["arguments"])) for call in answer["calls"]]


def written(answer: dict[str, Any]) -> list[tuple[str, str, Any]]:
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    return [(choice["text"], choice["finish_reason"], choice["stop_reason"]) for choice in choices]


def written_in_stream(url: str, body: dict[str, Any]) -> tuple[list[tuple[str, str, Any]], int]:
    """Join the pieces of a streamed completion to what `written` returns; return also how many they were."""
    outputs: dict[int, list[Any]] = {}
    pieces = 0
    for event in stream(url, body):
        for choice in event["choices"]:
            output = outputs.setdefault(choice["index"], ["", None, None])
            output[0] += choice["text"]
            output[1] = choice["finish_reason"] or output[1]
            output[2] = choice["stop_reason"] or output[2]
            pieces += 1
    return [tuple(outputs[index]) for index in sorted(outputs)], pieces


def leave_in_mid_stream(url: str, body: dict[str, Any]) -> dict[str, float]:
    """Close the connection after three pieces of a long answer; return the counters when nothing runs any more."""
    events = stream(f"{url}/v1/completions", {**body, "max_tokens": MAX_MODEL_LEN - 200})
    for _ in range(3):
        next(events)
    running = metrics(url)["vllm:num_requests_running"]
    events.close()
    deadline = time.monotonic() + 120
    while (left := metrics(url))["vllm:num_requests_running"] and time.monotonic() < deadline:
        time.sleep(0.2)
    return {**left, "running before": running}


def visit(url: str, prompts: list[list[int]], streamed: bool) -> SimpleNamespace:
    """Ask a server everything; for texts in streams too if wanted."""
    chats, texts = f"{url}/v1/chat/completions", f"{url}/v1/completions"
    common = {"model": MODEL, "temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    asked = {
        (kind, number): {**common, "prompt": prompt, **fields}
        for kind, fields in TEXTS.items()
        for number, prompt in enumerate(prompts)
    }
    saw = SimpleNamespace()
    saw.calls = {kind: called(post(chats, chat(fields))) for kind, fields in CALLS.items()}
    saw.after_calls = metrics(url)
    saw.streamed_calls = {kind: called_in_stream(chats, chat(fields)) for kind, fields in CALLS.items()}
    saw.texts = {key: written(post(texts, body)) for key, body in asked.items()}
    if streamed:
        saw.streamed_texts = {key: written_in_stream(texts, body) for key, body in asked.items()}
    saw.before = metrics(url)
    if streamed:
        saw.left = leave_in_mid_stream(url, {**common, "prompt": prompts[0]})
    return saw


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SimpleNamespace]:
    """A server without a drafter, then one with."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    lines = (TARGET.parent / "prompts.jsonl").read_text().splitlines()[:2]
    prompts = [
        tokenizer(json.loads(line)["text"])["input_ids"][:length] for line, length in zip(lines, (40, 150), strict=True)
    ]
    folder = tmp_path_factory.mktemp("http")
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    tools = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--chat-template", str(template)]
    answers = {}
    with pytest.MonkeyPatch.context() as patch:
        # Else a busy machine may draft nothing in so few steps.
        patch.setenv("QM_SPEC_ADAPT", "0")
        for name, drafter in (("plain", []), ("drafted", ["--speculative-model", "qm_spec"])):
            with server(TARGET, MODEL, [*tools, *drafter], folder / name, MAX_MODEL_LEN) as url:
                answers[name] = visit(url, prompts, streamed=bool(drafter))
    return answers


@pytest.mark.parametrize("kind", CALLS)
def test_tool_calls_are_the_same(ran: dict[str, SimpleNamespace], kind: str) -> None:
    plain, drafted = (ran[name].calls[kind] for name in ("plain", "drafted"))
    assert drafted == plain
    if kind == "auto, and no call":
        assert drafted["text"] and not drafted["calls"]
    else:
        call = drafted["calls"][0]
        assert call["name"] == "look_up" and len(json.loads(call["arguments"])["about"]) >= 30


@pytest.mark.parametrize("kind", CALLS)
def test_streamed_tool_calls_are_the_same_and_join_to_those_that_are_not(
    ran: dict[str, SimpleNamespace], kind: str
) -> None:
    drafted = ran["drafted"]
    assert drafted.streamed_calls[kind] == ran["plain"].streamed_calls[kind]
    assert meant(drafted.streamed_calls[kind]) == meant(drafted.calls[kind])


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_are_the_same_and_streamed_ones_join_to_them(ran: dict[str, SimpleNamespace], kind: str) -> None:
    plain, drafted = ran["plain"], ran["drafted"]
    for key in [key for key in plain.texts if key[0] == kind]:
        assert drafted.texts[key] == plain.texts[key]
        joined, pieces = drafted.streamed_texts[key]
        assert joined == drafted.texts[key]
        # Several tokens come at once.
        assert 1 < pieces < NUM_TOKENS * len(joined)


def test_settings_have_their_effect_over_http(ran: dict[str, SimpleNamespace]) -> None:
    """Else equal texts would say nothing of them."""
    texts = ran["drafted"].texts
    cut = [output for number in (0, 1) for output in texts["stop strings", number]]
    assert all(reason == "stop" and stop in STOP and stop not in text for text, reason, stop in cut)
    kept = [output for number in (0, 1) for output in texts["stop strings that are kept", number]]
    assert all(text.endswith(stop) for text, _, stop in kept)
    assert all(len({text for text, *_ in texts["n", number]}) == 3 for number in (0, 1))


def test_drafts_are_accepted_in_tool_calls_and_in_texts(ran: dict[str, SimpleNamespace]) -> None:
    accepted = "vllm:spec_decode_num_accepted_tokens_total"
    calls, all_of_it = ran["drafted"].after_calls[accepted], ran["drafted"].before[accepted]
    assert 0 < calls < all_of_it
    assert accepted not in ran["plain"].before


def test_a_client_that_leaves_in_mid_stream_leaves_no_request_behind(ran: dict[str, SimpleNamespace]) -> None:
    before, left = ran["drafted"].before, ran["drafted"].left
    assert left["running before"] == 1 and left["vllm:num_requests_running"] == 0
    assert left["vllm:num_requests_waiting"] == left["vllm:kv_cache_usage_perc"] == 0
    # It was ended, and not decoded to its end.
    assert left["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] < MAX_MODEL_LEN / 2
