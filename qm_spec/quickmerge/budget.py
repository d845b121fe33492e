"""Budgets: how many tokens each sequence keeps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qm_spec.ops.blocks import over_rows
from qm_spec.quickmerge.inputs import check_tokens, full_mask


def fixed_budget(keep: int, token_mask: Tensor) -> Tensor:
    """Return K for every sequence, or all its tokens where it has fewer.

    Args:
        keep: K, at least 1; more than N keeps N.
        token_mask: `[B, N]` bool, True = token.

    Returns:
        `[B]` int64, 0..N; 0 only for a sequence of padding alone.

    Raises:
        TypeError: K is not an integer.
        ValueError: K is below 1.
    """
    if isinstance(keep, bool) or not isinstance(keep, int):
        raise TypeError(f"fixed_budget: K must be an integer, got {keep!r}; for a ratio call ratio_budget")
    if keep < 1:
        raise ValueError(f"fixed_budget: K must be at least 1, got {keep}")
    return token_mask.sum(-1).clamp_max(keep)


def ratio_budget(ratio: float, token_mask: Tensor) -> Tensor:
    """Return `max(1, int(ratio * N))` for every sequence, N its tokens without padding.

    Args:
        ratio: of the tokens kept, above 0 and at most 1.
        token_mask: `[B, N]` bool, True = token.

    Returns:
        `[B]` int64, 0..N; 0 only for a sequence of padding alone.

    Raises:
        ValueError: the ratio is out of range.

    Source: the inference pipeline of the `quickmerge` README.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio_budget: ratio must be above 0 and at most 1, got {ratio}")
    count = token_mask.sum(-1)
    # In float64, as Python computes int(0.29 * 100) = 28; float32 would round it to 29.
    return torch.minimum((count.double() * ratio).long().clamp_min(1), count)


def effective_tokens(tokens: Tensor, saliency: Tensor | None = None, token_mask: Tensor | None = None) -> Tensor:
    """Return the effective number of tokens `exp(H)` of each sequence.

    `H = -sum_i p_i log sum_j z_ij p_j`, with p the saliency as a distribution (uniform without one)
    and z the cosine similarity, 0 where negative. Where all tokens differ (z the identity) this is
    the exponential of the entropy of the saliency. That entropy alone is largest where all tokens
    are the same, so equal tokens are counted as one: N copies have 1 effective token, N orthogonal
    tokens N.

    Args:
        tokens: `[B, N, D]`.
        saliency: `[B, N]`, not negative.
        token_mask: `[B, N]` bool, True = token.

    Returns:
        `[B]` float32, 1..N.

    Raises:
        TypeError: tokens are not floats.
        ValueError: shapes that do not fit.

    Source: the abstract of QuickMerge++ names an "entropy-based budget estimator" and no formula;
    this one is Leinster and Cobbold 2012, diversity of order 1.
    """
    check_tokens("effective_tokens", tokens)
    mask = full_mask("effective_tokens", tokens, token_mask)
    weight = torch.ones_like(mask, dtype=torch.float32) if saliency is None else saliency.float()
    if weight.shape != mask.shape:
        raise ValueError(f"effective_tokens: saliency must be {list(mask.shape)}, got {list(weight.shape)}")
    # A saliency of 0 everywhere is taken as uniform.
    weight = (weight + 1e-6).masked_fill(~mask, 0.0)
    share = weight / weight.sum(-1, keepdim=True).clamp_min(1e-12)
    unit = F.normalize(tokens.float().masked_fill(~mask.unsqueeze(-1), 0.0), dim=-1)
    likeness = over_rows(_likeness, unit, share.unsqueeze(-1), num_columns=unit.shape[1]).squeeze(-1)
    # A token is like itself, also one of zeros.
    likeness = likeness + share * (1 - unit.square().sum(-1)).clamp_min(0.0)
    return torch.exp(-(share * likeness.clamp_min(1e-12).log()).sum(-1))


def _likeness(rows: slice, unit: Tensor, share: Tensor) -> Tensor:
    return (unit[:, rows] @ unit.mT).clamp_(0, 1) @ share


def entropy_budget(
    tokens: Tensor,
    max_tokens: int,
    saliency: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> Tensor:
    """Return the effective number of tokens of each sequence, rounded up, at most `max_tokens`.

    A repetitive sequence gets fewer than a varied one of the same length.

    Args:
        tokens: `[B, N, D]`.
        max_tokens: the largest budget, at least 1.
        saliency: `[B, N]`, not negative.
        token_mask: `[B, N]` bool, True = token.

    Returns:
        `[B]` int64, 1..min(max_tokens, N); 0 only for a sequence of padding alone.

    Raises:
        TypeError: `max_tokens` is not an integer, or tokens are not floats.
        ValueError: `max_tokens` is below 1, or shapes do not fit.

    Source: see `effective_tokens`.
    """
    mask = full_mask("entropy_budget", tokens, token_mask)
    ceiling = fixed_budget(max_tokens, mask)
    # Rounding of a whole number must not cost a token.
    wanted = (effective_tokens(tokens.detach(), saliency, mask) - 1e-3).ceil().long().clamp_min(1)
    return torch.minimum(wanted, ceiling)
