"""Copies from other requests' answers: only where the operator and both requests want it, and never another token."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: run ./install.sh")

from support.offline_engine import run_offline

import qm_spec
from qm_spec.integrations.vllm_plugin import sharing
from qm_spec.integrations.vllm_plugin.session import DraftSession

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("most_drafts")]

ZOO = Path(qm_spec.__file__).parent / "zoo" / "novels"


def state(share: object = None, adapter: int = 0, output: tuple[int, ...] = ()) -> Any:
    """What is read of vLLM's state of a request."""
    extra = {} if share is None else {"qm_spec_share": share}
    return SimpleNamespace(
        sampling_params=SimpleNamespace(extra_args=extra),
        lora_request=SimpleNamespace(lora_int_id=adapter) if adapter else None,
        output_token_ids=list(output),
    )


def session_after(*finished: Any) -> DraftSession:
    """Return a session that has seen requests and seen them end."""
    session = DraftSession(None, None, 4, 4, lookup_length=2)
    states = {str(number): one for number, one in enumerate(finished)}
    session.note_batch(list(states), states)
    session.note_batch([], {})
    return session


def found(session: DraftSession, request: Any) -> bool:
    """Tell whether a new request finds what followed 1, 2 in others' answers."""
    session.note_batch(["new"], {"new": request})
    group = session.batch[0].group
    return bool(session.responses and group is not None and session.responses.look_up(group, [1, 2], 1).length)


def test_without_memory_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QM_SPEC_RESPONSES", raising=False)
    assert session_after(state("a", output=(1, 2, 3))).responses is None
    monkeypatch.setenv("QM_SPEC_RESPONSES", "0")
    assert session_after(state("a", output=(1, 2, 3))).responses is None


@pytest.mark.parametrize("wrong", ["", "on", "-1", "1.5"])
def test_memory_that_is_no_number_is_refused(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QM_SPEC_RESPONSES", wrong)
    with pytest.raises(ValueError, match="QM_SPEC_RESPONSES must be a number of MiB"):
        sharing.response_bytes()


@pytest.mark.parametrize(
    ("giver", "taker", "shared"),
    [
        ({"share": "a"}, {"share": "a"}, True),
        ({"share": "a"}, {"share": "b"}, False),
        ({"share": "a"}, {}, False),
        ({}, {"share": "a"}, False),
        ({}, {}, False),
        ({"share": "a", "adapter": 1}, {"share": "a", "adapter": 1}, True),
        ({"share": "a", "adapter": 1}, {"share": "a", "adapter": 2}, False),
        ({"share": "a", "adapter": 1}, {"share": "a"}, False),
        ({"share": ""}, {"share": ""}, False),
        ({"share": "a" * 65}, {"share": "a" * 65}, False),
        ({"share": ["a"]}, {"share": ["a"]}, False),
        ({"share": 1}, {"share": 1}, False),
    ],
)
def test_answers_are_shared_in_a_group_of_one_adapter_and_nowhere_else(
    giver: dict[str, Any], taker: dict[str, Any], shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QM_SPEC_RESPONSES", "1")
    session = session_after(state(**giver, output=(1, 2, 3)))
    assert found(session, state(**taker)) == shared


def test_tokens_that_have_not_arrived_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QM_SPEC_RESPONSES", "1")
    session = session_after(state("a", output=(7, 1, 2, -1, -1)))
    assert not found(session, state("a"))


def test_an_engine_copies_from_its_groups_answers_and_writes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QM_SPEC_RESPONSES", "8")
    monkeypatch.setenv("QM_SPEC_LOOKUP", "4")
    text = json.loads((ZOO / "prompts.jsonl").read_text().splitlines()[0])["text"][:600]
    shares = ["a", "a", "b", None]
    requests = [
        {
            "prompts": [text],
            "sampling": {"temperature": 0, "max_tokens": 60}
            | ({"extra_args": {"qm_spec_share": share}} if share else {}),
        }
        for share in shares
    ]
    engine = {"model": str(ZOO / "target"), "speculative_config": {"model": "qm_spec"}, "enable_prefix_caching": False}
    ran = run_offline(tmp_path, engine, requests)
    assert ran["errors"] == [None] * 4
    assert all(answers == ran["answers"][0] for answers in ran["answers"])
    totals = [counters["vllm:spec_decode_num_drafts"] for counters in ran["counters"]]
    drafts = [after - before for before, after in zip([0, *totals], totals, strict=False)]
    # With a copy of the whole answer steps are few; those of another group, and of none, are as many as the first's.
    assert drafts[1] < drafts[0] / 2
    assert drafts[2] == drafts[3] == drafts[0]
