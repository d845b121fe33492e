"""Grouping: which salient token each of the others joins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

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
        # The smallest |x - c|^2 has the largest x c - |c|^2 / 2.
        offset = (centres.square().sum(-1) / -2).masked_fill(~live, float("-inf"))
        cluster = nearest_slot(points, centres, offset).masked_fill(~mask, live.shape[1])
        cluster = _repair(cluster, points, centres, mass, mask, live)
        if previous is not None and torch.equal(cluster, previous):
            break
        total = sum_by_cluster(mass.unsqueeze(-1), cluster, live.shape[1])
        centres = sum_by_cluster(points * mass.unsqueeze(-1), cluster, live.shape[1]) / total.clamp_min(1e-30)
    assert cluster is not None
    return _in_order(cluster, mass, mask, live, causal)


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


def sum_by_cluster(values: Tensor, cluster: Tensor, num_slots: int) -> Tensor:
    """Sum the rows of each cluster: `[B, N, X]` to `[B, K, X]`; slot K, which padding has, is dropped.

    Differentiable, and the same at every call on every device.
    """
    batch, _, width = values.shape
    row = cluster + (num_slots + 1) * torch.arange(batch, device=cluster.device).unsqueeze(-1)
    total = values.new_zeros(batch * (num_slots + 1), width)
    if values.is_cuda:
        # There index_add adds in whatever order its threads come; this one sorts first.
        total = total.index_put((row.flatten(),), values.reshape(-1, width), accumulate=True)
    else:
        total = total.index_add(0, row.flatten(), values.reshape(-1, width))
    return total.view(batch, num_slots + 1, width)[:, :num_slots]


def _clean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return tokens as float32 without gradient; padding, which may hold NaN, as 0."""
    return tokens.detach().float().masked_fill(~mask.unsqueeze(-1), 0.0)


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    """Gather `[B, K, D]` at `[B, K]`; an index of N, an empty slot, takes any row."""
    index = index.clamp_max(tokens.shape[1] - 1)
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _repair(cluster: Tensor, points: Tensor, centres: Tensor, mass: Tensor, mask: Tensor, live: Tensor) -> Tensor:
    """Give every live slot without members a token that its own cluster can spare; padding stays in slot K."""
    num_slots = live.shape[1]
    members = torch.zeros(len(cluster), num_slots + 1, dtype=torch.int64, device=cluster.device)
    members.scatter_add_(1, cluster, torch.ones_like(cluster))
    empty = live & (members[:, :num_slots] == 0)
    if not bool(empty.any()):
        return cluster
    distance = (points - _rows(centres, cluster)).square().sum(-1)
    # Sorted by cluster and distance within it, the first of each cluster is its nearest member.
    by_distance = distance.argsort(dim=-1, stable=True)
    order = by_distance.gather(1, cluster.gather(1, by_distance).argsort(dim=-1, stable=True))
    label = cluster.gather(1, order)
    first = torch.ones_like(mask)
    first[:, 1:] = label[:, 1:] != label[:, :-1]
    needed = torch.zeros_like(mask).scatter(1, order, first)
    spare = (mass * distance).masked_fill(needed | ~mask, -1.0).argsort(dim=-1, descending=True, stable=True)
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
