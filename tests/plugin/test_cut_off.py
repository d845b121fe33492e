"""Batches too large for drafts, by what vLLM's adaptive verification expects: its own manager, on a simulated clock."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: run ./install.sh")

from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.spec_decode import adaptive_verification as vllms

from qm_spec.drafter.cut_off import CutOff
from qm_spec.integrations.vllm_plugin import compat
from qm_spec.integrations.vllm_plugin.patches.adaptive_verification import (
    ADAPTIVE_VERIFICATION,
    expected_gain,
    with_manager,
)

pytestmark = pytest.mark.vllm

NUM_DRAFTS, MOST_REQUESTS = 4, 256


def draft_ms(num_requests: int) -> float:
    return 0.6 + 0.004 * num_requests


def verify_ms(num_tokens: int) -> float:
    """Weights are read for up to 128 rows, behind which a step computes."""
    return 5.0 + 0.03 * max(0, num_tokens - 128)


def make_manager() -> Any:
    """Return vLLM's manager without the streams and events of a device, after its profile of these costs."""
    manager = vllms.AdaptiveVerificationManager.__new__(vllms.AdaptiveVerificationManager)
    places = {f"r{number}": number for number in range(MOST_REQUESTS)}
    prefill = SimpleNamespace(np=np.zeros(MOST_REQUESTS, dtype=np.int32))
    manager.req_states = SimpleNamespace(
        req_id_to_index=places,
        num_computed_tokens_np=np.ones(MOST_REQUESTS, dtype=np.int32),
        prefill_len=prefill,
        num_speculative_steps=NUM_DRAFTS,
    )
    manager.num_speculative_steps, manager.num_bonus_tokens, manager._max_total_logits = NUM_DRAFTS, 1, 1 << 20
    sizes = [1, 2, 4, 8, *range(16, MOST_REQUESTS * (NUM_DRAFTS + 1) + 1, 16)]
    manager.cost_tables = vllms.build_cost_tables_from_curves(
        [(size, draft_ms(size)) for size in sizes],
        [(size, verify_ms(size)) for size in sizes],
        MOST_REQUESTS,
        MOST_REQUESTS * (NUM_DRAFTS + 1),
    )
    ones = np.ones((MOST_REQUESTS, NUM_DRAFTS), dtype=np.float32)
    manager._stale_confidences = [SimpleNamespace(np=ones.copy()), SimpleNamespace(np=ones.copy())]
    manager._stale_idx = 0
    return manager


class Engine:
    """Decodes with a manager and a cut-off, by the clock of the costs above.

    Args:
        acceptance: of each draft token behind accepted ones, which vLLM's estimate knows.
    """

    def __init__(self, num_requests: int, acceptance: float) -> None:
        self.num_requests, self.acceptance = num_requests, acceptance
        self.manager = make_manager()
        replaced = with_manager(lambda **settings: self.manager)
        assert replaced(req_states=self.manager.req_states) is self.manager

    def rate(self, steps: int, cut_off: CutOff | None) -> float:
        """Return tokens per ms."""
        ids = [f"r{number}" for number in range(self.num_requests)]
        places = np.arange(self.num_requests)
        tokens = milliseconds = 0.0
        drafted = False
        for _ in range(steps):
            scheduled = dict.fromkeys(ids, 1 + NUM_DRAFTS)
            total = self.manager.get_num_tokens(scheduled, dict.fromkeys(ids, [0] * NUM_DRAFTS))
            budget = total - self.num_requests
            chances = np.sort(np.repeat(self.acceptance ** np.arange(1, 1 + NUM_DRAFTS), self.num_requests))[::-1]
            tokens += self.num_requests + (chances[:budget].sum() if drafted else 0)
            milliseconds += verify_ms(total)
            batch = SimpleNamespace(
                num_reqs=self.num_requests,
                num_draft_tokens=budget,
                num_draft_tokens_per_req=np.full(self.num_requests, NUM_DRAFTS),
                has_prefill=False,
                idx_mapping_np=places,
            )
            gain = expected_gain(self.manager.req_states, batch)
            drafted = cut_off is None or cut_off.drafts(self.num_requests, gain)
            milliseconds += draft_ms(self.num_requests) if drafted else 0
            # The chances that a step drafts with are those of the budget two steps later.
            self.manager._stale_idx ^= 1
            late = self.manager._stale_confidences[self.manager._stale_idx ^ 1].np
            late[: self.num_requests] = self.acceptance if drafted else 0.0
        return tokens / milliseconds


@pytest.mark.parametrize("acceptance", [0.02, 0.5, 0.8])
@pytest.mark.parametrize("num_requests", [1, 16, 100, 256])
def test_no_batch_is_slower_than_plain_decoding_nor_much_slower_than_the_best(
    num_requests: int, acceptance: float
) -> None:
    plain = num_requests / verify_ms(num_requests)
    always = Engine(num_requests, acceptance).rate(2000, None)
    ours = Engine(num_requests, acceptance).rate(2000, CutOff(lambda text: None))
    assert ours >= 0.97 * plain
    assert ours >= 0.97 * max(plain, always)


def test_a_useless_drafter_would_cost_without_the_cut_off() -> None:
    """What the test above guards against."""
    assert Engine(256, 0.02).rate(300, None) < 0.95 * 256 / verify_ms(256)


def test_nothing_is_expected_of_steps_that_read_prompts_or_schedule_no_drafts() -> None:
    manager = make_manager()
    with_manager(lambda **settings: manager)(req_states=manager.req_states)
    batch = SimpleNamespace(
        num_reqs=2,
        num_draft_tokens=8,
        num_draft_tokens_per_req=np.full(2, 4),
        has_prefill=False,
        idx_mapping_np=np.arange(2),
    )
    assert expected_gain(manager.req_states, batch) == pytest.approx(5 * 5 / (5 + draft_ms(2)))
    for name, value in (("has_prefill", True), ("num_draft_tokens_per_req", None)):
        assert expected_gain(manager.req_states, SimpleNamespace(**{**vars(batch), name: value})) is None
    assert expected_gain(SimpleNamespace(), batch) is None, "without adaptive verification"
    manager.cost_tables = None
    assert expected_gain(manager.req_states, batch) is None, "before vLLM has measured"


def test_the_patch_fits_vllms_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        model_runner, "maybe_create_adaptive_verification_manager", vllms.maybe_create_adaptive_verification_manager
    )
    assert compat.apply(ADAPTIVE_VERIFICATION) and compat.in_force(ADAPTIVE_VERIFICATION)
    states = SimpleNamespace()
    made = model_runner.maybe_create_adaptive_verification_manager(
        enable_adaptive_verification=False,
        attn_groups=[],
        req_states=states,
        query_start_loc=None,
        num_bonus_tokens=1,
        max_total_logits=1,
        vllm_config=None,
    )
    assert made is None and expected_gain(states, None) is None
