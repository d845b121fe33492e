"""The draft loop over the paged cache itself: no value read on the host, no shape that depends on one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qm_spec.config import MergeConfig
from qm_spec.ops import merge_groups_, merged_attention
from qm_spec.ops.draft_layer import DraftLayer
from qm_spec.ops.draft_tokens import LEAST_TEMPERATURE, DenseLayer, DraftWeights


class DraftInputs(NamedTuple):
    """What changes from one decode step to the next.

    Attributes:
        block_table: `[B, columns]` int32.
        num_tokens: `[B]` int32, verified tokens in the cache; 0 marks padding, whose drafts mean nothing.
        state: `[B, D]`, fused state of the newest of them.
        next_ids: `[B]` int32 or int64, the token that follows it.
        temperature: `[B]` float32; None drafts greedily, and so do rows below 1e-5.
        uniform: `[B, K]` float64 in 0..1 without 1, what to sample with; None with no temperature.
    """

    block_table: Tensor
    num_tokens: Tensor
    state: Tensor
    next_ids: Tensor
    temperature: Tensor | None = None
    uniform: Tensor | None = None


def paged_draft_steps(
    layer: DraftLayer,
    embed: Callable[[Tensor], Tensor],
    sample: Callable[[Tensor, int], Tensor],
    cache: Tensor,
    config: MergeConfig,
    inputs: DraftInputs,
    num_drafts: int,
) -> Tensor:
    """Merge what has grown old, then draft K tokens step by step, for any target and any way to sample.

    Args:
        layer: the prior.
        embed: token ids `[B]` to embeddings `[B, D]`.
        sample: the head's input `[B, D]` and the number of the step to token ids `[B]` of the target.
        cache: `[pages, G, P, C]`, changed in place by merging.
        config: of the merged cache.
        inputs: of B requests.
        num_drafts: K, at least 1.

    Returns:
        `[B, K]` token ids.
    """
    # Only verified tokens count here, so nothing provisional is merged. With no tokens, as in padding, nothing is.
    merge_groups_(cache, inputs.block_table, inputs.num_tokens, layer.head_dim, config)
    state, token_ids = inputs.state, inputs.next_ids
    keys: list[Tensor] = []
    values: list[Tensor] = []
    drafted: list[Tensor] = []
    for step in range(num_drafts):
        embedding = embed(token_ids)
        if step > 0:
            own_key, own_value = layer.keys_values(state, embedding)
            keys.append(own_key)
            values.append(own_value)
        query, residual = layer.query(embedding, state)
        attended = _attend(layer, query, cache, config, inputs, keys, values)
        output, state = layer.finish(attended, residual)
        token_ids = sample(output, step)
        drafted.append(token_ids)
    return torch.stack(drafted, 1)


def _attend(
    layer: DraftLayer,
    query: Tensor,
    cache: Tensor,
    config: MergeConfig,
    inputs: DraftInputs,
    keys: list[Tensor],
    values: list[Tensor],
) -> Tensor:
    """Attend to the memory and to the J drafted tokens: `[B, H, d]`; keys and values are J times `[B, G, d]`."""
    slopes, far_bias = layer.slopes.float(), layer.far_bias.float()
    batch, _, head_dim = query.shape
    num_drafted = len(keys)
    # The operator's row stands at the newest verified token, this one `num_drafted` tokens later. That takes
    # slope * num_drafted off the score of each raw entry: as much as to add it to the merged ones, then take it
    # off all.
    memory, lse, _ = merged_attention(
        query,
        cache,
        inputs.block_table,
        inputs.num_tokens,
        torch.arange(batch + 1, dtype=torch.int32, device=query.device),
        slopes,
        far_bias + num_drafted * slopes,
        1,
        config,
    )
    # The reference's softmax over nothing is NaN.
    memory = memory.masked_fill((lse == float("-inf")).unsqueeze(-1), 0.0)
    if not keys:
        return memory
    own_keys, own_values = torch.stack(keys, 1).float(), torch.stack(values, 1).float()
    grouped = query.float().view(batch, own_keys.shape[2], -1, head_dim)
    scores = torch.einsum("bgmd,bjgd->bgmj", grouped, own_keys).flatten(1, 2) * head_dim**-0.5
    scores = scores - slopes.unsqueeze(-1) * torch.arange(num_drafted - 1, -1, -1, device=query.device)
    memory_score = (lse - num_drafted * slopes).unsqueeze(-1)
    shares = torch.cat([memory_score, scores], -1).softmax(-1)
    far, near = shares.split([1, num_drafted], -1)
    near = near.view(*grouped.shape[:3], num_drafted)
    own = torch.einsum("bgmj,bjgd->bgmd", near, own_values).flatten(1, 2)
    return (far * memory + own).to(query.dtype)


@dataclass(frozen=True)
class PagedLoop:
    """Drafts what `draft_tokens` drafts, in operators that a CUDA graph can hold.

    `draft_tokens` gathers the entries of the memory, as many as there are; here every step attends to the pages, and
    the provisional keys join by the log-sum-exp of that attention.

    Attributes:
        weights: all but the token ids in the state's dtype.
        eps: of the norms.
        cache: `[pages, G, P, C]`.
        config: of the merged cache.
    """

    weights: DraftWeights
    eps: float
    cache: Tensor
    config: MergeConfig

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a captured graph reads at the addresses it had at capture."""
        return self.cache, *self.weights

    def draft(self, inputs: DraftInputs, num_drafts: int) -> tuple[Tensor, Tensor]:
        """Merge what has grown old, then draft.

        Args:
            inputs: of B requests.
            num_drafts: K, at least 1.

        Returns:
            The target's token ids `[B, K]` int64, and the distributions over the head's rows that they were drawn from
            `[B, K, Vd]` float32, at temperature 1 in greedy rows; `[B, 0, Vd]` without a temperature.
        """
        weights, probs = self.weights, list[Tensor]()

        def sample(output: Tensor, step: int) -> Tensor:
            logits = F.linear(output, weights.head)
            if inputs.temperature is None or inputs.uniform is None:
                row = logits.argmax(-1)
            else:
                row, distribution = draw(logits, inputs.temperature, inputs.uniform[:, step])
                probs.append(distribution)
            return weights.to_token_ids(row)

        drafted = paged_draft_steps(
            DenseLayer(weights, self.eps),
            lambda token_ids: F.embedding(token_ids, weights.embedding),
            sample,
            self.cache,
            self.config,
            # An id out of range would stop a GPU for good.
            inputs._replace(next_ids=inputs.next_ids.clamp(0, len(weights.embedding) - 1)),
            num_drafts,
        )
        no_probs = inputs.state.new_empty(len(drafted), 0, len(weights.head), dtype=torch.float32)
        return drafted, torch.stack(probs, 1) if probs else no_probs


def draw(logits: Tensor, temperature: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token of each row, by inverting its distribution.

    Args:
        logits: `[B, V]`.
        temperature: `[B]` float32; rows below 1e-5 take the best token.
        uniform: `[B]` float64 in 0..1 without 1.

    Returns:
        `[B]` int64 token ids and `[B, V]` float32 distributions, at temperature 1 in greedy rows.
    """
    greedy = temperature < LEAST_TEMPERATURE
    distribution = (logits.float() / temperature.masked_fill(greedy, 1.0).unsqueeze(-1)).softmax(-1)
    shares = distribution.double().cumsum(-1)
    # The first token up to which the shares add to more than the number drawn.
    drawn = (shares <= uniform.unsqueeze(-1) * shares[:, -1:]).sum(-1).clamp_max(logits.shape[-1] - 1)
    return torch.where(greedy, logits.argmax(-1), drawn), distribution
