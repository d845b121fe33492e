"""The autoregressive prior over merged tokens: a small causal transformer with a cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qm_spec.quickmerge.inputs import check_tokens


@dataclass(frozen=True)
class PriorCache:
    """Keys and values of the tokens seen, per layer `[B, H, T, d]`, and their log-sizes `[B, T]` if any were given."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    log_sizes: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """T, tokens seen."""
        return self.keys[0].shape[2]


@cache
def _memory_efficient_attention() -> Callable[[Tensor, Tensor, Tensor, float], Tensor] | None:
    """Return xformers' causal attention on `[B, H, T, d]`, or None where xformers is not installed."""
    if find_spec("xformers") is None:
        return None
    ops = import_module("xformers.ops")
    # Bottom-right: the newest query sees the newest key, also where a cache makes keys outnumber queries.
    bias = ops.fmha.attn_bias.LowerTriangularFromBottomRightMask()

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        # xformers wants [B, T, H, d].
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return ops.memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale).transpose(1, 2)

    return attend


def causal_attention(query: Tensor, key: Tensor, value: Tensor, log_sizes: Tensor | None = None) -> Tensor:
    """Attend from the newest T tokens to all S seen, each to itself and earlier ones.

    On CUDA by xformers' memory-efficient attention if it is installed, else by PyTorch's SDPA.

    Args:
        query: `[B, H, T, d]`.
        key: `[B, H, S, d]`, S at least T.
        value: `[B, H, S, d]`.
        log_sizes: `[B, S]` added to the scores of each key, so that one of size n weighs like n equal ones.

    Returns:
        `[B, H, T, d]`.
    """
    head_dim = query.shape[-1]
    scale = head_dim**-0.5
    if log_sizes is not None:
        # As one more channel of query and key (of eight, for alignment): the kernels keep their causal
        # mask, and none of them needs T x S biases.
        extra = log_sizes.to(key.dtype)[:, None, :, None].expand(-1, key.shape[1], -1, 1)
        query = F.pad(torch.cat([query, torch.full_like(query[..., :1], 1 / scale)], -1), (0, 7))
        key = F.pad(torch.cat([key, extra], -1), (0, 7))
        value = F.pad(value, (0, 8))
    return _causal_attention(query, key, value, scale)[..., :head_dim]


def _causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    if query.is_cuda:
        attend = _memory_efficient_attention()
        if attend is not None:
            return attend(query, key, value, scale)
    num_queries, num_keys = query.shape[2], key.shape[2]
    if num_queries == 1:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    if num_queries == num_keys:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)


class _PriorLayer(nn.Module):
    def __init__(self, embedding_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        # Heads of a multiple of 8 fit the attention kernels, and any D splits into them.
        self.head_dim = 8 * math.ceil(embedding_dim / num_heads / 8)
        inner = num_heads * self.head_dim
        self.attention_norm = nn.LayerNorm(embedding_dim)
        self.qkv = nn.Linear(embedding_dim, 3 * inner)
        self.out = nn.Linear(inner, embedding_dim)
        self.mlp_norm = nn.LayerNorm(embedding_dim)
        self.mlp = nn.Sequential(
            nn.Linear(embedding_dim, 4 * embedding_dim), nn.GELU(), nn.Linear(4 * embedding_dim, embedding_dim)
        )

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None, log_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        attended = causal_attention(query, key, value, log_sizes)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x)), key, value


def sinusoidal_positions(start: int, num_tokens: int, embedding_dim: int, device: torch.device) -> Tensor:
    """Return the sinusoidal position codes `[N, D]` float32 of positions `start`.. (any D, also odd).

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.5.
    """
    position = torch.arange(start, start + num_tokens, device=device, dtype=torch.float32).unsqueeze(-1)
    channel = torch.arange(embedding_dim, device=device)
    angle = position * torch.exp(-math.log(10000.0) * (channel // 2 * 2).float() / embedding_dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())


class AutoregressivePrior(nn.Module):
    """Predict each next merged token from those before it.

    Sequences of a batch begin at position 0 together; empty slots stand at their ends (as in
    `MergedTokens`), where a causal model never lets them reach a live one.

    Args:
        embedding_dim: D, any; heads are widened to a multiple of 8 where it does not split into them.
        num_layers: transformer layers.
        num_heads: attention heads.

    Raises:
        ValueError: a size is below 1.

    Source: QuickMerge++, arXiv 2508.13204; sizes and sinusoidal positions from `quickmergepp`.
    """

    def __init__(self, embedding_dim: int, num_layers: int = 6, num_heads: int = 8) -> None:
        super().__init__()
        if min(embedding_dim, num_layers, num_heads) < 1:
            raise ValueError(
                "AutoregressivePrior: embedding_dim, num_layers and num_heads must be at least 1, "
                f"got {embedding_dim}, {num_layers} and {num_heads}"
            )
        self.embedding_dim = embedding_dim
        self.layers = nn.ModuleList(_PriorLayer(embedding_dim, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(embedding_dim)
        self.head = nn.Linear(embedding_dim, embedding_dim)

    def forward(self, tokens: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Return predictions `[B, N, D]`: row i is of token i + 1, from tokens 0..i.

        Args:
            tokens: `[B, N, D]`, any float dtype; computed in the parameters' dtype, returned in the input's.
            sizes: `[B, N]`, tokens merged into each (`MergedTokens.size`): log n is added to the scores
                of a token of size n, so that it is attended to like n tokens. 0 = an empty slot, which
                no other attends to. None weighs all alike.

        Raises:
            TypeError: tokens are not floats.
            ValueError: tokens are not `[B, N, D]`, or sizes not `[B, N]`.

        Source of the sizes: ToMe, arXiv 2210.09461, proportional attention.
        """
        return self._run(tokens, None, sizes)[0]

    def prefill(self, tokens: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, PriorCache]:
        """Return what `forward` does, and the cache with which to go on."""
        return self._run(tokens, None, sizes)

    def step(self, tokens: Tensor, past: PriorCache, sizes: Tensor | None = None) -> tuple[Tensor, PriorCache]:
        """Return the predictions of new tokens `[B, T, D]` after the cached ones, and the longer cache.

        The cache given is left as it is, so that several continuations can start from it. New tokens
        without sizes, after tokens with them, have size 1. Raises as `forward` does.
        """
        return self._run(tokens, past, sizes)

    def _run(self, tokens: Tensor, past: PriorCache | None, sizes: Tensor | None) -> tuple[Tensor, PriorCache]:
        check_tokens("AutoregressivePrior", tokens, self.embedding_dim)
        if sizes is not None and sizes.shape != tokens.shape[:2]:
            raise ValueError(f"AutoregressivePrior: sizes must be {list(tokens.shape[:2])}, got {list(sizes.shape)}")
        start = past.num_tokens if past is not None else 0
        log_sizes = past.log_sizes if past is not None else None
        if sizes is not None or log_sizes is not None:
            # Small enough to be no weight at all, and finite: an empty slot sees at least itself.
            new = (
                torch.zeros(tokens.shape[:2], device=tokens.device)
                if sizes is None
                else sizes.float().clamp_min(1e-30).log()
            )
            old = new.new_zeros(len(tokens), start) if log_sizes is None else log_sizes
            log_sizes = torch.cat([old, new], 1)
        positions = sinusoidal_positions(start, tokens.shape[1], self.embedding_dim, tokens.device)
        x = tokens.to(self.head.weight.dtype)
        x = x + positions.to(x.dtype)
        keys, values = [], []
        for number, layer in enumerate(self.layers):
            layer_past = (past.keys[number], past.values[number]) if past is not None else None
            x, key, value = layer(x, layer_past, log_sizes)
            keys.append(key)
            values.append(value)
        return self.head(self.norm(x)).to(tokens.dtype), PriorCache(tuple(keys), tuple(values), log_sizes)
