"""`attention_entropy`: how widely each token of a set attends to the others."""

from __future__ import annotations

import torch
from torch import Tensor

from qm_spec.ops.blocks import over_rows


def attention_entropy(tokens: Tensor) -> Tensor:
    """Return the entropy of each token's self-attention, in nats.

    `A = softmax(X X^T / sqrt(D))`, `H_i = -sum_j A_ij log A_ij`, in blocks of rows: the memory grows
    with N and not with its square, also where gradients are wanted.

    Args:
        tokens: `[..., N, D]`, any float dtype.

    Returns:
        `[..., N]` float32, between 0 (attends to one token) and log N (to all alike); differentiable.

    Source: QuickMerge++, arXiv 2508.13204, saliency estimation.
    """
    x = tokens.float()
    return over_rows(_block_entropy, x, num_columns=x.shape[-2]).squeeze(-1)


def _block_entropy(rows: slice, x: Tensor) -> Tensor:
    return entropy_of_scores((x[..., rows, :] * x.shape[-1] ** -0.5) @ x.mT)


def entropy_of_scores(scores: Tensor, closed: Tensor | None = None) -> Tensor:
    """Return the entropy `[..., R, 1]` of the softmax of each row, in nats; the scores are overwritten.

    `H = log sum_j e^z_j - (sum_j z_j e^z_j) / sum_j e^z_j` with z the score less the row's largest:
    one exponential and no logarithm per score.

    Args:
        scores: `[..., R, N]` float32.
        closed: `[..., R, N]` bool, True where a score does not count; a row of nothing else gets log N.
    """
    if closed is not None:
        scores.masked_fill_(closed, torch.finfo(scores.dtype).min)
    # A shift changes no entropy, so it has no gradient.
    scores.sub_(scores.detach().amax(-1, keepdim=True))
    if closed is not None:
        # Far below what counts in float32, and not so far that a gradient overflows.
        scores.masked_fill_(closed, -80.0)
    weight = scores.exp()
    total = weight.sum(-1, keepdim=True)
    return total.log() - (scores * weight).sum(-1, keepdim=True) / total
