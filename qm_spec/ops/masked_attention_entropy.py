"""`masked_attention_entropy`: attention entropy where not every token may attend to every other."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_attention_entropy(tokens: Tensor, allowed: Tensor) -> Tensor:
    """Return the entropy of each token's self-attention over the tokens it may attend to, in nats.

    Args:
        tokens: `[..., N, D]`, any float dtype.
        allowed: `[..., N, N]` bool, True where row i may attend to column j; every row needs one.

    Returns:
        `[..., N]` float32, between 0 and the log of the tokens allowed; differentiable.

    Source: QuickMerge++, arXiv 2508.13204, saliency estimation; the mask is ours.
    """
    x = tokens.float()
    scores = (x @ x.mT * x.shape[-1] ** -0.5).masked_fill(~allowed, float("-inf"))
    log_attention = torch.log_softmax(scores, dim=-1)
    # log 0 = -inf meets weight 0 where nothing is allowed: its term is 0, not NaN.
    return -(log_attention.exp() * log_attention.masked_fill(~allowed, 0.0)).sum(-1)
