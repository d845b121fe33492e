"""The target's vocabulary head as the drafter reads it: whole, or the rows of a draft vocabulary, gathered once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.utils import set_weight_attrs

from qm_spec.drafter.vocabulary import check_token_ids, to_token_ids


class DraftRows(nn.Module):
    """The rows of the target's head that a drafter with a draft vocabulary reads, and whose they are.

    Their memory is taken here and not when they are gathered, so that vLLM counts it with the drafter's weights.

    Args:
        draft_vocab_size: Vd.
        vocab_size: V.
        hidden_size: D.

    Attributes:
        token_ids: `[Vd]` int64, the target's id of each row; loaded from a checkpoint's `d2t`.
        weight: `[Vd, D]`.
    """

    weight: Tensor

    def __init__(self, draft_vocab_size: int, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.token_ids = nn.Parameter(torch.arange(draft_vocab_size), requires_grad=False)
        self.register_buffer("weight", torch.empty(draft_vocab_size, hidden_size), persistent=False)
        self._gathered_from = 0

        def load(parameter: nn.Parameter, offsets: Tensor) -> None:
            if offsets.shape != parameter.shape:
                raise RuntimeError("another number of tokens")
            parameter.data.copy_(check_token_ids(to_token_ids(offsets), vocab_size))

        set_weight_attrs(self.token_ids, {"weight_loader": load})

    @torch.no_grad()
    def gather(self, head: Tensor) -> Tensor:
        """Return the rows `[Vd, D]` of the target's head `[V, D]`, which is read again only where it has moved."""
        if head.data_ptr() != self._gathered_from:
            torch.index_select(head, 0, self.token_ids, out=self.weight)
            self._gathered_from = head.data_ptr()
        return self.weight


def table_sources(model: Any) -> tuple[Any, ...]:
    """Return what the next two functions' answers depend on; vLLM may put the target's own in place of ours later."""
    modules = model.model.embed_tokens, model.lm_head, model.logits_processor
    weights = (getattr(module, "weight", None) for module in modules)
    return *modules, *(weight.data_ptr() if isinstance(weight, Tensor) else None for weight in weights)


def plain_head(model: Any) -> Tensor | None:
    """Return the target's head `[V, D]` where it is plain weights, None where vLLM's own layers must compute logits.

    They must for quantised or LoRA layers, a head of another type or cut over ranks, scaled or capped logits.

    Args:
        model: the drafter, with the target's head in place.
    """
    processor = model.logits_processor
    if not (
        type(processor) is LogitsProcessor
        and processor.scale == 1.0
        and processor.soft_cap is None
        and processor.head_dtype in (None, model.model.layer.slopes.dtype)
    ):
        return None
    return plain_table(model, model.lm_head)


def plain_table(model: Any, module: Any) -> Tensor | None:
    """Return the weight `[V, D]` of the target's embedding or head, None where it is more than a plain weight."""
    # Of these very classes: what wraps or replaces them computes something else.
    if type(module) not in (VocabParallelEmbedding, ParallelLMHead) or not isinstance(
        module.quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod
    ):
        return None
    # Rows behind the vocabulary are padding. A layer that repacks its weight may leave an empty one behind.
    vocabulary = model.logits_processor.org_vocab_size
    weight = module.weight[:vocabulary]
    fits = weight.shape == (vocabulary, model.config.hidden_size) and weight.dtype == model.model.layer.slopes.dtype
    return weight if fits else None
