"""A live engine counts its drafts as vLLM does, tells of them, and stops drafting when it is told to."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: run ./install.sh")

from support.offline_engine import OFFLINE, run_offline
from support.v2_engine import V2

import qm_spec

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("most_drafts")]

TARGET = Path(qm_spec.__file__).parent / "zoo" / "novels" / "target"
ENGINE = {
    "model": str(TARGET),
    "max_model_len": 512,
    "max_num_seqs": 4,
    "speculative_config": {"model": "qm_spec", "num_speculative_tokens": 4},
}
NUM_TOKENS = 32
# Before a request a worker's method may be called; behind each, what the engine says. Last, all that our logger said.
NOTED = """
import logging
said, handle = [], logging.Logger.handle


def noted(self, record):
    if self.name == "vllm.plugins.qm_spec":
        said.append([record.levelname, record.getMessage()])
    handle(self, record)


# vLLM takes a logger's handlers away when it sets up logging.
logging.Logger.handle = noted
"""
CALLED = (
    (
        """    sampling = SamplingParams(""",
        """    called = [llm.collective_rpc(name, args=tuple(args)) for name, *args in request.get("calls", [])]
    sampling = SamplingParams(""",
    ),
    (
        """    counters.append({""",
        """    counters.append({"ours": llm.collective_rpc("qm_spec_stats")[0]} | {""",
    ),
    (
        """json.dump({""",
        """from prometheus_client import REGISTRY, generate_latest
metrics = [line for line in generate_latest(REGISTRY).decode().splitlines() if line.startswith("qm_spec:")]
json.dump({"said": said, "metrics": metrics, """,
    ),
)


def with_calls(program: str) -> str:
    """Return the program with what it notes besides."""
    for old, new in CALLED:
        assert program.count(old) == 1
        program = program.replace(old, new)
    return program.replace("import json, sys\n", NOTED + "import json, sys\n")


@pytest.fixture(scope="module")
def requests() -> list[dict[str, Any]]:
    """Three prompts at once: as they come; off; two tokens; nonsense; with the engine off; and on again."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    texts = [json.loads(line)["text"] for line in (TARGET.parent / "prompts.jsonl").read_text().splitlines()[:3]]
    prompts = [{"prompt_token_ids": tokenizer(text)["input_ids"][:60]} for text in texts]

    def one(calls: Any = (), **extra: Any) -> dict[str, Any]:
        sampling = {"temperature": 0, "max_tokens": NUM_TOKENS, "extra_args": extra or None}
        return {"prompts": prompts, "sampling": sampling, "calls": calls}

    return [
        one(),
        one(qm_spec="off"),
        one(qm_spec=2),
        one(qm_spec="none\n"),
        one([["qm_spec_drafting", "off"]]),
        one([["qm_spec_drafting", "on"]]),
    ]


@pytest.fixture(scope="module")
def v1(requests: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the engine says, with a report behind every step and lookup on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_LOG_STATS_INTERVAL", "1e-9")
        patch.setenv("QM_SPEC_LOOKUP", "2")
        ran = run_offline(tmp_path_factory.mktemp("v1"), ENGINE, requests, with_calls(OFFLINE))
    return SimpleNamespace(**ran)


def counted(run: Any) -> list[dict[str, Any]]:
    """Return what each request added to vLLM's counters and to ours."""

    def flat(counters: Any) -> dict[str, int]:
        ours = counters["ours"]
        sums = {name: sum(ours[name].values()) for name in ("drafts", "draft_tokens", "accepted_tokens")}
        theirs = {name: counters[f"vllm:spec_decode_num_{name}"] for name in sums}
        steps = {f"steps {kind}": number for kind, number in ours["steps"].items()}
        return {**{f"our {name}": number for name, number in sums.items()}, **theirs, **steps}

    ends = [flat(counters) for counters in run.counters]
    starts = [dict.fromkeys(ends[0], 0), *ends[:-1]]
    return [{name: end[name] - start[name] for name in end} for start, end in zip(starts, ends, strict=True)]


def check_counts(run: Any) -> None:
    for added in counted(run):
        for name in ("drafts", "draft_tokens", "accepted_tokens"):
            assert added[f"our {name}"] == added[name], added


def test_counters_are_vllms_and_answers_are_those_of_an_engine_that_is_off(v1: Any) -> None:
    check_counts(v1)
    assert all(answers == v1.answers[0] for answers in v1.answers) and v1.errors == [None] * 6
    as_it_comes = counted(v1)[0]
    assert as_it_comes["accepted_tokens"] > 10 and as_it_comes["steps prior"] > 0
    assert all(v1.counters[-1]["ours"]["draft_tokens"].values()), "both sources have drafted"


def test_a_request_is_drafted_for_as_it_asks(v1: Any) -> None:
    as_it_comes, off, two, nonsense, *_ = counted(v1)
    assert off["drafts"] == 0 and off["steps prior"] == off["steps lookup"] == 0
    # Each token but the first, which the prompt brings, takes a step.
    assert off["steps plain"] >= NUM_TOKENS
    assert 0 < two["draft_tokens"] <= 2 * two["drafts"]
    assert nonsense == as_it_comes
    warnings = [text for level, text in v1.said if level == "WARNING"]
    assert [text for text in warnings if "got 'none\\n'; it is ignored" in text] == warnings


def test_an_engine_is_turned_off_and_on_while_it_runs(v1: Any) -> None:
    as_it_comes, *_, off, on = counted(v1)
    assert off["drafts"] == 0 and off["steps plain"] >= NUM_TOKENS
    assert on["accepted_tokens"] == as_it_comes["accepted_tokens"] and v1.counters[-1]["ours"]["drafting"]


def test_the_log_has_one_line_of_status_and_lines_of_counters(v1: Any) -> None:
    texts = [text for _, text in v1.said]
    (status,) = (text for text in texts if "qm_spec: target" in text)
    assert "runner V1, loop ours" in status and "KV groups 1, with the drafter 1" in status
    assert "lookup from 2 tokens, K 4" in status
    assert any("mean acceptance length" in text and "steps by what drafted" in text for text in texts)


def test_metrics_hold_the_counters(v1: Any) -> None:
    ours = v1.counters[-1]["ours"]
    for kind, number in ours["accepted_tokens"].items():
        name = f'qm_spec:accepted_tokens_total{{engine="0",model_name="{TARGET}",source="{kind}"}}'
        assert f"{name} {float(number)}" in v1.metrics


def test_an_engine_with_the_v2_runner_counts_and_is_turned_off(requests: Any, tmp_path: Path) -> None:
    """A request cannot be turned off there: vLLM has one number of drafts for all."""
    ran = SimpleNamespace(**run_offline(tmp_path, ENGINE, [requests[0], *requests[4:]], with_calls(V2)))
    as_it_comes, off, on = counted(ran)
    assert all(answers == ran.answers[0] for answers in ran.answers)
    # What a device has counted of the last step arrives with the next.
    for added in (as_it_comes, on):
        assert 0 < added["our drafts"] <= added["drafts"] + 3 and added["our accepted_tokens"] > 10
    assert off["steps prior"] == 0 and off["our drafts"] <= 3 and off["accepted_tokens"] <= 1
    (status,) = (text for _, text in ran.said if "qm_spec: target" in text)
    assert "runner V2, loop ours" in status


def test_batches_above_a_size_are_not_drafted_for(requests: Any, tmp_path: Path) -> None:
    """By vLLM's own setting; with the V2 runner in test_v2_engine.py."""
    config = {**ENGINE["speculative_config"], "num_speculative_tokens_per_batch_size": [[1, 2, 4], [3, 64, 0]]}  # type: ignore[dict-item]
    alone = {**requests[0], "prompts": requests[0]["prompts"][:1]}
    ran = SimpleNamespace(
        **run_offline(tmp_path, {**ENGINE, "speculative_config": config}, [requests[0], alone], with_calls(OFFLINE))
    )
    large, small = counted(ran)
    assert ran.answers[1] == ran.answers[0][:1]
    assert large["drafts"] <= 2 < small["drafts"] and large["steps plain"] > NUM_TOKENS - 4
