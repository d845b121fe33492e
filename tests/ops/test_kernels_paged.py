"""The CPU kernels of the merged cache against float64, against the references, and in every layout that vLLM has."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
    make_case,
    merge_reference,
    poison,
    raw_bytes,
)
from torch import Tensor

from qm_spec.config import SALIENCIES, MergeConfig
from qm_spec.ops import append_kv_, backend, merge_groups_, merged_attention
from qm_spec.ops.append_kv import append_kv_reference
from qm_spec.ops.entries import gather_entries
from qm_spec.ops.merged_attention import merged_attention_reference
from qm_spec.ops.page import COUNT, LEVEL, MASS, split_page

pytestmark = pytest.mark.skipif(backend.backend() != "compiled", reason="the CPU kernels were not built")

# Places in `CONFIG.pack()`, values that no kernel may take, and what is said of them.
pytestmark = pytest.mark.usefixtures("outputs_start_as_nan")

REFUSED = [
    (0, 0, "build the kernels again"),
    (0, 3, "build the kernels again"),
    (1, 4, "schedule must fall"),
    (2, 0, "schedule must fall"),
    (3, 5, "window or group_size"),
    (4, 1, "window or group_size"),
    (5, 17, "doublings"),
    (6, len(SALIENCIES), f"do not know saliency {len(SALIENCIES)}"),
    (6, -1, "do not know saliency -1"),
    (7, 0, "temperature or epsilon"),
    (8, 0, "temperature or epsilon"),
]


@pytest.fixture
def threads() -> Iterator[None]:
    """Put the number of threads back after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def merge_both(case: Case, expected: Case, table: Tensor, frontier: Tensor, config: MergeConfig) -> None:
    merge_groups_(case.cache, table, frontier, case.head_dim, config)
    merge_reference(expected.cache, table, frontier, case.head_dim, config)


def check_error(fast: Tensor, plain: Tensor, exact: Tensor) -> None:
    def err(found: Tensor) -> float:
        return (found.double() - exact).abs().max().item()

    assert torch.isfinite(fast).all(), "inf or nan"
    assert err(fast) <= 2 * err(plain) + 1e-6, f"{err(fast):.1e} against {err(plain):.1e}"


@pytest.mark.parametrize("name", ["append_kv_", "merge_groups_", "merged_attention"])
def test_the_dispatcher_takes_the_kernel(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qm_spec::{name}", "CPU")


class TestAppend:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("head_dim", [6, 32, 80, 256])
    def test_writes_every_byte_that_the_reference_writes_and_no_other(self, dtype, layout, head_dim) -> None:
        case = make_case(37, 16, 3, head_dim, dtype, layout)
        case.cache.fill_(float("nan"))
        expected = case.copy()
        append_kv_reference(expected.cache, case.key, case.value, case.slots)
        append_kv_(case.cache, case.key, case.value, case.slots)
        assert torch.equal(raw_bytes(case.buffer), raw_bytes(expected.buffer))

    @pytest.mark.parametrize("given_dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_converts_as_torch_does(self, dtype, given_dtype) -> None:
        case = make_case(40, 16, 2, 21, dtype)
        # Ties, subnormals, overflow, signed zeros, infinities; NaN is compared as such.
        special = [0.0, -0.0, 1e-8, -3e-6, 5.96e-8, 65504.0, 65519.9, 65520.0, 1e30, -1e30, math.inf, -math.inf]
        special += [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 6.1e-5, math.nan]
        key = torch.randn(40, 2, 21) * 10.0 ** torch.randint(-9, 9, (40, 2, 21))
        key.view(-1)[: len(special)] = torch.tensor(special)
        key = key.to(given_dtype)
        append_kv_(case.cache, key, key, case.slots)
        expected = case.copy()
        append_kv_reference(expected.cache, key, key, case.slots)
        assert torch.equal(case.cache.isnan(), expected.cache.isnan())
        assert torch.equal(raw_bytes(case.cache.nan_to_num(7.0)), raw_bytes(expected.cache.nan_to_num(7.0)))

    def test_takes_views_at_any_offset(self) -> None:
        case = make_case(9)
        expected = case.copy()
        for offset in range(5):
            # Query, key and value of a row stand side by side, as a projection leaves them.
            wide = torch.full((9, 5 + 2 * 16), SENTINEL)
            key = wide[:, offset : offset + 16].unflatten(1, (2, 8))
            value = wide[:, offset + 16 : offset + 32].unflatten(1, (2, 8))
            key.copy_(case.key)
            value.copy_(case.value)
            slots = torch.stack([case.slots, torch.full_like(case.slots, -1)], 1)[:, 0]
            case.cache.fill_(float("nan"))
            append_kv_(case.cache, key, value, slots)
            assert torch.equal(raw_bytes(case.buffer), raw_bytes(expected.buffer))
        # Elements that do not lie side by side.
        append_kv_(case.cache, case.key.mT.contiguous().mT, case.value.mT.contiguous().mT, case.slots)
        assert torch.equal(raw_bytes(case.buffer), raw_bytes(expected.buffer))

    def test_padding_and_page_zero_are_left_alone(self) -> None:
        case = make_case(20)
        before = case.buffer.clone()
        append_kv_(case.cache, case.key[:4], case.value[:4], torch.tensor([-1, -7, 0, 15]))
        append_kv_(case.cache, case.key[:0], case.value[:0], torch.tensor([], dtype=torch.int64))
        assert torch.equal(raw_bytes(before), raw_bytes(case.buffer))

    def test_a_slot_behind_the_last_page_is_an_error(self) -> None:
        case = make_case(20)
        with pytest.raises(RuntimeError, match=r"append_kv_: slots must be below 48, got 48"):
            append_kv_(case.cache, case.key[:1], case.value[:1], torch.tensor([48]))


def exact_merge(keys: Tensor, values: Tensor, mass: Tensor | None, count: Tensor, keep: int, config: MergeConfig):
    """Merge groups `[n, R0, d]` in float64; saliency gives the mass where there is none."""
    keys, values = keys.double(), values.double()
    if mass is None:
        scores = keys @ keys.mT / math.sqrt(keys.shape[-1])
        log_attention = scores - scores.logsumexp(-1, keepdim=True)
        entropy = -(log_attention.exp() * log_attention).sum(-1)
        entropy = -entropy if config.saliency == "inverse_entropy" else entropy
        low, high = entropy.amin(-1, keepdim=True), entropy.amax(-1, keepdim=True)
        s = (entropy - low) / (high - low)
        pi = torch.softmax(s / config.temperature, -1)
        mass = pi * s + (1 - pi) * config.epsilon
    mass = mass.double()
    salient = mass.argsort(dim=-1, descending=True, stable=True)[:, :keep].sort(-1).values
    unit = torch.nn.functional.normalize(keys, dim=-1)
    centres = unit.gather(1, salient.unsqueeze(-1).expand(-1, -1, unit.shape[-1]))
    cluster = (unit @ centres.mT).argmax(-1)
    cluster.scatter_(1, salient, torch.arange(keep).expand(len(keys), -1))
    member = torch.nn.functional.one_hot(cluster, keep).double()
    total = (member * mass.unsqueeze(-1)).sum(1)
    weights = (member * mass.unsqueeze(-1) / total.unsqueeze(1)).mT
    return weights @ keys, weights @ values, total, (member * count.unsqueeze(-1)).sum(1)


class TestMerge:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        ("head_dim", "page_size", "saliency"),
        [
            (32, 16, "entropy"),
            (64, 32, "inverse_entropy"),
            (80, 48, "entropy"),
            (96, 128, "entropy"),
            (128, 64, "inverse_entropy"),
            (256, 16, "entropy"),
            (7, 16, "entropy"),
        ],
    )
    def test_each_level_errs_at_most_twice_as_much_as_pytorch(self, dtype, head_dim, page_size, saliency) -> None:
        heads, groups = 2, 24
        if dtype != torch.float32 and head_dim % 2:
            head_dim += 1
        case = make_case(groups * 16, page_size, heads, head_dim, dtype)
        first = case.table[0, : groups * 16 // page_size].long().unsqueeze(1)
        page = first.expand(-1, page_size // 16).flatten()
        slot = (torch.arange(page_size // 16) * 16).expand(len(first), -1).flatten()
        counts = (16, 8, 4, 2, 1)
        for level, keep in enumerate(counts[1:], 1):
            config = MergeConfig(window=18, schedule=counts[1 : level + 1], saliency=saliency, doublings=0)
            fast, plain = case.copy(), case.copy()
            # Far beyond the last token: everything is due for the highest level.
            merge_both(fast, plain, case.table[:, : len(first)], lens(10**6), config)
            assert_same_cache(fast, plain)

            def entries(which: Case, number: int):
                where = page.unsqueeze(1), slice(None), slot.unsqueeze(1) + torch.arange(number)
                # Groups and heads as rows.
                return [x[where].transpose(1, 2).flatten(0, 1) for x in split_page(which.cache, which.head_dim)]

            keys, values, state = entries(case, counts[level - 1])
            mass = None if level == 1 else state[..., MASS]
            exact = exact_merge(keys, values, mass, state[..., COUNT].double(), keep, config)
            found, reference = entries(fast, keep), entries(plain, keep)
            assert torch.equal(found[2][..., COUNT].double(), exact[3])
            check_error(found[0], reference[0], exact[0])
            check_error(found[1], reference[1], exact[1])
            check_error(found[2][..., MASS], reference[2][..., MASS], exact[2])
            case = plain

    @pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 63, 64, 65, 150, 301])
    @pytest.mark.parametrize("page_size", [4, 16, 32])
    def test_equals_the_reference(self, num_tokens, page_size) -> None:
        case = make_case(num_tokens, page_size)
        expected = case.copy()
        merge_both(case, expected, case.table, lens(num_tokens), CONFIG)
        assert_same_cache(case, expected)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_equals_the_reference_in_every_layout_and_dtype(self, layout, dtype) -> None:
        case = make_case(250, 16, 3, 16, dtype, layout)
        expected = case.copy()
        merge_both(case, expected, case.table, lens(250), CONFIG)
        assert_same_cache(case, expected)

    @pytest.mark.parametrize(
        ("config", "heads", "head_dim", "page_size"),
        [
            (MergeConfig(), 8, 64, 128),
            (MergeConfig(temperature=0.1, epsilon=0.2), 1, 128, 64),
            # A schedule that ends above 1 has no spans; (0,) keeps nothing; groups of more tokens than vector lanes.
            (MergeConfig(window=20, group_size=8, schedule=(5, 3)), 2, 8, 16),
            (MergeConfig(window=12, group_size=4, schedule=(0,)), 2, 8, 16),
            (MergeConfig(window=70, group_size=64, schedule=(40, 17, 1), doublings=1), 1, 12, 128),
            # To one entry at once, and an odd number of heads, as tensor parallelism leaves them.
            (MergeConfig(window=12, group_size=4, schedule=(1,), doublings=2), 7, 40, 48),
        ],
    )
    def test_equals_the_reference_for_other_settings(self, config, heads, head_dim, page_size) -> None:
        num_tokens = config.window * 2 ** len(config.schedule) + 21 * config.group_size + 3
        case = make_case(num_tokens, page_size, heads, head_dim)
        expected = case.copy()
        merge_both(case, expected, case.table, lens(num_tokens), config)
        assert_same_cache(case, expected)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("head_dim", [8, 32, 12])
    def test_what_is_not_finite_is_dropped_when_it_is_merged(self, dtype, head_dim) -> None:
        """A key, a value, all of a group for one head, and what stood in a page before the request."""
        for num_tokens in (70, 250):
            case = make_case(num_tokens, 16, 2, head_dim, dtype)
            poison(case)
            expected = case.copy()
            merge_both(case, expected, case.table, lens(num_tokens), CONFIG)
            assert_merged_is_finite(case, num_tokens, CONFIG)
            assert_same_cache(case, expected)

    def test_other_entries_are_merged_as_with_zeros_in_the_place_of_what_is_dropped(self) -> None:
        case = make_case(20)
        page = case.table[0, 0].long()
        zeros = case.copy()
        for which, fill in ((case, math.nan), (zeros, 0.0)):
            which.cache[page, 0, 1, : 2 * which.head_dim] = fill
            # The first group to two entries.
            merge_groups_(which.cache, which.table, lens(20), which.head_dim, CONFIG)
        assert torch.equal(raw_bytes(case.cache[page, 1]), raw_bytes(zeros.cache[page, 1])), "the other head"
        assert torch.equal(raw_bytes(case.cache[page, 0, 4:]), raw_bytes(zeros.cache[page, 0, 4:])), "other groups"
        own, other = (which.state[page, 0, :2] for which in (case, zeros))
        assert own[:, COUNT].sum() == other[:, COUNT].sum() == 4, "it counts as a token"
        assert own[:, MASS].sum() < other[:, MASS].sum(), "and adds no mass"

    @pytest.mark.parametrize("steps", [(3000,), (700, 1900, 3000)])
    def test_spans_larger_than_what_a_thread_takes_equal_the_reference(self, steps) -> None:
        """Of up to 128 groups; two requests share the first ones."""
        config = MergeConfig(window=12, group_size=4, schedule=(2, 1), doublings=7)
        case = make_case(4000, 16)
        tables = case.table[:, :188].repeat(2, 1)
        tables[1, 150:] = case.table[0, 200:238]
        expected = case.copy()
        for tokens in steps:
            merge_both(case, expected, tables, lens(tokens, tokens - 100), config)
            assert_same_cache(case, expected)
        counts = gather_entries(case.cache, tables, lens(3000, 2900), 8, config).count
        assert counts.max().round() == 512
        assert counts[0].sum(-1).round().tolist() == [3000.0, 3000.0]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("value", [0.0, 0.5])
    def test_of_equal_tokens_the_earlier_stay_and_the_rest_joins_the_first(self, dtype, value) -> None:
        case = make_case(400, 16, 2, 32, dtype)
        split_page(case.cache, 32)[0].fill_(value)
        expected = [((8,), [9] + 7 * [1]), ((8, 4), [13, 1, 1, 1]), ((8, 4, 2), [15, 1])]
        # The mean of equal keys other than 0 is rounded, and then they are not equal any more.
        for schedule, counts in expected if value == 0 else expected[:1]:
            config = MergeConfig(window=18, schedule=schedule, doublings=0)
            merge_groups_(case.cache, case.table[:, :25], lens(10**6), 32, config)
            state = case.state[1:, :, : len(counts)]
            assert torch.equal(state[..., COUNT], torch.tensor(counts).float().expand(25, 2, -1))

    def test_of_two_equal_tokens_the_earlier_takes_what_is_near_both(self) -> None:
        case = make_case(400, 16, 2, 32)
        keys, _, _ = split_page(case.cache, 32)
        keys[..., 1::2, :] = keys[..., ::2, :]
        merge_groups_(case.cache, case.table[:, :25], lens(10**6), 32, MergeConfig(window=18, schedule=(8,)))
        # Four pairs stay.
        count = case.state[1:, :, :8, COUNT]
        assert (count[..., 1::2] == 1).all() and (count[..., ::2].sum(-1) == 12).all()

    def test_twice_changes_nothing_and_steps_end_where_one_step_does(self) -> None:
        for dtype in DTYPES:
            at_once = make_case(290, dtype=dtype)
            in_steps = at_once.copy()
            merge_groups_(at_once.cache, at_once.table, lens(290), 8, CONFIG)
            once = at_once.buffer.clone()
            merge_groups_(at_once.cache, at_once.table, lens(290), 8, CONFIG)
            assert torch.equal(raw_bytes(once), raw_bytes(at_once.buffer)), "merging twice changed something"
            for frontier in (20, 21, 90, 150, 151, 152, 230, 289, 290):
                merge_groups_(in_steps.cache, in_steps.table, lens(frontier), 8, CONFIG)
            live = at_once.state[..., COUNT] > 0
            # Bit for bit: what lies between levels is rounded as if it had been stored.
            assert torch.equal(raw_bytes(at_once.cache[live]), raw_bytes(in_steps.cache[live]))
            assert torch.equal(raw_bytes(at_once.state), raw_bytes(in_steps.state))

    @settings(max_examples=15, deadline=None)
    @given(data=st.data())
    def test_requests_that_share_pages_end_as_in_the_reference(self, data: st.DataObject) -> None:
        """Any number of requests part from the first one at any page, and merge in any order."""
        page_size, num_pages = data.draw(st.sampled_from([4, 8])), 36
        case = make_case(num_pages * page_size * 4, page_size)
        tables = case.table[:, :num_pages].clone()
        own = case.table[0, num_pages:]
        for number in range(3):
            shared = data.draw(st.integers(0, num_pages), label="shared pages")
            parent = tables[data.draw(st.integers(0, len(tables) - 1), label="parent")]
            fresh = own[number * num_pages : number * num_pages + num_pages - shared]
            tables = torch.cat([tables, torch.cat([parent[:shared], fresh]).unsqueeze(0)])
        expected = case.copy()
        frontier = torch.zeros(len(tables), dtype=torch.int32)
        for _ in range(data.draw(st.integers(1, 4), label="merges")):
            step = st.integers(1, num_pages * page_size)
            frontier = frontier.clamp_min(lens(*(data.draw(step) for _ in tables)))
            merge_both(case, expected, tables, frontier, CONFIG)
            assert_same_cache(case, expected)
            # The walk over spans finds the entries that reading every group finds.
            query = torch.randn(len(tables), 4, 8)
            starts = torch.arange(len(tables) + 1, dtype=torch.int32)
            check_attention(case, query, tables, frontier, starts, CONFIG)

    def test_a_request_keeps_its_groups_where_spans_were_merged_by_others(self) -> None:
        """One shares the first group alone and merges it; the next has spans around its own groups behind that."""
        case = make_case(3 * 64, 4)
        long, short = case.table[:, :16], torch.cat([case.table[:, :1], case.table[:, 16:31]], 1)
        expected = case.copy()
        for tables, frontier in ((short, lens(64)), (long, lens(64)), (long, lens(10**4))):
            merge_both(case, expected, tables, frontier, CONFIG)
            assert_same_cache(case, expected)
        counts = gather_entries(case.cache, long, lens(64), 8, CONFIG).count
        # Its own 60 tokens, and the 16 of the short one's first span.
        assert counts.sum(-1).round().tolist() == [[76.0, 76.0]]

    @pytest.mark.parametrize("page_size", [4, 16])
    @pytest.mark.parametrize("shared", [1, 2, 3, 9])
    def test_a_page_written_anew_is_no_part_of_the_span_that_it_was_merged_into(self, shared, page_size) -> None:
        """A request frees its later pages, and the next one gets the very same ones behind the prefix they share."""
        tokens = page_size * 16
        case = make_case(tokens, page_size)
        expected, table = case.copy(), case.table[:, :16]
        merge_both(case, expected, table, lens(10**4), CONFIG)
        shared_tokens = shared * page_size
        for which in (case, expected):
            append_kv_reference(
                which.cache, case.value[shared_tokens:], case.key[shared_tokens:], case.slots[shared_tokens:]
            )
        query = torch.randn(2, 4, 8)
        for frontier in (shared_tokens + 20, tokens, 10**4):
            check_attention(case, query, table, lens(tokens), lens(0, 2), CONFIG)
            merge_both(case, expected, table, lens(frontier), CONFIG)
            assert_same_cache(case, expected)
        counts = gather_entries(case.cache, table, lens(tokens), 8, CONFIG).count.sum(-1)
        # All of its own tokens behind the shared ones are there, and those; a span's entry may hold more.
        assert (counts >= tokens - 0.5).all()

    def test_a_reused_page_merges_again(self) -> None:
        case = make_case(256)
        merge_groups_(case.cache, case.table, lens(256), 8, CONFIG)
        key, value = torch.randn(2, 256, 2, 8)
        append_kv_(case.cache, key, value, case.slots)
        expected = case.copy()
        merge_both(case, expected, case.table, lens(200), CONFIG)
        assert_same_cache(case, expected)
        assert case.state[case.table[0, 0].long(), 0, 0, LEVEL] > 0

    def test_nothing_within_the_window_nor_on_page_zero_is_touched(self) -> None:
        case = make_case(120, 4)
        before = case.copy()
        merge_groups_(case.cache, case.table, lens(100), 8, CONFIG)
        recent = case.table[0, 22:30].long()
        assert torch.equal(raw_bytes(before.cache[recent]), raw_bytes(case.cache[recent]))
        before = case.copy()
        case.cache[0] = before.cache[0] = before.cache[1]
        merge_groups_(case.cache, torch.zeros_like(case.table), lens(120), 8, CONFIG)
        assert torch.equal(raw_bytes(before.cache[0]), raw_bytes(case.cache[0]))

    def test_no_requests_no_columns_and_no_tokens(self) -> None:
        case = make_case(64)
        before = case.buffer.clone()
        merge_groups_(case.cache, case.table[:0], lens(), 8, CONFIG)
        merge_groups_(case.cache, case.table[:, :0], lens(64), 8, CONFIG)
        merge_groups_(case.cache, case.table, lens(0), 8, CONFIG)
        merge_groups_(case.cache, case.table, lens(-5), 8, CONFIG)
        assert torch.equal(raw_bytes(before), raw_bytes(case.buffer))

    def test_strided_and_wide_integers(self) -> None:
        case = make_case(200)
        expected = case.copy()
        wide = torch.stack([case.table, torch.full_like(case.table, -1)], -1).long()[..., 0]
        merge_groups_(case.cache, wide, torch.tensor([200, 9])[::2], 8, CONFIG)
        merge_reference(expected.cache, case.table, lens(200), 8, CONFIG)
        assert_same_cache(case, expected)

    def test_a_page_that_does_not_exist_is_an_error(self) -> None:
        case = make_case(64)
        with pytest.raises(RuntimeError, match=r"block_table: pages must be in 0\.\.4, got 1000000"):
            merge_groups_(case.cache, case.table, lens(110), 8, CONFIG)


def check_attention(
    case: Case, query: Tensor, table: Tensor, seq_lens: Tensor, starts: Tensor, config: MergeConfig, max_rows: int = 3
) -> None:
    """Compare with the reference and with float64."""
    slopes, far_bias = torch.rand(query.shape[1]) * 0.2, torch.randn(query.shape[1])
    arguments = (query, case.cache, table, seq_lens, starts, slopes, far_bias, max_rows)
    fast, plain = merged_attention(*arguments, config), attend_reference(*arguments, config)
    rows = torch.zeros(len(query), dtype=torch.bool)
    exact = [x.double().clone() for x in plain]
    for b in range(len(seq_lens)):
        first, end = int(starts[b]), int(starts[b + 1])
        first = max(first, end - max_rows)
        if first >= end:
            continue
        one = (table[b : b + 1], seq_lens[b : b + 1], lens(0, end - first), slopes, far_bias, end - first, config)
        for all_rows, own in zip(exact, exact_attention(query[first:end], case.cache, *one), strict=True):
            all_rows[first:end] = own
        rows[first:end] = True
    for found, reference, wanted in zip(fast, plain, exact, strict=True):
        assert found.dtype == reference.dtype and found.stride() == reference.stride()
        if rows.any():
            check_error(found[rows], reference[rows], wanted[rows])
        assert torch.equal(found[~rows], reference[~rows]), "rows that are not computed hold 0, -inf and 0"


class TestAttention:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        ("heads", "query_heads", "head_dim", "page_size"),
        [
            (1, 1, 32, 16),
            (2, 6, 64, 32),
            (8, 8, 80, 48),
            (3, 21, 96, 128),
            (1, 16, 128, 64),
            (2, 2, 256, 16),
            (1, 5, 6, 16),
        ],
    )
    def test_errs_at_most_twice_as_much_as_pytorch(self, dtype, heads, query_heads, head_dim, page_size) -> None:
        config = MergeConfig(window=34, doublings=3)
        case = make_case(1500, page_size, heads, head_dim, dtype)
        merge_reference(case.cache, case.table, lens(1500), head_dim, config)
        query = torch.randn(6, query_heads, head_dim).to(dtype)
        check_attention(case, query, case.table, lens(1500), lens(0, 6), config, max_rows=5)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("num_tokens", [1, 4, 15, 63, 64, 65, 256, 257, 600])
    def test_any_length_in_any_layout(self, num_tokens, layout) -> None:
        case = make_case(num_tokens, 16, layout=layout)
        merge_reference(case.cache, case.table, lens(num_tokens), 8, CONFIG)
        query = torch.randn(min(num_tokens, 4), 4, 8)
        check_attention(case, query, case.table, lens(num_tokens), lens(0, len(query)), CONFIG)

    def test_thousands_of_raw_tokens(self) -> None:
        case = make_case(3000)
        check_attention(case, torch.randn(2, 4, 8), case.table, lens(3000), lens(0, 2), CONFIG)

    @pytest.mark.parametrize("scale", [0.0, 1e-3, 100.0])
    def test_equal_and_extreme_scores(self, scale) -> None:
        case = make_case(400)
        merge_reference(case.cache, case.table, lens(400), 8, CONFIG)
        query = torch.randn(3, 4, 8) * scale
        slopes = torch.zeros(4)
        arguments = (query, case.cache, case.table, lens(400), lens(0, 3), slopes, slopes, 3)
        fast = merged_attention(*arguments, CONFIG)
        for found, plain in zip(fast, merged_attention_reference(*arguments, CONFIG.pack()), strict=True):
            torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
        assert (fast[2] >= 0).all()

    @settings(max_examples=30, deadline=None)
    @given(
        lengths=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 5)), max_size=6),
        page_size=st.sampled_from([4, 16, 32]),
        max_rows=st.integers(1, 4),
    )
    def test_batches_with_padding_equal_the_reference(self, lengths, page_size, max_rows) -> None:
        """Requests without rows have a length and a table that mean nothing."""
        case = make_case(300, page_size)
        merge_reference(case.cache, case.table, lens(300), 8, CONFIG)
        lengths = [(tokens if rows == 0 else max(tokens, rows), rows) for tokens, rows in lengths]
        table = case.table.repeat(len(lengths), 1)
        for row, (_, rows) in enumerate(lengths):
            if rows == 0:
                table[row] = -1
        starts = [0]
        for _, rows in lengths:
            starts.append(starts[-1] + rows)
        # Rows behind those of all requests are padding too.
        query = torch.randn(starts[-1] + 2, 4, 8)
        seq_lens = torch.tensor([tokens for tokens, _ in lengths], dtype=torch.int32)
        check_attention(case, query, table, seq_lens, lens(*starts), CONFIG, max_rows)

    def test_views_and_strided_results(self) -> None:
        case = make_case(100)
        wide = torch.full((3, 4 * 8 + 9), SENTINEL)
        for offset in range(4):
            view = wide[:, offset : offset + 32].unflatten(1, (4, 8))
            view.copy_(torch.randn(3, 4, 8))
            check_attention(case, view, case.table, lens(100), lens(0, 3), CONFIG)
        # Heads first, and elements first: the result has the query's strides.
        check_attention(case, torch.randn(4, 3, 8).transpose(0, 1), case.table, lens(100), lens(0, 3), CONFIG)
        check_attention(case, torch.randn(3, 8, 4).mT, case.table, lens(100), lens(0, 3), CONFIG)

    def test_stale_bytes_cost_no_more_than_their_entries(self) -> None:
        query = torch.randn(1, 4, 8)
        for level, count in [
            (1e9, math.inf),
            (math.nan, 3.0),
            (math.inf, 1.0),
            (-3.0, 1.0),
            (3.0, math.nan),
            (2.0, -1),
        ]:
            case = make_case(60)
            case.state[case.table[0, 1].long(), :, ::4, LEVEL] = level
            case.state[case.table[0, 1].long(), :, ::4, COUNT] = count
            slopes = torch.zeros(4)
            arguments = (query, case.cache, case.table, lens(60), lens(0, 1), slopes, slopes, 1)
            for found, plain in zip(
                merged_attention(*arguments, CONFIG), merged_attention_reference(*arguments, CONFIG.pack()), strict=True
            ):
                assert torch.isfinite(found).all()
                torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
        # An empty slot may hold anything.
        case = make_case(60)
        keys, values, state = split_page(case.cache, 8)
        page = case.table[0, 1].long()
        keys[page, :, 0] = values[page, :, 0] = math.nan
        state[page, :, 0, LEVEL], state[page, :, 0, COUNT] = 2.0, 0.0
        out, lse, entropy = merged_attention(
            query, case.cache, case.table, lens(60), lens(0, 1), slopes, slopes, 1, CONFIG
        )
        assert torch.isfinite(out).all() and torch.isfinite(lse).all() and torch.isfinite(entropy).all()

    def test_no_rows_and_no_requests(self) -> None:
        case = make_case(20)
        bias = torch.zeros(4)
        out, lse, _ = merged_attention(
            torch.randn(0, 4, 8), case.cache, case.table, lens(20), lens(0, 0), bias, bias, 2, CONFIG
        )
        assert out.shape == (0, 4, 8) and lse.shape == (0, 4)
        out, lse, entropy = merged_attention(
            torch.randn(3, 4, 8), case.cache, case.table[:0], lens(), lens(0), bias, bias, 2, CONFIG
        )
        assert (out == 0).all() and (lse == -math.inf).all() and (entropy == 0).all()


class TestPackedConfig:
    """A drafter would be trained by one measure and served by another if a kernel took what it does not know."""

    @pytest.mark.parametrize("saliency", SALIENCIES)
    def test_every_saliency_means_the_same_to_kernel_and_reference(self, saliency: str) -> None:
        case = make_case(100)
        expected = case.copy()
        merge_both(case, expected, case.table, lens(100), replace(CONFIG, saliency=saliency))
        assert_same_cache(case, expected)

    def test_a_saliency_that_only_python_knows_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = make_case(64)
        monkeypatch.setattr("qm_spec.config.SALIENCIES", {**SALIENCIES, "norm": 1.0})
        with pytest.raises(RuntimeError, match=f"the kernels do not know saliency {len(SALIENCIES)}"):
            merge_groups_(case.cache, case.table, lens(64), 8, replace(CONFIG, saliency="norm"))

    @pytest.mark.parametrize(("number", "value", "problem"), REFUSED)
    def test_a_setting_out_of_range_is_an_error(self, number: int, value: int, problem: str) -> None:
        case, packed = make_case(64), CONFIG.pack()
        packed[number] = value
        with pytest.raises(RuntimeError, match=problem):
            torch.ops.qm_spec.merge_groups_(case.cache, case.table, lens(64), 8, packed)

    def test_a_field_that_only_python_knows_is_an_error(self) -> None:
        case, packed = make_case(64), [*CONFIG.pack(), 1]
        query, bias = torch.randn(1, 4, 8), torch.zeros(4)
        with pytest.raises(RuntimeError, match="build the kernels again"):
            torch.ops.qm_spec.merged_attention(
                query, case.cache, case.table, lens(64), lens(0, 1), bias, bias, 1, packed
            )


def run_all(case: Case, query: Tensor, config: MergeConfig) -> list[Tensor]:
    """Append, merge for two requests, attend; return everything that was written."""
    case = case.copy()
    tables = case.table[:, :-3].repeat(2, 1)
    append_kv_(case.cache, case.key, case.value, case.slots)
    merge_groups_(case.cache, tables, lens(len(case.key) // 2, len(case.key)), case.head_dim, config)
    bias = torch.linspace(0, 1, query.shape[1])
    starts = lens(0, len(query) // 2, len(query))
    lengths = lens(len(case.key), len(case.key))
    attended = merged_attention(query, case.cache, tables, lengths, starts, bias, bias, 4, config)
    return [raw_bytes(case.buffer), *attended]


def test_the_same_bits_in_a_hundred_runs_and_for_any_number_of_threads(threads: None) -> None:
    torch.manual_seed(0)
    case = make_case(900, 32, 2, 32, torch.bfloat16)
    query = torch.randn(6, 8, 32)
    config = MergeConfig(window=18, doublings=2)
    torch.set_num_threads(1)
    expected = run_all(case, query, config)
    for number in (1, 2, 3, 8):
        torch.set_num_threads(number)
        for _ in range(25):
            for found, wanted in zip(run_all(case, query, config), expected, strict=True):
                assert torch.equal(found, wanted), f"{number} threads"


def test_the_three_operators_compile_into_one_graph() -> None:
    case = make_case(70)
    expected = case.copy()
    query, slopes = torch.randn(2, 4, 8), torch.rand(4)

    def step(cache: Tensor, key: Tensor, value: Tensor, slots: Tensor, query: Tensor) -> tuple[Tensor, ...]:
        append_kv_(cache, key, value, slots)
        merge_groups_(cache, case.table, lens(70), 8, CONFIG)
        return merged_attention(query * 2, cache, case.table, lens(70), lens(0, 2), slopes, slopes, 2, CONFIG)

    eager = step(expected.cache, case.key, case.value, case.slots, query)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(compiled(case.cache, case.key, case.value, case.slots, query), eager, strict=True):
        torch.testing.assert_close(found, wanted)
    assert torch.equal(raw_bytes(case.buffer), raw_bytes(expected.buffer))
