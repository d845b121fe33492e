"""`draft_tokens`: all K draft steps of the prior over the merged cache, in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qm_spec.config import MergeConfig
from qm_spec.ops.draft_attention import draft_attention
from qm_spec.ops.draft_layer import DraftLayer
from qm_spec.ops.entries import Entries, entry_bias, gather_entries

# Below it a request drafts greedily; vLLM's own limit.
LEAST_TEMPERATURE = 1e-5

torch.library.define(
    "qm_spec::draft_tokens",
    "(Tensor cache, Tensor block_table, Tensor num_tokens, Tensor state, Tensor next_ids, Tensor[] weights, "
    "int num_drafts, float eps, int[] config, Tensor? temperature, Tensor? uniform) -> (Tensor, Tensor)",
)


class DraftWeights(NamedTuple):
    """The prior's weights with its target's embedding and vocabulary head, in the order of the operator.

    Attributes:
        embedding: `[X, D]`, X at least V: of each of the target's token ids.
        head: `[Vd, D]`, of the tokens that may be drafted.
        embed_norm: `[D]`.
        state_norm: `[D]`.
        in_proj: `[D, 2 D]`.
        q_proj: `[H d, 2 D]`.
        k_proj: `[G d, D]`.
        v_proj: `[G d, D]`.
        next_proj: `[G d, D]`, or `[0, D]` where values do not tell the next token.
        o_proj: `[D, H d]`.
        mlp_norm: `[D]`.
        gate_proj: `[I, D]`.
        up_proj: `[I, D]`.
        down_proj: `[D, I]`.
        norm: `[D]`.
        slopes: `[H]`.
        far_bias: `[H]`.
        token_ids: `[Vd]` int64, the target's token id of each row of the head, or `[0]` where row and id are the same.
    """

    embedding: Tensor
    head: Tensor
    embed_norm: Tensor
    state_norm: Tensor
    in_proj: Tensor
    q_proj: Tensor
    k_proj: Tensor
    v_proj: Tensor
    next_proj: Tensor
    o_proj: Tensor
    mlp_norm: Tensor
    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor
    norm: Tensor
    slopes: Tensor
    far_bias: Tensor
    token_ids: Tensor

    def to_token_ids(self, rows: Tensor) -> Tensor:
        """Return the target's token ids of rows of the head, int64."""
        return self.token_ids[rows] if len(self.token_ids) else rows


def draft_steps(
    layer: DraftLayer,
    embed: Callable[[Tensor], Tensor],
    compute_logits: Callable[[Tensor], Tensor],
    sample: Callable[[Tensor], Tensor],
    entries: Entries,
    num_tokens: Tensor,
    state: Tensor,
    next_ids: Tensor,
    num_drafts: int,
) -> Tensor:
    """Draft K tokens step by step, over entries that were gathered once.

    The keys and values of drafted tokens are provisional and stay here.

    Args:
        layer: the prior.
        embed: token ids `[B]` to embeddings `[B, D]`.
        compute_logits: `[B, D]` to logits, `[B, V]` or of the tokens that may be drafted.
        sample: these logits to token ids `[B]` of the target.
        entries: of the B requests.
        num_tokens: `[B]` int, verified tokens; a request without any attends to its drafted tokens alone.
        state: `[B, D]`, fused state of the newest verified token.
        next_ids: `[B]`, the token that follows it.
        num_drafts: K.

    Returns:
        `[B, K]` token ids.
    """
    slopes, far_bias = layer.slopes.float(), layer.far_bias.float()
    bias = entry_bias(entries, (num_tokens.long() - 1).unsqueeze(1), slopes, far_bias)
    raw_slopes = slopes.view(-1, 1, 1) * entries.raw[:, None, None]
    keys, values = entries.keys.to(state.dtype), entries.values.to(state.dtype)
    empty = (num_tokens == 0).view(-1, 1, 1)

    shape = (len(state), 1, num_drafts - 1, layer.num_kv_heads, layer.head_dim)
    draft_keys, draft_values = state.new_empty(shape), state.new_empty(shape)
    token_ids, drafted = next_ids, []
    for step in range(num_drafts):
        embedding = embed(token_ids)
        if step > 0:
            own_key, own_value = layer.keys_values(state, embedding)
            draft_keys[:, 0, step - 1], draft_values[:, 0, step - 1] = own_key, own_value
            bias = bias - raw_slopes
        query, residual = layer.query(embedding, state)
        attended = draft_attention(
            query.unsqueeze(1),
            keys,
            values,
            bias.to(state.dtype),
            draft_keys[:, :, :step],
            draft_values[:, :, :step],
            layer.slopes,
        ).squeeze(1)
        if step == 0:
            # A softmax over nothing is NaN.
            attended = attended.masked_fill(empty, 0.0)
        output, state = layer.finish(attended, residual)
        token_ids = sample(compute_logits(output))
        drafted.append(token_ids)
    return torch.stack(drafted, dim=1)


class DenseLayer(DraftLayer):
    """The layer on plain weights.

    Args:
        weights: in any one dtype.
        eps: of the norms.
    """

    def __init__(self, weights: DraftWeights, eps: float) -> None:
        self.slopes, self.far_bias = weights.slopes, weights.far_bias
        self.num_heads = len(weights.slopes)
        self.head_dim = len(weights.q_proj) // self.num_heads
        self.num_kv_heads = len(weights.k_proj) // self.head_dim
        self.bind(weights, eps)


def draft_tokens_reference(
    cache: Tensor,
    block_table: Tensor,
    num_tokens: Tensor,
    state: Tensor,
    next_ids: Tensor,
    weights: list[Tensor],
    num_drafts: int,
    eps: float,
    packed: list[int],
    temperature: Tensor | None,
    uniform: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute `draft_tokens` in plain PyTorch; the weights are those of `DraftWeights`."""
    config = MergeConfig.unpack(packed)
    w = DraftWeights(*(x.to(state.dtype) if x.is_floating_point() else x for x in weights))
    layer = DenseLayer(w, eps)
    probs: list[Tensor] = []

    def sample(logits: Tensor) -> Tensor:
        if temperature is None or uniform is None:
            return w.to_token_ids(logits.argmax(-1))
        greedy = temperature < LEAST_TEMPERATURE
        scaled = logits.double() / torch.where(greedy, 1.0, temperature).unsqueeze(-1)
        distribution = scaled.softmax(-1).float()
        shares = distribution.double().cumsum(-1)
        # The first token up to which the shares add to more than the number drawn.
        drawn = (shares <= uniform[:, len(probs), None] * shares[:, -1:]).sum(-1).clamp_max(logits.shape[-1] - 1)
        probs.append(distribution)
        return w.to_token_ids(torch.where(greedy, logits.argmax(-1), drawn))

    drafted = draft_steps(
        layer,
        lambda ids: F.embedding(ids, w.embedding),
        lambda hidden: F.linear(hidden, w.head),
        sample,
        gather_entries(cache, block_table, num_tokens, layer.head_dim, config),
        num_tokens,
        state,
        next_ids,
        num_drafts,
    )
    return drafted, torch.stack(probs, 1) if probs else state.new_empty(len(state), 0, len(w.head), dtype=torch.float32)


torch.library.impl("qm_spec::draft_tokens", "default", draft_tokens_reference)


@torch.library.register_fake("qm_spec::draft_tokens")
def _draft_tokens_fake(
    cache: Tensor,
    block_table: Tensor,
    num_tokens: Tensor,
    state: Tensor,
    next_ids: Tensor,
    weights: list[Tensor],
    num_drafts: int,
    eps: float,
    packed: list[int],
    temperature: Tensor | None,
    uniform: Tensor | None,
) -> tuple[Tensor, Tensor]:
    num_probs = 0 if temperature is None else num_drafts
    return (
        state.new_empty(len(state), num_drafts, dtype=torch.int64),
        state.new_empty(len(state), num_probs, len(weights[1]), dtype=torch.float32),
    )


def draft_tokens(
    cache: Tensor,
    block_table: Tensor,
    num_tokens: Tensor,
    state: Tensor,
    next_ids: Tensor,
    weights: DraftWeights,
    num_drafts: int,
    eps: float,
    config: MergeConfig,
    temperature: Tensor | None = None,
    uniform: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draft K tokens for each request, greedily or by sampling.

    Args:
        cache: `[pages, G, P, C]`, holding the verified tokens, merged as they are.
        block_table: `[B, columns]` int32.
        num_tokens: `[B]` int32, verified tokens in the cache; 0 marks padding, whose drafts mean nothing.
        state: `[B, D]`, fused state of the newest of them.
        next_ids: `[B]`, the token that follows it.
        weights: all but the token ids in the state's dtype; matrices may be in bfloat16, see `in_half_the_bytes` of
            `draft_layer.py`.
        num_drafts: K, at least 1.
        eps: of the norms.
        config: of the merged cache.
        temperature: `[B]` float32; None drafts greedily, and so do rows below 1e-5.
        uniform: `[B, K]` float64 in 0..1 without 1, what to sample with; None with no temperature.

    Returns:
        The target's token ids `[B, K]` int64, and the distributions over the head's rows that they were drawn from
        `[B, K, Vd]` float32, at temperature 1 in greedy rows; `[B, 0, Vd]` without a temperature.

    Raises:
        TypeError: weights or numbers of another dtype.
        ValueError: shapes that do not fit each other, or `num_drafts` below 1.
    """
    batch, hidden = state.shape
    if num_drafts < 1:
        raise ValueError(f"draft_tokens: num_drafts must be at least 1, got {num_drafts}")
    if len(block_table) != batch or num_tokens.shape != (batch,) or next_ids.shape != (batch,):
        raise ValueError(
            f"draft_tokens: block_table, num_tokens and next_ids must be of {batch} requests, "
            f"got {list(block_table.shape)}, {list(num_tokens.shape)} and {list(next_ids.shape)}"
        )
    _check_weights(weights, state.dtype, hidden, cache.shape[1])
    if (temperature is None) != (uniform is None):
        raise ValueError("draft_tokens: temperature and uniform must both be given, or neither to draft greedily")
    if temperature is not None and uniform is not None:
        if temperature.shape != (batch,) or uniform.shape != (batch, num_drafts):
            raise ValueError(
                f"draft_tokens: temperature must be [{batch}] and uniform [{batch}, {num_drafts}], "
                f"got {list(temperature.shape)} and {list(uniform.shape)}"
            )
        if temperature.dtype != torch.float32 or uniform.dtype != torch.float64:
            raise TypeError(
                "draft_tokens: temperature must be float32 and uniform float64, "
                f"got {temperature.dtype} and {uniform.dtype}"
            )
        temperature, uniform = temperature.contiguous(), uniform.contiguous()
    return torch.ops.qm_spec.draft_tokens(
        cache,
        block_table,
        num_tokens,
        state,
        next_ids,
        list(weights),
        num_drafts,
        eps,
        config.pack(),
        temperature,
        uniform,
    )


def _check_weights(weights: DraftWeights, dtype: torch.dtype, hidden: int, num_kv_heads: int) -> None:
    num_heads = len(weights.slopes)
    query_size, kv_size = weights.q_proj.shape[0], weights.k_proj.shape[0]
    middle, vocabulary = weights.gate_proj.shape[0], weights.head.shape[0]
    matrices = {
        "embedding": (max(vocabulary, len(weights.embedding)), hidden),
        "token_ids": (vocabulary if len(weights.token_ids) else 0,),
        "head": (vocabulary, hidden),
        "in_proj": (hidden, 2 * hidden),
        "q_proj": (query_size, 2 * hidden),
        "k_proj": (kv_size, hidden),
        "v_proj": (kv_size, hidden),
        "next_proj": (kv_size if len(weights.next_proj) else 0, hidden),
        "o_proj": (hidden, query_size),
        "gate_proj": (middle, hidden),
        "up_proj": (middle, hidden),
        "down_proj": (hidden, middle),
    }
    for name, weight in weights._asdict().items():
        length = num_heads if name in ("slopes", "far_bias") else hidden
        shape = matrices.get(name, (length,))
        if weight.shape != shape:
            raise ValueError(f"draft_tokens: {name} must be {list(shape)}, got {list(weight.shape)}")
        expected: tuple[torch.dtype, ...] = (dtype,)
        why = " as the state is"
        if name == "token_ids":
            expected, why = (torch.int64,), ""
        elif name in matrices:
            expected, why = (dtype, torch.bfloat16), " as the state is, or torch.bfloat16"
        if weight.dtype not in expected:
            raise TypeError(f"draft_tokens: {name} must be {expected[0]}{why}, got {weight.dtype}")
    if num_heads % num_kv_heads or query_size * num_kv_heads != kv_size * num_heads:
        raise ValueError(
            f"draft_tokens: q_proj and k_proj must have rows for {num_heads} and {num_kv_heads} heads of one size, "
            f"got {query_size} and {kv_size}"
        )
