"""Drafting where it pays: what is decided from the times of steps, played on a clock, and in an engine."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from offline_engine import OFFLINE, run_offline

import qm_spec
from qm_spec.drafter.payoff import Payoff

NUM_DRAFTS = 4
REQUEST = object()


class Engine:
    """Steps of a batch on a clock of its own: `decode` takes a plain step's time, `verify` one with drafts, K kept."""

    def __init__(self) -> None:
        self.now = 0.0
        self.payoff = Payoff(lambda: self.now)
        self.requests: list[object] = [REQUEST]
        self.pending, self.kept = 0, 0
        self.num_tokens = 1000
        self.widths = (NUM_DRAFTS,)

    def step(self, decode: float, verify: float, kept: int, how: str = "prior", drafting: float = 0.1) -> int:
        """Run one step and draft for the next; `kept` of the drafts will be, if so many are made.

        `verify` is the time of `NUM_DRAFTS`; others take more or less in proportion.
        """
        self.now += decode + (verify - decode) * self.pending / NUM_DRAFTS
        batch = len(self.requests)
        self.payoff.begin(self.requests, [1 + self.pending] * batch, [1 + min(self.kept, self.pending)] * batch)
        self.pending = self.payoff.choose(how, [[width] * batch for width in self.widths], self.num_tokens)[0]
        if self.pending:
            self.now += drafting
        self.payoff.end()
        self.kept = kept if self.pending else 0
        return self.pending

    def drafted(self, steps: int, decode: float, verify: float, kept: int, how: str = "prior") -> float:
        """Return the share of the steps for which was drafted."""
        return sum(self.step(decode, verify, kept, how) > 0 for _ in range(steps)) / steps


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.mark.parametrize(("verify", "kept", "pays"), [(1.0, 1, True), (2.5, 2, True), (2.5, 1, False), (1.2, 0, False)])
def test_drafts_are_made_where_they_bring_more_than_they_cost(
    engine: Engine, verify: float, kept: int, pays: bool
) -> None:
    engine.drafted(40, 1.0, verify, kept)
    share = engine.drafted(512, 1.0, verify, kept)
    # The rest keeps both costs known: one plain step of 256, or one try of 16.
    assert share == pytest.approx(1 - 2 / 512 if pays else 1 / 16)


def test_learning_what_plain_steps_cost_takes_three_of_them(engine: Engine) -> None:
    chosen = [engine.step(1.0, 1.1, 2) for _ in range(40)]
    assert chosen.count(0) == 3
    assert all(chosen[:3]), "no plain step before drafts are known"


def test_drafting_itself_is_part_of_the_cost(engine: Engine) -> None:
    """Two tokens a step at twice the cost of one would just pay; with the drafting they do not."""
    for _ in range(60):
        engine.step(1.0, 1.9, 1, drafting=0.2)
    assert sum(engine.step(1.0, 1.9, 1, drafting=0.2) > 0 for _ in range(160)) == 10


def test_kinds_of_drafts_are_judged_by_themselves(engine: Engine) -> None:
    for _ in range(40):
        engine.drafted(1, 1.0, 2.0, 3, "lookup")
        engine.drafted(1, 1.0, 2.0, 0, "prior")
    both = [(engine.drafted(1, 1.0, 2.0, 3, "lookup"), engine.drafted(1, 1.0, 2.0, 0, "prior")) for _ in range(64)]
    lookup, prior = (sum(column) for column in zip(*both, strict=True))
    assert (lookup, prior) == (64, 4)


def test_lengths_and_batches_are_judged_by_themselves(engine: Engine) -> None:
    engine.drafted(60, 1.0, 1.1, 1)
    engine.num_tokens = 8000
    engine.drafted(60, 1.0, 3.0, 1)
    assert engine.drafted(64, 1.0, 3.0, 1) == 1 / 16
    engine.num_tokens = 1000
    assert engine.drafted(64, 1.0, 1.1, 1) == 1.0
    engine.requests = [object() for _ in range(8)]
    engine.drafted(60, 1.0, 3.0, 1)
    assert engine.drafted(64, 1.0, 3.0, 1) == 1 / 16


def test_a_text_that_changes_is_noticed(engine: Engine) -> None:
    engine.drafted(60, 1.0, 2.0, 0)
    assert engine.drafted(64, 1.0, 2.0, 0) == 1 / 16
    engine.drafted(1000, 1.0, 2.0, 4)
    assert engine.drafted(64, 1.0, 2.0, 4) == 1.0
    engine.drafted(100, 1.0, 2.0, 0)
    assert engine.drafted(64, 1.0, 2.0, 0) == 1 / 16


def test_hiccups_prompts_and_new_batches_count_for_nothing(engine: Engine) -> None:
    for number in range(300):
        # Every fourth step takes a hundred times as long.
        engine.step(1.0, 1.5 if number % 4 else 150.0, 1)
        if number % 7 == 0:
            engine.requests = [object()]
        if number % 5 == 0:
            # A prompt is read: other rows, and long.
            engine.now += 1000
            engine.payoff.begin(engine.requests, [300], [300])
            (engine.pending,) = engine.payoff.choose("prior", [[NUM_DRAFTS]], 1000)
            engine.payoff.end()
    assert engine.drafted(100, 1.0, 1.5, 1) == 1.0


@pytest.mark.parametrize(
    ("verify", "kept", "best"),
    [(1.3, 16, 16), (1.3, 4, 4), (5.5, 16, 0), (2.0, 5, 4), (3.0, 16, 16)],
)
def test_of_several_ways_the_one_that_brings_most_is_taken(engine: Engine, verify: float, kept: int, best: int) -> None:
    engine.widths = (16, 4)
    for _ in range(80):
        engine.step(1.0, verify, kept)
    chosen = Counter(engine.step(1.0, verify, kept) for _ in range(512))
    # The rest keeps costs known, and shows what more drafts would bring: one step of 256 in turn, one try of 16.
    assert chosen.most_common(1)[0][0] == best
    assert chosen[best] >= 512 * (1 - 1 / 16) - 2
    if best != 16:
        assert chosen[16] in (31, 32)


def test_steps_that_draft_more_tell_what_fewer_would_have_brought(engine: Engine) -> None:
    """Or texts that begin to repeat themselves would be noticed only by the few steps of that way."""
    engine.widths = (16, 4)
    # Nothing is kept, then everything, of either way.
    for kept in (0, 16):
        for _ in range(400):
            engine.step(1.0, 1.5, kept)
    gains = engine.payoff._gains
    assert statistics.mean(gains["prior", 0]) == 17 and statistics.mean(gains["prior", 1]) == 5


def test_requests_may_be_given_different_numbers(engine: Engine) -> None:
    payoff, requests = engine.payoff, [object(), object()]
    payoff.begin(requests, [1, 1], [1, 1])
    for rows in ([9, 5], [5, 9], [9, 5]):
        assert payoff.choose("some", [[8, 4], [4, 4]], 500) == [8, 4]
        payoff.end()
        engine.now += 1.0
        # The second step is not the one that was drafted for.
        payoff.begin(requests, rows, [7, 2])
    assert list(payoff._gains["some", 0]) == [4.5, 4.5] and list(payoff._gains["some", 1]) == [3.5, 3.5]


# In vLLM

ZOO = Path(qm_spec.__file__).parent / "zoo" / "novels"
NUM_TOKENS = 40
# Chance decides, so that steps with and without drafts follow each other in any order.
PROGRAM = (
    """
import random
from qm_spec.drafter.payoff import Payoff
chance = random.Random(0)
choose = Payoff._choose
Payoff._choose = lambda self, load, kinds: chance.choice([choose(self, load, kinds), (None, 0), *kinds])
"""
    + OFFLINE
)


@pytest.mark.vllm
def test_the_variable_is_0_or_1(monkeypatch: pytest.MonkeyPatch) -> None:
    from qm_spec.integrations.vllm_plugin.adaptive import adapts

    monkeypatch.delenv("QM_SPEC_ADAPT")
    assert adapts()
    monkeypatch.setenv("QM_SPEC_ADAPT", "0")
    assert not adapts()
    monkeypatch.setenv("QM_SPEC_ADAPT", "auto")
    with pytest.raises(ValueError, match="QM_SPEC_ADAPT must be 0 or 1, got 'auto'"):
        adapts()


@pytest.mark.vllm
@pytest.mark.parametrize("change", ["off", "gpu", "unknown requests", None])
def test_every_step_drafts_on_a_gpu_and_where_it_is_asked_for(change: str | None) -> None:
    from qm_spec.integrations.vllm_plugin.adaptive import begin_step

    proposer: Any = SimpleNamespace(
        model=SimpleNamespace(adapts=change != "off"),
        device=torch.device("cuda" if change == "gpu" else "cpu"),
        _qm_spec_states=None if change == "unknown requests" else [REQUEST],
    )
    metadata = SimpleNamespace(query_start_loc=torch.tensor([0, 3]))
    decides = begin_step(proposer, metadata, torch.tensor([1]))
    assert (decides is None) == (change is not None)
    if decides is not None:
        assert begin_step(proposer, metadata, None) is decides, "it is the engine's, not the step's"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    texts = [json.loads(line)["text"][:600] for line in (ZOO / "prompts.jsonl").read_text().splitlines()[:6]]
    greedy = {"temperature": 0, "max_tokens": NUM_TOKENS}
    seeded = {"temperature": 1, "seed": 3, "max_tokens": NUM_TOKENS}
    requests = [
        *({"prompts": [text], "sampling": greedy} for text in texts[:2]),
        {"prompts": texts, "sampling": greedy},
        *[{"prompts": texts[:1], "sampling": seeded}] * 2,
    ]
    # Behind a prefix from the cache, which holds merged keys, other drafts are drawn, and so another sample.
    settings = {"max_model_len": 1024, "max_num_seqs": 8, "enable_prefix_caching": False}
    engine: dict[str, Any] = {"model": str(ZOO / "target"), **settings}

    def answers(name: str, program: str, **settings: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("QM_SPEC_ADAPT", "1")
            patch.setenv("QM_SPEC_LOOKUP", "3")
            return run_offline(tmp_path_factory.mktemp(name), {**engine, **settings}, requests, program)

    speculative: Callable[..., Any] = qm_spec.speculative_config
    return answers("plain", OFFLINE), answers("ours", PROGRAM, speculative_config=speculative(str(ZOO / "target")))


@pytest.mark.vllm
def test_text_is_the_targets_whatever_steps_are_drafted_for(run: Any) -> None:
    plain, ours = run
    assert plain["errors"] == [None] * 5 and ours["answers"][:3] == plain["answers"][:3]
    drafts, accepted = (ours["counters"][1][f"vllm:spec_decode_num_{what}"] for what in ("drafts", "accepted_tokens"))
    without = 2 * NUM_TOKENS - drafts - accepted
    assert drafts > 10 and without > 10, "steps of both kinds have written the text"


@pytest.mark.vllm
def test_a_seed_gives_the_same_sample_again(run: Any) -> None:
    _, ours = run
    assert ours["answers"][3] == ours["answers"][4]
