"""Grouping: which salient token each of the others joins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

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
    unit = F.normalize(_clean(tokens, mask), dim=-1)
    similarity = unit @ _rows(unit, selection.index).mT
    closed = ~selection.live.unsqueeze(1)
    if causal:
        position = torch.arange(num_tokens, device=tokens.device)
        closed = closed | (selection.index.unsqueeze(1) < position.unsqueeze(-1))
        if bool((closed.all(-1) & mask).any()):
            raise ValueError(
                "group_by_cosine: with causal=True the last token of each sequence must be selected; "
                "select with TokenSelection(keep_last=True)"
            )
    cluster = similarity.masked_fill(closed, float("-inf")).argmax(-1)
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
        num_iterations: at least 1.

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
    centres = _rows(points, selection.index)
    num_slots = live.shape[1]
    for _ in range(num_iterations):
        distance = torch.cdist(points, centres, compute_mode="use_mm_for_euclid_dist").square()
        nearest = distance.masked_fill(~live.unsqueeze(1), float("inf")).min(-1)
        cluster = _repair(nearest.indices, nearest.values, mass, mask, live)
        weight = one_hot(cluster, num_slots) * mass.unsqueeze(-1)
        centres = weight.mT @ points / weight.sum(1).unsqueeze(-1).clamp_min(1e-30)
    return _in_order(cluster, mass, mask, live, causal)


def one_hot(cluster: Tensor, num_slots: int) -> Tensor:
    """Return `[B, N, K]` float32, 1 at each token's slot; slot K, which padding has, is dropped."""
    member = torch.zeros(*cluster.shape, num_slots + 1, device=cluster.device)
    return member.scatter_(-1, cluster.unsqueeze(-1), 1.0)[..., :num_slots]


def _clean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return tokens as float32 without gradient; padding, which may hold NaN, as 0."""
    return tokens.detach().float().masked_fill(~mask.unsqueeze(-1), 0.0)


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    """Gather `[B, K, D]` at `[B, K]`; an index of N, an empty slot, takes any row."""
    index = index.clamp_max(tokens.shape[1] - 1)
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _repair(cluster: Tensor, distance: Tensor, mass: Tensor, mask: Tensor, live: Tensor) -> Tensor:
    """Give every live slot without members a token that its own cluster can spare; padding gets slot K."""
    num_slots = live.shape[1]
    cluster = cluster.masked_fill(~mask, num_slots)
    # Sorted by cluster and distance within it, the first of each cluster is its nearest member.
    by_distance = distance.argsort(dim=-1, stable=True)
    order = by_distance.gather(1, cluster.gather(1, by_distance).argsort(dim=-1, stable=True))
    label = cluster.gather(1, order)
    first = torch.ones_like(mask)
    first[:, 1:] = label[:, 1:] != label[:, :-1]
    needed = torch.zeros_like(mask).scatter(1, order, first)
    spare = (mass * distance).masked_fill(needed | ~mask, -1.0).argsort(dim=-1, descending=True, stable=True)
    members = torch.zeros(len(cluster), num_slots + 1, dtype=torch.int64, device=cluster.device)
    members.scatter_add_(1, cluster, torch.ones_like(cluster))
    empty = live & (members[:, :num_slots] == 0)
    # The e-th empty slot takes the e-th spare token; other slots write to an extra column.
    taken = spare.gather(1, (empty.cumsum(-1) - 1).clamp_min(0))
    taken = taken.masked_fill(~empty, cluster.shape[1])
    slot = torch.arange(num_slots, device=cluster.device).expand_as(taken)
    return F.pad(cluster, (0, 1)).scatter(1, taken, slot)[:, :-1]


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
