"""The reference operators against naive code, and the invariants of merging."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qm_spec.config import SALIENCIES, MergeConfig
from qm_spec.ops import append_kv_, attention_entropy, merge_groups_, merged_attention
from qm_spec.ops.entries import gather_entries
from qm_spec.ops.merge_entries import merge_entries, saliency_mass
from qm_spec.ops.page import COUNT, LEVEL, slot_elements, split_page

HEADS, GROUPS, HEAD_DIM = 4, 2, 8
# Spans of 2 groups from a distance of 48 tokens, of 4 from 96, of 8 from 192.
CONFIG = MergeConfig(window=12, group_size=4, schedule=(2, 1), doublings=3)


def make_cache(num_tokens, page_size, dtype=torch.float32, seed=0):
    """Fill a cache whose unused slots are NaN; return it with its table and the raw keys and values."""
    torch.manual_seed(seed)
    num_pages = -(-num_tokens // page_size)
    # Table columns past the request's pages name pages that do not exist: nobody may read them.
    table = torch.full((1, num_pages + 3), 10**6, dtype=torch.int32)
    table[0, :num_pages] = torch.randperm(num_pages).int() + 1
    shape = (num_pages + 1, GROUPS, page_size, slot_elements(HEAD_DIM, dtype))
    cache = torch.full(shape, float("nan"), dtype=dtype)
    key, value = torch.randn(2, num_tokens, GROUPS, HEAD_DIM).to(dtype)
    position = torch.arange(num_tokens)
    slots = table[0].long()[position // page_size] * page_size + position % page_size
    append_kv_(cache, key, value, slots)
    return cache, table, key, value


def live(cache):
    """Blank the keys and values of empty slots: what a merge leaves there is nobody's."""
    cache = cache.clone()
    keys, values, state = split_page(cache, HEAD_DIM)
    empty = (state[..., COUNT] == 0).unsqueeze(-1)
    keys.masked_fill_(empty, 0.0)
    values.masked_fill_(empty, 0.0)
    return cache.nan_to_num(7.0)


def lens(*values):
    return torch.tensor(values, dtype=torch.int32)


def attend(cache, table, query, num_tokens, slopes, far_bias, config=CONFIG, max_rows=8):
    starts = lens(0, len(query))
    return merged_attention(query, cache, table, lens(num_tokens), starts, slopes, far_bias, max_rows, config)


def naive_attention(query, key, value, row_position, slopes, far_bias, config):
    """One row at a time over a list of (key, value, bias), merged in a plain loop, in float64."""
    num_rows, num_heads, head_dim = query.shape
    num_tokens = len(key)
    out = torch.zeros(num_rows, num_heads, head_dim, dtype=torch.float64)
    lse = torch.zeros(num_rows, num_heads, dtype=torch.float64)
    for head in range(num_heads):
        kv_head = head // (num_heads // key.shape[1])
        entries = []  # (key, value, count or None, position)
        singles = {}  # one entry of a whole group: first group, groups -> (key, value, count, mass)
        for start in range(0, num_tokens, config.group_size):
            k = key[start : start + config.group_size, kv_head].double()
            v = value[start : start + config.group_size, kv_head].double()
            distance = num_tokens - (start + config.group_size)
            level = 0
            while level < len(config.schedule) and distance >= config.window * 2**level:
                level += 1
            if level == 0:
                entries += [(k[i], v[i], None, start + i) for i in range(len(k))]
                continue
            mass = saliency_mass(k.float(), config).double().tolist()
            count = [1] * len(k)
            k, v = list(k), list(v)
            for keep in config.schedule[:level]:
                order = sorted(range(len(k)), key=lambda i: (-mass[i], i))
                salient = sorted(order[:keep])
                home = {}
                for i in range(len(k)):
                    similarity = [torch.cosine_similarity(k[i], k[c], dim=0).item() for c in salient]
                    home[i] = i if i in salient else salient[similarity.index(max(similarity))]
                members = {c: [i for i in home if home[i] == c] for c in salient}
                new_k = [sum(mass[i] * k[i] for i in m) / sum(mass[i] for i in m) for m in members.values()]
                new_v = [sum(mass[i] * v[i] for i in m) / sum(mass[i] for i in m) for m in members.values()]
                count = [sum(count[i] for i in m) for m in members.values()]
                mass = [sum(mass[i] for i in m) for m in members.values()]
                k, v = new_k, new_v
            if level == len(config.schedule) and len(k) == 1:
                singles[start // config.group_size, 1] = (k[0], v[0], count[0], sum(mass))
            else:
                entries += list(zip(k, v, count, [None] * len(k), strict=True))
        for number in range(config.doublings):
            span = 2**number
            for first, groups in sorted(singles):
                neighbour = (first + span, span)
                end = (first + 2 * span) * config.group_size
                # Two levels share a distance.
                due = num_tokens - end >= config.window << (len(config.schedule) + number // 2)
                if groups != span or first % (2 * span) or neighbour not in singles or not due:
                    continue
                (k1, v1, n1, m1), (k2, v2, n2, m2) = singles.pop((first, span)), singles.pop(neighbour)
                whole = m1 + m2
                merged = ((m1 * k1 + m2 * k2) / whole, (m1 * v1 + m2 * v2) / whole, n1 + n2, whole)
                singles[first, 2 * span] = merged
        entries += [(k, v, n, None) for k, v, n, _ in singles.values()]
        for row in range(num_rows):
            scores, values = [], []
            for k, v, n, position in entries:
                score = (query[row, head].double() @ k).item() / math.sqrt(head_dim)
                if n is None:
                    if position > row_position[row]:
                        continue
                    score -= slopes[head].item() * (row_position[row] - position)
                else:
                    score += far_bias[head].item() + math.log(min(n, config.group_size))
                scores.append(score)
                values.append(v)
            scores = torch.tensor(scores, dtype=torch.float64)
            lse[row, head] = scores.logsumexp(0)
            out[row, head] = torch.softmax(scores, 0) @ torch.stack(values)
    return out, lse


@settings(max_examples=20, deadline=None)
@given(num_tokens=st.integers(1, 260), page_size=st.sampled_from([4, 16, 32]), seed=st.integers(0, 5))
def test_append_merge_attend_equals_naive_code(num_tokens, page_size, seed):
    cache, table, key, value = make_cache(num_tokens, page_size, seed=seed)
    merge_groups_(cache, table, lens(num_tokens), HEAD_DIM, CONFIG)
    rows = min(3, num_tokens)
    query = torch.randn(rows, HEADS, HEAD_DIM)
    slopes, far_bias = torch.rand(HEADS) * 0.2, torch.randn(HEADS)
    out, lse, _ = attend(cache, table, query, num_tokens, slopes, far_bias)
    positions = list(range(num_tokens - rows, num_tokens))
    exact, exact_lse = naive_attention(query, key, value, positions, slopes, far_bias, CONFIG)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(num_tokens=st.integers(1, 300), page_size=st.sampled_from([4, 16]))
def test_counts_sum_to_the_tokens_seen(num_tokens, page_size):
    cache, table, _, _ = make_cache(num_tokens, page_size)
    merge_groups_(cache, table, lens(num_tokens), HEAD_DIM, CONFIG)
    _, _, state = split_page(cache, HEAD_DIM)
    pages = table[0, : -(-num_tokens // page_size)].long()
    count = state[pages][..., COUNT].nan_to_num(0.0)
    assert torch.equal(count.sum((0, 2)), torch.full((GROUPS,), float(num_tokens)))


@settings(max_examples=20, deadline=None)
@given(steps=st.lists(st.integers(1, 90), min_size=1, max_size=6))
def test_merging_does_not_depend_on_when_it_happens(steps):
    total = sum(steps)
    at_once, table, _, _ = make_cache(total, 16)
    in_steps = at_once.clone()
    merge_groups_(at_once, table, lens(total), HEAD_DIM, CONFIG)
    for frontier in torch.tensor(steps).cumsum(0):
        merge_groups_(in_steps, table, frontier.view(1).int(), HEAD_DIM, CONFIG)
    assert torch.equal(live(at_once), live(in_steps))


def test_merging_twice_changes_nothing():
    cache, table, _, _ = make_cache(100, 16)
    merge_groups_(cache, table, lens(100), HEAD_DIM, CONFIG)
    once = cache.clone()
    merge_groups_(cache, table, lens(100), HEAD_DIM, CONFIG)
    assert torch.equal(once.nan_to_num(7.0), cache.nan_to_num(7.0))


@pytest.mark.parametrize("frontier", [1, 15, 16, 17, 40, 64])
def test_tokens_within_the_window_of_the_frontier_are_untouched(frontier):
    cache, table, _, _ = make_cache(100, 4)
    before = cache.clone()
    merge_groups_(cache, table, lens(frontier), HEAD_DIM, CONFIG)
    untouched = [p for p in range(25) if frontier - (p + 1) * 4 < CONFIG.window]
    pages = table[0, untouched].long()
    assert torch.equal(before[pages], cache[pages]), "unverified or recent tokens were merged"
    merged = [p for p in range(25) if p not in untouched]
    if merged:
        assert not torch.equal(before[table[0, merged].long()], cache[table[0, merged].long()])


def test_merging_commutes_with_page_sharing():
    cache, table, _, _ = make_cache(96, 16)
    alone = cache.clone()
    merge_groups_(alone, table, lens(96), HEAD_DIM, CONFIG)
    # A second request shares the first four pages and stands at token 50 of them.
    both = torch.cat([table, table])
    merge_groups_(cache, both, lens(50, 96), HEAD_DIM, CONFIG)
    assert torch.equal(live(alone), live(cache))


def test_page_zero_and_padding_are_never_merged_or_kept():
    cache, table, key, value = make_cache(64, 16)
    before = cache.clone()
    append_kv_(cache, key[:2], value[:2], torch.tensor([-1, -1]))
    assert torch.equal(before[1:].nan_to_num(7.0), cache[1:].nan_to_num(7.0))
    null = cache[0].clone()
    merge_groups_(cache, torch.zeros_like(table), lens(64), HEAD_DIM, CONFIG)
    assert torch.equal(null.nan_to_num(7.0), cache[0].nan_to_num(7.0))


def test_a_reused_page_becomes_raw_again():
    cache, table, _, _ = make_cache(64, 16)
    merge_groups_(cache, table, lens(64), HEAD_DIM, CONFIG)
    key, value = torch.randn(2, 64, GROUPS, HEAD_DIM)
    position = torch.arange(64)
    slots = table[0].long()[position // 16] * 16 + position % 16
    append_kv_(cache, key, value, slots)
    _, _, state = split_page(cache, HEAD_DIM)
    assert (state[table[0, :4].long()][:, :, ::4, LEVEL] == 0).all()


def test_stale_levels_and_counts_stay_within_bounds():
    cache, table, _, _ = make_cache(40, 16)
    _, _, state = split_page(cache, HEAD_DIM)
    state[table[0, 0].long(), :, 0, LEVEL] = 1e9
    state[table[0, 0].long(), :, 0, COUNT] = float("inf")
    out, lse, _ = attend(cache, table, torch.randn(1, HEADS, HEAD_DIM), 40, torch.zeros(HEADS), torch.zeros(HEADS))
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()


def test_empty_far_memory_equals_a_sliding_window():
    window_only = MergeConfig(window=12, group_size=4, schedule=(0,))
    cache, table, key, value = make_cache(60, 16)
    merge_groups_(cache, table, lens(60), HEAD_DIM, window_only)
    query, slopes = torch.randn(1, HEADS, HEAD_DIM), torch.rand(HEADS)
    out, _, _ = attend(cache, table, query, 60, slopes, torch.randn(HEADS), window_only)
    # Groups that end 12 or more tokens before the frontier are gone: the first 48 tokens.
    near_key = key[48:].repeat_interleave(HEADS // GROUPS, 1).transpose(0, 1)
    near_value = value[48:].repeat_interleave(HEADS // GROUPS, 1).transpose(0, 1)
    scores = (near_key @ query[0].unsqueeze(-1)).squeeze(-1) / math.sqrt(HEAD_DIM)
    scores = scores - slopes.unsqueeze(1) * torch.arange(11, -1, -1)
    expected = (torch.softmax(scores, -1).unsqueeze(1) @ near_value).squeeze(1)
    torch.testing.assert_close(out[0], expected, rtol=1e-4, atol=1e-5)


def test_attention_entropy_from_the_operator_is_that_of_its_weights():
    cache, table, key, _ = make_cache(10, 16)
    query = torch.randn(1, HEADS, HEAD_DIM)
    _, _, entropy = attend(cache, table, query, 10, torch.zeros(HEADS), torch.zeros(HEADS))
    k = key.repeat_interleave(HEADS // GROUPS, 1).transpose(0, 1)
    weights = torch.softmax((k @ query[0].unsqueeze(-1)).squeeze(-1) / math.sqrt(HEAD_DIM), -1)
    torch.testing.assert_close(entropy[0], -(weights * weights.log()).sum(-1), rtol=1e-4, atol=1e-5)


def test_a_batch_of_requests_equals_each_alone_and_only_the_newest_rows_are_computed():
    cache, table, _, _ = make_cache(70, 16)
    merge_groups_(cache, table, lens(70), HEAD_DIM, CONFIG)
    slopes, far_bias = torch.rand(HEADS), torch.randn(HEADS)
    query = torch.randn(9, HEADS, HEAD_DIM)
    both = torch.cat([table, table, table])
    # Requests of 6, 0 and 3 rows; at most 2 rows are computed for each.
    args = (slopes, far_bias, 2, CONFIG)
    out, lse, _ = merged_attention(query, cache, both, lens(70, 0, 65), lens(0, 6, 6, 9), *args)
    first, first_lse, _ = merged_attention(query[:6], cache, table, lens(70), lens(0, 6), *args)
    third, _, _ = merged_attention(query[6:], cache, table, lens(65), lens(0, 3), *args)
    torch.testing.assert_close(out[:6], first)
    torch.testing.assert_close(lse[:6], first_lse)
    torch.testing.assert_close(out[6:], third)
    assert (out[:4] == 0).all() and (lse[:4] == -math.inf).all() and (out[4:6] != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_rounding_the_inputs(dtype):
    cache, table, key, value = make_cache(80, 16, dtype)
    merge_groups_(cache, table, lens(80), HEAD_DIM, CONFIG)
    query = torch.randn(1, HEADS, HEAD_DIM).to(dtype)
    slopes, far_bias = torch.rand(HEADS) * 0.1, torch.zeros(HEADS)
    out, _, _ = attend(cache, table, query, 80, slopes, far_bias)
    exact, _ = naive_attention(query, key, value, [79], slopes, far_bias, CONFIG)
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() < 16 * torch.finfo(dtype).eps


@settings(max_examples=30, deadline=None)
@given(num=st.integers(1, 16), keep=st.integers(1, 16), seed=st.integers(0, 3))
def test_merge_entries_keeps_mass_and_count_and_order(num, keep, seed):
    keep = min(keep, num)
    torch.manual_seed(seed)
    keys, values = torch.randn(2, 3, num, 5)
    mass, count = torch.rand(3, num) + 0.01, torch.ones(3, num)
    merged = merge_entries(keys, values, mass, count, keep)
    assert merged.keys.shape == (3, keep, 5)
    torch.testing.assert_close(merged.mass.sum(-1), mass.sum(-1))
    assert torch.equal(merged.count.sum(-1), count.sum(-1))
    # The heaviest entries keep their place in order.
    salient = mass.argsort(-1, descending=True)[:, :keep].sort(-1).values
    assert torch.equal(merged.cluster.gather(-1, salient), torch.arange(keep).expand(3, -1))


def test_merging_to_all_is_identity_and_to_none_is_empty():
    keys, values = torch.randn(2, 3, 6, 5)
    mass, count = torch.rand(3, 6) + 0.01, torch.ones(3, 6)
    same = merge_entries(keys, values, mass, count, 6)
    assert torch.equal(same.keys, keys) and torch.equal(same.values, values)
    assert merge_entries(keys, values, mass, count, 0).values.shape == (3, 0, 5)
    with pytest.raises(ValueError, match=r"keep must be in 0\.\.6, got 7"):
        merge_entries(keys, values, mass, count, 7)


def test_equal_tokens_have_equal_mass_and_merge_to_themselves():
    keys = torch.ones(1, 8, 4)
    mass = saliency_mass(keys, CONFIG)
    torch.testing.assert_close(mass, mass[:, :1].expand(-1, 8))
    merged = merge_entries(keys, keys, mass, torch.ones(1, 8), 2)
    torch.testing.assert_close(merged.keys, torch.ones(1, 2, 4))


def test_saliency_signs_are_opposite():
    keys = torch.randn(4, 16, 8)
    high = saliency_mass(keys, CONFIG).argmax(-1)
    low = saliency_mass(keys, MergeConfig(saliency="inverse_entropy")).argmax(-1)
    entropy = attention_entropy(keys)
    assert torch.equal(high, entropy.argmax(-1)) and torch.equal(low, entropy.argmin(-1))


def test_entropy_is_log_n_for_equal_tokens_and_0_for_far_ones():
    torch.testing.assert_close(attention_entropy(torch.zeros(5, 3)), torch.full((5,), math.log(5)))
    assert attention_entropy(torch.eye(4) * 100).max() < 1e-3


def test_entries_attended_is_what_is_gathered():
    for num_tokens in (3, 16, 33, 200, 301):
        cache, table, _, _ = make_cache(num_tokens, 16)
        merge_groups_(cache, table, lens(num_tokens), HEAD_DIM, CONFIG)
        entries = gather_entries(cache, table, lens(num_tokens), HEAD_DIM, CONFIG)
        assert entries.keys.shape[2] == CONFIG.entries_attended(num_tokens)


def test_entries_attended_hardly_grow_with_the_context():
    attended = [MergeConfig().entries_attended(2**power) for power in range(10, 18)]
    assert attended == [320, 384, 416, 432, 440, 444, 446, 447]
    # Without doublings every 16 tokens add one entry.
    assert MergeConfig(doublings=0).entries_attended(2**17) == 8448


def test_counts_of_spans_reach_the_scores():
    cache, table, _, _ = make_cache(300, 16)
    merge_groups_(cache, table, lens(300), HEAD_DIM, CONFIG)
    entries = gather_entries(cache, table, lens(300), HEAD_DIM, CONFIG)
    assert entries.count.sum(-1).round().tolist() == [[300.0] * GROUPS]
    assert entries.count.max().round() == 8 * CONFIG.group_size


def test_a_span_cut_by_page_sharing_loses_nothing_of_the_second_request():
    """The first request merges spans across the page where the second one parts from it."""
    cache, table, _, _ = make_cache(300, 4)
    other, other_table, _, _ = make_cache(300, 4, seed=1)
    both = torch.cat([cache, other[1:]])
    second = table.clone()
    # They share 5 pages of one group each: spans of 2, 4 and 8 groups are cut.
    second[0, 5:75] = torch.randperm(75)[:70].int() + len(cache)
    source = other_table[0, 5:75].long()
    both[second[0, 5:75].long()] = other[source]
    merge_groups_(both, table, lens(300), HEAD_DIM, CONFIG)
    merge_groups_(both, second, lens(300), HEAD_DIM, CONFIG)
    entries = gather_entries(both, second, lens(300), HEAD_DIM, CONFIG)
    # Its own 280 tokens are all there; the shared span's entry may hold up to 12 tokens of the other's.
    assert 280 <= entries.count.sum(-1).round().min() <= 312


@pytest.mark.parametrize(
    "config",
    [CONFIG, MergeConfig(schedule=(0,), saliency="inverse_entropy"), MergeConfig(temperature=1 / 3, epsilon=1e-9)],
)
def test_packing_loses_nothing(config):
    assert MergeConfig.unpack(config.pack()) == config


@pytest.mark.parametrize("op", ["append_kv_", "merge_groups_", "merged_attention"])
def test_operators_pass_opcheck(op):
    cache, table, key, value = make_cache(40, 16)
    cache = cache.nan_to_num(0.0)
    args = {
        "append_kv_": (cache, key, value, torch.arange(16, 56)),
        "merge_groups_": (cache, table[:, :3], lens(40), HEAD_DIM, CONFIG.pack()),
        "merged_attention": (
            torch.randn(2, HEADS, HEAD_DIM),
            cache,
            table[:, :3],
            lens(40),
            lens(0, 2),
            torch.rand(HEADS),
            torch.rand(HEADS),
            5,
            CONFIG.pack(),
        ),
    }[op]
    torch.library.opcheck(getattr(torch.ops.qm_spec, op).default, args)


class TestBadInput:
    def test_append_refuses_other_shapes_and_types(self):
        cache, _, key, value = make_cache(8, 16)
        with pytest.raises(ValueError, match=r"key and value must both be"):
            append_kv_(cache, key, value[:4], torch.arange(8))
        with pytest.raises(TypeError, match="slots must be int64"):
            append_kv_(cache, key, value, torch.arange(8).int())
        with pytest.raises(ValueError, match=r"slots must be \[8\]"):
            append_kv_(cache, key, value, torch.arange(9))

    def test_a_page_that_cuts_groups_is_refused(self):
        cache, table, _, _ = make_cache(8, 16)
        with pytest.raises(ValueError, match="--block-size"):
            merge_groups_(cache, table, lens(8), HEAD_DIM, MergeConfig(group_size=12, window=32, schedule=(2, 1)))

    def test_attention_refuses_heads_that_do_not_fit(self):
        cache, table, _, _ = make_cache(8, 16)
        with pytest.raises(ValueError, match="multiple of 2"):
            attend(cache, table, torch.randn(1, 3, HEAD_DIM), 8, torch.rand(3), torch.rand(3))

    @pytest.mark.parametrize(
        "settings_",
        [
            {"window": 10},
            {"group_size": 1},
            {"schedule": (16, 8)},
            {"schedule": (4, 4)},
            {"schedule": ()},
            {"schedule": (4, 0)},
            {"doublings": -1},
            {"saliency": "loud"},
            {"temperature": 0.0},
            {"epsilon": 1.0},
        ],
    )
    def test_merge_config_refuses_values_out_of_range(self, settings_):
        with pytest.raises(ValueError, match="MergeConfig"):
            MergeConfig(**settings_)

    @pytest.mark.parametrize(
        "packed", [[], [3, 2, 1], [*CONFIG.pack(), 0], [*CONFIG.pack()[:6], len(SALIENCIES), *CONFIG.pack()[7:]]]
    )
    def test_what_pack_does_not_return_is_refused(self, packed):
        with pytest.raises(ValueError, match="MergeConfig"):
            MergeConfig.unpack(packed)

    def test_merge_config_refuses_unknown_keys(self):
        with pytest.raises(ValueError, match=r"unknown settings \['windw'\]"):
            MergeConfig.from_dict({"windw": 128})
