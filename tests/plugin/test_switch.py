"""Switching drafting off for one request, and for an engine while it runs."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: run ./install.sh")

from support.drafting_engine import MOST_DRAFTS, Engine, request
from support.plugin_doubles import make_model, make_step

from qm_spec.drafter.controller import Plan
from qm_spec.drafter.suffix_index import Lookup
from qm_spec.integrations.vllm_plugin.session import DraftSession
from qm_spec.integrations.vllm_plugin.switch import Switch
from qm_spec.integrations.vllm_plugin.worker import QuickMergeWorkerExtension

pytestmark = pytest.mark.vllm


def test_a_request_has_as_many_drafts_as_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, [Lookup((7,) * 16, 8), *[Lookup((), 0)] * 3, Lookup((7,) * 16, 8)], lookup_length=3)
    asked = [request(), request(), request(qm_spec="off"), request(qm_spec=2), request(qm_spec=0)]
    drafts = engine.step(asked, [10] * 5, [0] * 5, [10] * 5)
    assert [len(ids) for ids in drafts.token_ids] == [16, 4, 0, 2, 0]
    # What is off is neither looked up nor left to the prior.
    alone = Engine(monkeypatch, [Lookup((7,) * 16, 8)], lookup_length=3)
    alone.step([request(qm_spec="off")], [10], [0], [10])
    assert alone.widths == [[0]] and alone.session.counters.by_name()["steps"]["plain"] == 1


def test_the_controller_plans_with_what_requests_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would take what was never drafted for cheap."""
    engine = Engine(monkeypatch, adapts=True)
    planned: list[Any] = []

    def plan(candidates: Any, num_tokens: int) -> Plan:
        planned.append([one.most for one in candidates])
        return Plan([0, 0], [False, False], 0, 2.0, 1.0)

    monkeypatch.setattr(engine.session.controller, "plan", plan)
    engine.step([request(qm_spec="off"), request()], [10] * 2, [0] * 2, [10] * 2)
    assert planned == [[0, MOST_DRAFTS]]


@pytest.mark.parametrize("asked", ["Off", "on", 17, -1, 2.0, True, [2], "2", "x\n" * 500])
def test_what_makes_no_sense_is_ignored_and_said_once(asked: Any, plugin_log: list[logging.LogRecord]) -> None:
    switch = Switch(16)
    assert switch.most_tokens(asked) == switch.most_tokens(asked) == switch.most_tokens(None) == sys.maxsize
    (record,) = plugin_log
    text = record.getMessage()
    assert "0..16" in text and repr(asked)[:20] in text and "\n" not in text and len(text) < 300


def test_an_engine_that_is_off_drafts_nothing_and_still_writes_its_pages() -> None:
    model = make_model()
    cpu = SimpleNamespace(device_config=SimpleNamespace(device_type="cpu"))
    session, before = DraftSession(model, cpu, 4, 4), model.case.cache.clone()
    expected = session.draft(make_step(model, 4, None))
    assert expected is not None and expected.token_ids.shape == (3, 4)
    model.case.cache.copy_(before)
    session.turn(False)
    assert session.draft(make_step(model, 4, None)) is None
    assert not torch.equal(model.case.cache.nan_to_num(), before.nan_to_num())
    session.turn(True)
    again = session.draft(make_step(model, 4, None))
    assert again is not None and torch.equal(again.token_ids, expected.token_ids)


def test_the_controller_forgets_what_it_knew_when_drafting_is_turned_on_again() -> None:
    """It would take the time in between for that of one step."""
    session = DraftSession(None, None, 4, 4, adapts=True)
    before = session.controller
    session.turn(False)
    session.turn(True)
    assert session.controller is not before


@pytest.mark.parametrize("runner", ["drafter", "speculator"])
def test_workers_answer_for_either_runner(runner: str) -> None:
    session = DraftSession(None, None, 4, 4)
    worker = QuickMergeWorkerExtension()
    worker.model_runner = SimpleNamespace(**{runner: SimpleNamespace(model=SimpleNamespace(session=session))})
    assert worker.qm_spec_stats()["drafting"] and worker.qm_spec_stats()["drafts"] == {"prior": 0, "lookup": 0}
    assert not worker.qm_spec_drafting("off")["drafting"] and not session.switch.on
    assert worker.qm_spec_drafting("on")["drafting"] and session.switch.on
    with pytest.raises(ValueError, match="'on' or 'off', got 'Off'"):
        worker.qm_spec_drafting("Off")
