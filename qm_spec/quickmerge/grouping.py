"""Grouping: which salient token each of the others joins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qm_spec.ops import weighted_kmeans_assign, weighted_kmeans_update
from qm_spec.ops.blocks import over_rows
from qm_spec.quickmerge.inputs import check_tokens, full_mask
from qm_spec.quickmerge.selection import Selection

GROUPINGS = ("cosine", "kmeans")


@dataclass(frozen=True)
class Grouping:
    """Groups of tokens, ordered by the place at which their merged token stands.

    Attributes:
        cluster: `[B, N]` int64, group of each token, 0..K-1; -1 at padding.
        place: `[B, K]` int64, rising, a member of the group; N where the slot is empty.
        live: `[B, K]` bool, slots that hold a group, the first ones of each sequence.
    """

    cluster: Tensor
    place: Tensor
    live: Tensor


def group_by_cosine(
    tokens: Tensor, selection: Selection, token_mask: Tensor | None = None, causal: bool = False
) -> Grouping:
    """Let every token join the salient one that is nearest by cosine similarity (ties: the earlier).

    A salient token stays in its own group, and the merged token stands at its place. With `causal`
    only salient tokens at or after a token's own position are open to it, so that a merged token
    holds nothing later than its place; of 2 salient tokens, at 1 and 4:

        token      0    1    2    3    4
        joins    1 or 4 1    4    4    4

    Args:
        tokens: `[B, N, D]`.
        selection: of at least one token in each sequence that has any.
        token_mask: `[B, N]` bool, True = token.
        causal: see above; the last token of each sequence must be selected.

    Returns:
        See `Grouping`; no gradient.

    Raises:
        TypeError: tokens are not floats.
        ValueError: shapes that do not fit, or `causal` where a last token is not selected.

    Source: the `quickmerge` README, "Cluster tokens into K groups using cosine similarity"; the
    causal variant is ours.
    """
    check_tokens("group_by_cosine", tokens)
    mask = full_mask("group_by_cosine", tokens, token_mask)
    num_tokens, num_slots = tokens.shape[1], selection.index.shape[1]
    if causal:
        position = torch.arange(num_tokens, device=tokens.device)
        last = torch.where(mask, position, -1).amax(-1)
        if bool((selection.index.masked_fill(~selection.live, -1).amax(-1) < last).any()):
            raise ValueError(
                "group_by_cosine: with causal=True the last token of each sequence must be selected; "
                "select with TokenSelection(keep_last=True)"
            )
    unit = F.normalize(_clean(tokens, mask), dim=-1)
    offset = torch.zeros_like(selection.index, dtype=torch.float32).masked_fill(~selection.live, float("-inf"))
    cluster = nearest_slot(unit, _rows(unit, selection.index), offset, selection.index if causal else None)
    # Empty slots write to an extra column.
    cluster = F.pad(cluster, (0, 1))
    slot = torch.arange(num_slots, device=tokens.device).expand_as(selection.index)
    cluster = cluster.scatter(1, selection.index, slot)[:, :num_tokens]
    return Grouping(cluster.masked_fill(~mask, -1), selection.index, selection.live)


def group_by_kmeans(
    tokens: Tensor,
    selection: Selection,
    token_mask: Tensor | None = None,
    causal: bool = False,
    num_iterations: int = 5,
) -> Grouping:
    """Group tokens by k-means, weighted by mass, that begins at the salient tokens.

    Distances are Euclidean. A cluster left without members takes the token of the largest
    `mass * distance^2` that is not the nearest member of its cluster, so that no slot stays empty,
    duplicates among the tokens or not. The merged token stands at its member of the largest mass
    (ties: the earlier), or with `causal` at its last member, so that it holds nothing later.

    Args:
        tokens: `[B, N, D]`.
        selection: of at least one token in each sequence that has any.
        token_mask: `[B, N]` bool, True = token.
        causal: see above.
        num_iterations: at most, at least 1; it ends when no token changes its cluster.

    Returns:
        See `Grouping`; no gradient.

    Raises:
        TypeError: tokens are not floats.
        ValueError: shapes that do not fit, or no iteration.

    Source: the `quickmergepp` README, "weighted k-means"; seeds, repair and order are ours.
    """
    check_tokens("group_by_kmeans", tokens)
    if num_iterations < 1:
        raise ValueError(f"group_by_kmeans: num_iterations must be at least 1, got {num_iterations}")
    mask = full_mask("group_by_kmeans", tokens, token_mask)
    points, mass, live = _clean(tokens, mask), selection.mass.detach(), selection.live
    # Distances do not change, and products of centred points lose fewer digits.
    points = (points - points.sum(1, keepdim=True) / mask.sum(-1).clamp_min(1)[:, None, None]) * mask.unsqueeze(-1)
    centres, cluster = _rows(points, selection.index), None
    for _ in range(num_iterations):
        previous = cluster
        cluster, distance = weighted_kmeans_assign(points, centres, mask, live)
        cluster, centres = weighted_kmeans_update(points, mass, cluster, distance, live)
        if previous is not None and torch.equal(cluster, previous):
            break
    assert cluster is not None
    return _in_order(cluster.masked_fill(~mask, live.shape[1]), mass, mask, live, causal)


def nearest_slot(points: Tensor, centres: Tensor, offset: Tensor, place: Tensor | None = None) -> Tensor:
    """Return the slot of the largest `x c + offset` for each point, in blocks of points (ties: the earlier slot).

    Args:
        points: `[B, N, D]` float32.
        centres: `[B, K, D]` float32.
        offset: `[B, K]` float32, -inf at slots that are not open.
        place: `[B, K]` int64; if given, a slot is open to the points at positions up to its place only.

    Returns:
        `[B, N]` int64.
    """

    def block(rows: slice, points: Tensor, centres: Tensor, offset: Tensor, place: Tensor | None) -> Tensor:
        score = torch.baddbmm(offset.unsqueeze(1), points[:, rows], centres.mT)
        if place is not None:
            position = torch.arange(rows.start, rows.stop, device=points.device)
            score.masked_fill_(place.unsqueeze(1) < position.unsqueeze(-1), float("-inf"))
        return score.argmax(-1, keepdim=True)

    return over_rows(block, points, centres, offset, place, num_columns=centres.shape[1]).squeeze(-1)


def _clean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return tokens as float32 without gradient; padding, which may hold NaN, as 0."""
    return tokens.detach().float().masked_fill(~mask.unsqueeze(-1), 0.0)


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    """Gather `[B, K, D]` at `[B, K]`; an index of N, an empty slot, takes any row."""
    index = index.clamp_max(tokens.shape[1] - 1)
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _in_order(cluster: Tensor, mass: Tensor, mask: Tensor, live: Tensor, causal: bool) -> Grouping:
    """Find each cluster's place and number the clusters by it."""
    num_tokens, num_slots = mask.shape[1], live.shape[1]
    position = torch.arange(num_tokens, device=mask.device).expand_as(cluster)
    preference = position.flip(-1) if causal else mass.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(position).scatter(1, preference, position)
    best = torch.full((len(mask), num_slots + 1), num_tokens, device=mask.device)
    best = best.scatter_reduce(1, cluster, rank, "amin")[:, :num_slots]
    place = F.pad(preference, (0, 1), value=num_tokens).gather(1, best)
    place, order = place.sort(dim=-1, stable=True)
    slot = torch.arange(num_slots, device=mask.device).expand_as(order)
    renamed = F.pad(torch.empty_like(order).scatter(1, order, slot), (0, 1), value=-1)
    return Grouping(renamed.gather(1, cluster), place, live)
