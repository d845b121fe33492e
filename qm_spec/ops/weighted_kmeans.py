"""`weighted_kmeans_assign` and `weighted_kmeans_update`: one iteration of k-means, weighted by mass."""

from __future__ import annotations

import torch
from torch import Tensor

from qm_spec.ops.saliency_merge import check_slots, saliency_merge_reference

torch.library.define(
    "qm_spec::weighted_kmeans_assign",
    "(Tensor points, Tensor centres, Tensor mask, Tensor live) -> (Tensor, Tensor)",
)
torch.library.define(
    "qm_spec::weighted_kmeans_update",
    "(Tensor points, Tensor mass, Tensor cluster, Tensor distance, Tensor live) -> (Tensor, Tensor)",
)


def weighted_kmeans_assign_reference(
    points: Tensor, centres: Tensor, mask: Tensor, live: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute `weighted_kmeans_assign` in plain PyTorch."""
    closed = ~mask | ~live.any(-1, keepdim=True)
    if centres.shape[1] == 0:
        return torch.full_like(mask, -1, dtype=torch.int64), torch.zeros_like(mask, dtype=torch.float32)
    x = points.float().masked_fill(~mask.unsqueeze(-1), 0.0)
    # |x|^2 is the same for all centres of a token.
    score = centres.square().sum(-1).unsqueeze(1) - 2 * x @ centres.mT
    cluster = score.masked_fill(~live.unsqueeze(1), float("inf")).argmin(-1)
    # The difference of squares cancels where a token is near its centre; the squared difference does not.
    away = x - centres.gather(1, cluster.unsqueeze(-1).expand_as(x))
    return cluster.masked_fill(closed, -1), away.square().sum(-1).masked_fill(closed, 0.0)


def weighted_kmeans_update_reference(
    points: Tensor, mass: Tensor, cluster: Tensor, distance: Tensor, live: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute `weighted_kmeans_update` in plain PyTorch."""
    check_slots("weighted_kmeans_update", cluster, live.shape[1])
    repaired = _repair(cluster, distance, mass, live)
    return repaired, saliency_merge_reference(points.float(), mass, repaired, live.shape[1])[0]


def _repair(cluster: Tensor, distance: Tensor, mass: Tensor, live: Tensor) -> Tensor:
    """Give every live slot without members a token that its own cluster can spare."""
    num_tokens, num_slots = cluster.shape[1], live.shape[1]
    if num_tokens == 0:
        return cluster.clone()
    mask = cluster >= 0
    # Padding goes to an extra slot.
    label = cluster.masked_fill(~mask, num_slots)
    # Sorted by cluster and distance within it, the first of each cluster is its nearest member.
    by_distance = distance.argsort(dim=-1, stable=True)
    order = by_distance.gather(1, label.gather(1, by_distance).argsort(dim=-1, stable=True))
    sorted_label = label.gather(1, order)
    first = torch.ones_like(mask)
    first[:, 1:] = sorted_label[:, 1:] != sorted_label[:, :-1]
    needed = torch.zeros_like(mask).scatter(1, order, first)
    cost, spare = (mass * distance).masked_fill(needed | ~mask, -1.0).sort(dim=-1, descending=True, stable=True)
    members = torch.zeros(len(cluster), num_slots + 1, dtype=torch.int64, device=cluster.device)
    members.scatter_add_(1, label, torch.ones_like(label))
    empty = live & (members[:, :num_slots] == 0)
    # The e-th empty slot takes the e-th token to spare; slots that take none write to an extra column.
    rank = (empty.cumsum(-1) - 1).clamp(0, num_tokens - 1)
    taken = spare.gather(1, rank)
    takes = empty & (cost.gather(1, rank) >= 0) & (empty.cumsum(-1) <= num_tokens)
    slot = torch.arange(num_slots, device=cluster.device).expand_as(taken)
    padded = torch.nn.functional.pad(cluster, (0, 1))
    return padded.scatter(1, taken.masked_fill(~takes, num_tokens), slot)[:, :-1].contiguous()


torch.library.impl("qm_spec::weighted_kmeans_assign", "default", weighted_kmeans_assign_reference)
torch.library.impl("qm_spec::weighted_kmeans_update", "default", weighted_kmeans_update_reference)


@torch.library.register_fake("qm_spec::weighted_kmeans_assign")
def _weighted_kmeans_assign_fake(points: Tensor, centres: Tensor, mask: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mask, dtype=torch.int64), torch.empty_like(mask, dtype=torch.float32)


@torch.library.register_fake("qm_spec::weighted_kmeans_update")
def _weighted_kmeans_update_fake(
    points: Tensor, mass: Tensor, cluster: Tensor, distance: Tensor, live: Tensor
) -> tuple[Tensor, Tensor]:
    centres = points.new_empty(points.shape[0], live.shape[1], points.shape[2], dtype=torch.float32)
    return torch.empty_like(cluster), centres


def weighted_kmeans_assign(points: Tensor, centres: Tensor, mask: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Find the nearest live centre of each token by Euclidean distance (ties: the earlier).

    Args:
        points: `[B, N, D]`, any float dtype; padding may hold anything.
        centres: `[B, K, D]` float32.
        mask: `[B, N]` bool, True = token.
        live: `[B, K]` bool, True = the slot is used.

    Returns:
        cluster `[B, N]` int64, 0..K-1, -1 at padding and where no slot is live, and squared distance
        to its centre `[B, N]` float32, 0 there; no gradient.

    Raises:
        TypeError: points are not floats, centres not float32, or masks not bool.
        ValueError: shapes that do not fit each other.

    Source: the `quickmergepp` README, "weighted k-means".
    """
    if points.ndim != 3 or centres.ndim != 3 or points.shape[::2] != centres.shape[::2]:
        raise ValueError(
            "weighted_kmeans_assign: points must be [B, N, D] and centres [B, K, D], "
            f"got {list(points.shape)} and {list(centres.shape)}"
        )
    if mask.shape != points.shape[:2] or live.shape != centres.shape[:2]:
        raise ValueError(
            f"weighted_kmeans_assign: mask must be {list(points.shape[:2])} and live {list(centres.shape[:2])}, "
            f"got {list(mask.shape)} and {list(live.shape)}"
        )
    if not points.is_floating_point() or centres.dtype != torch.float32:
        raise TypeError(
            f"weighted_kmeans_assign: points must be floats and centres float32, got {points.dtype} and {centres.dtype}"
        )
    if mask.dtype != torch.bool or live.dtype != torch.bool:
        raise TypeError(f"weighted_kmeans_assign: mask and live must be bool, got {mask.dtype} and {live.dtype}")
    return torch.ops.qm_spec.weighted_kmeans_assign(points.detach(), centres.detach(), mask, live)


def weighted_kmeans_update(
    points: Tensor, mass: Tensor, cluster: Tensor, distance: Tensor, live: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill the empty slots, then return each slot's mean weighted by mass.

    The e-th live slot without members takes the e-th of the tokens that their own clusters can spare:
    those that are not its nearest member (ties: the earlier), by falling `mass * distance` (ties: the
    earlier). So no live slot stays empty while there are tokens, duplicates or not.

    Args:
        points: `[B, N, D]`, any float dtype; padding may hold anything.
        mass: `[B, N]` float32, not negative.
        cluster: `[B, N]` int64, as `weighted_kmeans_assign` returns it.
        distance: `[B, N]` float32, likewise.
        live: `[B, K]` bool, True = the slot is used.

    Returns:
        cluster `[B, N]` int64 and centres `[B, K, D]` float32, 0 in slots that are not live; no gradient.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: shapes that do not fit each other.
        RuntimeError: a slot is not in -1..K-1; not looked at on a GPU, where such a token counts as padding.

    Source: the `quickmergepp` README, "weighted k-means"; the repair is ours.
    """
    shapes = {tuple(x.shape) for x in (mass, cluster, distance)}
    if points.ndim != 3 or shapes != {tuple(points.shape[:2])} or live.ndim != 2 or len(live) != len(points):
        raise ValueError(
            "weighted_kmeans_update: points must be [B, N, D], mass, cluster and distance [B, N] and live [B, K], "
            f"got {[list(x.shape) for x in (points, mass, cluster, distance, live)]}"
        )
    expected = (torch.float32, torch.int64, torch.float32, torch.bool)
    found = tuple(x.dtype for x in (mass, cluster, distance, live))
    if not points.is_floating_point() or found != expected:
        raise TypeError(
            "weighted_kmeans_update: points must be floats, mass float32, cluster int64, distance float32 and live "
            f"bool, got {points.dtype}, {', '.join(map(str, found))}"
        )
    return torch.ops.qm_spec.weighted_kmeans_update(points.detach(), mass.detach(), cluster, distance, live)
