"""The V1 runner's way to the drafter: a step and its requests come from vLLM's proposer, and drafts go back to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size

from qm_spec.integrations.vllm_plugin.lookup import warn_without_lookup
from qm_spec.integrations.vllm_plugin.model import QuickMergeForCausalLM
from qm_spec.integrations.vllm_plugin.session import Drafts, DraftSession, plain_weights
from qm_spec.integrations.vllm_plugin.step import DraftStep
from qm_spec.integrations.vllm_plugin.verification import without_seeds_of_unread_prompts
from qm_spec.ops import backend


def session_of(proposer: Any) -> DraftSession | None:
    """Return the session of a proposer with our model, None of another."""
    return proposer.model.session if isinstance(proposer.model, QuickMergeForCausalLM) else None


def can_draft(proposer: Any) -> bool:
    """Tell whether our loop can draft for this proposer; if not, vLLM's own loop does.

    Multimodal rotary positions do not matter to ours, token ids of another vocabulary do.
    """
    return (
        session_of(proposer) is not None
        and obstacle(proposer.model, proposer.vllm_config, proposer.device.type) is None
        and not proposer.use_heterogeneous_vocab
        and not proposer.supports_mm_inputs
    )


def obstacle(model: Any, vllm_config: Any, device: str) -> str | None:
    """Return why vLLM's own loop must draft, None where ours can.

    Ours runs on one rank, on the CPU, and on a GPU with compiled kernels and a target of plain weights. Ranks of data
    parallelism run vLLM's loop, in which they wait for each other.

    Args:
        model: the drafter, with the target's embedding and head in place.
        vllm_config: of the engine.
        device: its type.
    """
    if get_tensor_model_parallel_world_size() > 1:
        return "there are several ranks of tensor parallelism"
    if vllm_config.parallel_config.data_parallel_size > 1:
        return "there are several ranks of data parallelism"
    if device == "cpu":
        return None
    if device != "cuda":
        return f"there is none for {device}"
    if backend.backend("cuda") != "compiled":
        return "there are no compiled kernels"
    if plain_weights(model) is None:
        return "the target's embedding or head is quantised, scaled or carries LoRA"
    return None


def no_drafts(num_requests: int, num_drafts: int, device: torch.device) -> Drafts:
    """Return empty lists on a CPU, and zeros `[B, K]` elsewhere, where vLLM takes no fewer than K."""
    if device.type == "cpu":
        return Drafts([[] for _ in range(num_requests)], None)
    return Drafts(torch.zeros((num_requests, num_drafts), dtype=torch.int64, device=device), None)


@dataclass(frozen=True)
class PendingDrafts:
    """Drafts that are made when they are asked for: by then the tokens of the step are on their way to the user.

    What `draft` reads stays as it is until the next step begins.
    """

    draft: Callable[[], Drafts]


def with_request_states(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return vLLM's `prepare_next_token_ids_padded` that tells our session which requests the batch's rows are."""

    @wraps(original)
    def replaced(
        self: Any,
        sampled_token_ids: Tensor,
        requests: dict[str, Any],
        gpu_input_batch: Any,
        discard_request_mask: Tensor,
    ) -> Any:
        session = session_of(self)
        if session is not None:
            session.note_batch(gpu_input_batch.req_ids[: gpu_input_batch.num_reqs], requests)
        return original(self, sampled_token_ids, requests, gpu_input_batch, discard_request_mask)

    return replaced


def with_draft_loop(original: Callable[..., Tensor]) -> Callable[..., Tensor | list[list[int]] | PendingDrafts]:
    """Return vLLM's `propose` with our loop in its place where it applies."""

    @wraps(original)
    def replaced(
        self: Any,
        num_speculative_tokens: int,
        target_token_ids: Tensor,
        target_positions: Tensor,
        target_hidden_states: Tensor,
        next_token_ids: Tensor,
        token_indices_to_sample: Tensor | None,
        common_attn_metadata: Any,
        sampling_metadata: Any,
        mm_embed_inputs: Any = None,
        num_rejected_tokens_gpu: Tensor | None = None,
        slot_mappings: Any = None,
    ) -> Tensor | list[list[int]] | PendingDrafts:
        session = session_of(self)
        if session is not None and can_draft(self):

            def draft() -> Drafts | None:
                step = DraftStep.from_v1(
                    self,
                    num_speculative_tokens,
                    target_token_ids,
                    target_hidden_states,
                    next_token_ids,
                    token_indices_to_sample,
                    common_attn_metadata,
                    sampling_metadata,
                    num_rejected_tokens_gpu,
                    session.batch,
                )
                return session.draft(step)

            def guarded() -> Drafts:
                return session.attempt(draft) or no_drafts(len(next_token_ids), num_speculative_tokens, self.device)

            self._last_draft_probs = None
            if self.model.drafts_after_step:
                return PendingDrafts(guarded)
            token_ids, self._last_draft_probs = guarded()
            return token_ids
        if session is not None and session.lookup_length:
            warn_without_lookup()
        most = num_speculative_tokens if session is None else min(num_speculative_tokens, session.num_drafts)
        drafts = original(
            self,
            most,
            target_token_ids,
            target_positions,
            target_hidden_states,
            next_token_ids,
            token_indices_to_sample,
            common_attn_metadata,
            sampling_metadata,
            mm_embed_inputs,
            num_rejected_tokens_gpu,
            slot_mappings,
        )
        if session is not None and not session.switch.on:
            # Its keys and values are written.
            self._last_draft_probs = None
            return no_drafts(len(next_token_ids), num_speculative_tokens, self.device).token_ids
        return drafts

    return replaced


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
