"""`attention_entropy`: how widely each token of a set attends to the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qm_spec.ops.blocks import over_rows, row_blocks

torch.library.define("qm_spec::attention_entropy", "(Tensor tokens, bool causal) -> Tensor")


def attention_entropy_reference(tokens: Tensor, causal: bool) -> Tensor:
    """Compute the entropy `[B, N]` float32 of the self-attention of `[B, N, D]` in plain PyTorch."""
    return _entropy(tokens.float(), None, causal)


torch.library.impl("qm_spec::attention_entropy", "default", attention_entropy_reference)


@torch.library.register_fake("qm_spec::attention_entropy")
def _attention_entropy_fake(tokens: Tensor, causal: bool) -> Tensor:
    return tokens.new_empty(tokens.shape[:2], dtype=torch.float32)


def attention_entropy(tokens: Tensor) -> Tensor:
    """Return the entropy of each token's self-attention, in nats.

    `A = softmax(X X^T / sqrt(D))`, `H_i = -sum_j A_ij log A_ij`, in blocks of rows: the memory grows
    with N and not with its square, for the gradient too.

    Args:
        tokens: `[..., N, D]`, any float dtype.

    Returns:
        `[..., N]` float32, between 0 (attends to one token) and log N (to all alike); differentiable once.

    Source: QuickMerge++, arXiv 2508.13204, saliency estimation.
    """
    return RowEntropy.apply(tokens.float(), None, False)  # type: ignore[no-untyped-call]


class RowEntropy(torch.autograd.Function):
    """The entropy of self-attention with an optional mask, and its gradient; see `masked_attention_entropy`.

    With z the scores of row i less their largest, `H_i = log sum_j e^z_j - m`, where
    `m = sum_j z_j e^z_j / sum_j e^z_j`: one exponential and no logarithm per score. The derivative by
    score j is `-(e^z_j / sum_k e^z_k) (z_j - m)`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, allowed: Tensor | None, causal: bool) -> Tensor:
        """Return `[..., N]` of `[..., N, D]` float32 and `allowed` `[..., N, N]` bool or None."""
        ctx.save_for_backward(x, allowed)
        ctx.causal = causal
        if allowed is not None:
            return _entropy(x, allowed, causal)
        sets = x.reshape(x.shape[:-2].numel(), *x.shape[-2:])
        return torch.ops.qm_spec.attention_entropy(sets, causal).view(x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the tokens, which stand in each score twice."""
        x, allowed = ctx.saved_tensors
        result = torch.zeros_like(x)
        scale = x.shape[-1] ** -0.5
        for rows in row_blocks(x, x.shape[-2]):
            z, weight, total = _exponentials(rows, x, allowed, ctx.causal)
            mean = (z * weight).sum(-1, keepdim=True) / total
            by_score = z.sub_(mean).mul_(weight).mul_(gradient[..., rows].unsqueeze(-1) * (-scale / total))
            seen = slice(0, z.shape[-1])
            result[..., rows, :] += by_score @ x[..., seen, :]
            result[..., seen, :] += by_score.mT @ x[..., rows, :]
        return result, None, None


def _entropy(x: Tensor, allowed: Tensor | None, causal: bool) -> Tensor:
    """Return `[..., N]` of `[..., N, D]` float32."""

    def block(rows: slice, x: Tensor, allowed: Tensor | None) -> Tensor:
        z, weight, total = _exponentials(rows, x, allowed, causal)
        return total.log() - z.mul_(weight).sum(-1, keepdim=True) / total

    # Without tokens there is no largest score.
    if x.shape[-2] == 0:
        return x.new_zeros(x.shape[:-1])
    return over_rows(block, x, allowed, num_columns=x.shape[-2]).squeeze(-1)


def _exponentials(rows: slice, x: Tensor, allowed: Tensor | None, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return z `[..., R, S]`, `e^z` and its sum `[..., R, 1]`; both are 0 where a row must not attend."""
    seen = slice(0, rows.stop if causal else x.shape[-2])
    z = (x[..., rows, :] * x.shape[-1] ** -0.5) @ x[..., seen, :].mT
    closed = None if allowed is None else ~allowed[..., rows, seen]
    if causal:
        later = torch.ones(z.shape[-2:], dtype=torch.bool, device=x.device).triu(rows.start + 1)
        closed = later if closed is None else closed | later
    if closed is None:
        z.sub_(z.amax(-1, keepdim=True))
        weight = z.exp()
        return z, weight, weight.sum(-1, keepdim=True)
    z.masked_fill_(closed, float("-inf"))
    # The largest of a row without any column is no infinity, and its sum no 0: its entropy is 0.
    z.sub_(z.amax(-1, keepdim=True).clamp_min(torch.finfo(z.dtype).min))
    weight = z.exp()
    return z.masked_fill_(closed, 0.0), weight, weight.sum(-1, keepdim=True).clamp_min(1.0)
