"""The V2 runner's way to the drafter: all K tokens of a step in one call, and prompts read by keys and values only."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.worker.gpu.dp_utils import dispatch_cg_and_sync_dp
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import SpeculatorCudaGraphManager

from qm_spec.drafter.loop import DraftLoop
from qm_spec.drafter.paged_loop import DraftInputs, paged_draft_steps
from qm_spec.integrations.vllm_plugin.counters import DeviceCounts
from qm_spec.integrations.vllm_plugin.step import DraftStep
from qm_spec.ops.page import slot_elements

logger = logging.getLogger("vllm.plugins.qm_spec")


class QuickMergeSpeculator(EagleSpeculator):
    """vLLM's EAGLE speculator with our loop in the place of its own.

    The loop runs on the model's own modules, so it drafts over ranks, quantised heads and draft vocabularies too. Its
    drafts are drawn, and weighed by verification, as vLLM's are: by temperature, seed and position. Where vLLM captures
    decode steps of one token in full CUDA graphs, it captures the loop for each of their batch sizes.

    Attributes:
        num_verified: `[R]` int32, tokens in the pages by row of the batch; 0 in rows without a request, so that
            nothing is merged or attended to there.
        next_token_ids: `[R]` int64, the token behind each of them. Their states are in `hidden_states`.
        counts: of verified drafts.
        has_drafted: whether what the next step verifies are drafts of ours, and not zeros.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.num_verified = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=device)
        self.next_token_ids = torch.zeros(self.max_num_reqs, dtype=torch.int64, device=device)
        self.counts = DeviceCounts(device)
        self.has_drafted = False

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Prepare full graphs of the loop where the target's decode steps have them, else none."""
        full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        mode = CUDAGraphMode.FULL_DECODE_ONLY if full else CUDAGraphMode.NONE
        self.decode_cudagraph_manager = SpeculatorCudaGraphManager(
            self.vllm_config, self.device, mode, decode_query_len=1
        )
        self.model.session.captures = full

    def capture(self) -> None:
        """Capture the loop, in vLLM's own capture phase; it runs without graphs if that fails."""
        self.num_verified.zero_()
        self.idx_mapping.fill_(-1)
        try:
            self.decode_cudagraph_manager.capture(
                self._draft_all,
                self.model_state,
                self.input_buffers,
                self.block_tables,
                self.attn_groups,
                self.kv_cache_config,
                progress_bar_desc="Capturing draft CUDA graphs",
                specialize_spec_tokens=self.speculative_config.uses_dynamic_speculative_decoding(),
            )
        except Exception:
            logger.warning("qm_spec: the draft loop was not captured and runs without CUDA graphs", exc_info=True)
            self.init_cudagraph_manager(CUDAGraphMode.NONE)

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
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
        **unread: Any,
    ) -> Tensor:
        """Write this step's states into the merged cache and draft from it.

        Args:
            input_batch: the target's batch of B requests.
            attn_metadata: by layer; None in dummy runs without attention.
            slot_mappings: not read, as `attn_metadata` has that of our layer.
            last_hidden_states: not read.
            aux_hidden_states: three times `[T, D]` or more rows.
            num_sampled: `[B]`, 0 where a prompt is still being read.
            num_rejected: `[B]`, drafts that this step has rejected.
            last_sampled: `[R, 1]` by the place of a request's state.
            next_prefill_tokens: `[n, R]`, likewise: the prompt's next tokens.
            temperature: `[R]`, likewise.
            seeds: `[R]`, likewise.
            dummy_run: no request stands behind the batch, and no page may change.
            is_profile: as `dummy_run`, and before there are pages or graphs.
            num_speculative_tokens: K, all that there may be if None.
            unread: what other speculators need.

        Returns:
            `[B, most K]` int64, of which the runner reads the first K.
        """
        num_reqs = input_batch.num_reqs
        num_drafts = self.num_speculative_steps if num_speculative_tokens is None else num_speculative_tokens
        self._copy_request_inputs(num_reqs, input_batch.idx_mapping, temperature, seeds, dummy_run=dummy_run)

        def draft() -> bool:
            step = DraftStep.from_v2(
                num_drafts,
                input_batch,
                self._metadata(attn_metadata),
                aux_hidden_states,
                num_sampled,
                num_rejected,
                last_sampled,
                next_prefill_tokens,
            )
            self._remember(step, num_reqs, dummy_run)
            # A later step merges what one without drafts leaves.
            drafts_now = num_drafts > 0 and session.switch.on
            if drafts_now:
                self._draft(num_reqs, attn_metadata, is_profile, num_drafts)
            if not dummy_run:
                self._count(input_batch.num_draft_tokens_per_req, num_rejected, drafts_now)
            return session.switch.on

        session, drafts = self.model.session, self.draft_tokens[:num_reqs]
        if not session.attempt(draft):
            self._draft_zeros(drafts, None if dummy_run else input_batch.idx_mapping)
        return drafts

    def _count(self, num_draft_tokens: Any, num_rejected: Tensor, drafts_now: bool) -> None:
        """Count this step, without a value read on the host.

        Args:
            num_draft_tokens: `[B]` on the host, of the drafts that it has verified; None where there were none.
            num_rejected: `[B]`, of these.
            drafts_now: whether there are drafts behind it.
        """
        counters = self.model.session.counters
        counters["steps", "prior" if drafts_now else "plain"] += 1
        if num_draft_tokens is not None and self.has_drafted:
            self.counts.note(int((num_draft_tokens > 0).sum()), int(num_draft_tokens.sum()), num_rejected)
        counters.note_drafts("prior", *self.counts.take())
        self.has_drafted = drafts_now

    def _metadata(self, attn_metadata: dict[str, Any] | None) -> Any:
        return (attn_metadata or {}).get(self.model.model.attn.layer_name)

    @property
    def _pages(self) -> Tensor:
        """The merged cache; a page that nobody reads while vLLM measures its memory and there is none."""
        inner = self.model.model
        cache: Tensor = inner.attn.kv_cache
        if cache.numel():
            return cache
        elements = slot_elements(inner.layer.head_dim, self.hidden_states.dtype)
        return self.hidden_states.new_zeros(1, inner.layer.num_kv_heads, self.model.config.merge.group_size, elements)

    def _remember(self, step: DraftStep, num_reqs: int, dummy_run: bool) -> None:
        """Write keys and values of all rows, and what the loop reads to where its graphs read it."""
        model, inner = self.model, self.model.model
        states = model.combine_hidden_states(step.states)
        loop = DraftLoop(inner.layer, inner.embed_tokens, model.compute_logits, model.config.merge)
        loop.remember(self._pages, states, step.following_token_ids, step.slot_mapping)
        self.hidden_states[:num_reqs] = states[step.last_rows.long()]
        self.next_token_ids[:num_reqs] = step.next_token_ids
        self.num_verified.zero_()
        if not dummy_run:
            self.num_verified[:num_reqs] = step.num_verified

    def _draft(self, num_reqs: int, attn_metadata: dict[str, Any] | None, is_profile: bool, num_drafts: int) -> None:
        """Draft by a graph where there is one of this size, else by the loop itself."""
        # Ranks of data parallelism need not agree on a size: nothing is exchanged between them while drafting.
        graph, _ = dispatch_cg_and_sync_dp(
            self.decode_cudagraph_manager,
            num_reqs,
            num_reqs,
            uniform_token_count=1,
            dp_size=1,
            dp_rank=0,
            need_eager=is_profile,
        )
        if self.decode_cudagraph_manager is not None:
            graph = self.decode_cudagraph_manager.specialize_spec_tokens(graph, num_drafts)
        if graph.cg_mode != CUDAGraphMode.FULL:
            self._draft_all(num_reqs, num_reqs, attn_metadata, None, None, CUDAGraphMode.NONE, num_drafts)
            return
        for groups in self.attn_groups:
            for group in groups:
                # The graph reads the table that it was captured with.
                group.map_to_kernel_block_table(self.block_tables.input_block_tables[group.kv_cache_group_id])
        self.decode_cudagraph_manager.run_fullgraph(graph)
        self.model.session.counters["graph_replays", ""] += 1

    def _draft_all(
        self,
        num_reqs: int,
        num_tokens: int,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, Tensor] | None,
        num_tokens_across_dp: Tensor | None,
        cudagraph_mode: CUDAGraphMode,
        num_speculative_steps: int,
    ) -> None:
        """Draft K tokens for each row of the batch; the parameters are those of what vLLM captures."""
        inner, verified = self.model.model, self.num_verified[:num_reqs]
        metadata, idx_mapping, positions = self._metadata(attn_metadata), self.idx_mapping[:num_reqs], verified.long()
        table = verified.new_zeros((num_reqs, 1)) if metadata is None else metadata.block_table[:num_reqs]

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

        self.draft_tokens[:num_reqs, :num_speculative_steps] = paged_draft_steps(
            inner.layer,
            inner.embed_tokens,
            sample,
            self._pages,
            self.model.config.merge,
            DraftInputs(table, verified, self.hidden_states[:num_reqs], self.next_token_ids[:num_reqs]),
            num_speculative_steps,
        )

    def _draft_zeros(self, drafts: Tensor, places: Tensor | None) -> None:
        """Draft token 0 for all, as drafting has failed or is off and vLLM takes no fewer than K.

        Verification must be told that they are sure, or it takes them for draws from what is kept of earlier steps.

        Args:
            drafts: `[B, K]`, filled.
            places: `[B]` of the requests' states; None where there are no requests.
        """
        drafts.zero_()
        if places is not None and self.draft_logits is not None:
            sure = torch.full_like(self.draft_logits[: len(places)], float("-inf"))
            sure[..., 0] = 0.0
            self.draft_logits[places] = sure
