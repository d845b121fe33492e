"""`saliency_merge`: the mean of each group of tokens, weighted by saliency mass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

torch.library.define(
    "qm_spec::saliency_merge",
    "(Tensor tokens, Tensor mass, Tensor cluster, SymInt num_slots) -> (Tensor, Tensor, Tensor)",
)


def check_slots(op: str, cluster: Tensor, num_slots: int) -> None:
    """Raise RuntimeError, as a kernel does, where a slot is not in -1..num_slots-1; a GPU is not waited for."""
    if cluster.device.type == "cpu" and cluster.numel():
        for slot in (int(cluster.min()), int(cluster.max())):
            if not -1 <= slot < num_slots:
                raise RuntimeError(f"{op}: cluster must be in -1..{num_slots - 1}, got {slot}")


def saliency_merge_reference(
    tokens: Tensor, mass: Tensor, cluster: Tensor, num_slots: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `saliency_merge` in plain PyTorch."""
    check_slots("saliency_merge", cluster, num_slots)
    padding = ((cluster < 0) | (cluster >= num_slots)).unsqueeze(-1)
    # Padding may hold NaN, and a weight of 0 would not silence that.
    weight = mass.unsqueeze(-1).masked_fill(padding, 0.0)
    values = tokens.float().masked_fill(padding, 0.0)
    size = sum_by_slot(1.0 - padding.float(), cluster, num_slots)
    total = sum_by_slot(weight, cluster, num_slots)
    slot = cluster.unsqueeze(-1).masked_fill(padding, num_slots)
    # Divided first, so that a group of one is copied bit by bit.
    share = weight / torch.nn.functional.pad(total.masked_fill(total == 0, 1.0), (0, 0, 0, 1), value=1.0).gather(
        1, slot
    )
    return sum_by_slot(share * values, cluster, num_slots).to(tokens.dtype), size.squeeze(-1), total.squeeze(-1)


def sum_by_slot(values: Tensor, cluster: Tensor, num_slots: int) -> Tensor:
    """Sum the rows of each slot, the same way at every call on every device.

    Args:
        values: `[B, N, X]`.
        cluster: `[B, N]` int64; a row outside 0..K-1 is dropped.
        num_slots: K.

    Returns:
        `[B, K, X]`.
    """
    batch, _, width = values.shape
    # What is dropped goes to an extra slot.
    slot = cluster.masked_fill((cluster < 0) | (cluster >= num_slots), num_slots)
    row = (slot + (num_slots + 1) * torch.arange(batch, device=cluster.device).unsqueeze(-1)).flatten()
    total = values.new_zeros(batch * (num_slots + 1), width)
    if values.is_cuda:
        # There index_add adds in whatever order its threads come; this one sorts first.
        total = total.index_put((row,), values.flatten(0, 1), accumulate=True)
    else:
        total = total.index_add(0, row, values.flatten(0, 1))
    return total.view(batch, num_slots + 1, width)[:, :num_slots].contiguous()


torch.library.impl("qm_spec::saliency_merge", "default", saliency_merge_reference)


@torch.library.register_fake("qm_spec::saliency_merge")
def _saliency_merge_fake(
    tokens: Tensor, mass: Tensor, cluster: Tensor, num_slots: int
) -> tuple[Tensor, Tensor, Tensor]:
    per_slot = mass.new_empty(tokens.shape[0], num_slots)
    return tokens.new_empty(tokens.shape[0], num_slots, tokens.shape[2]), per_slot, torch.empty_like(per_slot)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tokens, mass, cluster, _ = inputs
    merged, _, total = output
    ctx.save_for_backward(tokens, mass, cluster, merged, total)


def _backward(
    ctx: Any, grad_merged: Tensor, grad_size: Tensor, grad_total: Tensor
) -> tuple[Tensor, Tensor, None, None]:
    tokens, mass, cluster, merged, total = ctx.saved_tensors
    padding = cluster < 0
    slot = cluster.clamp_min(0)
    rows = slot.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
    total = total.gather(1, slot)
    empty = padding | (total == 0)
    total = total.masked_fill(empty, 1.0)
    grad = grad_merged.float().gather(1, rows)
    away = tokens.float() - merged.float().gather(1, rows)
    grad_tokens = grad * (mass / total).unsqueeze(-1)
    grad_mass = (grad * away).sum(-1) / total + grad_total.gather(1, slot)
    return (
        grad_tokens.masked_fill(empty.unsqueeze(-1), 0.0).to(tokens.dtype),
        grad_mass.masked_fill(padding, 0.0),
        None,
        None,
    )


torch.library.register_autograd("qm_spec::saliency_merge", _backward, setup_context=_setup_context)


def saliency_merge(tokens: Tensor, mass: Tensor, cluster: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Average each group weighted by mass: `x_k = sum_{j in G_k} m_j x_j / sum_{j in G_k} m_j`.

    Every output is written: slots without members, or with a mass of 0, hold 0.

    Args:
        tokens: `[B, N, D]`, any float dtype; padding may hold anything.
        mass: `[B, N]` float32, not negative.
        cluster: `[B, N]` int64, slot of each token, 0..K-1; -1 at padding.
        num_slots: K.

    Returns:
        merged tokens `[B, K, D]` in the tokens' dtype (summed in float32), sizes `[B, K]` (tokens of
        each slot) and summed masses `[B, K]`, float32. Differentiable in tokens and mass.

    Raises:
        TypeError: tokens or mass are not floats of those types, or `cluster` is not int64.
        ValueError: shapes that do not fit each other, or `num_slots` is negative.
        RuntimeError: a slot is not in -1..K-1; not looked at on a GPU, where such a token counts as padding.

    Source: QuickMerge++, arXiv 2508.13204.
    """
    if tokens.ndim != 3 or mass.shape != tokens.shape[:2] or cluster.shape != tokens.shape[:2]:
        raise ValueError(
            "saliency_merge: tokens must be [B, N, D], mass and cluster [B, N], "
            f"got {list(tokens.shape)}, {list(mass.shape)} and {list(cluster.shape)}"
        )
    if not tokens.is_floating_point() or mass.dtype != torch.float32 or cluster.dtype != torch.int64:
        raise TypeError(
            "saliency_merge: tokens must be floats, mass float32 and cluster int64, "
            f"got {tokens.dtype}, {mass.dtype} and {cluster.dtype}"
        )
    if num_slots < 0:
        raise ValueError(f"saliency_merge: num_slots must be at least 0, got {num_slots}")
    return torch.ops.qm_spec.saliency_merge(tokens, mass, cluster, num_slots)
