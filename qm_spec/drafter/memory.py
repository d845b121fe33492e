"""The merged memory of whole sequences at once, as training sees it, and its mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qm_spec.config import MergeConfig
from qm_spec.ops.entries import Entries, entry_bias
from qm_spec.ops.merge_entries import Merged, merge_entries, saliency_mass
from qm_spec.ops.merge_groups import due_levels


def merge_levels(keys: Tensor, values: Tensor, config: MergeConfig) -> list[Merged]:
    """Merge every full group of each sequence through all levels of the schedule.

    Args:
        keys: `[B, G, N, d]`, raw.
        values: `[B, G, N, d]`.
        config: the merging schedule.

    Returns:
        One `Merged` of `[B, G, n, R, d]` per level, n groups, or spans of groups, of R entries; the
        same arithmetic as `merge_groups_`. Levels that no row of the sequence is old enough to see are left out.
    """
    size = config.group_size
    full = keys.shape[2] // size * size
    k = keys[:, :, :full].unflatten(2, (-1, size))
    v = values[:, :, :full].unflatten(2, (-1, size))
    mass = saliency_mass(k, config)
    count = torch.ones_like(mass)
    levels = []
    for number, (span, distance) in enumerate(zip(config.spans, config.level_distances, strict=True)):
        if keys.shape[2] < span * size + distance:
            break
        if span > 1:
            whole = k.shape[2] // 2 * 2
            k, v = (x[:, :, :whole].unflatten(2, (-1, 2)).flatten(3, 4) for x in (k, v))
            mass, count = (x[:, :, :whole].unflatten(2, (-1, 2)).flatten(3, 4) for x in (mass, count))
        keep = config.schedule[number] if span == 1 else 1
        level = merge_entries(k, v, mass, count, keep)
        levels.append(level)
        k, v, mass, count = level.keys, level.values, level.mass, level.count
    return levels


@dataclass(frozen=True)
class Memory:
    """Raw tokens followed by every level's entries of whole sequences: E = N + sum(n R).

    Attributes:
        entries: keys, values, positions and counts of all of them.
        group: `[E]` int64, the group of each entry, the first one of its span.
        level: `[E]` int64, the level at which each entry exists; 0 = raw.
        config: the merging schedule.
    """

    entries: Entries
    group: Tensor
    level: Tensor
    config: MergeConfig

    @classmethod
    def build(cls, keys: Tensor, values: Tensor, levels: list[Merged], config: MergeConfig) -> Memory:
        """Join raw keys and values `[B, G, N, d]` with their merged levels."""
        batch, heads, num_tokens, _ = keys.shape
        device = keys.device
        position = torch.arange(num_tokens, device=device)
        groups, ranks = [position // config.group_size], [torch.zeros_like(position)]
        parts_k, parts_v = [keys], [values]
        parts_n = [keys.new_ones(batch, heads, num_tokens, dtype=torch.float32)]
        for number, level in enumerate(levels, 1):
            num_groups, kept = level.mass.shape[2:]
            first = torch.arange(num_groups, device=device) * config.spans[number - 1]
            group = first.repeat_interleave(kept)
            groups.append(group)
            ranks.append(torch.full_like(group, number))
            parts_k.append(level.keys.flatten(2, 3))
            parts_v.append(level.values.flatten(2, 3))
            parts_n.append(level.count.flatten(2))
        group, rank = torch.cat(groups), torch.cat(ranks)
        raw = rank == 0
        place = torch.zeros_like(group)
        place[:num_tokens] = position
        entries = Entries(
            keys=torch.cat(parts_k, 2),
            values=torch.cat(parts_v, 2),
            position=place.expand(batch, -1),
            raw=raw.expand(batch, -1),
            count=torch.cat(parts_n, 2),
            group_size=config.group_size,
        )
        return cls(entries, group, rank, config)

    def bias(self, row_position: Tensor, slopes: Tensor, far_bias: Tensor) -> Tensor:
        """Return the mask and bias of inference for rows of any age.

        A row at position p sees what the cache holds when p + 1 tokens are verified: of each group
        the entries of its level at that time, and nothing behind p.

        Args:
            row_position: `[B, T]` int64.
            slopes: `[H]`.
            far_bias: `[H]`.

        Returns:
            `[B, H, T, E]` float32, -inf where a row does not attend.
        """
        num_groups = int(self.group.max()) + 1
        due = due_levels(row_position.flatten() + 1, num_groups, self.config)
        visible = due[:, self.group] == self.level
        bias = entry_bias(self.entries, row_position, slopes, far_bias)
        return bias.masked_fill(~visible.view(*row_position.shape, -1).unsqueeze(1), float("-inf"))
