"""`attention_entropy`: how widely each token of a set attends to the others."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_entropy(tokens: Tensor) -> Tensor:
    """Return the entropy of each token's self-attention, in nats.

    `A = softmax(X X^T / sqrt(D))`, `H_i = -sum_j A_ij log A_ij`.

    Args:
        tokens: `[..., N, D]`, any float dtype.

    Returns:
        `[..., N]` float32, between 0 (attends to one token) and log N (to all alike).

    Source: QuickMerge++, arXiv 2508.13204, saliency estimation.
    """
    x = tokens.float()
    log_attention = torch.log_softmax(x @ x.mT * x.shape[-1] ** -0.5, dim=-1)
    return -(log_attention.exp() * log_attention).sum(-1)
