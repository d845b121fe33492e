"""The page: where keys, values and merge state lie in the paged cache.

The cache is `[pages, G, P, C]` in the model's dtype. Of the C elements of one slot the first d are
the key (never rotated), the next d the value, and the rest four float32 words of merge state:

    mass    saliency mass of the entry, the weight it has in the next merge
    count   tokens the entry stands for; 0 marks an empty slot
    level   of the group, in the group's first slot: 0 raw, l >= 1 merged to `schedule[l - 1]`
            entries; past the schedule the group's one entry lies in the first slot of its span's
            first group, the first slots of the others are empty, and the span's last group has the
            level of the span as its first one has
    (spare) keeps C a multiple of 16 bytes

State lies inside the page so that block copies, offload and memory accounting carry it. A new page
holds its previous owner's bytes, so readers bound levels and counts and never trust page 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

STATE_BYTES = 16
MASS, COUNT, LEVEL = 0, 1, 2


def slot_elements(head_dim: int, dtype: torch.dtype) -> int:
    """Return C, the elements of one slot: key, value and state."""
    return 2 * head_dim + STATE_BYTES // dtype.itemsize


def check_page(cache: Tensor, head_dim: int) -> None:
    """Raise `ValueError` where the cache is not `[pages, G, P, C]` with the C of `head_dim`."""
    expected = slot_elements(head_dim, cache.dtype)
    if cache.ndim != 4 or cache.shape[-1] != expected or cache.stride(-1) != 1:
        raise ValueError(
            f"page: cache must be [pages, G, P, {expected}] for head_dim {head_dim} in {cache.dtype}, with a "
            f"contiguous last dimension, got {list(cache.shape)} with strides {list(cache.stride())}"
        )


def split_page(cache: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """View the cache as keys, values and state.

    Args:
        cache: `[pages, G, P, C]`, any strides with a contiguous last dimension.
        head_dim: d.

    Returns:
        keys `[pages, G, P, d]`, values `[pages, G, P, d]`, state `[pages, G, P, 4]` float32; views.

    Raises:
        ValueError: C does not fit `head_dim`.
    """
    check_page(cache, head_dim)
    return (
        cache[..., :head_dim],
        cache[..., head_dim : 2 * head_dim],
        cache[..., 2 * head_dim :].view(torch.float32),
    )


def group_levels(state: Tensor, pages: Tensor, group_size: int, num_levels: int) -> Tensor:
    """Read the level of every group of the listed pages, bounded against stale bytes.

    Args:
        state: `[pages, G, P, 4]` float32.
        pages: `[B, n]` int64 page ids.
        group_size: M.
        num_levels: L.

    Returns:
        `[B, n * P / M]` int64, 0..L. All heads of a group have the same level; head 0 is read.
    """
    words = state[:, 0, ::group_size, LEVEL][pages]
    return words.nan_to_num(0.0, 0.0, 0.0).clamp(0, num_levels).long().flatten(1)
