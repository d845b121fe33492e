"""Steps behind which nothing is decided: what they read is written later, and nobody sees a difference."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: run ./install.sh")

from support.paged import raw_bytes
from support.plugin_doubles import SIZES, make_model

from qm_spec.integrations.vllm_plugin import session as drafting
from qm_spec.integrations.vllm_plugin.session import DraftSession
from qm_spec.integrations.vllm_plugin.step import DraftStep

pytestmark = pytest.mark.vllm

PAGE = 16


class Rests:
    """A controller that rests behind so many steps and drafts nothing."""

    def __init__(self, number: int) -> None:
        self.left, self.begun = number, 0

    def rests(self) -> bool:
        self.left -= 1
        return self.left >= 0

    def begin(self, *step: Any) -> None:
        self.begun += 1

    def plan(self, candidates: Any, num_tokens: int) -> Any:
        return SimpleNamespace(widths=[0] * len(candidates), copies=[False] * len(candidates))

    def end(self) -> None:
        pass


class Engine:
    """A session with real pages, whose requests decode a token a step."""

    def __init__(self, rests: int) -> None:
        self.model = make_model()
        self.session = DraftSession(self.model, None, 4, 4, adapts=True)
        self.controller = Rests(rests)
        self.session.__dict__["controller"] = self.controller
        self.requests: dict[str, Any] = {}
        self.lengths: dict[str, int] = {}

    @property
    def pages(self) -> torch.Tensor:
        """The bytes of all pages: what was never written is not a number."""
        return raw_bytes(self.model.model.attn.kv_cache)

    def step(self, slots: dict[str, int], seed: int) -> Any:
        """Decode a token of each request into its slot."""
        for name in slots:
            sampling = SimpleNamespace(max_tokens=100, extra_args=None)
            self.requests.setdefault(
                name,
                SimpleNamespace(
                    num_prompt_tokens=1, sampling_params=sampling, prompt_token_ids=None, get_token_id=lambda place: 0
                ),
            )
            self.lengths[name] = self.lengths.get(name, 1) + 1
        self.session.note_batch([*slots], self.requests)
        size = len(slots)
        generator = torch.Generator().manual_seed(seed)
        common = SimpleNamespace(
            slot_mapping=torch.tensor([*slots.values()]),
            query_start_loc=torch.arange(size + 1, dtype=torch.int32),
            block_table_tensor=torch.zeros(size, 1, dtype=torch.int32),
            seq_lens=torch.tensor([self.lengths[name] for name in slots], dtype=torch.int32),
        )
        step = DraftStep.from_v1(
            SimpleNamespace(_enable_probabilistic_draft_probs=False),
            4,
            torch.randint(SIZES.vocabulary, (size,), generator=generator, dtype=torch.int32),
            torch.randn(size, 3 * SIZES.hidden, generator=generator),
            torch.randint(SIZES.vocabulary, (size,), generator=generator, dtype=torch.int32),
            None,
            common,
            SimpleNamespace(all_greedy=True, generators={}),
            None,
            self.session.batch,
        )
        drafts = self.session.draft(step)
        # vLLM's buffer is that of the next step, too.
        common.slot_mapping.fill_(0)
        return drafts


def decode(rests: int, steps: list[dict[str, int]]) -> Engine:
    engine = Engine(rests)
    for number, slots in enumerate(steps):
        drafts = engine.step(slots, number)
        token_ids = drafts.token_ids
        assert sum(len(row) for row in token_ids) == 0
    return engine


def test_pages_hold_what_they_would_without_a_rest_as_soon_as_they_are_read() -> None:
    steps = [{"a": PAGE + place, "b": 5 * PAGE + place} for place in range(6)]
    never, rested = decode(0, steps), decode(4, steps[:5])
    assert rested.controller.begun == 1 and not torch.equal(rested.pages, never.pages), "nothing was put off"
    rested.step(steps[5], 5)
    assert rested.controller.begun == 2
    assert torch.equal(rested.pages, never.pages)


def test_a_slot_that_another_request_gets_holds_what_that_one_wrote() -> None:
    # Request b has ended, and a's next page was b's.
    steps = [{"a": PAGE, "b": 5 * PAGE}, {"a": PAGE + 1, "b": 5 * PAGE + 1}, {"a": PAGE + 2, "b": 5 * PAGE + 2}]
    steps += [{"a": 5 * PAGE + 2}]
    never, rested = decode(0, steps), decode(9, steps)
    assert rested.controller.begun == 2, "a batch that has changed is looked at"
    assert torch.equal(rested.pages, never.pages)


def test_no_more_is_put_off_than_one_call_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafting, "MOST_ROWS", 4)
    sizes = []
    original = DraftSession._remember

    def noted(self: Any, states: Any, *arguments: Any) -> Any:
        sizes.append(len(states))
        return original(self, states, *arguments)

    monkeypatch.setattr(DraftSession, "_remember", noted)
    decode(9, [{"a": PAGE + place, "b": 5 * PAGE + place} for place in range(8)])
    assert sizes == [2, 4, 4, 4]


def test_an_engine_that_is_switched_off_puts_its_reading_off_too() -> None:
    engine = Engine(0)
    engine.session.switch.on = False
    steps = [{"a": PAGE + place} for place in range(4)]
    for number, slots in enumerate(steps):
        engine.step(slots, number)
    assert engine.controller.begun == 0
    engine.session.switch.on = True
    engine.step({"a": PAGE + 4}, 4)
    never = decode(0, [*steps, {"a": PAGE + 4}])
    assert torch.equal(engine.pages, never.pages)
