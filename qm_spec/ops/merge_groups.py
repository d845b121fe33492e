"""`merge_groups_`: merge every group that has grown old, where it stands in its page."""

from __future__ import annotations

import torch
from torch import Tensor

from qm_spec.config import MergeConfig
from qm_spec.ops.merge_entries import merge_entries, saliency_mass
from qm_spec.ops.page import COUNT, LEVEL, MASS, check_page, group_levels, split_page

torch.library.define(
    "qm_spec::merge_groups_",
    "(Tensor(a!) cache, Tensor block_table, Tensor frontier, int head_dim, int[] config) -> ()",
)


def due_levels(frontier: Tensor, num_groups: int, config: MergeConfig) -> Tensor:
    """Return the level that each group should have: `[B, num_groups]` int64.

    Args:
        frontier: `[B]` verified tokens of each request.
        num_groups: groups counted from position 0.
        config: window, group size, schedule and doublings.
    """
    group = torch.arange(num_groups, device=frontier.device).unsqueeze(-1)
    spans = torch.tensor(config.spans, device=frontier.device)
    # A span is as old as its newest token.
    ends = (group // spans + 1) * spans * config.group_size
    limits = torch.tensor(config.level_distances, device=frontier.device)
    return (frontier.long().view(-1, 1, 1) - ends >= limits).sum(-1)


def merge_groups_reference(
    cache: Tensor, block_table: Tensor, frontier: Tensor, head_dim: int, packed: list[int]
) -> None:
    """Compute `merge_groups_` in plain PyTorch."""
    config = MergeConfig.unpack(packed)
    keys, values, state = split_page(cache, head_dim)
    groups_per_page = cache.shape[2] // config.group_size
    # Table columns beyond a request's pages hold other requests' ids; no due group lies there.
    due_tokens = int(frontier.max()) - config.window if frontier.numel() else 0
    num_pages = min(block_table.shape[1], -(-due_tokens // cache.shape[2]))
    if num_pages <= 0:
        return
    pages = block_table[:, :num_pages].long()
    first_group = pages * groups_per_page
    groups = (first_group.unsqueeze(-1) + torch.arange(groups_per_page, device=cache.device)).flatten(1)
    wanted = due_levels(frontier, groups.shape[1], config)
    # The null page is nobody's.
    wanted = wanted.masked_fill(groups < groups_per_page, 0)
    counts = (config.group_size, *config.schedule)
    if not bool((wanted > group_levels(state, pages, config.group_size, len(config.spans))).any()):
        return
    # Level by level, so that the result does not depend on when a group was visited.
    for new_level, span in enumerate(config.spans[: int(wanted.max())], 1):
        level = group_levels(state, pages, config.group_size, len(config.spans))
        due = (wanted >= new_level) & (level == new_level - 1)
        if span == 1:
            # Two requests of a batch may share a page: each group is merged once.
            now = torch.unique(groups[due]).unsqueeze(-1)
            if now.numel():
                _merge(keys, values, state, now, counts[new_level - 1], counts[new_level], new_level, config)
            continue
        empty = ~(state[:, 0, :: config.group_size, COUNT][pages].flatten(1) > 0)
        # Due and whole: two spans beside each other, [B, n, 2, groups of each].
        due, empty, level, members = (_pairs(words, span) for words in (due, empty, level, groups))
        pair = (due[..., 0] & _whole(level, empty, members // groups_per_page, len(config.schedule))).all(-1)
        # The first groups of both, and the last one.
        now = torch.cat([members[..., 0][pair], members[..., -1, -1:][pair]], -1)
        if now.numel():
            now = _first_of_each(now)
            _merge(keys, values, state, now[:, :2], 1, 1, new_level, config)
            last = now[:, 2]
            state[last // groups_per_page, :, last % groups_per_page * config.group_size, LEVEL] = new_level


torch.library.impl("qm_spec::merge_groups_", "default", merge_groups_reference)


def _pairs(words: Tensor, span: int) -> Tensor:
    """View `[B, groups]` as the two halves of every complete span: `[B, n, 2, span / 2]`."""
    number = words.shape[1] // span
    return words[:, : number * span].unflatten(1, (number, 2, span // 2))


def _whole(level: Tensor, empty: Tensor, page: Tensor, schedule_levels: int) -> Tensor:
    """Say which spans `[..., groups]`, whose heads have the level of such a span, are one span of this request.

    The head has the level also where another request merged it with pages that this one does not share. Inside a page
    they cannot part. Else a span is whole if its last group bears the mark of the merge: whoever did it had this last
    group, and so every page of the span.
    """
    doublings = level.shape[-1].bit_length() - 1
    marked = empty[..., -1] & (level[..., -1] >= schedule_levels + doublings)
    return marked | (page[..., 0] == page[..., -1])


def _first_of_each(pairs: Tensor) -> Tensor:
    """Drop the pairs `[n, 3]` whose first group another pair before them has: requests may share pages."""
    _, inverse = torch.unique(pairs[:, 0], return_inverse=True)
    number = torch.arange(len(pairs), device=pairs.device)
    first = torch.full_like(number, len(pairs)).scatter_reduce_(0, inverse, number, "amin")
    return pairs[first[first < len(pairs)]]


def _merge(
    keys: Tensor,
    values: Tensor,
    state: Tensor,
    groups: Tensor,
    old: int,
    keep: int,
    new_level: int,
    config: MergeConfig,
) -> None:
    """Merge the first `old` entries of each row's groups into the first `keep` slots of its first group.

    An entry whose key, value or mass is not finite is dropped: it reads as zeros without a mass.

    Args:
        keys: `[pages, G, P, d]`, changed in place.
        values: `[pages, G, P, d]`, changed in place.
        state: `[pages, G, P, 4]` float32, changed in place.
        groups: `[n, groups per row]` int64, page * groups per page + group within it.
        old: entries that each group has.
        keep: entries that each row will have.
        new_level: level of every group of a row afterwards.
        config: of the merge.
    """
    size = config.group_size
    groups_per_page = keys.shape[2] // size
    offset = torch.arange(size, device=keys.device)
    page = (groups // groups_per_page).unsqueeze(-1)
    slot = (groups % groups_per_page).unsqueeze(-1) * size + offset

    def read(words: Tensor) -> Tensor:
        # Advanced indices around the head slice put heads last: [n, m, old, G, ...] -> [n, G, m old, ...].
        return words[page, :, slot[..., :old]].flatten(1, 2).transpose(1, 2)

    k, v, s = read(keys), read(values), read(state)
    dropped = ~(k.isfinite() & v.isfinite()).all(-1) | ~s[..., MASS].isfinite()
    k, v = (x.masked_fill(dropped.unsqueeze(-1), 0.0) for x in (k, v))
    mass = saliency_mass(k, config) if new_level == 1 else s[..., MASS]
    mass = mass.masked_fill(dropped | ~mass.isfinite(), 0.0)
    merged = merge_entries(k, v, mass, s[..., COUNT], keep)
    target = page[:, 0], slice(None), slot[:, 0, :keep]
    keys[target] = merged.keys.transpose(1, 2)
    values[target] = merged.values.transpose(1, 2)
    new_state = state.new_zeros(*groups.shape, size, state.shape[1], 4)
    new_state[:, 0, :keep, :, MASS] = merged.mass.transpose(1, 2)
    new_state[:, 0, :keep, :, COUNT] = merged.count.transpose(1, 2)
    new_state[:, :, 0, :, LEVEL] = new_level
    state[page, :, slot] = new_state


@torch.library.register_fake("qm_spec::merge_groups_")
def _merge_groups_fake(*args: object) -> None:
    return None


def merge_groups_(cache: Tensor, block_table: Tensor, frontier: Tensor, head_dim: int, config: MergeConfig) -> None:
    """Merge in place every group whose distance to the frontier calls for a higher level.

    Idempotent, and a function of each group's content alone: a group shared by two requests ends
    the same whoever comes first, and in however many steps. Levels never fall. A span of several
    groups may cross pages; where two requests share its first pages but not all, the first request
    that comes gives it its content, and the other keeps its own groups beside it. What the slots
    hold that a merge leaves empty is not specified.

    What a merge writes is finite. An entry with a key or value that is not (inf or NaN) is dropped: it counts as a
    token, and adds nothing else to its head's means, for it reads as zeros with mass 0. Where all entries of a cluster
    are dropped, zeros with mass 0 remain, which the next merge leaves out. Raw entries are kept as they were written:
    the window's attention may read them until they are merged, and no longer.

    Args:
        cache: `[pages, G, P, C]`, changed in place; page 0 is never touched.
        block_table: `[B, columns]` int32, the page of each P tokens.
        frontier: `[B]` int32, verified tokens; nothing within `window` of it is touched.
        head_dim: d.
        config: of the merge.

    Raises:
        ValueError: the group size does not divide the page size, or the cache does not fit `head_dim`.
    """
    if cache.shape[2] % config.group_size:
        raise ValueError(
            f"merge_groups_: group_size {config.group_size} must divide the page size {cache.shape[2]}; "
            "start vLLM with --block-size 16 or a multiple"
        )
    check_page(cache, head_dim)
    torch.ops.qm_spec.merge_groups_(cache, block_table, frontier, head_dim, config.pack())
