"""Drafting in one call: our draft loop in place of vLLM's, which builds metadata anew for each step."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size

from qm_spec.drafter.loop import DraftLoop
from qm_spec.integrations.vllm_plugin.model import QuickMergeForCausalLM


def can_draft(proposer: Any) -> bool:
    """Tell whether our loop can draft for this proposer; if not, vLLM's own loop does.

    It runs on the CPU and on one rank. Multimodal rotary positions do not matter to it, token ids
    of another vocabulary do.
    """
    return (
        isinstance(proposer.model, QuickMergeForCausalLM)
        and proposer.device.type == "cpu"
        and get_tensor_model_parallel_world_size() == 1
        and not proposer.use_heterogeneous_vocab
        and not proposer.supports_mm_inputs
    )


def propose(
    proposer: Any,
    num_speculative_tokens: int,
    target_hidden_states: Tensor,
    next_token_ids: Tensor,
    token_indices_to_sample: Tensor | None,
    common_attn_metadata: Any,
    sampling_metadata: Any,
    num_rejected_tokens_gpu: Tensor | None,
) -> Tensor:
    """Write this step's states into the merged cache and draft from it.

    Args:
        proposer: vLLM's EAGLE proposer, whose `propose` this stands in for.
        num_speculative_tokens: K; 0 keeps the cache in step and drafts nothing.
        target_hidden_states: `[T, 3 D]`, rejected rows included.
        next_token_ids: `[B]`, the token after each request's last verified one.
        token_indices_to_sample: `[B]` rows of the last verified tokens; the last rows when None.
        common_attn_metadata: of the draft layer's cache group.
        sampling_metadata: temperatures, for drafting by sampling.
        num_rejected_tokens_gpu: `[B]` drafts rejected in this step, or None.

    Returns:
        `[B, K]` int64 draft token ids.
    """
    model = proposer.model
    proposer.num_speculative_tokens = num_speculative_tokens
    proposer._last_draft_probs = None
    attn = model.model.attn
    _, per_layer = proposer.build_per_group_and_layer_attn_metadata(common_attn_metadata)
    metadata = per_layer[attn.layer_name]
    loop = DraftLoop(model.model.layer, model.model.embed_tokens, model.compute_logits, model.config.merge)

    states = model.combine_hidden_states(target_hidden_states)
    loop.remember(attn.kv_cache, states, metadata.slot_mapping[: len(states)])
    if num_speculative_tokens == 0:
        return next_token_ids.new_empty((len(next_token_ids), 0), dtype=torch.int64)
    rows = token_indices_to_sample
    if rows is None:
        rows = metadata.query_start_loc[1:] - 1
    verified = metadata.seq_lens
    if num_rejected_tokens_gpu is not None:
        verified = verified - num_rejected_tokens_gpu
    draft_probs: list[Tensor] = []

    def sample(logits: Tensor) -> Tensor:
        token_ids, probs = proposer._sample_from_logits(logits, sampling_metadata)
        if probs is not None:
            draft_probs.append(probs)
        return token_ids

    with torch.inference_mode():
        drafted = loop.draft(
            attn.kv_cache,
            metadata.block_table,
            verified,
            states[rows.long()],
            next_token_ids,
            num_speculative_tokens,
            sample,
        )
    if draft_probs:
        proposer._last_draft_probs = torch.stack(draft_probs, dim=1).contiguous()
    return drafted


def with_draft_loop(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
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
    ) -> Tensor:
        if can_draft(self):
            return propose(
                self,
                num_speculative_tokens,
                target_hidden_states,
                next_token_ids,
                token_indices_to_sample,
                common_attn_metadata,
                sampling_metadata,
                num_rejected_tokens_gpu,
            )
        return original(
            self,
            num_speculative_tokens,
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

    return replaced
