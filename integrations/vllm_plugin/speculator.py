"""The V2 runner's way to the drafter: all K tokens of a step in one call, and prompts read by keys and values only.

What suffix lookup finds is found on the device, beside the loop, and takes the place of the prior's drafts inside it.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor
from vllm.v1.worker.gpu.dp_utils import dispatch_cg_and_sync_dp
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import SpeculatorCudaGraphManager

from qm_spec.drafter.cut_off import CutOff
from qm_spec.drafter.loops.paged import DraftInputs, paged_draft_steps
from qm_spec.integrations.vllm_plugin import compat
from qm_spec.integrations.vllm_plugin.copies import CopiedDrafts
from qm_spec.integrations.vllm_plugin.counters import DeviceCounts
from qm_spec.integrations.vllm_plugin.cuda_graphs import can_capture
from qm_spec.integrations.vllm_plugin.lookup import lookup_length
from qm_spec.integrations.vllm_plugin.model import drafter_config
from qm_spec.integrations.vllm_plugin.patches.adaptive_verification import ADAPTIVE_VERIFICATION, expected_gain
from qm_spec.integrations.vllm_plugin.step import DraftStep
from qm_spec.ops.page import slot_elements

logger = logging.getLogger("vllm.plugins.qm_spec")

# The most memory of the device that all requests' tokens may take there for lookup.
_MOST_TOKEN_BYTES = 1 << 30


def keep_tokens_on_device(req_states: Any) -> None:
    """Have all tokens of all requests in the device's memory, where they fit.

    vLLM keeps them on the host, to be read over the bus: for a lookup that is all of them in each step. It does the
    same as this for its own n-gram lookup.

    Args:
        req_states: the V2 runner's, just made.
    """
    size = req_states.max_num_reqs, req_states.max_model_len
    if size[0] * size[1] * torch.int32.itemsize <= _MOST_TOKEN_BYTES:
        req_states.all_token_ids = StagedWriteTensor(size, dtype=torch.int32, device=req_states.device)


class QuickMergeSpeculator(EagleSpeculator):
    """vLLM's EAGLE speculator with our loop in the place of its own.

    The loop runs on the model's own modules, so it drafts over ranks, quantised heads and draft vocabularies too. Its
    drafts are drawn, and weighed by verification, as vLLM's are: by temperature, seed and position. Where vLLM captures
    decode steps of one token in full CUDA graphs, it captures the loop for each of their batch sizes.

    Attributes:
        num_verified: `[R]` int32, tokens in the pages by row of the batch; 0 in rows without a request, so that
            nothing is merged or attended to there.
        next_token_ids: `[R]` int64, the token behind each of them. Their states are in `hidden_states`.
        copied: what lookup has found behind them.
        req_states: the runner's requests, for the tokens of their texts; None where vLLM does not hand them over.
        cut_off: decides from which batch size on nothing is drafted, where vLLM verifies adaptively.
        counts: of verified drafts.
        has_drafted: whether what the next step verifies are drafts of ours, and not zeros.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, req_states: Any = None) -> None:
        super().__init__(vllm_config, device)
        self.req_states = req_states
        if req_states is not None and lookup_length(drafter_config(vllm_config)):
            keep_tokens_on_device(req_states)
        self.copied = CopiedDrafts(self.max_num_reqs, self.num_speculative_steps, device)
        self.num_verified = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=device)
        self.next_token_ids = torch.zeros(self.max_num_reqs, dtype=torch.int64, device=device)
        self.cut_off = CutOff(report=partial(logger.info, "qm_spec: %s"))
        if self.enable_adaptive_verification:
            # The runner makes it when it knows its attention backends.
            compat.apply(ADAPTIVE_VERIFICATION)
        self.counts = DeviceCounts(device)
        self.has_drafted = False

    def load_model(self, target_model: nn.Module) -> None:
        """Load the drafter. Behind its own drafts there are copies only, or token 0: either is sure."""
        super().load_model(target_model)
        if self.req_states is None and self.model.session.lookup_length:
            logger.warning("qm_spec: vLLM does not tell its speculators the requests' tokens, so there is no lookup")
            self.model.session.lookup_length = 0
        self.sure_ids = self.copied.token_ids[:, self._num_prior_drafts :].clone()
        if self.draft_logits is not None:
            tail = self.draft_logits[:, self._num_prior_drafts :]
            tail.fill_(float("-inf"))
            tail[..., 0] = 0.0

    @property
    def _num_prior_drafts(self) -> int:
        """The most tokens that the prior drafts, at most K."""
        most: int = self.model.session.num_drafts
        return min(most, self.num_speculative_steps)

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Prepare full graphs of the loop where the target's decode steps have them and the operators hold in them."""
        full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL and can_capture(self.vllm_config)
        mode = CUDAGraphMode.FULL_DECODE_ONLY if full else CUDAGraphMode.NONE
        self.decode_cudagraph_manager = SpeculatorCudaGraphManager(
            self.vllm_config, self.device, mode, decode_query_len=1
        )
        self.model.session.captures = full

    def capture(self) -> None:
        """Capture the loop, in vLLM's own capture phase; it runs without graphs if that fails."""
        self.num_verified.zero_()
        self.copied.clear()
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
    def propose(  # noqa: PLR0913 - vLLM's
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
            if not dummy_run:
                drafts_now = drafts_now and self._pays(input_batch)
                self._count(input_batch, num_rejected, drafts_now)
            if drafts_now:
                self._look_up(input_batch, dummy_run)
                self._draft(num_reqs, attn_metadata, is_profile, num_drafts)
            return drafts_now or num_drafts == 0

        session, drafts = self.model.session, self.draft_tokens[:num_reqs]
        if not session.attempt(draft):
            self._draft_zeros(drafts, None if dummy_run else input_batch.idx_mapping)
        return drafts

    def _pays(self, input_batch: Any) -> bool:
        """Return whether to draft behind a step, by what vLLM expects of batches of its size."""
        return self.cut_off.drafts(input_batch.num_reqs, expected_gain(self.req_states, input_batch))

    def _count(self, input_batch: Any, num_rejected: Tensor, drafts_now: bool) -> None:
        """Count this step, without a value read on the host.

        Args:
            input_batch: of this step, which has verified the drafts behind the one before.
            num_rejected: `[B]`, of these.
            drafts_now: whether there are drafts behind this one.
        """
        counters, places = self.model.session.counters, input_batch.idx_mapping
        counters["steps", "prior" if drafts_now else "plain"] += 1
        if input_batch.num_draft_tokens and self.has_drafted:
            # The target's logits are those behind the drafts and of one more token.
            num_drafted = input_batch.cu_num_logits[: len(places) + 1].diff() - 1
            self.counts.note(num_drafted, num_rejected, self.copied.by_place[places])
        for source, numbers in self.counts.take().items():
            counters.note_drafts(source, *numbers)
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
        states = self.model.session.read(step, self._pages)
        self.hidden_states[:num_reqs] = states[step.last_rows.long()]
        self.next_token_ids[:num_reqs] = step.next_token_ids
        self.num_verified.zero_()
        if not dummy_run:
            self.num_verified[:num_reqs] = step.num_verified

    def _look_up(self, input_batch: Any, dummy_run: bool) -> None:
        """Look the requests' newest tokens up in their own texts, of which the longest bounds what is searched."""
        session, num_reqs, places = self.model.session, input_batch.num_reqs, input_batch.idx_mapping
        if not session.lookup_length:
            return
        if dummy_run:
            self.copied.clear()
            return
        # vLLM has the token just sampled among them by now. The bound is known to the host.
        longest = int(input_batch.seq_lens_cpu_upper_bound.max()) + 1
        all_token_ids, num_tokens = self.req_states.all_token_ids.gpu[:, :longest], self.num_verified[:num_reqs] + 1
        self.copied.find(all_token_ids, places, num_tokens, session.lookup_length)
        if self.draft_logits is not None and self.sure_ids.numel():
            first = self._num_prior_drafts
            rows, steps = places.unsqueeze(1), torch.arange(first, self.num_speculative_steps, device=places.device)
            # Distributions behind the prior's drafts are written where they change only: they are as wide as V.
            self.draft_logits[rows, steps, self.sure_ids[places]] = float("-inf")
            self.sure_ids[places] = self.copied.token_ids[:num_reqs, first:]
            self.draft_logits[rows, steps, self.sure_ids[places]] = 0.0

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
        inner, verified, copied = self.model.model, self.num_verified[:num_reqs], self.copied
        num_drafts = min(num_speculative_steps, self._num_prior_drafts)
        metadata, idx_mapping, positions = self._metadata(attn_metadata), self.idx_mapping[:num_reqs], verified.long()
        table = verified.new_zeros((num_reqs, 1)) if metadata is None else metadata.block_table[:num_reqs]

        def sample(output: Tensor, number: int) -> Tensor:
            self.current_draft_step.fill_(number)
            # Drafts behind what is not finite may be any, but verification must not weigh them by such a distribution.
            output = output.nan_to_num(0.0, 0.0, 0.0)
            # vLLM draws a token by the position before it. That of the first draft holds the token behind those read.
            token_ids: Tensor = self.sample_draft(
                output,
                positions + number,
                idx_mapping,
                self.temperature,
                self.seeds,
                self.current_draft_step,
                self.draft_logits,
                number,
            )
            return token_ids

        self.draft_tokens[:num_reqs, :num_drafts] = paged_draft_steps(
            inner.layer,
            inner.embed_tokens,
            sample,
            self._pages,
            self.model.config.merge,
            DraftInputs(table, verified, self.hidden_states[:num_reqs], self.next_token_ids[:num_reqs]),
            num_drafts,
        )
        rest = slice(num_drafts, num_speculative_steps)
        self.draft_tokens[:num_reqs, rest] = copied.token_ids[:num_reqs, rest]
        if self.enable_adaptive_verification:
            confidences = self.draft_token_confidence_probs[:num_reqs]
            confidences[:, num_drafts:] = 0.0
            confidences.copy_(copied.over_confidences(confidences))

    def compute_draft_logits(self, hidden_states: Tensor, spec_step_idx: int) -> Tensor:
        """Return the head's logits `[B, V]` of a draft step, certain of the copy in rows that lookup drafts."""
        logits: Tensor = super().compute_draft_logits(hidden_states, spec_step_idx)
        return self.copied.over_logits(logits, spec_step_idx) if self.model.session.lookup_length else logits

    def get_draft_top_tokens(self, hidden_states: Tensor, spec_step_idx: int) -> Tensor:
        """Return the best tokens `[B]` of a draft step, the copies in rows that lookup drafts."""
        token_ids: Tensor = super().get_draft_top_tokens(hidden_states, spec_step_idx)
        return self.copied.over_tokens(token_ids, spec_step_idx)

    def observe_verification(self, idx_mapping: Tensor, num_sampled: Tensor, num_rejected: Tensor) -> None:
        """Have vLLM's estimate of acceptance learn from the prior's drafts only: it knows nothing of others."""
        if not self.has_drafted:
            return
        if self.acceptance_estimator is not None:
            copied = self.copied.by_place[idx_mapping]
            num_sampled, num_rejected = num_sampled.masked_fill(copied, 0), num_rejected.masked_fill(copied, 0)
        super().observe_verification(idx_mapping, num_sampled, num_rejected)

    def _draft_zeros(self, drafts: Tensor, places: Tensor | None) -> None:
        """Draft token 0 for all, where there are no drafts and vLLM takes no fewer than K.

        Verification must be told that they are sure, or it takes them for draws from what is kept of earlier steps.

        Args:
            drafts: `[B, K]`, filled.
            places: `[B]` of the requests' states; None where there are no requests.
        """
        drafts.zero_()
        self.draft_token_confidence_probs.zero_()
        if places is None:
            return
        self.has_drafted = False
        if self.draft_logits is not None:
            sure = torch.full_like(self.draft_logits[: len(places)], float("-inf"))
            sure[..., 0] = 0.0
            self.draft_logits[places] = sure
