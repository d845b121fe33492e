"""A request's pages in the merged cache, what the references make of them, and how caches are compared."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qm_spec.config import MergeConfig
from qm_spec.ops.append_kv import append_kv_reference
from qm_spec.ops.entries import entry_bias, gather_entries
from qm_spec.ops.merge_groups import merge_groups_reference
from qm_spec.ops.merged_attention import merged_attention_reference
from qm_spec.ops.page import COUNT, LEVEL, MASS, slot_elements, split_page

# Spans of 2 groups from a distance of 48 tokens, of 4 from 96, of 8 from 192.
CONFIG = MergeConfig(window=12, group_size=4, schedule=(2, 1), doublings=3)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Where layers, pages, heads, slots and elements of a cache stand in memory: vLLM's four block-compact layouts.
LAYOUTS = {"LBHNC": (0, 1, 2, 3, 4), "LBNHC": (0, 1, 3, 2, 4), "BLHNC": (1, 0, 2, 3, 4), "BLNHC": (1, 0, 3, 2, 4)}
SENTINEL = 0.1234


@dataclass
class Case:
    """The pages of one request, or of several that hold different ones; a cache among sentinels.

    Attributes:
        buffer: what the cache is a view of; everything else in it is a sentinel.
        cache: `[pages, G, P, C]`; what was not written is NaN.
        table: `[1, columns]` int32; columns past the request's pages name none that exists, or a spare one.
        key: `[N, G, d]`, as appended.
        value: `[N, G, d]`.
        slots: `[N]` int64.
    """

    buffer: Tensor
    cache: Tensor
    table: Tensor
    key: Tensor
    value: Tensor
    slots: Tensor

    @property
    def head_dim(self) -> int:
        return self.key.shape[-1]

    @property
    def state(self) -> Tensor:
        return split_page(self.cache, self.head_dim)[2]

    def copy(self) -> Case:
        """Return the same with memory of its own."""
        buffer = self.buffer.clone()
        cache = buffer.as_strided(self.cache.shape, self.cache.stride(), self.cache.storage_offset())
        return replace(self, buffer=buffer, cache=cache)


def lens(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_case(
    num_tokens: int,
    page_size: int = 16,
    heads: int = 2,
    head_dim: int = 8,
    dtype: torch.dtype = torch.float32,
    layout: str = "LBHNC",
    seed: int = 0,
    appended: bool = True,
    spare_page: bool = False,
) -> Case:
    """Return a case whose tokens stand in pages in any order.

    Args:
        num_tokens: N.
        page_size: P.
        heads: G.
        head_dim: d.
        dtype: of the cache.
        layout: of `LAYOUTS`.
        seed: of keys, values and the order of pages.
        appended: whether keys and values stand in the cache.
        spare_page: whether columns past the request's pages name one more page, of NaN, for kernels that read
            unchecked what a table says.
    """
    torch.manual_seed(seed)
    num_pages = -(-num_tokens // page_size)
    order = LAYOUTS[layout]
    sizes = (3, num_pages + 1 + spare_page, heads, page_size, slot_elements(head_dim, dtype))
    buffer = torch.full([sizes[i] for i in order], SENTINEL, dtype=dtype)
    # The second of three layers.
    cache = buffer.permute([order.index(i) for i in range(5)])[1]
    cache.fill_(float("nan"))
    table = torch.full((1, num_pages + 3), num_pages + 1 if spare_page else 10**6, dtype=torch.int32)
    table[0, :num_pages] = torch.randperm(num_pages).int() + 1
    # Scores of moderate size for any head size: far from uniform attention, and far from one token's attention to
    # itself alone, where float32 leaves of an entropy little but rounding errors.
    key, value = (torch.randn(2, num_tokens, heads, head_dim) * 1.5 * head_dim**-0.25).to(dtype)
    position = torch.arange(num_tokens)
    slots = table[0].long()[position // page_size] * page_size + position % page_size
    if appended:
        append_kv_reference(cache, key, value, slots)
    return Case(buffer, cache, table, key, value, slots)


def merge_reference(cache: Tensor, table: Tensor, frontier: Tensor, head_dim: int, config: MergeConfig) -> None:
    merge_groups_reference(cache, table, frontier, head_dim, config.pack())


def attend_reference(*arguments: object) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, config = arguments
    return merged_attention_reference(*tensors, config.pack())


def exact_attention(query: Tensor, cache: Tensor, table: Tensor, seq_lens: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Attention of one request, all of whose rows are computed, in float64; takes what the operator takes."""
    _, slopes, far_bias, _, config = rest
    entries = gather_entries(cache, table, seq_lens, query.shape[-1], config)
    position = int(seq_lens) - len(query) + torch.arange(len(query)).unsqueeze(0)
    entries = replace(entries, count=entries.count.double())
    bias = entry_bias(entries, position, slopes.double(), far_bias.double())[0]
    per_group = query.shape[1] // cache.shape[1]
    key, value = (x[0].double().repeat_interleave(per_group, 0) for x in (entries.keys, entries.values))
    scores = query.double().transpose(0, 1) @ key.mT * query.shape[-1] ** -0.5 + bias
    weights, lse = torch.softmax(scores, -1), scores.logsumexp(-1)
    entropy = -torch.special.xlogy(weights, weights).sum(-1)
    return (weights @ value).transpose(0, 1), lse.T, entropy.T


def assert_same_cache(case: Case, expected: Case) -> None:
    """Counts, levels and what lies outside are equal; masses, keys and values of live entries up to rounding."""
    keys, values, state = split_page(case.cache, case.head_dim)
    wanted_keys, wanted_values, wanted = split_page(expected.cache, case.head_dim)
    for word in (COUNT, LEVEL):
        assert torch.equal(state[..., word].nan_to_num(-7.0), wanted[..., word].nan_to_num(-7.0))
    live = wanted[..., COUNT] > 0
    eps = torch.finfo(case.cache.dtype).eps
    # Bytes that were never written may read as a live entry, whose key is not a number.
    tolerance = {"rtol": max(2 * eps, 1e-4), "atol": max(2 * eps, 1e-5), "equal_nan": True}
    torch.testing.assert_close(state[..., MASS][live], wanted[..., MASS][live], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(keys[live], wanted_keys[live], **tolerance)
    torch.testing.assert_close(values[live], wanted_values[live], **tolerance)
    outside = case.copy(), expected.copy()
    for copy in outside:
        copy.cache.fill_(0.0)
    assert torch.equal(outside[0].buffer, outside[1].buffer), "written outside of the cache"


def poison(case: Case) -> None:
    """Write what is not finite into some of a case's first 64 tokens."""
    keys, values, state = split_page(case.cache, case.head_dim)
    pages = case.table[0, :4].long()
    keys[pages[0], 0, 1, -1], values[pages[0], 1, 6, 0] = math.nan, -math.inf
    # All of a group, for one head; and all of two neighbours, which become one span.
    keys[pages[1], 0, 8:12], values[pages[2], 1, 0:8] = math.inf, math.nan
    # As a former owner may have left it.
    state[pages[3], 0, 5, MASS] = math.nan


def assert_merged_is_finite(case: Case, num_tokens: int, config: MergeConfig) -> None:
    entries = gather_entries(case.cache, case.table, lens(num_tokens), case.head_dim, config)
    merged = ~entries.raw
    assert merged.any()
    for words in (entries.keys, entries.values, entries.count):
        assert words.transpose(1, 2)[merged].isfinite().all()
    assert (entries.count.transpose(1, 2)[merged] > 0).all(), "every token is counted"


def raw_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
