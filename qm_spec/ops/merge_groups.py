"""`merge_groups_`: merge every group that has grown old, where it stands in its page."""

from __future__ import annotations

import torch
from torch import Tensor

from qm_spec.config import MergeConfig
from qm_spec.ops.merge_entries import merge_entries, saliency_mass
from qm_spec.ops.page import COUNT, LEVEL, MASS, group_levels, split_page

torch.library.define(
    "qm_spec::merge_groups_",
    "(Tensor(a!) cache, Tensor block_table, Tensor frontier, int head_dim, int window, int group_size, "
    "int[] schedule, str saliency, float temperature, float epsilon) -> ()",
)


def due_levels(frontier: Tensor, num_groups: int, config: MergeConfig) -> Tensor:
    """Return the level that each group should have: `[B, num_groups]` int64.

    Args:
        frontier: `[B]` verified tokens of each request.
        num_groups: groups counted from position 0.
        config: window, group size and schedule.
    """
    ends = torch.arange(1, num_groups + 1, device=frontier.device) * config.group_size
    distance = frontier.long().unsqueeze(-1) - ends
    limits = torch.tensor(config.level_distances, device=frontier.device)
    return (distance.unsqueeze(-1) >= limits).sum(-1)


@torch.library.impl("qm_spec::merge_groups_", "default")
def _merge_groups_reference(
    cache: Tensor,
    block_table: Tensor,
    frontier: Tensor,
    head_dim: int,
    window: int,
    group_size: int,
    schedule: list[int],
    saliency: str,
    temperature: float,
    epsilon: float,
) -> None:
    config = MergeConfig(window, group_size, tuple(schedule), saliency, temperature, epsilon)
    keys, values, state = split_page(cache, head_dim)
    groups_per_page = cache.shape[2] // group_size
    # Table columns beyond a request's pages hold other requests' ids; no due group lies there.
    due_tokens = int(frontier.max()) - window if frontier.numel() else 0
    num_pages = min(block_table.shape[1], -(-due_tokens // cache.shape[2]))
    if num_pages <= 0:
        return
    pages = block_table[:, :num_pages].long()
    wanted = due_levels(frontier, num_pages * groups_per_page, config)
    level = group_levels(state, pages, group_size, len(schedule))
    group_ids = pages.repeat_interleave(groups_per_page, 1) * groups_per_page
    group_ids = group_ids + torch.arange(num_pages * groups_per_page, device=cache.device) % groups_per_page
    due = (wanted > level) & (pages.repeat_interleave(groups_per_page, 1) != 0)
    if not bool(due.any()):
        return
    # Two requests of a batch may share a page: each group is merged once, as far as either wants.
    ids, inverse = torch.unique(group_ids[due], return_inverse=True)
    wanted = torch.zeros_like(ids).scatter_reduce_(0, inverse, wanted[due], "amax")
    level = torch.zeros_like(ids).scatter_reduce_(0, inverse, level[due], "amax")
    counts = (group_size, *schedule)
    for new_level in range(1, len(counts)):
        # Level by level, so that the result does not depend on when the group was visited.
        now = ids[(level < new_level) & (wanted >= new_level)]
        if now.numel() == 0:
            continue
        old, keep = counts[new_level - 1], counts[new_level]
        page = (now // groups_per_page).unsqueeze(-1)
        first = (now % groups_per_page).unsqueeze(-1) * group_size
        source = first + torch.arange(old, device=cache.device)
        # Advanced indices around the head slice put heads last: [n, old, G, ...] -> [n, G, old, ...].
        k = keys[page, :, source].transpose(1, 2)
        v = values[page, :, source].transpose(1, 2)
        s = state[page, :, source].transpose(1, 2)
        mass = saliency_mass(k, config) if new_level == 1 else s[..., MASS]
        merged = merge_entries(k, v, mass, s[..., COUNT], keep)
        target = first + torch.arange(keep, device=cache.device)
        keys[page, :, target] = merged.keys.transpose(1, 2)
        values[page, :, target] = merged.values.transpose(1, 2)
        new_state = state.new_zeros(len(now), cache.shape[1], group_size, 4)
        new_state[:, :, :keep, MASS] = merged.mass
        new_state[:, :, :keep, COUNT] = merged.count
        new_state[:, :, 0, LEVEL] = new_level
        state[page, :, first + torch.arange(group_size, device=cache.device)] = new_state.transpose(1, 2)


@torch.library.register_fake("qm_spec::merge_groups_")
def _merge_groups_fake(*args: object) -> None:
    return None


def merge_groups_(cache: Tensor, block_table: Tensor, frontier: Tensor, head_dim: int, config: MergeConfig) -> None:
    """Merge in place every group whose distance to the frontier calls for a higher level.

    Idempotent, and a function of each group's content alone: a group shared by two requests ends
    the same whoever comes first, and in however many steps. Levels never fall.

    Args:
        cache: `[pages, G, P, C]`, changed in place; page 0 is never touched.
        block_table: `[B, columns]` int32, the page of each P tokens.
        frontier: `[B]` int32, verified tokens; nothing within `window` of it is touched.
        head_dim: d.
        config: window, group size, schedule and saliency.

    Raises:
        ValueError: the group size does not divide the page size.
    """
    if cache.shape[2] % config.group_size:
        raise ValueError(
            f"merge_groups_: group_size {config.group_size} must divide the page size {cache.shape[2]}; "
            "start vLLM with --block-size 16 or a multiple"
        )
    torch.ops.qm_spec.merge_groups_(
        cache,
        block_table,
        frontier,
        head_dim,
        config.window,
        config.group_size,
        list(config.schedule),
        config.saliency,
        config.temperature,
        config.epsilon,
    )
