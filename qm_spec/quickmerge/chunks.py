"""Chunks: a sequence compressed piece by piece, so that no merged token waits for what comes later."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qm_spec.quickmerge.merging import MergedTokens


def split_chunks(tokens: Tensor, token_mask: Tensor, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut each sequence into chunks that stand in the batch, padding at the end of the last one.

    Args:
        tokens: `[..., B, N, D]`.
        token_mask: `[B, N]` bool, True = token.
        chunk_size: M.

    Returns:
        chunks `[..., B C, M, D]` with C the chunks that N tokens fill, their mask `[B C, M]`, and the
        order `[B, N]` int64 in which the tokens stand in them: as they came, padding last.
    """
    num_tokens, width = tokens.shape[-2:]
    order = (~token_mask).byte().argsort(dim=-1, stable=True)
    tail = -num_tokens % chunk_size
    index = order.unsqueeze(-1).expand(*tokens.shape[:-3], *order.shape, width)
    chunks = F.pad(tokens.gather(-2, index), (0, 0, 0, tail)).unflatten(-2, (-1, chunk_size))
    mask = F.pad(token_mask.gather(1, order), (0, tail)).view(-1, chunk_size)
    return chunks.flatten(-4, -3), mask, order


def join_chunks(merged: MergedTokens, order: Tensor) -> MergedTokens:
    """Join the merged chunks of each sequence, live slots first.

    Args:
        merged: of `[B C, M, D]`, K slots each.
        order: `[B, N]`, from `split_chunks`.

    Returns:
        Of `[B, N, D]`; as many slots as N tokens without padding fill.
    """
    batch, num_tokens = order.shape
    (rows, chunk_size), slots = merged.cluster.shape, merged.live.shape[1]
    width = num_tokens // chunk_size * slots + min(slots, num_tokens % chunk_size)
    chunk = torch.arange(rows // batch, device=order.device).repeat(batch).unsqueeze(-1)

    live = merged.live.view(batch, -1)
    place = (merged.place + chunk * chunk_size).view(batch, -1).clamp_max(num_tokens - 1)
    place = order.gather(1, place).masked_fill(~live, num_tokens)
    front = (~live).byte().argsort(dim=-1, stable=True)
    slot = torch.arange(front.shape[1], device=order.device).expand_as(front)
    # Where each slot stands now; padding, of slot -1, looks up one more that holds -1.
    moved = F.pad(torch.empty_like(front).scatter(1, front, slot), (0, 1), value=-1)
    cluster = torch.where(merged.cluster < 0, front.shape[1], merged.cluster + chunk * slots)
    front = front[:, :width]
    rows_of = front.unsqueeze(-1).expand(-1, -1, merged.tokens.shape[-1])
    return MergedTokens(
        tokens=merged.tokens.reshape(batch, -1, merged.tokens.shape[-1]).gather(1, rows_of),
        live=live.gather(1, front),
        size=merged.size.reshape(batch, -1).gather(1, front),
        mass=merged.mass.reshape(batch, -1).gather(1, front),
        place=place.gather(1, front),
        cluster=join_values(moved.gather(1, cluster.view(batch, -1)), order),
        mask=join_values(merged.mask, order),
    )


def join_values(values: Tensor, order: Tensor) -> Tensor:
    """Return values per token, `[B, N, ...]`, of those of the chunks' tokens, `[B C, M, ...]`."""
    values = values.reshape(len(order), -1, *values.shape[2:])[:, : order.shape[1]]
    index = order.view(*order.shape, *[1] * (values.ndim - 2)).expand_as(values)
    return torch.empty_like(values).scatter(1, index, values)
