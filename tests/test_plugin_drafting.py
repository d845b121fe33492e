"""The plug-in's choice between one operator and vLLM's layers, and that both draft the same."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: run ./install.sh")

from draft_cases import PriorSizes, make_case
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from qm_spec.config import MergeConfig
from qm_spec.drafter.config import QuickMergeConfig
from qm_spec.drafter.prior import QuickMergePrior
from qm_spec.integrations.vllm_plugin import proposer as plugin

pytestmark = pytest.mark.vllm

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


@pytest.fixture
def model() -> Any:
    """What `plain_weights` and `propose` read of `QuickMergeForCausalLM`, with a target of plain weights."""
    torch.manual_seed(0)
    case = make_case([70, 9, 200], SIZES, config=MERGE)
    config = QuickMergeConfig(
        hidden_size=SIZES.hidden,
        intermediate_size=SIZES.intermediate,
        num_attention_heads=SIZES.num_heads,
        num_key_value_heads=SIZES.num_kv_heads,
        head_dim=SIZES.head_dim,
        vocab_size=SIZES.vocabulary,
        quickmerge=MERGE.to_dict(),
    )
    layer = QuickMergePrior(config).eval().layer.requires_grad_(False)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
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
        config=config,
        model=SimpleNamespace(layer=layer, embed_tokens=embed, attn=SimpleNamespace(kv_cache=case.cache)),
        lm_head=head,
        logits_processor=processor,
        combine_hidden_states=layer.fuse,
        compute_logits=lambda hidden: hidden @ weights[1][: SIZES.vocabulary].T,
    )


def test_plain_weights_are_taken_without_their_padding(model):
    weights = plugin.plain_weights(model, 1)
    assert weights is not None
    assert weights.head.shape == weights.embedding.shape == (SIZES.vocabulary, SIZES.hidden)
    assert weights.head.data_ptr() == model.lm_head.weight.data_ptr(), "not copied"
    assert weights.q_proj is model.model.layer.q_proj.weight and weights.norm is model.model.layer.norm.weight


class LoRAEmbedding(VocabParallelEmbedding):
    """Stands for any class that computes more than the product."""


def quantised(model: Any) -> None:
    model.lm_head.quant_method = object()


def wrapped(model: Any) -> None:
    model.model.embed_tokens.__class__ = LoRAEmbedding


def capped(model: Any) -> None:
    model.logits_processor.soft_cap = 30.0


def scaled(model: Any) -> None:
    model.logits_processor.scale = 0.5


def head_of_another_type(model: Any) -> None:
    model.logits_processor.head_dtype = torch.float64


def weight_of_another_type(model: Any) -> None:
    model.lm_head.weight = model.lm_head.weight.half()


def weight_packed_away(model: Any) -> None:
    model.lm_head.weight = torch.empty(0)


@pytest.mark.parametrize(
    "change",
    [quantised, wrapped, capped, scaled, head_of_another_type, weight_of_another_type, weight_packed_away],
    ids=lambda change: change.__name__,
)
def test_vllms_layers_draft_for_a_target_with_more_than_plain_weights(model, change: Callable[[Any], None]):
    change(model)
    assert plugin.plain_weights(model, 1) is None


def test_large_batches_of_16_bit_weights_are_left_to_the_library(model):
    model.model.layer.bfloat16()
    for module in (model.model.embed_tokens, model.lm_head):
        module.weight = module.weight.bfloat16()
    model.logits_processor.head_dtype = None
    assert plugin.plain_weights(model, plugin.MOST_REQUESTS_16_BIT) is not None
    assert plugin.plain_weights(model, plugin.MOST_REQUESTS_16_BIT + 1) is None


def propose(model: Any, num_drafts: int, sampling: Any, sampler: Callable[..., Any]) -> tuple[torch.Tensor, Any]:
    """Draft after one step in which requests 0, 1 and 2 had 2, 0 and 1 of their 2 drafts rejected."""
    case = model.case
    torch.manual_seed(1)
    rejected = torch.tensor([2, 0, 1], dtype=torch.int32)
    starts = torch.tensor([0, 3, 6, 9], dtype=torch.int32)
    lengths = case.num_tokens + 3
    position = (lengths.unsqueeze(1) - 3 + torch.arange(3)).long()
    page_size = case.cache.shape[2]
    slots = case.block_table.long().gather(1, position // page_size) * page_size + position % page_size
    proposer = SimpleNamespace(
        model=model,
        num_speculative_tokens=0,
        _last_draft_probs="stale",
        _enable_probabilistic_draft_probs=sampling is not None,
        _sample_from_logits=sampler,
    )
    common = SimpleNamespace(
        slot_mapping=slots.flatten(),
        query_start_loc=starts,
        block_table_tensor=case.block_table,
        seq_lens=lengths,
    )
    drafted = plugin.propose(
        proposer,
        num_drafts,
        torch.randn(9, 3 * SIZES.hidden),
        case.next_ids.int(),
        starts[1:] - 1 - rejected,
        common,
        sampling,
        rejected,
    )
    return drafted, proposer._last_draft_probs


def greedy(logits: torch.Tensor, sampling: Any) -> Any:
    return logits.argmax(-1), None


def test_one_operator_drafts_what_vllms_layers_draft(model):
    drafted, probs = propose(model, 4, None, greedy)
    assert drafted.shape == (3, 4) and drafted.dtype == torch.int64 and probs is None
    # Rejected rows are written again, with the same states.
    capped(model)
    assert torch.equal(propose(model, 4, None, greedy)[0], drafted)


def test_no_draft_asked_for_still_fills_the_cache(model):
    before = model.case.cache.clone()
    drafted, _ = propose(model, 0, None, greedy)
    assert drafted.shape == (3, 0)
    assert not torch.equal(before.nan_to_num(), model.case.cache.nan_to_num())


def test_sampled_drafts_come_with_their_distributions(model):
    sampling = SimpleNamespace(all_greedy=False, temperature=torch.tensor([0.0, 0.8, 1.2]))
    greedily, _ = propose(model, 3, None, greedy)
    drafted, probs = propose(model, 3, sampling, greedy)
    assert probs.shape == (3, 3, SIZES.vocabulary) and probs.dtype == torch.float32
    torch.testing.assert_close(probs.sum(-1), torch.ones(3, 3))
    assert torch.equal(drafted[0], greedily[0]), "temperature 0 drafts greedily"
    assert (probs.gather(-1, drafted.unsqueeze(-1)) > 0).all()
    sampling.all_greedy = True
    assert propose(model, 3, sampling, greedy)[1] is None
