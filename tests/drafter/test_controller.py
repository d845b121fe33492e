"""Never slower: how many tokens a controller drafts, played on simulated engines, and in vLLM."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.offline_engine import OFFLINE, run_offline
from support.simulated_engine import NUM_DRAFTS, Engine, Machine, Text, controlled

import qm_spec
from qm_spec.drafter.acceptance import AcceptanceRates
from qm_spec.drafter.controller import Candidate, Controller, Estimates, Plan
from qm_spec.drafter.linear_cost import LinearCost
from qm_spec.drafter.suffix_index import Lookup

REQUEST = object()
MACHINES = {
    # A target of 135 M parameters on two cores, drafts over all of its vocabulary and over 8192 tokens.
    "full": Machine(step=12.6, row=0.15, request=0.65, context=0.1, draft=2.3, draft_row=0.15),
    "small": Machine(step=12.6, row=0.15, request=0.65, context=0.1, draft=0.4, draft_row=0.06),
    # A step that computes: every token costs.
    "compute": Machine(step=5.2, row=0.8, request=0.0, context=0.1, draft=0.4, draft_row=0.06),
    # Verification of sampled drafts takes as long as half a step, however few they are.
    "verify": Machine(step=8.5, row=0.55, request=0.6, context=0.4, draft=0.3, draft_row=0.05, verify=6.0),
}
USELESS = Text([0.02] * 4)
GREEDY = Text([0.75, 0.7, 0.65, 0.6], spread=1.3)
SAMPLED = Text([0.5, 0.45, 0.4, 0.35], spread=1.3)
COPIES = Text([0.5, 0.4, 0.3, 0.3], copy_share=0.2, copy_rate=0.85)
WRONG_COPIES = Text([0.02] * 4, copy_share=0.3, copy_rate=0.1)
TEXTS = {"useless": USELESS, "greedy": GREEDY, "sampled": SAMPLED, "copies": COPIES, "wrong copies": WRONG_COPIES}
SECONDS = 62


def over_plain(engine: Engine, plain: Engine) -> float:
    """Return the least share of plain decoding's tokens over any minute."""
    return min(engine.tokens(start, start + 60) / plain.tokens(start, start + 60) for start in range(SECONDS - 59))


def play(machine: Machine, text: Text, concurrency: int) -> tuple[Engine, Engine]:
    """Return an engine with a controller and a plain one, after a minute and a bit."""
    plain = Engine(machine, text, concurrency).run(SECONDS, 0)
    engine = Engine(machine, text, concurrency)
    return engine.run(SECONDS, controlled(engine)), plain


def best_fixed(machine: Machine, text: Text, concurrency: int) -> int:
    """Return the number of drafts by the prior that brings the most tokens per second on average."""

    def rate(num_drafts: int) -> float:
        tokens = reach = 1.0
        for chance in text.rates[:num_drafts]:
            reach *= chance
            tokens += reach
        num_rows = concurrency * (1 + num_drafts)
        step_ms = machine.step_ms(num_rows, concurrency, 275 * concurrency)
        return tokens / (step_ms + machine.draft_ms(num_drafts, concurrency))

    return max(range(NUM_DRAFTS + 1), key=rate)


@pytest.mark.parametrize(
    ("machine", "text", "concurrency"),
    [
        *(("small", "useless", number) for number in (1, 4, 8, 16, 32)),
        *(("small", "sampled", number) for number in (1, 8, 32)),
        *(("full", text, number) for text in ("useless", "greedy") for number in (1, 16)),
        *(("compute", "useless", number) for number in (1, 32)),
        *(("verify", "sampled", number) for number in (1, 4, 16)),
        *(("compute", "greedy", number) for number in (4, 8, 16, 32)),
        *((machine, text, 16) for machine in ("small", "compute") for text in ("copies", "wrong copies")),
    ],
)
def test_no_minute_is_slower_than_plain_decoding_and_the_best_fixed_number_of_drafts_is_met(
    machine: str, text: str, concurrency: int
) -> None:
    case = MACHINES[machine], TEXTS[text], concurrency
    engine, plain = play(*case)
    assert over_plain(engine, plain) >= 0.97
    best = Engine(*case).run(15, best_fixed(*case))
    assert engine.tokens(32, 62) / plain.tokens(32, 62) >= 0.95 * best.tokens(0, 15) / plain.tokens(0, 15)


@pytest.mark.parametrize("slow", [(0.0, 0.0), (15.0, 35.0)])
@pytest.mark.parametrize("text", ["useless", "greedy"])
def test_a_machine_that_pauses_and_slows_down_is_followed(text: str, slow: tuple[float, float]) -> None:
    # A step that takes twenty times as long, every three seconds; and for a while all takes half as long again.
    machine = replace(MACHINES["small"], hiccup_ms=270.0, slow=slow)
    engine, plain = play(machine, TEXTS[text], 1)
    assert over_plain(engine, plain) >= (0.97 if text == "useless" else 2.0)


@pytest.mark.parametrize("text", ["greedy", "sampled"])
def test_what_a_busy_machine_has_taught_is_tried_again(text: str) -> None:
    """Costs that were measured between other work must not keep drafting off when that is over."""
    quiet = MACHINES["small"], TEXTS[text], 8
    best = Engine(*quiet).run(60, best_fixed(*quiet)).tokens(0, 60) / 60
    for seed in range(6):
        engine = Engine(replace(quiet[0], busy=(2.0, 25.0)), *quiet[1:], seed)
        engine.run(85, controlled(engine))
        assert engine.tokens(45, 85) / 40 >= 0.95 * best, seed


@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_text_that_changes_is_noticed(concurrency: int) -> None:
    machine = MACHINES["small"]
    plain = Engine(machine, GREEDY, concurrency).run(100, 0)
    engine = Engine(machine, GREEDY, concurrency)
    controller = controlled(engine)
    shares = []
    # Where drafts are useless the whole minute counts, what noticing it costs included.
    for text, seconds, counted in ((GREEDY, 20, 12), (USELESS, 60, 60), (GREEDY, 20, 12)):
        engine.text = text
        engine.run(seconds, controller)
        shares.append(engine.tokens(engine.now - counted, engine.now) / plain.tokens(engine.now - counted, engine.now))
    assert shares[0] > 1.6 and shares[1] > 0.97 and shares[2] > 1.6, shares


def test_one_load_teaches_the_others() -> None:
    """After one request, a batch of eight drafts from its first steps on, but for one or two that time it."""
    machine = MACHINES["small"]
    engine = Engine(machine, GREEDY, 1)
    controller = controlled(engine)
    engine.run(10, controller)
    engine.concurrency, before, drafted = 8, engine.num_steps, engine.num_drafted_steps
    engine.run(1, controller)
    assert engine.num_drafted_steps - drafted >= engine.num_steps - before - 6


def test_a_request_whose_drafts_are_never_accepted_is_left_out() -> None:
    class TwoKinds(Engine):
        """Every other request is drafted for in vain."""

        def pass_(self, ms: float) -> None:
            for row, request in enumerate(self.requests):
                request.factor, request.left = float(row % 2), 150
            super().pass_(ms)

    engine = TwoKinds(MACHINES["compute"], GREEDY, 4)
    controller = controlled(engine)
    engine.run(6, controller)
    plans: list[Plan] = []

    def noted(candidates: Any, num_tokens: int) -> Plan:
        plans.append(Controller.plan(controller, candidates, num_tokens))
        return plans[-1]

    controller.plan = noted  # type: ignore[method-assign]
    engine.run(3, controller)
    totals = [sum(plan.widths[row] for plan in plans) for row in range(4)]
    assert min(totals[1], totals[3]) > 5 * max(totals[0], totals[2]) > 0, totals


# One step at a time


class Steps:
    """Steps of 10 ms, with costs of a row and of a draft step beside that, as parts of it."""

    def __init__(self, num_requests: int = 1, policy: Callable[[Estimates], Plan] | None = None, **cost: float) -> None:
        self.now, self.lines = 0.0, []  # type: float, list[str]
        self.cost = {"row": 0.0, "draft": 0.01, **cost}
        self.controller = Controller(4, 16, lambda: self.now, policy, self.lines.append)
        self.requests: list[Any] = [object() for _ in range(num_requests)]
        self.widths: list[int] = [0] * num_requests
        self.candidates = [Candidate(request, 99) for request in self.requests]
        self.plan = Plan(self.widths, [False] * num_requests, 0, 0.0, 0.0)

    def step(self, accepted: int = 0, newest: int = 0, **candidate: Any) -> Plan:
        """Run a step that accepts so many drafts of each request, and plan the next one."""
        self.now += 0.01 * (1.0 + self.cost["row"] * sum(self.widths))
        rows = [1 + width for width in self.widths]
        verified = [1 + min(accepted, width) for width in self.widths]
        self.controller.begin(self.requests, rows, verified, [newest] * len(rows))
        if candidate:
            self.candidates = [replace(one, **candidate) for one in self.candidates]
        self.plan = self.controller.plan(self.candidates, 100)
        self.widths = list(self.plan.widths)
        self.now += 0.01 * (0.01 + self.cost["draft"] * self.plan.num_drafts)
        self.controller.end()
        return self.plan


def test_plain_steps_are_timed_before_anything_is_drafted() -> None:
    steps = Steps()
    planned = [sum(steps.step(accepted=4).widths) for _ in range(8)]
    assert planned[:3] == [0] * 3 and planned[3] > 1 and planned[-1] == 4, planned


def test_no_more_is_drafted_than_a_request_can_use() -> None:
    steps = Steps(num_requests=2)
    for _ in range(20):
        steps.step(accepted=4)
    steps.candidates[0] = replace(steps.candidates[0], most=1)
    assert steps.step(accepted=4).widths == [1, 4]
    assert steps.step(accepted=4, most=0) == Plan([0, 0], [False] * 2, 0, 2.0, pytest.approx(0.0101, rel=0.05))


def test_copies_are_judged_by_what_is_written_where_nothing_is_drafted() -> None:
    """So that a text that begins to repeat itself is noticed for nothing."""
    for token, drafts in ((7, True), (8, False)):
        steps = Steps(policy=lambda estimates: estimates.plain())
        for _ in range(40):
            steps.step(newest=token, copied=[7] * 16, match=4)
        best = steps.controller.best()
        assert best.copies == [drafts] and (best.widths[0] > 4) == drafts


def test_the_prior_drafts_where_copies_are_worse() -> None:
    steps = Steps()
    for _ in range(20):
        steps.step(accepted=4)
    for _ in range(80):
        plan = steps.step(accepted=4 if not any(steps.plan.copies) else 0, newest=8, copied=[7] * 16, match=4)
    assert plan.widths == [4] and plan.copies == [False] and plan.num_drafts == 4


def test_where_nothing_is_drafted_by_the_prior_it_is_not_run() -> None:
    steps = Steps(draft=2.0)
    plans = [steps.step(accepted=16, newest=7, copied=[7] * 16, match=8) for _ in range(100)]
    copied = [plan for plan in plans if plan.copies == [True]]
    assert len(copied) > 95 and copied[-1].widths == [16]
    assert not any(plan.num_drafts for plan in plans)


def test_prompts_and_unknown_requests_teach_nothing() -> None:
    steps = Steps()
    for _ in range(20):
        steps.step(accepted=4)
    before = steps.controller.plain().seconds
    for request in (steps.requests[0], object()):
        steps.now += 1000
        steps.controller.begin([request], [300], [300], [0])
        steps.controller.plan([Candidate(request, 99)], 100)
        steps.controller.end()
    steps.controller.begin([], [], [], [])
    steps.controller.plan(steps.candidates, 100)
    assert steps.controller.plain().seconds == pytest.approx(before)
    assert steps.controller.best().num_tokens > 4.5


def test_what_drafting_may_lose_is_bounded() -> None:
    """Whatever a policy's estimates say: here drafts are said to be accepted, and never are."""
    steps = Steps(row=0.3)

    class Sanguine(AcceptanceRates):
        def observe(self, verified: Any, step: int) -> None:
            self.expected = [0.9] * 4

    steps.controller._prior = dict.fromkeys((False, True), Sanguine(0.9, 4))
    for _ in range(6000):
        steps.step()
    assert 60 * 1.005 < steps.now < 60 * 1.03 * 1.01


@pytest.mark.parametrize(("num_requests", "most_calls"), [(1, 390), (32, 1500)])
@pytest.mark.parametrize("accepted", [0, 4])
def test_a_decision_takes_few_calls(num_requests: int, most_calls: int, accepted: int) -> None:
    """At some 0.1 us a call, as times would depend on how busy the machine is."""
    steps = Steps(num_requests)
    for _ in range(50):
        steps.step(accepted)
    calls: list[str] = []
    sys.setprofile(lambda frame, event, argument: calls.append(event) if "call" in event else None)
    try:
        for _ in range(20):
            steps.step(accepted)
    finally:
        sys.setprofile(None)
    # The engine's own are among them.
    assert len(calls) / 20 < most_calls, len(calls) / 20


def test_a_change_of_mind_is_reported_with_its_numbers() -> None:
    steps = Steps(num_requests=8)
    for _ in range(1200):
        steps.step(accepted=4)
    (line,) = steps.lines
    assert line.startswith("drafting on with 8 requests: 24 tokens, 0 of them copied, for 2.18 tokens a step and")
    assert line.endswith("; plain decoding takes 10.0 ms for 1")
    steps.cost["row"] = 0.5
    for _ in range(300):
        steps.step()
    assert len(steps.lines) == 2 and steps.lines[1].startswith("drafting off with 8 requests: "), steps.lines


# What is estimated


def test_a_cost_is_learnt_through_hiccups_and_followed_when_it_changes() -> None:
    cost = LinearCost((1.0, 0.1), (1.0, 1.0))
    for number in range(200):
        rows = number % 5
        cost.measure((1, rows), (2.0 + 0.5 * rows) * (20 if number % 20 == 19 else 1))
    assert cost.predict((1, 8)) == pytest.approx(6.0, rel=0.03) and cost.slope(1) == pytest.approx(0.5, rel=0.05)
    for number in range(400):
        cost.measure((1, number % 5), 1.5 * (2.0 + 0.5 * (number % 5)))
    assert cost.predict((1, 4)) == pytest.approx(6.0, rel=0.05) and cost.predict((1, 0)) == pytest.approx(3.0, rel=0.05)


def test_what_is_not_measured_again_becomes_unsure() -> None:
    cost = LinearCost((1.0, 0.1), (1.0, 1.0))
    for number in range(40):
        cost.measure((1, number % 5), 2.0 + 0.5 * (number % 5))
    sure = cost.deviation((1, 8))
    for _ in range(2000):
        cost.measure((1, 0), 2.0)
    assert cost.deviation((1, 0)) < 0.05 and cost.deviation((1, 8)) > 3 * sure
    assert cost.predict((1, 8)) == pytest.approx(6.0, rel=0.1), "but is not forgotten"


def test_acceptance_is_learnt_by_position_and_what_is_new_weighs_most() -> None:
    rates = AcceptanceRates(0.6, 4)
    assert rates.expected == pytest.approx([0.6] * 4)
    for step in range(200):
        rates.observe([(2, step % 3)], step)
    # Two of three first tokens, and half of the second ones behind these; the others are expected to be like them.
    assert rates.expected == pytest.approx([2 / 3, 1 / 2, 1 / 2, 1 / 2], abs=0.04)
    assert all(low < high for low, high in zip(rates.expected, rates.upper(200), strict=True))
    assert rates.upper(2000)[0] > rates.upper(200)[0] + 0.1, "nothing was tried since"
    for step in range(2000, 2010):
        rates.observe([(2, 0)], step)
    assert rates.expected[0] < 0.25


# In vLLM

ZOO = Path(qm_spec.__file__).parent / "zoo" / "novels"
NUM_TOKENS = 40
# Chance decides, so that steps with and without drafts follow each other in any order.
PROGRAM = (
    """
import random
from functools import partial
from qm_spec.integrations.vllm_plugin import adaptive
chance = random.Random(0)
policy = lambda estimates: chance.choice([estimates.plain(), estimates.best(), estimates.best(upper=True)])
adaptive.Controller = partial(adaptive.Controller, policy=policy)
"""
    + OFFLINE
)


@pytest.mark.vllm
def test_the_variable_is_0_or_1(monkeypatch: pytest.MonkeyPatch) -> None:
    from qm_spec.integrations.vllm_plugin.adaptive import adapts

    assert adapts()
    monkeypatch.setenv("QM_SPEC_ADAPT", "0")
    assert not adapts()
    monkeypatch.setenv("QM_SPEC_ADAPT", "auto")
    with pytest.raises(ValueError, match="QM_SPEC_ADAPT must be 0 or 1, got 'auto'"):
        adapts()


@pytest.mark.vllm
@pytest.mark.parametrize("change", ["off", "gpu", "unknown requests", None])
def test_every_step_drafts_on_a_gpu_and_where_it_is_asked_for(
    change: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qm_spec.integrations.vllm_plugin.session import DraftSession

    session = DraftSession(None, None, 4, 16, adapts=change != "off")
    began: list[Any] = []
    plain = Plan([0], [False], 0, 1.0, 1.0)
    controller: Any = SimpleNamespace(
        begin=lambda *args: began.append(args), plan=lambda *args: plain, end=lambda: began.append("end")
    )
    session.controller = controller
    drafted: list[Any] = []
    monkeypatch.setattr(session, "propose", lambda step, widths, found: drafted.append(widths))
    device = torch.device("meta" if change == "gpu" else "cpu")
    state = SimpleNamespace(num_prompt_tokens=3, sampling_params=SimpleNamespace(max_tokens=9))
    session.draft(step_of(state, [0, 3], [9], [1], device, known=change != "unknown requests"))
    # Two of its three rows are verified, and 7 is the token behind them.
    assert [list(args[1:]) for args in began[:1]] == ([] if change else [[[3], [2], [7]]])
    assert len(began) == (0 if change else 2) and drafted == [[4] if change else [0]]


def step_of(
    state: Any, starts: list[int], lengths: list[int], rejected: list[int], device: Any = "cpu", known: bool = True
) -> Any:
    """A step of one greedy request."""
    from qm_spec.integrations.vllm_plugin.step import DraftRequest, DraftStep

    unread: Any = None
    return DraftStep(
        num_drafts=64,
        token_ids=unread,
        states=unread,
        next_token_ids=torch.tensor([7], device=device),
        last_rows=unread,
        query_start_loc=torch.tensor(starts),
        seq_lens=torch.tensor(lengths),
        num_rejected=torch.tensor(rejected),
        block_table=unread,
        slot_mapping=unread,
        requests=[DraftRequest(state)] if known else [],
    )


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("num_computed", "most_tokens", "useful"),
    [(10, 50, 0), (11, 50, 48), (58, 50, 1), (59, 50, 0), (60, 50, 0), (11, None, 64)],
)
def test_drafts_that_a_request_has_no_use_for_are_not_made(num_computed: int, most_tokens: Any, useful: int) -> None:
    """While its prompt is read, and beyond the last token that it may write."""
    from qm_spec.integrations.vllm_plugin.adaptive import plan_step

    state = SimpleNamespace(num_prompt_tokens=11, sampling_params=SimpleNamespace(max_tokens=most_tokens))
    planned = []
    controller: Any = SimpleNamespace(plan=lambda *args: planned.append(args) or Plan([1], [False], 1, 1.0, 1.0))
    found = [Lookup((7,) * 64, 4)]
    widths, left = plan_step(controller, step_of(state, [0, 3], [num_computed + 2], [2]), found)
    (((candidate,), num_tokens),) = planned
    assert candidate.most == useful and candidate.request.state is state
    assert candidate.match == 4 and not candidate.sampled and num_tokens == num_computed + 2
    assert widths == [1] and left == [Lookup((), 0)], "what is not copied is drafted by the prior"


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
    settings = {"max_model_len": 1024, "max_num_seqs": 8}
    engine: dict[str, Any] = {"model": str(ZOO / "target"), **settings}

    def answers(name: str, program: str, **settings: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
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
def test_a_seed_gives_plain_decodings_sample_whatever_steps_are_drafted_for(run: Any) -> None:
    plain, ours = run
    assert ours["answers"][3] == ours["answers"][4] == plain["answers"][3]
