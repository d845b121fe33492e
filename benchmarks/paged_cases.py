"""Cases of the operators of the merged cache: one request of N tokens in scattered pages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from cases import Case
from torch import Tensor
from torch.nn import functional as F

from qm_spec.config import MergeConfig
from qm_spec.ops import append_kv_, merge_groups_
from qm_spec.ops.append_kv import append_kv_reference
from qm_spec.ops.merge_groups import merge_groups_reference
from qm_spec.ops.merged_attention import merged_attention_reference
from qm_spec.ops.page import STATE_BYTES, slot_elements

CONFIG = MergeConfig()


@dataclass(frozen=True)
class PagedSizes:
    """N tokens of context, T query rows of H heads over G key/value heads of d, P tokens a page."""

    num_tokens: int
    num_rows: int = 1
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 128

    def __str__(self) -> str:
        heads = f"H{self.num_heads} G{self.num_kv_heads} d{self.head_dim} P{self.page_size}"
        return f"N{self.num_tokens} T{self.num_rows} {heads}"


@dataclass
class Context:
    """A request's cache, raw or merged, and its tokens side by side, as SDPA takes them."""

    sizes: PagedSizes
    dtype: torch.dtype
    key: Tensor = field(init=False)
    value: Tensor = field(init=False)
    slots: Tensor = field(init=False)
    cache: Tensor = field(init=False)
    table: Tensor = field(init=False)
    length: Tensor = field(init=False)

    def __post_init__(self) -> None:
        sizes = self.sizes
        tokens, page_size = sizes.num_tokens, sizes.page_size
        num_pages = -(-tokens // page_size)
        self.key, self.value = torch.randn(2, tokens, sizes.num_kv_heads, sizes.head_dim).to(self.dtype)
        self.table = (torch.randperm(num_pages) + 1).int().unsqueeze(0)
        position = torch.arange(tokens)
        self.slots = self.table[0].long()[position // page_size] * page_size + position % page_size
        elements = slot_elements(sizes.head_dim, self.dtype)
        self.cache = torch.zeros(num_pages + 1, sizes.num_kv_heads, page_size, elements, dtype=self.dtype)
        self.length = torch.tensor([tokens], dtype=torch.int32)
        append_kv_(self.cache, self.key, self.value, self.slots)

    def merge(self) -> None:
        """Merge all that is due."""
        merge_groups_(self.cache, self.table, self.length, self.sizes.head_dim, CONFIG)


def _slot_bytes(sizes: PagedSizes, dtype: torch.dtype) -> int:
    return 2 * sizes.head_dim * dtype.itemsize + STATE_BYTES


def append_case() -> Case:
    """A prefill's keys and values into their slots."""

    def arguments(sizes: PagedSizes, dtype: torch.dtype) -> tuple[Any, ...]:
        context = Context(sizes, dtype)
        return context.cache, context.key, context.value, context.slots

    def index_put(cache: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
        # Without the state: what a cache of keys and values alone would cost.
        page, offset = slots // cache.shape[2], slots % cache.shape[2]
        cache[page, :, offset, : 2 * key.shape[-1]] = torch.cat([key, value], -1)

    return Case(
        "append_kv_",
        arguments,
        append_kv_reference,
        index_put,
        "index_put, no state",
        moved_bytes=lambda sizes, dtype: (
            sizes.num_tokens * sizes.num_kv_heads * (2 * _slot_bytes(sizes, dtype) - STATE_BYTES)
        ),
    )


def merge_case() -> Case:
    """A prefill of raw tokens to the levels that they are due for."""
    raw = torch.empty(0)

    def arguments(sizes: PagedSizes, dtype: torch.dtype) -> tuple[Any, ...]:
        nonlocal raw
        context = Context(sizes, dtype)
        raw = context.cache.clone()
        return context.cache, context.table, context.length, sizes.head_dim, CONFIG.pack()

    def restore(cache: Tensor, *_: object) -> None:
        cache.copy_(raw)

    def index_add(cache: Tensor, _table: Tensor, _length: Tensor, head_dim: int, *_: object) -> Tensor:
        # The first level's sums alone: the pages are whole and in order, and clusters and masses are given.
        rows = cache[1:, ..., : 2 * head_dim].reshape(-1, 2 * head_dim).float()
        cluster = torch.arange(len(rows), device=rows.device) // 2
        return rows.new_zeros(len(rows) // 2, 2 * head_dim).index_add_(0, cluster, rows * 0.5).to(cache.dtype)

    def moved_bytes(sizes: PagedSizes, dtype: torch.dtype) -> int:
        # Every slot that is due is read, and its state written; what is left is written.
        due = (sizes.num_tokens - CONFIG.window) // CONFIG.group_size * CONFIG.group_size
        left = CONFIG.entries_attended(sizes.num_tokens) - (sizes.num_tokens - due)
        slot = _slot_bytes(sizes, dtype)
        return sizes.num_kv_heads * (due * (slot + STATE_BYTES) + left * (slot - STATE_BYTES))

    def flops(sizes: PagedSizes) -> int:
        # The scores of the first level, which are symmetric.
        return sizes.num_kv_heads * (sizes.num_tokens - CONFIG.window) * CONFIG.group_size * sizes.head_dim

    return Case(
        "merge_groups_",
        arguments,
        merge_groups_reference,
        index_add,
        "index_add_, sums of level 1",
        flops,
        moved_bytes,
        restore,
    )


def merge_again_case() -> Case:
    """What a decode step pays where nothing is due: finding that out."""

    def arguments(sizes: PagedSizes, dtype: torch.dtype) -> tuple[Any, ...]:
        context = Context(sizes, dtype)
        context.merge()
        return context.cache, context.table, context.length, sizes.head_dim, CONFIG.pack()

    return Case("merge_groups_", arguments, merge_groups_reference, moved_bytes=lambda sizes, dtype: 0)


def attention_case(alternative: str) -> Case:
    """The rows of a decode step over raw window and merged entries, against `sdpa` or `paged` full attention."""
    context: Context

    def arguments(sizes: PagedSizes, dtype: torch.dtype) -> tuple[Any, ...]:
        nonlocal context
        context = Context(sizes, dtype)
        tensors = context.cache.clone(), context.table, context.length
        context.merge()
        merged = context.cache
        # The context keeps the raw cache.
        context.cache = tensors[0]
        query = torch.randn(sizes.num_rows, sizes.num_heads, sizes.head_dim).to(dtype)
        starts = torch.tensor([0, sizes.num_rows], dtype=torch.int32)
        slopes, far_bias = torch.rand(2, sizes.num_heads)
        return query, merged, *tensors[1:], starts, slopes, far_bias, sizes.num_rows, CONFIG.pack()

    def paged(query: Tensor, _cache: Tensor, *rest: Any) -> Tensor:
        context.cache = context.cache.to(query.device)
        return torch.ops.qm_spec.merged_attention(query, context.cache, *rest)[0]

    def sdpa(query: Tensor, *_: Any) -> Tensor:
        context.key, context.value = context.key.to(query.device), context.value.to(query.device)
        # Keys and values side by side, no bias, no mask: less than a drafter needs.
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, context.key, context.value))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def moved_bytes(sizes: PagedSizes, dtype: torch.dtype) -> int:
        entries = CONFIG.entries_attended(sizes.num_tokens)
        rows = 2 * sizes.num_rows * sizes.num_heads * sizes.head_dim * dtype.itemsize
        return entries * sizes.num_kv_heads * _slot_bytes(sizes, dtype) + rows

    def flops(sizes: PagedSizes) -> int:
        return 4 * sizes.num_rows * sizes.num_heads * sizes.head_dim * CONFIG.entries_attended(sizes.num_tokens)

    functions = {"sdpa": (sdpa, "SDPA, all tokens"), "paged": (paged, "this kernel, nothing merged")}
    return Case("merged_attention", arguments, merged_attention_reference, *functions[alternative], flops, moved_bytes)
