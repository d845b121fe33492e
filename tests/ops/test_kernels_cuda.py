"""The CUDA kernels of the merged cache: their source, run on the CPU by an emulation, and on a GPU where one is.

Every test takes `kernels`, the three operators. `emulated` compiles `csrc/cuda/*.cuh` with the C++ compiler and runs
every CUDA thread as a fibre, in an order that a seed decides. `gpu` calls the registered operators.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import draft_cases
import pytest
import torch
from support import paged
from support.cuda_emulation import Emulation, build
from support.cuda_emulation.host import Host, link
from support.paged import (
    CONFIG,
    DTYPES,
    LAYOUTS,
    SENTINEL,
    Case,
    assert_merged_is_finite,
    assert_same_cache,
    attend_reference,
    exact_attention,
    lens,
    merge_reference,
    poison,
    raw_bytes,
)
from support.recorded_graph import Recorder
from torch import Tensor

from qm_spec import ops
from qm_spec.config import SALIENCIES, MergeConfig
from qm_spec.drafter.loops import paged as paged_loop
from qm_spec.drafter.loops.graphs import DraftGraphs
from qm_spec.drafter.loops.paged import DraftInputs, PagedLoop
from qm_spec.ops.append_kv import append_kv_reference
from qm_spec.ops.page import COUNT, LEVEL, split_page

OPERATORS = ("append_kv", "merge_groups", "merged_attention")
CUDA_HOME = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
make_case = functools.partial(paged.make_case, spare_page=True)


class Gpu:
    """The registered operators on the GPU, for tensors of the CPU that keep their layout and what lies between."""

    def append_kv_(self, cache: Tensor, *rest: Tensor) -> None:
        self._in_place(ops.append_kv_, cache, *rest)

    def merge_groups_(self, cache: Tensor, *rest: object) -> None:
        self._in_place(ops.merge_groups_, cache, *rest)

    def merged_attention(self, *arguments: object) -> tuple[Tensor, ...]:
        return tuple(x.cpu() for x in ops.merged_attention(*(self._moved(a) for a in arguments)))

    def _in_place(self, op: Callable, cache: Tensor, *rest: object) -> None:
        on_gpu = self._moved(cache)
        op(on_gpu, *(self._moved(a) for a in rest))
        _whole_storage(cache).copy_(_whole_storage(on_gpu))

    def _moved(self, argument: object) -> object:
        if not isinstance(argument, Tensor):
            return argument
        moved = _whole_storage(argument).cuda()
        return moved.as_strided(argument.shape, argument.stride(), argument.storage_offset())


def _whole_storage(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("the emulation is compiled, and there is no C++ compiler (Debian: apt-get install g++)")
    return Emulation(build(compiler, tmp_path_factory.mktemp("cuda_emulation")))


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest) -> Emulation | Gpu:
    torch.manual_seed(0)
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA GPU")
        if ops.backend.backend("cuda") != "compiled":
            pytest.skip("the CUDA kernels were not built: make test-gpu")
        return Gpu()
    emulation = request.getfixturevalue("emulation")
    emulation.seed = emulation.num_splits = 0
    return emulation


# What the emulation finds


def test_the_emulation_finds_a_missing_barrier(emulation: Emulation) -> None:
    results = []
    for number in (0, 1):
        for seed in range(8):
            emulation.seed = seed
            results.append(emulation.fault(number))
    assert all(torch.equal(result, torch.arange(63.0, -1.0, -1.0)) for result in results[:8])
    # What was not written yet reads as NaN, and which that is changes with the order.
    assert all(result.isnan().any() for result in results[8:])
    assert len({tuple(result.isnan().tolist()) for result in results[8:]}) > 1


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (2, "threads wait at __syncthreads for others that never come"),
        (3, "lanes are at different instructions"),
        (4, "a block wrote behind its shared memory"),
        (5, "an access is not aligned to its type"),
    ],
)
def test_the_emulation_finds_what_would_hang_or_overflow(emulation: Emulation, number: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        emulation.fault(number)


# append_kv_


@pytest.mark.parametrize("head_dim", [6, 32, 80, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_append_writes_every_byte_that_the_reference_writes_and_no_other(kernels, dtype, head_dim) -> None:
    for layout in LAYOUTS:
        case = make_case(21, 16, 3, head_dim, dtype, layout, appended=False)
        expected = case.copy()
        append_kv_reference(expected.cache, case.key, case.value, case.slots)
        kernels.append_kv_(case.cache, case.key, case.value, case.slots)
        assert torch.equal(raw_bytes(case.buffer), raw_bytes(expected.buffer)), layout


def test_append_takes_views_at_any_offset(kernels) -> None:
    case = make_case(9, 16, 2, 8, appended=False)
    expected = case.copy()
    append_kv_reference(expected.cache, case.key, case.value, case.slots)
    for offset in range(5):
        # Query, key and value of a row stand side by side, as a projection leaves them.
        wide = torch.full((9, 5 + 2 * 16), SENTINEL)
        key = wide[:, offset : offset + 16].unflatten(1, (2, 8))
        value = wide[:, offset + 16 : offset + 32].unflatten(1, (2, 8))
        key.copy_(case.key)
        value.copy_(case.value)
        slots = torch.stack([case.slots, torch.full_like(case.slots, -1)], 1)[:, 0]
        case.cache.fill_(float("nan"))
        kernels.append_kv_(case.cache, key, value, slots)
        assert torch.equal(raw_bytes(case.buffer), raw_bytes(expected.buffer))


def test_append_keeps_no_padding_and_leaves_page_zero_alone(kernels) -> None:
    case = make_case(20)
    before = case.buffer.clone()
    # Padding, page 0, and a slot behind the last page.
    slots = torch.tensor([-1, -7, 0, 15, len(case.cache) * 16])
    kernels.append_kv_(case.cache, case.key[:5], case.value[:5], slots)
    assert torch.equal(raw_bytes(before), raw_bytes(case.buffer))
    kernels.append_kv_(case.cache, case.key[:0], case.value[:0], slots[:0])


def test_append_makes_a_reused_page_raw(kernels) -> None:
    case = make_case(64)
    merge_reference(case.cache, case.table, lens(64), 8, CONFIG)
    _, _, state = split_page(case.cache, 8)
    assert state[case.table[0, 0].long(), :, 0, LEVEL].min() > 0
    kernels.append_kv_(case.cache, case.key, case.value, case.slots)
    assert (state[case.table[0, :4].long()][:, :, ::4, LEVEL] == 0).all()


# merge_groups_


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 63, 64, 65, 150, 301])
@pytest.mark.parametrize("page_size", [4, 16, 32])
def test_merge_equals_the_reference(kernels, num_tokens, page_size) -> None:
    case = make_case(num_tokens, page_size)
    expected = case.copy()
    merge_reference(expected.cache, case.table, lens(num_tokens), 8, CONFIG)
    kernels.merge_groups_(case.cache, case.table, lens(num_tokens), 8, CONFIG)
    assert_same_cache(case, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_merge_equals_the_reference_in_every_layout_and_dtype(kernels, layout, dtype) -> None:
    case = make_case(120, 16, 3, 16, dtype, layout)
    expected = case.copy()
    merge_reference(expected.cache, case.table, lens(120), 16, CONFIG)
    kernels.merge_groups_(case.cache, case.table, lens(120), 16, CONFIG)
    assert_same_cache(case, expected)


@pytest.mark.parametrize(
    ("config", "heads", "head_dim", "page_size"),
    [
        # The default, with every head size that models have; the largest page; more heads than warps in a block.
        (MergeConfig(), 1, 32, 16),
        (MergeConfig(), 2, 64, 32),
        (MergeConfig(), 1, 80, 128),
        *((MergeConfig(saliency=saliency), 1, 96, 16) for saliency in SALIENCIES),
        (MergeConfig(temperature=0.1, epsilon=0.2), 1, 128, 64),
        (MergeConfig(doublings=0), 1, 256, 16),
        (CONFIG, 11, 8, 16),
        # A schedule that ends above 1 has no spans; (0,) keeps nothing; a group of more tokens than lanes.
        (MergeConfig(window=20, group_size=8, schedule=(5, 3)), 2, 8, 16),
        (MergeConfig(window=12, group_size=4, schedule=(0,)), 2, 8, 16),
        (MergeConfig(window=70, group_size=64, schedule=(40, 1), doublings=1), 1, 12, 128),
        # A head size that is no multiple of four.
        (CONFIG, 1, 6, 16),
    ],
)
def test_merge_equals_the_reference_for_other_settings(kernels, config, heads, head_dim, page_size) -> None:
    num_tokens = config.window * 2 ** (len(config.schedule) - 1) + 5 * config.group_size + 3
    case = make_case(num_tokens, page_size, heads, head_dim)
    expected = case.copy()
    merge_reference(expected.cache, case.table, lens(num_tokens), head_dim, config)
    kernels.merge_groups_(case.cache, case.table, lens(num_tokens), head_dim, config)
    assert_same_cache(case, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [70, 150])
def test_what_is_not_finite_is_dropped_when_it_is_merged(kernels, num_tokens, dtype) -> None:
    case = make_case(num_tokens, 16, 2, 8, dtype)
    poison(case)
    expected = case.copy()
    merge_reference(expected.cache, case.table, lens(num_tokens), 8, CONFIG)
    kernels.merge_groups_(case.cache, case.table, lens(num_tokens), 8, CONFIG)
    assert_merged_is_finite(case, num_tokens, CONFIG)
    assert_same_cache(case, expected)


def test_merge_is_idempotent_and_does_not_depend_on_when_it_happens(kernels) -> None:
    at_once = make_case(290)
    in_steps = at_once.copy()
    kernels.merge_groups_(at_once.cache, at_once.table, lens(290), 8, CONFIG)
    once = at_once.buffer.clone()
    kernels.merge_groups_(at_once.cache, at_once.table, lens(290), 8, CONFIG)
    assert torch.equal(raw_bytes(once), raw_bytes(at_once.buffer)), "merging twice changed something"
    for frontier in (20, 21, 90, 150, 151, 152, 230, 289, 290):
        kernels.merge_groups_(in_steps.cache, in_steps.table, lens(frontier), 8, CONFIG)
    live = split_page(at_once.cache, 8)[2][..., COUNT] > 0
    assert torch.equal(at_once.cache[live], in_steps.cache[live])
    assert torch.equal(raw_bytes(split_page(at_once.cache, 8)[2]), raw_bytes(split_page(in_steps.cache, 8)[2]))


@pytest.mark.parametrize("frontier", [1, 15, 16, 17, 40, 64])
def test_merge_leaves_the_window_before_the_frontier_alone(kernels, frontier) -> None:
    case = make_case(100, 4)
    before = case.cache.clone()
    kernels.merge_groups_(case.cache, case.table, lens(frontier), 8, CONFIG)
    recent = [page for page in range(25) if frontier - (page + 1) * 4 < CONFIG.window]
    pages = case.table[0, recent].long()
    assert torch.equal(raw_bytes(before[pages]), raw_bytes(case.cache[pages]))


def test_merge_leaves_page_zero_padding_and_the_columns_of_others_alone(kernels) -> None:
    case = make_case(100)
    before = case.buffer.clone()
    # Null pages; a request without tokens whose table holds real pages; one whose later columns are another's.
    table = torch.cat([torch.zeros_like(case.table), case.table, case.table.flip(1)])
    table[2, 0] = 0
    kernels.merge_groups_(case.cache, table, lens(100, 0, 27), 8, CONFIG)
    assert torch.equal(raw_bytes(before), raw_bytes(case.buffer))
    kernels.merge_groups_(case.cache, table[:0], lens(), 8, CONFIG)


@pytest.mark.parametrize("frontiers", [(50, 96), (96, 50), (96, 96), (16, 60, 230, 100)])
def test_requests_that_share_pages_end_as_the_furthest_alone(kernels, frontiers) -> None:
    shared = make_case(230)
    alone = shared.copy()
    kernels.merge_groups_(alone.cache, alone.table, lens(max(frontiers)), 8, CONFIG)
    table = shared.table.expand(len(frontiers), -1)
    kernels.merge_groups_(shared.cache, table, lens(*frontiers), 8, CONFIG)
    assert torch.equal(raw_bytes(alone.buffer), raw_bytes(shared.buffer))


def parted(shared_pages: int, frontiers: tuple[int, ...], page_size: int = 4) -> tuple[Case, Tensor]:
    """Requests that have their first pages in common, each with its own tokens behind: one cache, and their table."""
    longest = max(frontiers)
    num_pages = -(-longest // page_size)
    case = make_case(len(frontiers) * num_pages * page_size, page_size)
    table = case.table[0, : len(frontiers) * num_pages].view(len(frontiers), num_pages).clone()
    table[:, :shared_pages] = table[0, :shared_pages]
    return case, table


@pytest.mark.parametrize("frontiers", [(300, 300), (300, 210, 300), (120, 300), (300, 120)])
@pytest.mark.parametrize("shared_pages", [5, 6, 11])
def test_spans_cut_by_page_sharing_equal_the_reference(kernels, shared_pages, frontiers) -> None:
    case, table = parted(shared_pages, frontiers)
    expected = case.copy()
    merge_reference(expected.cache, table, lens(*frontiers), 8, CONFIG)
    kernels.merge_groups_(case.cache, table, lens(*frontiers), 8, CONFIG)
    assert_same_cache(case, expected)


@pytest.mark.parametrize("first_alone", [0, 1])
def test_a_span_that_another_request_merged_before_is_not_merged_again(kernels, first_alone) -> None:
    case, table = parted(5, (300, 300))
    expected = case.copy()
    for rows, frontiers in ((slice(first_alone, first_alone + 1), lens(110)), (slice(0, 2), lens(300, 300))):
        merge_reference(expected.cache, table[rows], frontiers, 8, CONFIG)
        kernels.merge_groups_(case.cache, table[rows], frontiers, 8, CONFIG)
    assert_same_cache(case, expected)


@pytest.mark.parametrize("word", [1e9, -3.0, math.nan, math.inf, 0.5, 2.7])
def test_merge_bounds_stale_levels(kernels, word) -> None:
    case = make_case(100)
    split_page(case.cache, 8)[2][case.table[0, 1].long(), :, 4, LEVEL] = word
    expected = case.copy()
    merge_reference(expected.cache, case.table, lens(100), 8, CONFIG)
    kernels.merge_groups_(case.cache, case.table, lens(100), 8, CONFIG)
    assert_same_cache(case, expected)


@pytest.mark.parametrize("group", [1, 2, 3, 5])
@pytest.mark.parametrize(("level", "count"), [(3.0, 0.0), (2.0, 0.0), (5.0, 7.0), (math.nan, math.nan), (5.0, 0.0)])
def test_merge_judges_stale_spans_as_the_reference_does(kernels, group, level, count) -> None:
    case = make_case(300, 4)
    # Spans of two groups, the first one's second half then overwritten: is it one entry, or two?
    merge_reference(case.cache, case.table, lens(110), 8, CONFIG)
    state = split_page(case.cache, 8)[2][case.table[0, group].long()]
    state[:, 0, LEVEL], state[:, 0, COUNT] = level, count
    expected = case.copy()
    merge_reference(expected.cache, case.table, lens(300), 8, CONFIG)
    kernels.merge_groups_(case.cache, case.table, lens(300), 8, CONFIG)
    assert_same_cache(case, expected)


def test_among_equal_keys_the_first_ones_stay_and_the_others_join_the_first(kernels) -> None:
    # 24 tokens: 3 groups are at the first level, where two entries stay.
    case = make_case(24, appended=False)
    kernels.append_kv_(case.cache, torch.ones_like(case.key), case.value, case.slots)
    kernels.merge_groups_(case.cache, case.table, lens(24), 8, CONFIG)
    keys, values, state = (x[case.table[0, 0].long()] for x in split_page(case.cache, 8))
    tokens = case.value.transpose(0, 1)
    for start in (0, 4, 8):
        assert (state[:, start : start + 4, COUNT] == torch.tensor([3.0, 1.0, 0.0, 0.0])).all()
        torch.testing.assert_close(keys[:, start : start + 2], torch.ones(2, 2, 8))
        assert torch.equal(values[:, start + 1], tokens[:, start + 1])
        torch.testing.assert_close(values[:, start], tokens[:, [start, start + 2, start + 3]].mean(1))


# merged_attention


def attention_arguments(case: Case, num_tokens: int, rows: int, heads: int, max_rows: int, config: MergeConfig):
    query = torch.randn(rows, heads, case.head_dim).to(case.cache.dtype)
    slopes, far_bias = torch.rand(heads) * 0.2, torch.randn(heads)
    return query, case.cache, case.table, lens(num_tokens), lens(0, rows), slopes, far_bias, max_rows, config


def assert_precise(results: tuple[Tensor, ...], plain: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    for name, fast, slow, wanted in zip(("output", "lse", "entropy"), results, plain, exact, strict=True):
        assert fast.dtype == slow.dtype and torch.isfinite(fast).all(), name
        error, allowed = ((x.double() - wanted).abs().max().item() for x in (fast, slow))
        assert error <= 2 * allowed + 2e-6, f"{name}: {error:.1e} against {allowed:.1e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "groups", "head_dim", "page_size"),
    [(4, 2, 8, 16), (1, 1, 32, 16), (6, 2, 64, 32), (5, 5, 80, 64), (8, 1, 96, 128), (14, 2, 128, 16), (2, 1, 256, 16)],
)
def test_attention_errs_at_most_twice_as_much_as_pytorch(kernels, heads, groups, head_dim, page_size, dtype) -> None:
    for layout in ("LBHNC", "BLNHC"):
        case = make_case(150, page_size, groups, head_dim, dtype, layout)
        merge_reference(case.cache, case.table, lens(150), head_dim, CONFIG)
        # 3 rows of up to 14 heads: a tile of 16 queries and a part of another.
        arguments = attention_arguments(case, 150, 3, heads, 8, CONFIG)
        before = case.buffer.clone()
        results = kernels.merged_attention(*arguments)
        assert torch.equal(raw_bytes(before), raw_bytes(case.buffer))
        assert_precise(results, attend_reference(*arguments), exact_attention(*arguments))


@pytest.mark.parametrize("num_tokens", [1, 4, 15, 17, 49, 100, 301])
@pytest.mark.parametrize("num_splits", [0, 1, 2, 7])
def test_attention_does_not_depend_on_the_splits(kernels, num_tokens, num_splits) -> None:
    if isinstance(kernels, Gpu) and num_splits:
        pytest.skip("on a GPU the operator chooses the splits")
    case = make_case(num_tokens)
    merge_reference(case.cache, case.table, lens(num_tokens), 8, CONFIG)
    arguments = attention_arguments(case, num_tokens, min(2, num_tokens), 4, 8, CONFIG)
    if num_splits:
        kernels.num_splits = num_splits
    assert_precise(kernels.merged_attention(*arguments), attend_reference(*arguments), exact_attention(*arguments))


def test_attention_over_spans_longer_than_a_block_lists_at_once(kernels) -> None:
    config = MergeConfig(window=6, group_size=4, schedule=(1,), doublings=7)
    case = make_case(2000, 16, 1, 64)
    merge_reference(case.cache, case.table, lens(2000), 64, config)
    arguments = attention_arguments(case, 2000, 1, 2, 5, config)
    plain, exact = attend_reference(*arguments), exact_attention(*arguments)
    for seed in range(4):
        if isinstance(kernels, Emulation):
            # 64 groups at a time, with an entry in every 128.
            kernels.seed, kernels.num_splits = seed, 1
        assert_precise(kernels.merged_attention(*arguments), plain, exact)


def test_attention_over_a_long_memory_of_the_default_settings(kernels) -> None:
    config = MergeConfig()
    case = make_case(2400, 16, 1, 32)
    merge_reference(case.cache, case.table, lens(2400), 32, config)
    arguments = attention_arguments(case, 2400, 1, 2, 5, config)
    assert_precise(kernels.merged_attention(*arguments), attend_reference(*arguments), exact_attention(*arguments))


def test_a_batch_equals_each_request_alone_whatever_stands_in_its_table_behind_it(kernels) -> None:
    case = make_case(230)
    merge_reference(case.cache, case.table, lens(230), 8, CONFIG)
    query, *_, slopes, far_bias, _, _ = attention_arguments(case, 230, 14, 4, 2, CONFIG)
    # Requests of 6, 0, 3, 1 and 4 rows, 2 computed of each; all tables go on behind the request's tokens with pages
    # that are merged. The second is padding: its length means nothing. The last has fewer tokens than rows; no more is
    # asked of it than finite numbers.
    table = case.table.expand(5, -1)
    lengths, starts = lens(230, 77, 65, 18, 1), lens(0, 6, 6, 9, 10, 14)
    query = torch.cat([query, query[:3]])
    args = (slopes, far_bias, 2, CONFIG)
    out, lse, entropy = kernels.merged_attention(query, case.cache, table, lengths, starts, *args)
    computed = torch.zeros(len(query), dtype=torch.bool)
    for number in (0, 2, 3):
        rows = slice(int(starts[number]), int(starts[number + 1]))
        alone = attend_reference(
            query[rows], case.cache, case.table, lengths[[number]], lens(0, rows.stop - rows.start), *args
        )
        for got, wanted in zip((out, lse, entropy), alone, strict=True):
            torch.testing.assert_close(got[rows][-2:], wanted[-2:], rtol=1e-5, atol=2e-6)
        computed[rows] = torch.arange(rows.stop - rows.start) >= rows.stop - rows.start - 2
    computed[12:14] = True
    assert torch.isfinite(out).all() and not lse.isnan().any() and torch.isfinite(entropy).all()
    assert (out[~computed] == 0).all() and (lse[~computed] == -math.inf).all() and (entropy[~computed] == 0).all()
    assert torch.isfinite(lse[computed]).all()


def test_attention_takes_strided_queries(kernels) -> None:
    case = make_case(60)
    arguments = attention_arguments(case, 60, 3, 4, 8, CONFIG)
    wide = torch.full((3, 7, 21), SENTINEL)
    wide[:, 1:5, 3:11] = arguments[0]
    torch.testing.assert_close(
        kernels.merged_attention(wide[:, 1:5, 3:11], *arguments[1:]), kernels.merged_attention(*arguments)
    )


@pytest.mark.parametrize(
    ("level", "count"), [(1e9, math.inf), (1.0, math.nan), (3.0, math.nan), (4.0, -1.0), (2.0, 1e30), (math.nan, 0.0)]
)
def test_attention_bounds_stale_levels_and_counts(kernels, level, count) -> None:
    case = make_case(50)
    _, _, state = split_page(case.cache, 8)
    state[case.table[0, 1].long(), :, 4, LEVEL] = level
    state[case.table[0, 1].long(), :, 4, COUNT] = count
    # Behind the request's tokens, in its last page: its previous owner's.
    state[case.table[0, 3].long(), :, 8, LEVEL] = 2.0
    state[case.table[0, 3].long(), :, 8, COUNT] = 4.0
    arguments = attention_arguments(case, 50, 2, 4, 8, CONFIG)
    for got, wanted in zip(kernels.merged_attention(*arguments), attend_reference(*arguments), strict=True):
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-6)


def test_padded_requests_on_the_null_page_get_zeros_whatever_it_holds(kernels) -> None:
    case = make_case(40)
    assert case.cache[0].isnan().all()
    # As a dummy batch of vLLM: block rows of zeros, and lengths equal to the rows.
    out, lse, entropy = kernels.merged_attention(
        torch.randn(4, 4, 8), case.cache, torch.zeros(2, 3, dtype=torch.int32), lens(3, 1), lens(0, 3, 4),
        torch.rand(4), torch.rand(4), 5, CONFIG,
    )  # fmt: skip
    assert (out == 0).all() and (lse == -math.inf).all() and (entropy == 0).all()


def test_attention_of_no_rows_and_of_no_requests(kernels) -> None:
    case = make_case(20)
    rest = (torch.rand(4), torch.rand(4), 5, CONFIG)
    out, lse, _ = kernels.merged_attention(torch.randn(0, 4, 8), case.cache, case.table, lens(20), lens(0, 0), *rest)
    assert out.shape == (0, 4, 8) and lse.shape == (0, 4)
    out, lse, _ = kernels.merged_attention(torch.randn(2, 4, 8), case.cache, case.table[:0], lens(), lens(0), *rest)
    assert (out == 0).all() and (lse == -math.inf).all()


# What a captured graph and a parallel machine ask for


@pytest.mark.parametrize("seed", range(1, 6))
def test_the_order_of_threads_and_blocks_changes_no_byte(emulation: Emulation, seed: int) -> None:
    outcomes = []
    for emulation.seed in (0, seed):
        case, table = parted(6, (290, 200, 290), 16)
        emulation.append_kv_(case.cache, case.key, case.value, case.slots)
        for frontiers in (lens(90, 200, 150), lens(290, 200, 290)):
            emulation.merge_groups_(case.cache, table, frontiers, 8, CONFIG)
        torch.manual_seed(1)
        query, slopes, far_bias = torch.randn(7, 4, 8), torch.rand(4), torch.randn(4)
        starts = lens(0, 3, 4, 7)
        emulation.num_splits = 3
        arguments = (query, case.cache, table, lens(290, 200, 290), starts, slopes, far_bias, 5, CONFIG)
        outcomes.append((case.buffer, *emulation.merged_attention(*arguments)))
    for first, second in zip(*outcomes, strict=True):
        assert torch.equal(raw_bytes(first), raw_bytes(second))


def test_launches_depend_on_shapes_alone(emulation: Emulation) -> None:
    case = make_case(300)
    table = case.table.expand(2, -1)
    launches = []
    for lengths in (lens(300, 300), lens(300, 0), lens(1, 7)):
        emulation.append_kv_(case.cache, case.key, case.value, case.slots)
        launched = emulation.launches()
        emulation.merge_groups_(case.cache, table, lengths, 8, CONFIG)
        launched += emulation.launches()
        starts = lens(0, 1, 2) if lengths[1] else lens(0, 2, 2)
        arguments = (torch.randn(2, 4, 8), case.cache, table, lengths, starts, torch.rand(4), torch.rand(4))
        emulation.merged_attention(*arguments, 5, CONFIG)
        launches.append(launched + emulation.launches())
    assert launches[0] == launches[1] == launches[2]
    # Appending; levels and three doublings; attention and its end.
    assert len(launches[0].splitlines()) == 1 + 4 + 2


def test_the_draft_loop_over_these_kernels_drafts_what_the_operator_drafts(kernels, monkeypatch) -> None:
    sizes = draft_cases.PriorSizes(48, 4, 2, 16, 96, 200)
    torch.manual_seed(0)
    case = draft_cases.make_case([70, 9, 130], sizes, config=MergeConfig(window=10_000, group_size=4, schedule=(2, 1)))
    case.config = CONFIG
    # Behind the requests a row of padding, whose state and id are left over.
    table = torch.cat([case.block_table, torch.zeros_like(case.block_table[:1])])
    state = torch.cat([case.state, torch.full_like(case.state[:1], float("nan"))])
    next_ids, num_tokens = torch.cat([case.next_ids, lens(-1)]), torch.cat([case.num_tokens, lens(0)])
    uniform = torch.rand(4, 3, dtype=torch.float64)
    temperature = torch.tensor([0.0, 0.7, 1.3, 0.0])
    inputs = DraftInputs(table, num_tokens, state, next_ids, temperature, uniform)
    merged = case.cache.clone()
    merge_reference(merged, case.block_table, case.num_tokens, 16, CONFIG)

    monkeypatch.setattr(paged_loop, "merge_groups_", kernels.merge_groups_)
    monkeypatch.setattr(paged_loop, "merged_attention", kernels.merged_attention)
    ids, probs = PagedLoop(case.weights, case.eps, case.cache, CONFIG).draft(inputs, 3)
    levels, wanted = (split_page(cache, 16)[2][..., LEVEL].nan_to_num(-7.0) for cache in (case.cache, merged))
    assert torch.equal(levels, wanted) and (levels > 2).any()
    case.cache = merged
    expected_ids, expected_probs = case.draft(3, temperature[:3], uniform[:3])
    assert torch.equal(ids[:3], expected_ids)
    torch.testing.assert_close(probs[:3], expected_probs, rtol=1e-3, atol=1e-6)
    assert ((ids >= 0) & (ids < sizes.vocabulary)).all()


@pytest.mark.gpu
def test_the_operators_are_captured_in_a_graph_and_replayed_on_other_lengths() -> None:
    if not torch.cuda.is_available() or ops.backend.backend("cuda") != "compiled":
        pytest.skip("there is no CUDA GPU, or the CUDA kernels were not built: make test-gpu")
    case = make_case(300)
    cache, table = case.cache.contiguous().cuda(), case.table.cuda()
    frontier, starts = lens(40).cuda(), lens(0, 1).cuda()
    query, slopes, far_bias = torch.randn(1, 4, 8).cuda(), torch.rand(4).cuda(), torch.rand(4).cuda()

    def step() -> tuple[Tensor, ...]:
        ops.merge_groups_(cache, table, frontier, 8, CONFIG)
        return ops.merged_attention(query, cache, table, frontier, starts, slopes, far_bias, 5, CONFIG)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for length in (90, 300):
        frontier.fill_(length)
        graph.replay()
        merge_reference(case.cache, case.table, lens(length), 8, CONFIG)
        arguments = (query.cpu(), case.cache, case.table, lens(length), lens(0, 1), slopes.cpu(), far_bias.cpu(), 5)
        for got, wanted in zip(captured, attend_reference(*arguments, CONFIG), strict=True):
            torch.testing.assert_close(got.cpu(), wanted, rtol=1e-4, atol=1e-5)


# The host code, by nvcc


@pytest.fixture(scope="session")
def compile_cuda(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Compile an operator's `.cu` for every architecture, once, without a warning; returns the object's path."""
    nvcc = shutil.which(str(CUDA_HOME / "bin/nvcc"))
    if nvcc is None:
        pytest.skip("there is no nvcc; set CUDA_HOME to the folder of the CUDA toolkit")
    folder = tmp_path_factory.mktemp("nvcc")
    architectures = ["compute_80,code=sm_80", "compute_90,code=sm_90", "compute_90,code=compute_90"]

    @functools.cache
    def compiled(name: str) -> Path:
        command = [nvcc, "-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL", f"-I{root}", "-isystem"]
        command += [str(Path(torch.__file__).parent / "include"), *(f"-gencode=arch={a}" for a in architectures)]
        command += ["-Xcompiler=-fPIC,-fvisibility=hidden", "-Werror=all-warnings", "-c"]
        command += [str(root / f"csrc/cuda/{name}.cu"), "-o", str(folder / f"{name}.o")]
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return folder / f"{name}.o"

    return compiled


@pytest.mark.parametrize("name", OPERATORS)
def test_nvcc_compiles_the_kernels_for_every_architecture(compile_cuda: Callable[[str], Path], name: str) -> None:
    assert compile_cuda(name).exists()


@pytest.fixture(scope="session")
def linked(emulation: Emulation, compile_cuda: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Host:
    if torch.version.cuda:
        pytest.skip("this torch has CUDA, whose operators must not be replaced")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    return Host(link(compiler, CUDA_HOME, map(compile_cuda, OPERATORS), tmp_path_factory.mktemp("host")), emulation)


@pytest.fixture
def host(linked: Host) -> Iterator[Host]:
    """The operators' host code over emulated kernels; what it allocates begins as NaN."""
    linked.kernels.seed = linked.kernels.num_splits = 0
    torch.use_deterministic_algorithms(True)
    yield linked
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_host_code_hands_the_kernels_what_the_emulation_hands_them(host: Host, layout: str, dtype) -> None:
    # Head sizes with and without a multiple of four; strides of all kinds.
    case = make_case(300, 16, 2, 8, dtype, layout, appended=False)
    expected = case.copy()
    lengths, starts = lens(300, 0, 99)[::2], lens(0, 3, 4)
    table = case.table.expand(2, -1)
    query = torch.randn(4, 8, 2, 8).to(dtype)[:, ::2].flatten(1, 2)
    # As they come from a drafter in 16 bits.
    slopes, far_bias = torch.rand(8).to(dtype), torch.randn(8).to(dtype)
    outcomes = []
    for now, kernels, mode in ((case, ops, host), (expected, host.kernels, contextlib.nullcontext())):
        with mode:
            kernels.append_kv_(now.cache, now.key, now.value, now.slots)
            kernels.merge_groups_(now.cache, table, lengths, 8, CONFIG)
            biases = (slopes, far_bias) if kernels is ops else (slopes.float(), far_bias.float())
            outcomes.append(kernels.merged_attention(query, now.cache, table, lengths, starts, *biases, 5, CONFIG))
    assert torch.equal(raw_bytes(case.buffer), raw_bytes(expected.buffer))
    for got, wanted in zip(*outcomes, strict=True):
        assert got.dtype == wanted.dtype and torch.isfinite(wanted).all()
        assert torch.equal(raw_bytes(got), raw_bytes(wanted))


def test_the_host_code_drafts_with_the_settings_it_is_given(host: Host) -> None:
    """Every number of a config, so that one in the place of another would be seen."""
    case = make_case(150)
    for config in (
        CONFIG,
        MergeConfig(window=20, group_size=8, schedule=(5, 3)),
        MergeConfig(window=24, group_size=8, schedule=(4, 2, 1), saliency="inverse_entropy", doublings=1),
        MergeConfig(window=12, group_size=4, schedule=(2, 1), temperature=0.1, epsilon=0.3, doublings=2),
    ):
        got, wanted = case.copy(), case.copy()
        query, rest = torch.randn(6, 4, 8), (lens(150), lens(0, 6), torch.rand(4), torch.randn(4))
        with host:
            ops.merge_groups_(got.cache, case.table, lens(150), 8, config)
            attended = ops.merged_attention(query, got.cache, case.table, *rest, 3, config)
        merge_reference(wanted.cache, case.table, lens(150), 8, config)
        expected = attend_reference(query, wanted.cache, case.table, *rest, 3, config)
        for ours, theirs in zip(attended, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert_same_cache(got, wanted)


def test_graphs_over_the_host_code_draft_what_the_operator_drafts(host: Host) -> None:
    """All of the way on a GPU but for the GPU: padding, the loop, the dispatcher, checks, launches, kernels."""
    sizes = draft_cases.PriorSizes(48, 4, 2, 16, 96, 200)
    torch.manual_seed(0)
    case = draft_cases.make_case([70, 9, 130], sizes, torch.bfloat16, config=CONFIG)
    loop, recorder = PagedLoop(case.weights, case.eps, case.cache, CONFIG), Recorder()
    graphs = DraftGraphs(recorder, [4])
    for _ in range(2):
        case.state = torch.randn(3, sizes.hidden).to(torch.bfloat16)
        with host:
            ids, _ = graphs.draft(loop, DraftInputs(case.block_table, case.num_tokens, case.state, case.next_ids), 3)
        exact = case.replay(ids, torch.float64)
        plain_error = (case.replay(ids, torch.bfloat16).double() - exact).abs().max().item()
        behind = exact.max(-1).values - exact.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        assert behind.max().item() <= 4 * plain_error, "other than near ties"
    assert len(recorder.graphs) == 1


def test_the_host_code_refuses_with_a_sentence(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(20)
    rest = (torch.rand(4), torch.rand(4), 5, CONFIG)
    with host:
        with pytest.raises(RuntimeError, match="frontier must be one-dimensional and int32"):
            ops.merge_groups_(case.cache, case.table, lens(20).long(), 8, CONFIG)
        with pytest.raises(RuntimeError, match="query must have the dtype of the cache"):
            ops.merged_attention(torch.randn(1, 4, 8).half(), case.cache, case.table, lens(20), lens(0, 1), *rest)
        with pytest.raises(RuntimeError, match="block_table must be"):
            ops.merge_groups_(case.cache, case.table.long(), lens(20), 8, CONFIG)
        with monkeypatch.context() as patch:
            patch.setattr("qm_spec.config.SALIENCIES", {**SALIENCIES, "norm": 1.0})
            with pytest.raises(RuntimeError, match=f"the kernels do not know saliency {len(SALIENCIES)}"):
                ops.merge_groups_(case.cache, case.table, lens(20), 8, replace(CONFIG, saliency="norm"))
        # Nothing to do.
        ops.append_kv_(case.cache, case.key[:0], case.value[:0], case.slots[:0])
        out, lse, _ = ops.merged_attention(torch.randn(0, 4, 8), case.cache, case.table, lens(20), lens(0, 0), *rest)
    assert out.shape == (0, 4, 8) and lse.shape == (0, 4)
