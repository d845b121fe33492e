"""The V1 runner's drafts of a step in one call."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

from qm_spec.integrations.vllm_plugin.compat import Patch
from qm_spec.integrations.vllm_plugin.lookup import warn_without_lookup
from qm_spec.integrations.vllm_plugin.proposer import PendingDrafts, can_draft, no_drafts, session_of
from qm_spec.integrations.vllm_plugin.session import Drafts
from qm_spec.integrations.vllm_plugin.step import DraftStep


def with_draft_loop(original: Callable[..., Tensor]) -> Callable[..., Tensor | list[list[int]] | PendingDrafts]:
    """Return vLLM's `propose` with our loop in its place where it applies."""

    @wraps(original)
    def replaced(  # noqa: PLR0913 - vLLM's
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


DRAFT_LOOP = Patch(
    target="vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer.propose",
    parameters=(
        "self",
        "num_speculative_tokens",
        "target_token_ids",
        "target_positions",
        "target_hidden_states",
        "next_token_ids",
        "token_indices_to_sample",
        "common_attn_metadata",
        "sampling_metadata",
        "mm_embed_inputs",
        "num_rejected_tokens_gpu",
        "slot_mappings",
    ),
    replacement=with_draft_loop,
    why="a draft step costs its arithmetic; vLLM's loop adds milliseconds of metadata to each on a CPU",
    how="drafts all K tokens in one call for our model and is applied when that is built; others keep vLLM's",
    upstream="none",
    delete_when="vLLM lets a draft model bring its own loop",
)
