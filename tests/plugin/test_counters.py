"""What an engine counts and says of its drafting: counters, the line in the log, `/metrics`, the warning."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: run ./install.sh")

from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from support.drafting_engine import NUM_DRAFTS, Engine, request

from qm_spec.drafter.suffix_index import Lookup
from qm_spec.integrations.vllm_plugin import metrics
from qm_spec.integrations.vllm_plugin.counters import Counters, DeviceCounts
from qm_spec.integrations.vllm_plugin.metrics import MetricsFile, open_file
from qm_spec.integrations.vllm_plugin.report import LEAST_ACCEPTED, LEAST_DRAFTS, LEAST_REPORTS, Report
from qm_spec.integrations.vllm_plugin.session import DraftSession

pytestmark = pytest.mark.vllm

# Counting


def test_drafts_are_counted_by_their_source_once_they_are_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, [Lookup((), 0), Lookup((7,) * 16, 3)], lookup_length=3)
    both = [request(), request()]
    engine.step(both, [10, 10], [0, 0], [10, 10])
    assert engine.widths == [[4, 6]]
    counters = engine.session.counters.by_name()
    assert counters["drafts"] == {"prior": 0, "lookup": 0}, "nothing is verified yet"
    assert counters["steps"] == {"plain": 0, "prior": 1, "lookup": 0}
    engine.step(both, [5, 7], [3, 0], [15, 17])
    # The engine had room for two of the first one's four.
    engine.step(both, [3, 7], [0, 2], [16, 24])
    assert engine.session.counters.by_name() == {
        "steps": {"plain": 0, "prior": 3, "lookup": 0},
        "drafts": {"prior": 2, "lookup": 2},
        "draft_tokens": {"prior": 6, "lookup": 12},
        "accepted_tokens": {"prior": 3, "lookup": 10},
        "graph_replays": 0,
        "failed_steps": 0,
    }


def test_rows_that_are_no_drafts_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a prompt, however short; a preempted request, which is read again; a step that drafted nothing."""
    engine, one = Engine(monkeypatch), [request()]
    engine.step(one, [6], [0], [6])
    engine.step(one, [4], [0], [10])
    engine.step(one, [11], [0], [11])
    engine.session.turn(False)
    engine.step(one, [1], [0], [12])
    engine.step(one, [2], [0], [14])
    assert engine.session.counters.by_name()["drafts"] == {"prior": 0, "lookup": 0}
    assert engine.session.counters.by_name()["steps"] == {"plain": 2, "prior": 3, "lookup": 0}


def test_a_step_of_copies_alone_is_a_lookup_step(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, [Lookup((7,) * 16, 3)], lookup_length=3)
    engine.step([request()], [10], [0], [10])
    assert engine.session.counters.by_name()["steps"] == {"plain": 0, "prior": 0, "lookup": 1}


def test_steps_where_drafting_has_failed_are_counted() -> None:
    session = DraftSession(None, None, NUM_DRAFTS, NUM_DRAFTS)
    for _ in range(3):
        assert session.attempt(lambda: 1 / 0) is None
    assert session.counters.by_name()["failed_steps"] == 3


def test_verdicts_on_a_device_are_taken_as_they_arrive() -> None:
    """Drafts and accepted tokens always belong together, so no reading is better than the truth."""
    counts, counters = DeviceCounts(torch.device("cpu")), Counters()

    def take() -> None:
        for source, numbers in counts.take().items():
            counters.note_drafts(source, *numbers)

    for num_tokens, rejected in (([4, 4], [4, 1]), ([4, 4], [0, 0]), ([4, 0], [4, 0])):
        counts.note(torch.tensor(num_tokens), torch.tensor(rejected), torch.tensor([False, True]))
        take()
    assert counters["drafts", "prior"] == 2 and counters["draft_tokens", "prior"] == 8
    assert counters["drafts", "lookup"] == 2 and counters["accepted_tokens", "lookup"] == 7
    assert counters["accepted_tokens", "prior"] == 4
    take()
    assert counters["drafts", "prior"] == 3 and counters["accepted_tokens", "prior"] == 4


# Telling


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(report: Report, clock: Clock, seconds: int, num_drafts: int, accepted: float) -> None:
    """One step a second, each with so many drafts of four tokens by the prior."""
    for _ in range(seconds):
        clock.now += 1
        report.counters["steps", "prior"] += 1
        report.counters.note_drafts("prior", num_drafts, 4 * num_drafts, round(accepted * num_drafts))
        report.end_step()


def test_a_line_tells_of_the_last_seconds_only_while_steps_run(plugin_log: list[logging.LogRecord]) -> None:
    clock = Clock()
    report = Report(Counters(), "D", logs=True, clock=clock)
    run(report, clock, 11, 2, 1.5)
    clock.now += 60
    assert len(plugin_log) == 1
    run(report, clock, 1, 2, 0.5)
    first, second = (record.getMessage() for record in plugin_log)
    assert "in 10 s" in first and "prior: mean acceptance length 2.50, 33 of 88 tokens accepted, drafts 22" in first
    assert "steps by what drafted: 0 plain, 11 prior, 0 lookup" in first
    assert "in 61 s" in second and "1.50, 1 of 8 tokens accepted, drafts 2" in second


def test_without_statistics_there_is_no_line(plugin_log: list[logging.LogRecord]) -> None:
    clock = Clock()
    run(Report(Counters(), "D", clock=clock), clock, 50, 100, 1.0)
    assert not plugin_log


def warnings_after(plugin_log: list[logging.LogRecord], *parts: tuple[int, int, float]) -> list[str]:
    clock = Clock()
    report = Report(Counters(), "the/drafter", clock=clock)
    for part in parts:
        run(report, clock, *part)
    return [record.getMessage() for record in plugin_log if record.levelno == logging.WARNING]


def test_a_drafter_that_does_not_fit_is_said_once_with_numbers_and_the_way_out(
    plugin_log: list[logging.LogRecord],
) -> None:
    (text,) = warnings_after(plugin_log, (300, 20, 0.05))
    assert "the/drafter" in text and "0.05 tokens a draft in the last 12" in text and f"{LEAST_ACCEPTED:.2f}" in text
    assert "qm-spec train" in text and "qm_spec_drafting" in text


@pytest.mark.parametrize(
    "parts",
    [
        [(300, 20, 0.2)],
        # One odd minute in two halves.
        [(30, 100, 0.0), (20, 100, 1.0), (30, 100, 0.0), (20, 100, 1.0)],
        # So few drafts may all be bad.
        [(10 * LEAST_REPORTS + 2, LEAST_DRAFTS // (10 * LEAST_REPORTS + 3), 0.0)],
        # Nothing was drafted.
        [(300, 0, 0.0)],
    ],
    ids=["fits", "for half a minute", "few drafts", "no drafts"],
)
def test_there_is_no_warning_without_need(plugin_log: list[logging.LogRecord], parts: Any) -> None:
    assert not warnings_after(plugin_log, *parts)


# Metrics


def exposed(folder: Path) -> list[str]:
    """What a server's registry reads of a folder."""
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(folder))
    return [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]


def test_metrics_of_several_engines_are_told_apart_and_those_of_one_go_on(tmp_path: Path) -> None:
    counters = Counters()
    files = [MetricsFile(str(tmp_path), {"model_name": "m", "engine": engine}) for engine in "01"]
    for accepted in (2, 3):
        counters.note_drafts("prior", 1, 4, accepted)
        files[0].write(counters)
    files[1].write(Counters())
    lines = exposed(tmp_path)
    assert 'qm_spec:accepted_tokens_total{engine="0",model_name="m",source="prior"} 5.0' in lines
    assert 'qm_spec:accepted_tokens_total{engine="1",model_name="m",source="prior"} 0.0' in lines
    assert 'qm_spec:steps_total{drafting="plain",engine="0",model_name="m"} 0.0' in lines
    assert 'qm_spec:graph_replays_total{engine="0",model_name="m"} 0.0' in lines
    assert len(lines) == 2 * 11


def test_a_server_of_several_processes_reads_vllms_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert metrics.shared_folder() == str(tmp_path)
    # The engine's configuration was made before vLLM settled it.
    file = open_file("/another/folder", {"engine": "0"})
    assert file is not None
    file.write(Counters())
    assert exposed(tmp_path)


def test_an_engine_away_from_its_server_has_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    assert open_file("/not/on/this/machine", {}) is None and open_file(None, {}) is None


def test_an_engine_starts_where_the_servers_folder_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin_log: list[logging.LogRecord]
) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)

    def full(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert open_file(str(tmp_path), {}) is None
    (record,) = plugin_log
    assert "no space left" in record.getMessage()
