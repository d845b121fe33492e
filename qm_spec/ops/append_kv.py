"""`append_kv_`: write new keys and values into their slots of the paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from qm_spec.ops.page import check_page, split_page

torch.library.define("qm_spec::append_kv_", "(Tensor(a!) cache, Tensor key, Tensor value, Tensor slots) -> ()")


def append_kv_reference(cache: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Compute `append_kv_` in plain PyTorch."""
    keys, values, state = split_page(cache, key.shape[-1])
    # Slot -1 marks padding. Its row goes to slot 0 of the null page 0, which nobody reads.
    slots = slots.clamp_min(0)
    page, offset = slots // cache.shape[2], slots % cache.shape[2]
    keys[page, :, offset] = key.to(cache.dtype)
    values[page, :, offset] = value.to(cache.dtype)
    state[page, :, offset] = state.new_tensor([1.0, 1.0, 0.0, 0.0])


torch.library.impl("qm_spec::append_kv_", "default", append_kv_reference)


@torch.library.register_fake("qm_spec::append_kv_")
def _append_kv_fake(cache: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    return None


def append_kv_(cache: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """Write `key` and `value` of T rows into `cache`, with mass 1 and count 1.

    A row that lands on a group's first slot makes that group raw again: pages are reused.

    Args:
        cache: `[pages, G, P, C]`, changed in place; page 0 is a scratch page.
        key: `[T, G, d]`, unrotated.
        value: `[T, G, d]`.
        slots: `[T]` int64, `page * P + offset`; negative rows are padding and are not kept.

    Raises:
        ValueError: shapes that do not fit each other.
        TypeError: `slots` is not int64.
    """
    if key.shape != value.shape or key.ndim != 3 or key.shape[1] != cache.shape[1]:
        raise ValueError(
            f"append_kv_: key and value must both be [T, {cache.shape[1]}, d], "
            f"got {list(key.shape)} and {list(value.shape)}"
        )
    if slots.dtype != torch.int64:
        raise TypeError(f"append_kv_: slots must be int64, got {slots.dtype}")
    if slots.shape != key.shape[:1]:
        raise ValueError(f"append_kv_: slots must be [{key.shape[0]}], got {list(slots.shape)}")
    check_page(cache, key.shape[-1])
    torch.ops.qm_spec.append_kv_(cache, key, value, slots)
