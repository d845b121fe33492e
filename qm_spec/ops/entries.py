"""The entries that a request attends to, gathered from its pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qm_spec.config import MergeConfig
from qm_spec.ops.page import COUNT, group_levels, split_page


@dataclass(frozen=True)
class Entries:
    """What each request of a batch may attend to, padded to the longest.

    Attributes:
        keys: `[B, G, E, d]`.
        values: `[B, G, E, d]`.
        position: `[B, E]` int64, of raw entries; meaningless for merged ones.
        raw: `[B, E]` bool, a single token with a position.
        count: `[B, G, E]` float32, tokens an entry stands for; 0 where nothing is.
        group_size: tokens, the most that an entry counts for in attention.
    """

    keys: Tensor
    values: Tensor
    position: Tensor
    raw: Tensor
    count: Tensor
    group_size: int


def gather_entries(
    cache: Tensor, block_table: Tensor, num_tokens: Tensor, head_dim: int, config: MergeConfig
) -> Entries:
    """Gather the raw and merged entries of each request.

    Args:
        cache: `[pages, G, P, C]`.
        block_table: `[B, columns]` int32.
        num_tokens: `[B]` int, tokens of each request in the cache.
        head_dim: d.
        config: group size, schedule and doublings.

    Returns:
        See `Entries`; the copy costs time by the entries attended, not by the tokens seen.
    """
    keys, values, state = split_page(cache, head_dim)
    page_size, group_size = cache.shape[2], config.group_size
    longest = int(num_tokens.max()) if num_tokens.numel() else 0
    pages = block_table[:, : -(-longest // page_size)].long()
    level = group_levels(state, pages, group_size, len(config.spans))
    num_doublings = len(config.spans) - len(config.schedule)
    held = torch.tensor([group_size, *config.schedule, *[1] * num_doublings], device=cache.device)[level]
    # Of a span only the first group holds an entry.
    first_count = state[:, 0, ::group_size, COUNT][pages].flatten(1)
    held = torch.where((level > len(config.schedule)) & ~(first_count > 0), 0, held)
    offset = torch.arange(group_size, device=cache.device)
    position = torch.arange(level.shape[1] * group_size, device=cache.device).view(-1, group_size)
    raw = (level == 0).unsqueeze(-1)
    # Behind a request's tokens its table holds other pages, with entries of their own.
    live = (position < num_tokens.view(-1, 1, 1)) & (raw | (offset < held.unsqueeze(-1)))

    live, raw = live.flatten(1), raw.expand_as(live).flatten(1)
    batch, where = live.nonzero(as_tuple=True)
    rank = (live.cumsum(1) - 1)[batch, where]
    num_entries = int(live.sum(1).max()) if live.numel() else 0

    def padded(rows: Tensor, fill: float) -> Tensor:
        out = rows.new_full((len(pages), num_entries, *rows.shape[1:]), fill)
        out[batch, rank] = rows
        return out

    page, slot = pages[batch, where // page_size], where % page_size
    count = state[page, :, slot, COUNT].nan_to_num(0.0, 0.0, 0.0).clamp(0, config.spans[-1] * group_size)
    count = torch.where(raw[batch, where].unsqueeze(-1), 1.0, count)
    return Entries(
        keys=padded(keys[page, :, slot], 0.0).transpose(1, 2),
        values=padded(values[page, :, slot], 0.0).transpose(1, 2),
        position=padded(where, 0),
        raw=padded(raw[batch, where], False),
        count=padded(count, 0.0).transpose(1, 2),
        group_size=group_size,
    )


def entry_bias(entries: Entries, row_position: Tensor, slopes: Tensor, far_bias: Tensor) -> Tensor:
    """Return what is added to the scores of each head, row and entry.

    Raw entries at or before the row: `-slope_h * distance`. Raw entries behind it: -inf. Merged
    entries, which have no position: `far_bias_h + log(min(count, group_size))`. That is ToMe's proportional
    attention within a group. A span of many groups counts as one: training, at short lengths, knows no
    heavier entry, and distant text would outweigh the near one.

    Args:
        entries: of B requests.
        row_position: `[B, T]` int64, position of each query row.
        slopes: `[H]` float32, per token.
        far_bias: `[H]` float32.

    Returns:
        `[B, H, T, E]` float32.
    """
    heads_per_group = len(slopes) // entries.count.shape[1]
    distance = (row_position.unsqueeze(-1) - entries.position.unsqueeze(1)).unsqueeze(1)
    near = -slopes.view(-1, 1, 1) * distance
    near = near.masked_fill(distance < 0, float("-inf"))
    log_count = entries.count.clamp_max(entries.group_size).log().repeat_interleave(heads_per_group, 1).unsqueeze(2)
    bias = torch.where(entries.raw[:, None, None], near, far_bias.view(-1, 1, 1))
    return bias + log_count
