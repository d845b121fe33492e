"""Drafting after a step's tokens have gone out, with the V1 runner on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from qm_spec.integrations.vllm_plugin.compat import Patch
from qm_spec.integrations.vllm_plugin.proposer import PendingDrafts
from qm_spec.integrations.vllm_plugin.seeds import without_seeds_of_unread_prompts


def with_pending_drafts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the runner's `take_draft_token_ids` that makes pending drafts first."""

    @wraps(original)
    def replaced(self: Any) -> Any:
        pending = self._draft_token_ids
        if isinstance(pending, PendingDrafts):
            with torch.inference_mode(), without_seeds_of_unread_prompts(self):
                drafts, probs = pending.draft()
            self._draft_token_ids = drafts.tolist() if isinstance(drafts, Tensor) else drafts
            if probs is not None:
                self._draft_probs, self._draft_prob_req_ids = probs, self.input_batch.req_ids.copy()
        return original(self)

    return replaced


DRAFTS_AFTER_STEP = Patch(
    target="vllm.v1.worker.gpu_model_runner:GPUModelRunner.take_draft_token_ids",
    parameters=("self",),
    replacement=with_pending_drafts,
    why="tokens go out before those behind them are drafted: the first one does not wait until the prior has read the "
    "prompt too",
    how="drafts when the engine asks for drafts, which it does after it has handed out the step's tokens; on a CPU",
    upstream="none",
    delete_when="vLLM drafts after it has handed out a step's tokens",
)
