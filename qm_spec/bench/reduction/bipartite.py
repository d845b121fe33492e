"""ToMe: bipartite soft matching."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qm_spec.bench.reduction.result import last_layer
from qm_spec.quickmerge import MergedTokens


def bipartite_matching(tokens: Tensor, keep: int) -> MergedTokens:
    """Merge the most similar pairs of alternate tokens, in as many passes as K needs.

    One pass: tokens at even places look for the most similar one at odd places (cosine; ties: the
    earlier), the r most similar pairs merge (ties: the earlier), the merged token stands at the odd
    place and is the mean of all tokens in it. A pass merges at most half of the tokens, so K below
    N / 2 takes several; in the paper each layer of the model makes one.

    Args:
        tokens: `[B, N, D]` or `[L, B, N, D]`.
        keep: K, at least 1.

    Returns:
        See `MergedTokens`; `mass` is the size, and `mask` marks the places.

    Raises:
        TypeError: tokens are not floats.
        ValueError: K is below 1, or a wrong shape.

    Source: ToMe, arXiv 2210.09461, section 3. It matches attention keys; here all methods see hidden states.
    """
    tokens, keep = last_layer("bipartite_matching", tokens, keep)
    batch, num_tokens, _ = tokens.shape
    values = tokens.float()
    size = torch.ones(batch, num_tokens, device=tokens.device)
    place = torch.arange(num_tokens, device=tokens.device).expand(batch, -1)
    cluster = place
    while values.shape[1] > keep:
        remaining = values.shape[1]
        slot, stays = _match(values, min(remaining - keep, remaining // 2))
        index = slot.unsqueeze(-1).expand_as(values)
        merged_size = size.new_zeros(stays.shape).scatter_add(1, slot, size)
        total = torch.zeros_like(values[:, : stays.shape[1]]).scatter_add(1, index, values * size.unsqueeze(-1))
        values, size = total / merged_size.unsqueeze(-1), merged_size
        place, cluster = place.gather(1, stays), slot.gather(1, cluster)
    mask = torch.zeros(batch, num_tokens, device=tokens.device).scatter(1, place, 1.0)
    return MergedTokens(values.to(tokens.dtype), size.bool(), size, size, place, cluster, mask)


def _match(values: Tensor, num_merged: int) -> tuple[Tensor, Tensor]:
    """Return the new slot of each token `[B, n]`, and the tokens `[B, n - r]` that keep one of their own."""
    unit = F.normalize(values, dim=-1)
    similarity = unit[:, ::2] @ unit[:, 1::2].mT
    partner = similarity.argmax(-1)
    best = similarity.gather(-1, partner.unsqueeze(-1)).squeeze(-1)
    source = best.argsort(dim=-1, descending=True, stable=True)[:, :num_merged]
    position = torch.arange(values.shape[1], device=values.device).expand(len(values), -1)
    joins = position.scatter(1, 2 * source, 2 * partner.gather(1, source) + 1)
    stays = joins == position
    rank = stays.cumsum(-1) - 1
    order = (~stays).byte().argsort(dim=-1, stable=True)
    return rank.gather(1, joins), order[:, : values.shape[1] - num_merged]
