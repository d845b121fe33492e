"""The V2 runner's way to the drafter: all K tokens of a step in one call, and prompts read by keys and values only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator

from qm_spec.drafter.loop import DraftLoop
from qm_spec.drafter.paged_loop import DraftInputs, paged_draft_steps
from qm_spec.integrations.vllm_plugin.step import DraftStep
from qm_spec.ops.page import slot_elements


class QuickMergeSpeculator(EagleSpeculator):
    """vLLM's EAGLE speculator with our loop in the place of its own.

    The loop runs on the model's own modules, so it drafts over ranks, quantised heads and draft vocabularies too. Its
    drafts are drawn, and weighed by verification, as vLLM's are: by temperature, seed and position.
    """

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Do nothing: the loop runs without graphs; the target keeps its own."""

    def capture(self) -> None:
        """Do nothing, as there are no graphs."""

    @torch.inference_mode()
    def propose(
        self,
        input_batch: Any,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, Tensor] | None,
        last_hidden_states: Tensor,
        aux_hidden_states: list[Tensor] | None,
        num_sampled: Tensor,
        num_rejected: Tensor,
        last_sampled: Tensor,
        next_prefill_tokens: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        dummy_run: bool = False,
        num_speculative_tokens: int | None = None,
        **unread: Any,
    ) -> Tensor:
        """Write this step's states into the merged cache and draft from it.

        Args:
            input_batch: the target's batch of B requests.
            attn_metadata: by layer, None where no layer has pages yet.
            slot_mappings: not read; those of `attn_metadata` are of our layer.
            last_hidden_states: not read.
            aux_hidden_states: three times `[T, D]` or more rows.
            num_sampled: `[B]`, 0 where a prompt is still being read.
            num_rejected: `[B]`, drafts that this step has rejected.
            last_sampled: `[R, 1]` by the place of a request's state.
            next_prefill_tokens: `[n, R]`, likewise: the prompt's next tokens.
            temperature: `[R]`, likewise.
            seeds: `[R]`, likewise.
            dummy_run: no request stands behind the batch, and no page may change.
            num_speculative_tokens: K, all that there may be if None.
            unread: what other speculators need.

        Returns:
            `[B, most K]` int64, of which the runner reads the first K.
        """
        num_reqs = input_batch.num_reqs
        num_drafts = self.num_speculative_steps if num_speculative_tokens is None else num_speculative_tokens
        drafts = self.draft_tokens[:num_reqs]
        self._copy_request_inputs(num_reqs, input_batch.idx_mapping, temperature, seeds, dummy_run=dummy_run)

        def draft() -> bool:
            step = DraftStep.from_v2(
                num_drafts,
                input_batch,
                (attn_metadata or {}).get(self.model.model.attn.layer_name),
                aux_hidden_states,
                num_sampled,
                num_rejected,
                last_sampled,
                next_prefill_tokens,
            )
            self._draft(step, drafts, dummy_run)
            return True

        if not self.model.session.attempt(draft):
            drafts.zero_()
            if not dummy_run and self.draft_logits is not None:
                # Verification would else take the zeros for draws from what was kept of earlier steps.
                sure = torch.full_like(self.draft_logits[:num_reqs], float("-inf"))
                sure[..., 0] = 0.0
                self.draft_logits[input_batch.idx_mapping] = sure
        return drafts

    def _draft(self, step: DraftStep, drafts: Tensor, dummy_run: bool) -> None:
        model, inner = self.model, self.model.model
        layer, merge, cache = inner.layer, self.model.config.merge, inner.attn.kv_cache
        states, rows, num_reqs = model.combine_hidden_states(step.states), step.last_rows.long(), len(drafts)
        if cache.numel() == 0:
            # As while vLLM measures its memory: a page that nobody reads or writes.
            elements = slot_elements(layer.head_dim, states.dtype)
            cache = states.new_zeros(1, layer.num_kv_heads, merge.group_size, elements)
        loop = DraftLoop(layer, inner.embed_tokens, model.compute_logits, merge)
        loop.remember(cache, states, step.following_token_ids, step.slot_mapping)
        if step.num_drafts == 0:
            # A later step merges what this one leaves.
            drafts.fill_(-1)
            return
        num_verified = step.num_verified
        if dummy_run:
            num_verified = torch.zeros_like(num_verified)
        idx_mapping, positions = self.idx_mapping[:num_reqs], num_verified.long()

        def sample(output: Tensor, number: int) -> Tensor:
            self.current_draft_step.fill_(number)
            # vLLM draws a token by the position before it. That of the first draft holds the token behind those read.
            token_ids: Tensor = self.sample_draft(
                output,
                positions + number,
                idx_mapping,
                self.temperature,
                self.seeds,
                self.current_draft_step,
                self.draft_logits,
            )
            return token_ids

        inputs = DraftInputs(step.block_table, num_verified, states[rows], step.next_token_ids)
        drafts[:, : step.num_drafts] = paged_draft_steps(
            layer, inner.embed_tokens, sample, cache, merge, inputs, step.num_drafts
        )
