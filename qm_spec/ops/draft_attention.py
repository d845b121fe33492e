"""`draft_attention`: draft rows attend to a memory and to the provisional tokens drafted before them."""

from __future__ import annotations

import torch
from torch import Tensor


def draft_attention(
    query: Tensor,
    memory_keys: Tensor,
    memory_values: Tensor,
    memory_bias: Tensor,
    draft_keys: Tensor,
    draft_values: Tensor,
    slopes: Tensor,
) -> Tensor:
    """Attend from T rows to E shared entries and to each row's own J drafted tokens.

    Args:
        query: `[B, T, H, d]`.
        memory_keys: `[B, G, E, d]`.
        memory_values: `[B, G, E, d]`.
        memory_bias: `[B, H, T, E]`, added to the scores.
        draft_keys: `[B, T, J, G, d]`, the newest last, which is the row's own.
        draft_values: `[B, T, J, G, d]`.
        slopes: `[H]`, bias per token of distance between drafted tokens.

    Returns:
        `[B, T, H, d]`.
    """
    batch, rows, heads, head_dim = query.shape
    _, groups, num_entries, _ = memory_keys.shape
    shared = heads // groups
    scale = head_dim**-0.5
    # [B, G, H/G, T, d]: the query heads of one key/value head side by side.
    q = query.view(batch, rows, groups, shared, head_dim).permute(0, 2, 3, 1, 4)
    scores = (q.flatten(2, 3) @ memory_keys.mT).view(batch, heads, rows, num_entries) * scale + memory_bias
    num_drafted = draft_keys.shape[2]
    if num_drafted == 0:
        weights = torch.softmax(scores, -1).view(batch, groups, shared * rows, num_entries)
        out = weights @ memory_values
    else:
        own = torch.einsum("bgmtd,btjgd->bgmtj", q, draft_keys).reshape(batch, heads, rows, -1) * scale
        age = torch.arange(num_drafted - 1, -1, -1, device=query.device)
        own = own - slopes.view(-1, 1, 1) * age
        weights = torch.softmax(torch.cat([scores, own], -1), -1)
        far, near = weights.split([num_entries, num_drafted], -1)
        out = far.view(batch, groups, shared * rows, num_entries) @ memory_values
        near = near.view(batch, groups, shared, rows, num_drafted)
        out = out + torch.einsum("bgmtj,btjgd->bgmtd", near, draft_values).flatten(2, 3)
    out = out.view(batch, groups, shared, rows, head_dim)
    return out.permute(0, 3, 1, 2, 4).reshape(batch, rows, heads, head_dim)
