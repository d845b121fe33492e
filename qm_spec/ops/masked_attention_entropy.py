"""`masked_attention_entropy`: attention entropy where not every token may attend to every other."""

from __future__ import annotations

import torch
from torch import Tensor

from qm_spec.ops.attention_entropy import entropy_of_scores
from qm_spec.ops.blocks import over_rows


def masked_attention_entropy(tokens: Tensor, allowed: Tensor | None = None, causal: bool = False) -> Tensor:
    """Return the entropy of each token's self-attention over the tokens it may attend to, in nats.

    The memory grows with N and not with its square, but for an `allowed` that has N rows.

    Args:
        tokens: `[..., N, D]`, any float dtype, finite also where nothing may attend.
        allowed: `[..., N, N]` bool, True where row i may attend to column j, or `[..., 1, N]` for the
            same columns in every row; None allows all.
        causal: a token attends to itself and earlier ones only.

    Returns:
        `[..., N]` float32, between 0 and the log of the tokens allowed; differentiable. Finite but
        without meaning in rows that may attend to nothing.

    Source: QuickMerge++, arXiv 2508.13204, saliency estimation; the mask is ours.
    """
    x = tokens.float()
    num_tokens = x.shape[-2]
    if allowed is not None:
        allowed = allowed.expand(*allowed.shape[:-2], num_tokens, num_tokens)

    def block_entropy(rows: slice, x: Tensor, allowed: Tensor | None) -> Tensor:
        seen = slice(0, rows.stop if causal else num_tokens)
        scores = (x[..., rows, :] * x.shape[-1] ** -0.5) @ x[..., seen, :].mT
        closed = None if allowed is None else ~allowed[..., rows, seen]
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(rows.start + 1)
            closed = later if closed is None else closed | later
        return entropy_of_scores(scores, closed)

    return over_rows(block_entropy, x, allowed, num_columns=num_tokens).squeeze(-1)
