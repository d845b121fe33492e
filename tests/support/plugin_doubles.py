"""Doubles of what the plug-in reads of vLLM: a drafter with a target of plain weights, and a step to draft behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from draft_cases import PriorSizes, make_case, random_prior
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from qm_spec.config import MergeConfig
from qm_spec.integrations.vllm_plugin.step import DraftStep

SIZES = PriorSizes(48, 4, 2, 16, 96, 200)
PADDED_VOCABULARY = 256
MERGE = MergeConfig(window=24, group_size=8, schedule=(4, 2, 1))


def bare(kind: type[torch.nn.Module], **attributes: Any) -> Any:
    """Make one of vLLM's modules without the distributed set-up that its constructor asks for."""
    module = kind.__new__(kind)
    torch.nn.Module.__init__(module)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def make_model() -> Any:
    """Make what drafting reads of `QuickMergeForCausalLM`, with a target of plain weights."""
    torch.manual_seed(0)
    case = make_case([70, 9, 200], SIZES, config=MERGE)
    prior = random_prior(SIZES, MERGE)
    layer = prior.layer
    padding = torch.full((PADDED_VOCABULARY - SIZES.vocabulary, SIZES.hidden), float("nan"))
    weights = [torch.cat([weight, padding]) for weight in (case.weights.embedding, case.weights.head)]
    method = UnquantizedEmbeddingMethod()
    embed = bare(VocabParallelEmbedding, weight=weights[0], quant_method=method)
    embed.forward = lambda ids: weights[0][ids]
    head = bare(ParallelLMHead, weight=weights[1], quant_method=method)
    processor = bare(
        LogitsProcessor, org_vocab_size=SIZES.vocabulary, scale=1.0, soft_cap=None, head_dtype=torch.float32
    )
    return SimpleNamespace(
        case=case,
        config=prior.config,
        model=SimpleNamespace(layer=layer, embed_tokens=embed, attn=SimpleNamespace(kv_cache=case.cache)),
        lm_head=head,
        logits_processor=processor,
        combine_hidden_states=layer.fuse,
        compute_logits=lambda hidden: hidden @ weights[1][: SIZES.vocabulary].T,
        draft_rows=None,
    )


def make_step(model: Any, num_drafts: int, sampling: Any) -> DraftStep:
    """Return one step in which requests 0, 1 and 2 had 2, 0 and 1 of their 2 drafts rejected, the same at each call."""
    case = model.case
    torch.manual_seed(1)
    rejected = torch.tensor([2, 0, 1], dtype=torch.int32)
    starts = torch.tensor([0, 3, 6, 9], dtype=torch.int32)
    lengths = case.num_tokens + 3
    position = (lengths.unsqueeze(1) - 3 + torch.arange(3)).long()
    page_size = case.cache.shape[2]
    slots = case.block_table.long().gather(1, position // page_size) * page_size + position % page_size
    common = SimpleNamespace(
        slot_mapping=slots.flatten(),
        query_start_loc=starts,
        block_table_tensor=case.block_table,
        seq_lens=lengths,
    )
    return DraftStep.from_v1(
        SimpleNamespace(_enable_probabilistic_draft_probs=sampling is not None),
        num_drafts,
        torch.randint(SIZES.vocabulary, (9,), dtype=torch.int32),
        torch.randn(9, 3 * SIZES.hidden).to(model.model.layer.slopes.dtype),
        case.next_ids.int(),
        starts[1:] - 1 - rejected,
        common,
        sampling or SimpleNamespace(all_greedy=True, generators={}),
        rejected,
        (),
    )
