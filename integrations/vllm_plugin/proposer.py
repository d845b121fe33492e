"""Drafting in one call, on a GPU in one graph, in place of vLLM's loop, which builds metadata anew for each step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size

from qm_spec.drafter.cuda_graph import CudaCapture
from qm_spec.drafter.draft_graphs import DraftGraphs
from qm_spec.drafter.head import spread
from qm_spec.drafter.loop import DraftLoop, dense_weights
from qm_spec.drafter.paged_loop import DraftInputs, PagedLoop, draw
from qm_spec.drafter.suffix_index import Lookup
from qm_spec.integrations.vllm_plugin.adaptive import begin_step, plan_step
from qm_spec.integrations.vllm_plugin.cuda_graphs import graph_sizes
from qm_spec.integrations.vllm_plugin.head import plain_head, plain_table
from qm_spec.integrations.vllm_plugin.lookup import (
    draft_widths,
    join_drafts,
    known_next_tokens,
    look_up,
    warn_without_lookup,
)
from qm_spec.integrations.vllm_plugin.model import QuickMergeForCausalLM
from qm_spec.integrations.vllm_plugin.seeds import next_numbers
from qm_spec.integrations.vllm_plugin.seeds import sample as sample_by_number
from qm_spec.integrations.vllm_plugin.verification import without_seeds_of_unread_prompts
from qm_spec.ops import backend, merge_groups_
from qm_spec.ops.draft_tokens import DraftWeights, draft_tokens

logger = logging.getLogger("vllm.plugins.qm_spec")

# In larger batches the library multiplies 16-bit weights faster than the operator (benchmarks/bench_draft_tokens.py).
MOST_REQUESTS_16_BIT = 16


def can_draft(proposer: Any) -> bool:
    """Tell whether our loop can draft for this proposer; if not, vLLM's own loop does.

    It runs on one rank, on the CPU, and on a GPU with compiled kernels and a target of plain weights.
    Ranks of data parallelism run vLLM's loop, in which they wait for each other. Multimodal rotary
    positions do not matter to ours, token ids of another vocabulary do.
    """
    return (
        isinstance(proposer.model, QuickMergeForCausalLM)
        and (proposer.device.type == "cpu" or _can_draft_on_gpu(proposer))
        and get_tensor_model_parallel_world_size() == 1
        and proposer.vllm_config.parallel_config.data_parallel_size == 1
        and not proposer.use_heterogeneous_vocab
        and not proposer.supports_mm_inputs
    )


def _can_draft_on_gpu(proposer: Any) -> bool:
    return (
        proposer.device.type == "cuda"
        and backend.backend("cuda") == "compiled"
        and plain_weights(proposer.model) is not None
    )


def plain_weights(model: QuickMergeForCausalLM) -> DraftWeights | None:
    """Return the weights of a drafter whose target has plain ones, None where vLLM's own layers must draft.

    Of the target's head only the rows of the draft vocabulary are there.

    Args:
        model: the drafter, with the target's embedding and head in place.
    """
    embedding, head, rows = plain_table(model, model.model.embed_tokens), plain_head(model), model.draft_rows
    if embedding is None or head is None:
        return None
    if rows is None:
        return dense_weights(model.model.layer, embedding, head)
    return dense_weights(model.model.layer, embedding, rows.gather(head), rows.token_ids)


def draft_graphs(proposer: Any) -> DraftGraphs | None:
    """Return the proposer's draft graphs, made at its first step; None on a CPU."""
    if not hasattr(proposer, "_qm_spec_graphs"):
        on_gpu = proposer.device.type == "cuda"
        graphs = DraftGraphs(CudaCapture(), graph_sizes(proposer.vllm_config)) if on_gpu else None
        proposer._qm_spec_graphs = graphs
    return proposer._qm_spec_graphs


def propose(
    proposer: Any,
    widths: Sequence[int],
    target_token_ids: Tensor,
    target_hidden_states: Tensor,
    next_token_ids: Tensor,
    token_indices_to_sample: Tensor | None,
    common_attn_metadata: Any,
    sampling_metadata: Any,
    num_rejected_tokens_gpu: Tensor | None,
    found: Sequence[Lookup] = (),
) -> Tensor | list[list[int]]:
    """Write this step's states into the merged cache and draft from it.

    Args:
        proposer: vLLM's EAGLE proposer, whose `propose` this stands in for.
        widths: tokens to draft for each of the B requests; the prior drafts as many for all as the most of those
            without a lookup. 0 for all still writes the cache.
        target_token_ids: `[T]`, what the target read in this step, rejected rows included.
        target_hidden_states: `[T, 3 D]`, of these.
        next_token_ids: `[B]`, the token after each request's last verified one.
        token_indices_to_sample: `[B]` rows of the last verified tokens; the last rows when None.
        common_attn_metadata: of the draft layer's cache group.
        sampling_metadata: temperatures, for drafting by sampling.
        num_rejected_tokens_gpu: `[B]` drafts rejected in this step, or None.
        found: what suffix lookup drafts for each request; empty where it is off.

    Returns:
        Draft token ids `[B, W]` int64 where all requests have W, else a list for each.
    """
    model, common = proposer.model, common_attn_metadata
    layer, merge, cache = model.model.layer, model.config.merge, model.model.attn.kv_cache
    proposer._last_draft_probs = None
    loop = DraftLoop(layer, model.model.embed_tokens, model.compute_logits, merge)

    states = model.combine_hidden_states(target_hidden_states)
    rows = token_indices_to_sample
    if rows is None:
        rows = common.query_start_loc[1:] - 1
    # The token after each one that was read; what follows a rejected one does not matter.
    following = target_token_ids.roll(-1).index_put((rows.long(),), next_token_ids.to(target_token_ids.dtype))
    loop.remember(cache, states, following, common.slot_mapping[: len(states)])
    sampled = proposer._enable_probabilistic_draft_probs and not sampling_metadata.all_greedy
    seeded = sampling_metadata.generators if sampled else {}
    num_drafts = max((width for row, width in enumerate(widths) if not (found and found[row].length)), default=0)
    if seeded and not model.seeds_by_position:
        # The same sample again only if every step takes as many numbers from the seed.
        num_drafts = min(widths)
    if num_drafts == 0:
        # A later step merges what this one leaves. Without distributions drafts count as sure.
        nothing = next_token_ids.new_empty((len(next_token_ids), 0), dtype=torch.int64)
        return join_drafts(found, nothing, None, widths)[0]
    state, table, verified = states[rows.long()], common.block_table_tensor, common.seq_lens
    if num_rejected_tokens_gpu is not None:
        verified = verified - num_rejected_tokens_gpu

    weights, graphs = plain_weights(model), draft_graphs(proposer)
    if graphs is None and len(state) > MOST_REQUESTS_16_BIT and state.dtype.itemsize == 2:
        weights = None
    temperature = uniform = None
    if sampled:
        temperature = sampling_metadata.temperature
        uniform = _random_numbers({} if model.seeds_by_position else seeded, state.new_empty(len(state), num_drafts))
    numbers = None
    if seeded and model.seeds_by_position:
        # The operator draws by other numbers.
        weights, seeded_rows = None, list(seeded)
        numbers = torch.stack([next_numbers(generator, num_drafts) for generator in seeded.values()])
    with torch.inference_mode():
        probs: Tensor | None
        if weights is None:
            step_probs: list[Tensor] = []

            def sample(logits: Tensor) -> Tensor:
                if temperature is None or uniform is None:
                    return logits.argmax(-1)
                token_ids, distribution = draw(logits, temperature, uniform[:, len(step_probs)])
                if numbers is not None:
                    own = logits[seeded_rows].float() / temperature[seeded_rows].unsqueeze(-1)
                    token_ids[seeded_rows] = sample_by_number(own, numbers[:, len(step_probs)])
                step_probs.append(distribution)
                return token_ids

            drafted = loop.draft(cache, table, verified, state, next_token_ids, num_drafts, sample)
            probs = torch.stack(step_probs, dim=1) if step_probs else None
        else:
            if graphs is not None:
                paged = PagedLoop(weights, layer.norm.eps, cache, merge)
                inputs = DraftInputs(table, verified, state, next_token_ids, temperature, uniform)
                drafted, probs = graphs.draft(paged, inputs, num_drafts)
            else:
                merge_groups_(cache, table, verified, layer.head_dim, merge)
                drafted, probs = draft_tokens(
                    cache,
                    table,
                    verified,
                    state,
                    next_token_ids,
                    weights,
                    num_drafts,
                    layer.norm.eps,
                    merge,
                    temperature,
                    uniform,
                )
            # What verifies drafts knows the target's vocabulary only.
            if sampled and model.draft_rows is not None:
                probs = spread(probs, weights.token_ids, model.config.vocab_size, 0.0)
        drafts, proposer._last_draft_probs = join_drafts(found, drafted, probs if sampled else None, widths)
    return drafts


def _random_numbers(generators: Mapping[int, torch.Generator], like: Tensor) -> Tensor:
    """Return float64 numbers in 0..1, shape `[B, K]`; those of rows with a generator come from that."""
    uniform = torch.rand_like(like, dtype=torch.float64)
    for row, generator in generators.items():
        uniform[row] = torch.rand(like.shape[1:], dtype=torch.float64, device=like.device, generator=generator)
    return uniform


def draft_step(
    proposer: Any,
    num_speculative_tokens: int,
    target_token_ids: Tensor,
    target_hidden_states: Tensor,
    next_token_ids: Tensor,
    token_indices_to_sample: Tensor | None,
    common_attn_metadata: Any,
    sampling_metadata: Any,
    num_rejected_tokens_gpu: Tensor | None,
) -> Tensor | list[list[int]]:
    """Decide how many tokens to draft behind this step, and draft them; see `propose`."""
    proposer.num_speculative_tokens = num_speculative_tokens
    next_token_ids = known_next_tokens(proposer, next_token_ids, common_attn_metadata, num_rejected_tokens_gpu)
    controller = begin_step(proposer, next_token_ids, common_attn_metadata, num_rejected_tokens_gpu)
    found = look_up(
        proposer,
        num_speculative_tokens,
        target_token_ids,
        next_token_ids,
        common_attn_metadata,
        num_rejected_tokens_gpu,
    )
    num_drafts = min(num_speculative_tokens, proposer.model.num_drafts)
    if sampling_metadata.generators and not proposer.model.seeds_by_position:
        # A request's own seed must give the same text again, and each draft takes random numbers from it.
        widths = [num_drafts] * len(next_token_ids)
        controller = None
    elif controller is not None:
        widths, found = plan_step(
            controller,
            proposer,
            num_speculative_tokens,
            found,
            common_attn_metadata,
            num_rejected_tokens_gpu,
            sampling_metadata,
        )
    else:
        widths = draft_widths(found, len(next_token_ids), num_drafts)
    drafted = propose(
        proposer,
        widths,
        target_token_ids,
        target_hidden_states,
        next_token_ids,
        token_indices_to_sample,
        common_attn_metadata,
        sampling_metadata,
        num_rejected_tokens_gpu,
        found,
    )
    if controller is not None:
        controller.end()
    return drafted


def guarded(proposer: Any, num_requests: int, draft: Callable[[], Any]) -> Any:
    """Draft, or go on without drafts for good after an error: decoding needs none.

    Args:
        proposer: told that drafting has failed.
        num_requests: B.
        draft: returns the drafts of a step.

    Returns:
        The drafts; without them an empty list for each request on a CPU, and zeros `[B, K]` elsewhere, where vLLM
        takes no fewer than K.
    """
    if not getattr(proposer, "_qm_spec_failed", False):
        try:
            return draft()
        except Exception:
            proposer._qm_spec_failed = True
            logger.exception(
                "qm_spec: drafting failed, so this engine goes on without drafts. Outputs stay right; "
                "please report what follows"
            )
    proposer._last_draft_probs = None
    if proposer.device.type == "cpu":
        return [[] for _ in range(num_requests)]
    shape = num_requests, proposer.num_speculative_tokens
    return torch.zeros(shape, dtype=torch.int64, device=proposer.device)


@dataclass(frozen=True)
class PendingDrafts:
    """Drafts that are made when they are asked for: by then the tokens of the step are on their way to the user.

    What `draft` reads stays as it is until the next step begins.
    """

    draft: Callable[[], Tensor | list[list[int]]]


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
        if can_draft(self):
            draft = partial(
                draft_step,
                self,
                num_speculative_tokens,
                target_token_ids,
                target_hidden_states,
                next_token_ids,
                token_indices_to_sample,
                common_attn_metadata,
                sampling_metadata,
                num_rejected_tokens_gpu,
            )
            draft = partial(guarded, self, len(next_token_ids), draft)
            if not self.model.drafts_after_step:
                return draft()
            # The runner takes those of the step before otherwise.
            self._last_draft_probs = None
            return PendingDrafts(draft)
        if getattr(self.model, "lookup_length", 0):
            warn_without_lookup()
        return original(
            self,
            min(num_speculative_tokens, getattr(self.model, "num_drafts", num_speculative_tokens)),
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


def with_pending_drafts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the runner's `take_draft_token_ids` that makes pending drafts first."""

    @wraps(original)
    def replaced(self: Any) -> Any:
        pending = self._draft_token_ids
        if isinstance(pending, PendingDrafts):
            with torch.inference_mode(), without_seeds_of_unread_prompts(self):
                drafts = pending.draft()
            self._draft_token_ids = drafts.tolist() if isinstance(drafts, Tensor) else drafts
            probs = self.drafter.take_last_draft_probs()
            if probs is not None:
                self._draft_probs, self._draft_prob_req_ids = probs, self.input_batch.req_ids.copy()
        return original(self)

    return replaced
