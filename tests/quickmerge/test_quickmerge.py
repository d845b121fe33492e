"""The compressor: its formulas against naive code, the properties of merging, and the references' flaws."""

import json
import math
import runpy
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from importlib.machinery import ModuleSpec
from itertools import product
from types import ModuleType, SimpleNamespace

import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import qm_spec
from qm_spec import (
    BidirectionalARAlignment,
    DifferentiableTokenMerging,
    EntropyAwareSaliency,
    NormBasedFidelityConstraint,
    QuickMergePP,
    quickmerge_inference,
)
from qm_spec.ops import attention_entropy, blocks, masked_attention_entropy
from qm_spec.quickmerge import (
    AutoregressivePrior,
    LearnedSaliency,
    NormSaliency,
    TemperatureSchedule,
    TokenSelection,
    effective_tokens,
    entropy_budget,
    fixed_budget,
    group_by_cosine,
    group_by_kmeans,
    norm_mass_retained,
    normalised_entropy_drop,
    ratio_budget,
)
from qm_spec.quickmerge import ar_prior as prior_module
from qm_spec.quickmerge.relaxation import relaxed_unmerge
from qm_spec.quickmerge.saliency import attend

VARIANTS = list(product(("cosine", "kmeans"), (False, True)))
SALIENCIES = ("entropy", "inverse_entropy", "learned", "norm")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def merger(grouping="cosine", causal=False, **settings):
    return DifferentiableTokenMerging(grouping=grouping, causal=causal, **settings).eval()


def small(**settings):
    return QuickMergePP(**{"dim": 16, "num_layers": 2, "prior_layers": 1, "prior_heads": 2, **settings})


def ranks(values):
    return values.argsort(-1).argsort(-1).float()


def spearman(a, b):
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 4 rows, so that a few tokens fill several and leave a tail."""
    monkeypatch.setattr(blocks, "_CPU_ELEMENTS", 1)
    monkeypatch.setattr(blocks, "_MIN_ROWS", 4)


class Largest(TorchDispatchMode):
    """Remembers the most elements of any tensor that was made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)]
        # A view counts as what it holds, however often it repeats it.
        self.elements = max([self.elements, *(x.untyped_storage().nbytes() // x.element_size() for x in made)])
        return out


# Attention entropy


def plain_entropy(x, allowed):
    scores = (x @ x.mT * x.shape[-1] ** -0.5).masked_fill(~allowed, float("-inf"))
    log_attention = torch.log_softmax(scores, dim=-1)
    return -(log_attention.exp() * log_attention.masked_fill(~allowed, 0.0)).sum(-1)


@pytest.mark.parametrize("mask", ["none", "causal", "padding", "both", "any"])
@pytest.mark.parametrize("scale", [0.3, 1, 30])
def test_attention_entropy_and_its_gradient_err_at_most_twice_as_much_as_plain_pytorch(mask, scale, small_blocks):
    x = scale * torch.randn(2, 3, 21, 8)
    columns = torch.rand(2, 3, 1, 21) > 0.3
    columns[..., 0] = True
    allowed = {
        "padding": columns,
        "both": columns,
        "any": (torch.rand(2, 3, 21, 21) > 0.5) | torch.eye(21, dtype=torch.bool),
    }.get(mask)
    causal = mask in ("causal", "both")
    full = (torch.ones(1, dtype=torch.bool) if allowed is None else allowed).expand(2, 3, 21, 21)
    full = full.tril() if causal else full
    weight = torch.randn(2, 3, 21)

    def run(function, x):
        x = x.clone().requires_grad_()
        entropy = function(x)
        (entropy * weight.to(x.dtype)).sum().backward()
        return entropy.detach().double(), x.grad.double()

    def blockwise(x):
        return attention_entropy(x) if mask == "none" else masked_attention_entropy(x, allowed, causal)

    exact = run(lambda x: plain_entropy(x, full), x.double())
    plain = run(lambda x: plain_entropy(x, full), x)
    for fast, slow, truth in zip(run(blockwise, x), plain, exact, strict=True):
        error, plain_error = ((y - truth).abs().max().item() for y in (fast, slow))
        assert fast.isfinite().all()
        assert error <= 2 * plain_error + 1e-6, f"{error:.1e} against {plain_error:.1e}"


def test_a_row_that_may_attend_to_nothing_has_no_entropy_and_no_gradient():
    x = torch.randn(1, 3, 4, requires_grad=True)
    allowed = torch.tensor([[False, False, False], [True, True, False], [True, True, True]])
    entropy = masked_attention_entropy(x, allowed.unsqueeze(0))
    assert entropy[0, 0] == 0 and entropy[0, 1] > 0
    [grad] = torch.autograd.grad(entropy[0, 1], x)
    assert grad.isfinite().all() and (grad[0, 2] == 0).all() and (grad[0, 0] != 0).any()


@pytest.mark.parametrize("causal", [False, True])
def test_attending_in_blocks_equals_attending_at_once(causal, small_blocks):
    x = torch.randn(2, 21, 8)
    whole = attend(x, None, causal)
    attention = x @ x.mT / math.sqrt(8)
    attention = attention.masked_fill(~torch.ones(21, 21).tril().bool(), -math.inf) if causal else attention
    torch.testing.assert_close(whole, attention.softmax(-1) @ x)
    torch.testing.assert_close(attend(x, torch.ones(2, 21, dtype=torch.bool), causal), whole)
    # Padding in front leaves rows that see no token: they stay finite.
    mask = torch.arange(21) >= torch.tensor([[0], [6]])
    padded = attend(x, mask, causal)
    assert padded.isfinite().all()
    torch.testing.assert_close(padded[1:, 6:], attend(x[1:, 6:], None, causal))


@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_change_no_result(variant, monkeypatch):
    module = small(grouping=variant[0], causal=variant[1], k_max=7, budget="entropy")
    x, mask = torch.randn(2, 30, 16), torch.rand(2, 30) > 0.2
    merged, info = module.compress(x, mask)
    monkeypatch.setattr(blocks, "_CPU_ELEMENTS", 1)
    monkeypatch.setattr(blocks, "_MIN_ROWS", 4)
    again, again_info = module.compress(x, mask)
    torch.testing.assert_close(again, merged)
    assert torch.equal(again_info["assignments"], info["assignments"])


@pytest.mark.parametrize("grouping", ["cosine", "kmeans"])
def test_no_tensor_holds_every_pair_of_tokens(grouping, monkeypatch):
    # At 32k tokens such a tensor takes 4 GiB.
    monkeypatch.setattr(blocks, "_CPU_ELEMENTS", 1 << 15)
    num_tokens = 1024
    mask = torch.ones(1, num_tokens, dtype=torch.bool)
    mask[0, -3:] = False
    for causal, token_mask in ((False, None), (True, None), (True, mask)):
        module = small(dim=8, grouping=grouping, causal=causal, k_max=64, budget="entropy")
        x = torch.randn(1, num_tokens, 8, requires_grad=True)
        with Largest() as largest:
            module.compress(x, token_mask)[0].sum().backward()
        assert largest.elements <= 64 * num_tokens < num_tokens**2 / 8, (causal, largest.elements)


# Saliency


def naive_entropy(states, visible):
    """Attention entropy of every token in float64, one row at a time."""
    states = states.double()
    entropies = []
    for i, row in enumerate(states):
        p = torch.softmax(torch.stack([row @ states[j] for j in visible(i)]) / math.sqrt(states.shape[1]), 0)
        entropies.append(-(p * p.log()).sum())
    return torch.stack(entropies)


@pytest.mark.parametrize("causal", [False, True])
def test_entropy_saliency_is_the_papers_formula_averaged_over_the_given_layers(causal):
    layers = torch.randn(3, 2, 9, 8)
    saliency = EntropyAwareSaliency(8, causal=causal)(layers)
    for b in range(2):
        expected = 0
        for layer in layers:
            entropy = naive_entropy(layer[b], lambda i: range(i + 1) if causal else range(9))
            expected = expected + (entropy - entropy.min()) / (entropy.max() - entropy.min()) / 3
        torch.testing.assert_close(saliency[b].double(), expected, atol=1e-5, rtol=0)


def test_the_two_directions_of_entropy_saliency_are_opposite():
    x = torch.randn(1, 20, 8)
    high, low = (EntropyAwareSaliency(8, 3, direction=name)(x) for name in ("entropy", "inverse_entropy"))
    assert spearman(high[0], low[0]) == pytest.approx(-1)
    # A token that is like nothing else attends to itself alone: its entropy is the lowest.
    x = torch.cat([torch.ones(1, 9, 8) * 0.1, 9 * F.one_hot(torch.tensor([[0]]), 8)], 1)
    assert EntropyAwareSaliency(8, 1)(x)[0].argmin() == 9


def test_number_of_layers_has_an_effect_on_a_single_input():
    # A reference accepts num_layers and ignores it.
    x = torch.randn(1, 20, 8)
    one, two, many = (EntropyAwareSaliency(8, layers)(x) for layers in (1, 2, 6))
    assert (one - two).abs().max() > 1e-2
    assert (two - many).abs().max() > 1e-2


def test_causal_saliency_as_a_fraction_does_not_see_later_tokens():
    saliency = EntropyAwareSaliency(8, 3, causal=True, normalisation="fraction")
    x = torch.randn(1, 12, 8)
    changed = x.clone()
    changed[:, 7:] = torch.randn(1, 5, 8)
    torch.testing.assert_close(saliency(x)[:, :7], saliency(changed)[:, :7])
    assert saliency(x).min() >= 0 and saliency(x).max() <= 1


@pytest.mark.parametrize("tokens", [torch.ones(1, 6, 8), torch.zeros(1, 6, 8), torch.randn(1, 1, 8)])
def test_equal_tokens_are_equally_salient(tokens):
    for module in (EntropyAwareSaliency(8, 3), NormSaliency(8)):
        assert module(tokens).unique().tolist() == [0.5]


def test_tiny_entropies_still_rank_tokens():
    # Long random vectors attend to themselves alone; entropies of 1e-7 must not count as all alike.
    assert len(EntropyAwareSaliency(512, 1)(torch.randn(1, 50, 512)).unique()) > 40


@pytest.mark.parametrize("module", [NormSaliency(8), LearnedSaliency(8), EntropyAwareSaliency(8, 2)])
def test_saliency_lies_in_0_to_1_and_is_0_at_padding(module):
    mask = torch.rand(3, 11) > 0.3
    mask[0] = True
    x = torch.randn(3, 11, 8).masked_fill(~mask.unsqueeze(-1), float("nan"))
    saliency = module(x, mask)
    assert saliency.dtype == torch.float32
    assert saliency.min() >= 0 and saliency.max() <= 1
    assert (saliency[~mask] == 0).all()


def test_norm_saliency_ranks_by_norm():
    x = torch.randn(1, 30, 8)
    assert spearman(NormSaliency(8)(x)[0], x[0].norm(dim=-1)) == pytest.approx(1)


# Budget


def test_effective_tokens_counts_different_tokens():
    copies = torch.randn(1, 1, 16).expand(1, 12, 16)
    torch.testing.assert_close(effective_tokens(copies), torch.tensor([1.0]))
    different = torch.eye(16).unsqueeze(0)
    torch.testing.assert_close(effective_tokens(different), torch.tensor([16.0]))
    twice = torch.cat([different, different], 1)
    torch.testing.assert_close(effective_tokens(twice), torch.tensor([16.0]))


def test_a_token_of_zeros_is_like_itself_alone():
    tokens = torch.eye(8).unsqueeze(0)
    tokens[0, [2, 5]] = 0
    torch.testing.assert_close(effective_tokens(tokens), torch.tensor([8.0]))


def test_effective_tokens_of_different_tokens_is_the_exponential_of_the_saliencys_entropy():
    saliency = torch.rand(1, 16) + 0.01
    p = saliency / saliency.sum()
    expected = torch.exp(-(p * p.log()).sum(-1))
    torch.testing.assert_close(effective_tokens(torch.eye(16).unsqueeze(0), saliency), expected, rtol=1e-4, atol=0)


def test_a_repetitive_sequence_gets_fewer_tokens_than_a_varied_one():
    varied = torch.randn(64, 128)
    repetitive = varied[:4].repeat(16, 1)
    both = torch.stack([repetitive, varied])
    budget = entropy_budget(both, 64)
    assert budget[0] <= 4 < 10 < budget[1]
    merged, info = small(dim=128, k_max=64, budget="entropy").compress(both)
    assert merged.shape == (2, 64, 128)
    kept = info["mask"].sum(1)
    assert kept[0] <= 4 < 10 < kept[1]
    assert info["sizes"].sum(1).tolist() == [64, 64]
    assert entropy_budget(both, 3).tolist() == [3, 3]


def test_ratio_and_fixed_budgets_count_tokens_without_padding():
    mask = torch.arange(100) < torch.tensor([[100], [29], [2], [0]])
    # As int() has it: 0.29 * 100 is 28.999999999999996.
    assert ratio_budget(0.29, mask).tolist() == [28, 8, 1, 0]
    assert fixed_budget(20, mask).tolist() == [20, 20, 2, 0]


# Selection


def test_eval_mode_takes_the_most_salient_and_training_draws():
    saliency = torch.rand(2, 40)
    budget = torch.tensor([5, 5])
    selection = TokenSelection().eval()
    chosen = selection(saliency, budget)
    assert torch.equal(chosen.index, saliency.topk(5).indices.sort(-1).values)
    assert torch.equal(selection(saliency, budget).index, chosen.index)
    selection.train()
    draws = {tuple(selection(saliency, budget).index.flatten().tolist()) for _ in range(20)}
    assert len(draws) > 1


def test_mass_is_the_papers_formula():
    saliency = torch.rand(1, 30)
    pi = torch.softmax(saliency / 0.5, -1)
    mass = TokenSelection(0.5, 0.01).eval()(saliency, torch.tensor([3])).mass
    torch.testing.assert_close(mass, pi * saliency + (1 - pi) * 0.01)


def test_noise_does_not_drown_the_saliency():
    # A reference's mass follows the saliency with a rank correlation of 0.28.
    saliency = torch.rand(1, 500)
    selection = TokenSelection(0.5, 0.01)
    assert spearman(selection(saliency, torch.tensor([50])).mass[0], saliency[0]) > 0.7
    selection.eval()
    assert spearman(selection(saliency, torch.tensor([50])).mass[0], saliency[0]) == pytest.approx(1)


def test_the_mask_is_hard_with_a_soft_gradient():
    saliency = torch.rand(1, 12, requires_grad=True)
    mask = TokenSelection()(saliency, torch.tensor([4])).mask
    assert sorted(mask.tolist()[0]) == [0.0] * 8 + [1.0] * 4
    (mask * torch.randn(12)).sum().backward()
    assert saliency.grad.isfinite().all() and (saliency.grad != 0).all()


def test_temperature_falls_geometrically_and_sharpens_the_mask_gradient():
    schedule = TemperatureSchedule(1.0, 0.01, 10)
    assert [schedule(step) for step in (0, 5, 10, 99)] == pytest.approx([1.0, 0.1, 0.01, 0.01])
    selection = TokenSelection(schedule(0)).eval()
    saliency = torch.rand(1, 12)
    before = selection(saliency, torch.tensor([4])).mass.max()
    selection.temperature = schedule(5)
    assert selection(saliency, torch.tensor([4])).mass.max() > before


def test_selection_probabilities_are_a_softmax():
    # A reference's Gumbel kernel never divides by the sum.
    saliency = torch.rand(2, 30)
    mass = TokenSelection(0.5, 0.01).eval()(saliency, torch.tensor([3, 3])).mass
    pi = (mass - 0.01) / (saliency - 0.01)
    torch.testing.assert_close(pi.sum(-1), torch.ones(2), atol=1e-4, rtol=0)


# Grouping and merging


@pytest.mark.parametrize("variant", VARIANTS)
@settings(deadline=None, max_examples=50)
@given(
    num_tokens=st.integers(1, 24),
    keep=st.integers(1, 30),
    dim=st.integers(1, 13),
    kind=st.sampled_from(["random", "equal", "zero", "repeated", "huge"]),
    padded=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_properties_of_merging(variant, num_tokens, keep, dim, kind, padded, seed):
    torch.manual_seed(seed)
    x = torch.randn(3, num_tokens, dim)
    if kind == "equal":
        x = x[:, :1].expand_as(x)
    elif kind == "zero":
        x = torch.zeros_like(x)
    elif kind == "repeated":
        x = x[:, torch.arange(num_tokens) % 3 % num_tokens]
    elif kind == "huge":
        x = x * 1e4
    mask = torch.rand(3, num_tokens) > 0.4 if padded else torch.ones(3, num_tokens, dtype=torch.bool)
    x = x.masked_fill(~mask.unsqueeze(-1), float("nan"))
    saliency = torch.rand(3, num_tokens)
    count = mask.sum(1)
    merged = merger(*variant).merge(x, saliency, fixed_budget(keep, mask), mask, num_slots=keep)

    slots = min(keep, num_tokens)
    assert merged.tokens.shape == (3, slots, dim)
    assert merged.tokens.isfinite().all()
    assert torch.equal(merged.size.sum(1), count.float())
    assert torch.equal(merged.live.sum(1), count.clamp_max(keep))
    # No slot is empty but those past a sequence's own tokens.
    assert torch.equal(merged.size > 0, merged.live)
    assert torch.equal(merged.cluster >= 0, mask)
    for b in range(3):
        # A reference's clusters come in no order.
        places = merged.place[b][merged.live[b]].tolist()
        assert places == sorted(set(places))
        for slot, place in enumerate(places):
            members = (merged.cluster[b] == slot).nonzero().flatten()
            assert place in members
            # A reference's duplicates give rows of zeros.
            assert kind == "zero" or (merged.tokens[b, slot] != 0).any()
            if variant[1]:
                assert members.max() <= place
            low, high = x[b, members].amin(0), x[b, members].amax(0)
            slack = 1e-5 * (1 + x[b, members].abs().max())
            assert ((merged.tokens[b, slot] >= low - slack) & (merged.tokens[b, slot] <= high + slack)).all()
    if keep >= num_tokens and not padded:
        assert torch.equal(merged.tokens, x)
        assert torch.equal(merged.unmerge(), x)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_merged_token_is_the_mass_weighted_mean_of_its_group(variant):
    x, saliency = torch.randn(2, 30, 7), torch.rand(2, 30)
    module = merger(*variant)
    merged = module.merge(x, saliency, torch.tensor([6, 4]))
    mass = module.selection(saliency, torch.tensor([6, 4])).mass
    for b, slot in [(0, 0), (0, 5), (1, 0), (1, 3)]:
        members = merged.cluster[b] == slot
        expected = (mass[b, members, None] * x[b, members]).sum(0) / mass[b, members].sum()
        torch.testing.assert_close(merged.tokens[b, slot], expected)
        torch.testing.assert_close(merged.mass[b, slot], mass[b, members].sum())
    torch.testing.assert_close(merged.unmerge()[0, 3], merged.tokens[0, merged.cluster[0, 3]])
    torch.testing.assert_close(merged.log_size.exp(), merged.size)
    assert (merged.log_size[1, 4:] == float("-inf")).all()


def test_cosine_groups_join_the_nearest_salient_token():
    x, saliency = torch.randn(1, 40, 6), torch.rand(1, 40)
    selection = TokenSelection().eval()(saliency, torch.tensor([5]))
    grouping = group_by_cosine(x, selection)
    assert torch.equal(grouping.place, selection.index)
    for token in range(40):
        if token not in selection.index:
            nearest = F.cosine_similarity(x[0, token], x[0, selection.index[0]], dim=-1).argmax()
            assert grouping.cluster[0, token] == nearest


@pytest.mark.parametrize("grouping", ["cosine", "kmeans"])
def test_well_separated_clusters_are_found(grouping):
    centres = 10 * torch.eye(4, 8)
    label = torch.arange(4).repeat(10)
    x = (centres[label] + 0.1 * torch.randn(40, 8)).unsqueeze(0)
    # One salient token in each cluster.
    saliency = torch.full((1, 40), 0.1)
    saliency[0, 8:12] = 0.9
    merged = merger(grouping).merge(x, saliency, torch.tensor([4]))
    assert merged.size.tolist() == [[10, 10, 10, 10]]


def test_kmeans_is_lloyds_algorithm_and_ends_where_nothing_changes():
    x, mass = torch.randn(1, 60, 5, dtype=torch.float64), torch.rand(1, 60)
    selection = TokenSelection().eval()(mass, torch.tensor([6]))
    centres = x[0, selection.index[0]]
    for _ in range(50):
        cluster = torch.cdist(x[0], centres).argmin(-1)
        weight = F.one_hot(cluster, 6).double() * selection.mass[0].double().unsqueeze(-1)
        centres = weight.T @ x[0] / weight.sum(0).unsqueeze(-1)
    # Also far from the origin, where squared distances would lose most of their digits.
    grouping = group_by_kmeans((x + 2000).float(), selection, num_iterations=50)
    same = grouping.cluster[0].unsqueeze(0) == grouping.cluster[0].unsqueeze(1)
    assert torch.equal(same, cluster.unsqueeze(0) == cluster.unsqueeze(1))
    assert torch.equal(group_by_kmeans((x + 2000).float(), selection, num_iterations=10**9).cluster, grouping.cluster)


def test_kmeans_improves_on_its_seeds():
    x, saliency = torch.randn(1, 200, 4), torch.rand(1, 200)

    def error(grouping):
        merged = merger(grouping).merge(x, saliency, torch.tensor([20]))
        return (merged.unmerge() - x).square().sum()

    assert error("kmeans") < error("cosine")


@pytest.mark.parametrize("grouping", ["cosine", "kmeans"])
def test_a_causal_merged_token_has_no_gradient_from_later_tokens(grouping):
    x, saliency = torch.randn(1, 24, 6, requires_grad=True), torch.rand(1, 24)
    merged = merger(grouping, causal=True).merge(x, saliency, torch.tensor([5]))
    assert merged.place[0, -1] == 23
    for slot, place in enumerate(merged.place[0].tolist()):
        [grad] = torch.autograd.grad(merged.tokens[0, slot].sum(), x, retain_graph=True)
        assert (grad[0, place + 1 :] == 0).all() and (grad[0, place] != 0).all()


def test_causal_cosine_grouping_demands_the_last_token():
    selection = TokenSelection().eval()(torch.tensor([[0.9, 0.1, 0.2]]), torch.tensor([1]))
    with pytest.raises(ValueError, match="keep_last=True"):
        group_by_cosine(torch.randn(1, 3, 4), selection, causal=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_duplicates_keep_their_content(variant):
    # A reference returns rows of zeros for duplicate tokens.
    x = torch.randn(1, 1, 8).expand(1, 16, 8)
    merged = merger(*variant).merge(x, torch.full((1, 16), 0.5), torch.tensor([5]))
    torch.testing.assert_close(merged.tokens, x[:, :5])
    assert (merged.size >= 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision(variant, dtype):
    module = small(grouping=variant[0], causal=variant[1], k_max=5).to(dtype)
    h = torch.randn(2, 3, 20, 16).to(dtype)
    merged, info = module.compress(h)
    exact, exact_info = module.compress(h.float())
    assert merged.dtype == dtype and module.ar_predict(merged).dtype == dtype
    assert torch.equal(info["assignments"], exact_info["assignments"])
    # Computed in float32, so all that is lost is the last rounding.
    assert torch.equal(merged, exact.to(dtype))
    _, losses = module(h)
    assert losses["total"].isfinite()


# The whole


@pytest.mark.parametrize("saliency", SALIENCIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_of_two_equals_two_batches_and_padding_never_leaks(variant, saliency):
    module = small(grouping=variant[0], causal=variant[1], saliency=saliency, k_max=6).eval()
    layers = torch.randn(2, 2, 20, 16)
    count = [20, 13]
    mask = torch.arange(20) < torch.tensor(count).unsqueeze(1)
    layers[:, 1, 13:] = float("nan")
    merged, info = module.compress(layers, mask)
    total = 0.0
    for b in range(2):
        alone, alone_info = module.compress(layers[:, b : b + 1, : count[b]])
        torch.testing.assert_close(merged[b], alone[0])
        assert torch.equal(info["assignments"][b, : count[b]], alone_info["assignments"][0])
        torch.testing.assert_close(info["saliency"][b, : count[b]], alone_info["saliency"][0])
        total += module(layers[:, b : b + 1, : count[b]])[1]["total"] / 2
    torch.testing.assert_close(module(layers, token_mask=mask)[1]["total"], total)
    # Padding in front is padding as well.
    front, _ = module.compress(layers[:, 1:, list(range(13, 20)) + list(range(13))], mask[1:].roll(7, 1))
    torch.testing.assert_close(front[0], merged[1])


def test_a_sequence_of_padding_alone_is_empty():
    module = small(k_max=4)
    mask = torch.tensor([[True] * 6, [False] * 6])
    x = torch.randn(2, 6, 16).masked_fill(~mask.unsqueeze(-1), float("nan"))
    merged, info = module.compress(x, mask)
    assert merged.isfinite().all() and info["sizes"].sum(1).tolist() == [6, 0]
    assert module(x, token_mask=mask)[1]["total"].isfinite()


@pytest.mark.parametrize("variant", VARIANTS)
def test_inference_is_deterministic_and_needs_no_seed(variant):
    module = small(grouping=variant[0], causal=variant[1], k_max=5)
    x = torch.randn(2, 30, 16)
    # compress is inference in training mode too.
    first, second = module.compress(x), module.compress(x)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1]["assignments"], second[1]["assignments"])
    module.eval()
    assert torch.equal(module(x)[0], module(x)[0])
    assert torch.equal(module(x)[0], first[0])
    module.train()
    torch.manual_seed(1)
    drawn = module(x)[0]
    assert not torch.equal(drawn, first[0])
    torch.manual_seed(1)
    assert torch.equal(drawn, module(x)[0])


@pytest.mark.parametrize("saliency", SALIENCIES)
def test_gradients_reach_the_input_and_every_parameter(saliency):
    module = small(saliency=saliency)
    assert isinstance(module, torch.nn.Module)
    x = torch.randn(2, 20, 16, requires_grad=True)
    _, losses = module(x, 5)
    for loss in losses.values():
        assert loss.requires_grad and loss.ndim == 0 and loss.dtype == torch.float32
    losses["total"].backward()
    assert x.grad.isfinite().all() and (x.grad != 0).any(-1).all()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize("saliency", SALIENCIES)
def test_padding_gets_no_gradient_and_spoils_none(saliency):
    module = small(saliency=saliency, budget="entropy", k_max=5)
    mask = torch.rand(2, 20) > 0.3
    x = torch.randn(2, 20, 16).masked_fill(~mask.unsqueeze(-1), float("nan")).requires_grad_()
    module(x, token_mask=mask)[1]["total"].backward()
    assert x.grad.isfinite().all()
    assert torch.equal((x.grad != 0).any(-1), mask)
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("causal", [False, True])
def test_the_gradient_of_the_choice_tells_which_tokens_would_help(causal):
    x, saliency = torch.randn(1, 24, 4), torch.rand(1, 24)
    # Tokens of four directions, of which the salient ones cover three.
    x = x * 0.2 + 3 * F.one_hot(torch.arange(24) % 4, 4)
    saliency[0, torch.arange(24) % 4 == 1] = 0
    merged = merger(causal=causal).merge(x, saliency, torch.tensor([6]))
    mask = merged.mask.clone().requires_grad_()
    rebuilt = relaxed_unmerge(x, replace(merged, mask=mask), causal=causal)
    assert torch.equal(rebuilt, merged.unmerge())
    (rebuilt - x).square().sum().backward()
    # The loss would fall most, per token, with one of the direction that is missing.
    best = mask.grad[0].masked_fill(merged.mask[0] > 0, math.inf).argsort()
    assert (best[: 1 if causal else 6] % 4 == 1).all()


def test_the_choice_learns_in_training_only_and_forgets_no_loss():
    module = small(saliency="learned", gamma=1.0)
    module.merging.selection.noise = 0.0
    x = torch.randn(2, 20, 16)
    gradients = []
    for mode in (True, False):
        module.train(mode).zero_grad()
        loss = module(x, 4)[1]["fidelity"]
        loss.backward()
        gradients.append((loss.detach(), module.saliency.score.weight.grad.clone()))
    assert torch.equal(gradients[0][0], gradients[1][0]) and not torch.allclose(gradients[0][1], gradients[1][1])


def test_input_scale_undoes_the_scale_of_the_input():
    one, thousand = (small(saliency="learned", k_max=5, input_scale=scale).eval() for scale in (1.0, 1000.0))
    thousand.load_state_dict(one.state_dict())
    x = torch.randn(2, 20, 16)
    (merged, losses), (large, large_losses) = one(x), thousand(1000 * x)
    torch.testing.assert_close(large / 1000, merged)
    torch.testing.assert_close(large_losses, losses)
    torch.testing.assert_close(thousand.ar_predict(large) / 1000, one.ar_predict(merged))


def test_saliency_learns_to_lower_the_loss():
    module = small(saliency="learned")
    x = torch.randn(4, 24, 16)
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    module.eval()
    before = module(x, 6)[1]["total"].item()
    module.train()
    for _ in range(30):
        optimizer.zero_grad()
        module(x, 6)[1]["total"].backward()
        optimizer.step()
    module.eval()
    assert module(x, 6)[1]["total"].item() < 0.95 * before


@pytest.mark.parametrize("keep", [1, 7, 20, 99])
def test_any_k_is_served(keep):
    # A reference crashes where K exceeds the tokens.
    x = torch.randn(2, 20, 16)
    merged, losses = small().eval()(x, keep)
    assert merged.shape == (2, min(keep, 20), 16)
    assert losses["total"].isfinite()
    if keep >= 20:
        assert torch.equal(merged, x) and losses["fidelity"] == 0


@pytest.mark.parametrize("dim", [1, 7, 13, 20])
def test_any_embedding_size_is_served(dim):
    # A reference demands D divisible by 8.
    module = QuickMergePP(dim=dim, k_max=4, num_layers=2, prior_layers=1)
    merged, _ = module.compress(torch.randn(3, 2, 9, dim))
    assert module.ar_predict(merged).shape == (2, 4, dim)


def test_autocast_and_integer_masks_change_nothing():
    module = small(k_max=12)
    h, mask = torch.randn(2, 3, 12, 16), torch.ones(3, 12, dtype=torch.bool)
    mask[1, 9:] = False
    merged, info = module.compress(h, mask)
    with torch.autocast("cpu", torch.bfloat16):
        cast, cast_info = module.compress(h, mask.long())
    assert torch.equal(cast, merged) and torch.equal(cast_info["saliency"], info["saliency"])
    assert torch.equal(merged[0], h[-1, 0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_non_contiguous_input(variant):
    h = torch.randn(16, 20, 3, 2).permute(2, 3, 1, 0)
    module = small(grouping=variant[0], causal=variant[1], k_max=5)
    assert torch.equal(module.compress(h)[0], module.compress(h.contiguous())[0])


@pytest.mark.parametrize("grouping", ["cosine", "kmeans"])
def test_the_number_of_operations_does_not_depend_on_tokens_or_clusters(grouping):
    # A reference loops over tokens and clusters in Python: 2.7 s at 2048 tokens.
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    def count(num_tokens, keep):
        module = small(grouping=grouping, k_max=keep)
        with Count() as counter:
            module.compress(torch.zeros(2, 1, num_tokens, 16))
        return counter.calls

    assert count(40, 5) == count(200, 50)


@pytest.mark.parametrize("saliency", SALIENCIES)
@pytest.mark.parametrize(("num_tokens", "keep", "batch"), [(1, 1, 1), (1, 5, 2), (2, 1, 3), (9, 4, 9), (9, 12, 1)])
def test_every_shape_is_served_by_every_setting(num_tokens, keep, batch, saliency):
    for grouping, causal in VARIANTS:
        module = small(dim=13, grouping=grouping, causal=causal, saliency=saliency)
        for x in (torch.randn(batch, num_tokens, 13), torch.ones(batch, num_tokens, 13)):
            merged, losses = module(x, keep)
            assert merged.shape == (batch, min(keep, num_tokens), 13)
            assert merged.isfinite().all() and (merged != 0).any(-1).all()
            assert all(loss.isfinite() for loss in losses.values())


def test_compress_is_differentiable():
    # A reference's compress is not.
    x = torch.randn(3, 2, 20, 16, requires_grad=True)
    merged, _ = small(k_max=5).compress(x)
    merged.square().sum().backward()
    assert (x.grad[-1] != 0).any(-1).all() and (x.grad[0] != 0).any()


# Causality: three guarantees, each with its own setting


def test_causal_with_fraction_decides_each_saliency_by_earlier_tokens():
    x = torch.randn(2, 30, 16)
    changed = x.clone()
    changed[:, 20:] = torch.randn(2, 10, 16)
    for normalisation, same in (("fraction", True), ("minmax", False)):
        module = small(k_max=5, causal=True, normalisation=normalisation)
        before, after = (module.compress(y)[1]["saliency"][:, :20] for y in (x, changed))
        assert torch.allclose(before, after, atol=1e-6) == same


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("saliency", SALIENCIES)
def test_chunks_do_not_depend_on_later_ones_so_a_sequence_compresses_as_it_grows(variant, saliency):
    module = small(grouping=variant[0], causal=variant[1], saliency=saliency, k_max=3, chunk_size=8)
    layers = torch.randn(2, 2, 29, 16)
    merged, info = module.compress(layers)
    assert merged.shape == (2, 12, 16) and info["mask"].all()
    assert torch.equal(info["sizes"].sum(1), torch.tensor([29.0, 29.0]))
    for end in (8, 16, 24):
        start, start_info = module.compress(layers[:, :, :end])
        torch.testing.assert_close(start, merged[:, : 3 * end // 8])
        assert torch.equal(start_info["assignments"], info["assignments"][:, :end])
        assert torch.equal(start_info["places"], info["places"][:, : 3 * end // 8])
    for b, slot in product(range(2), range(12)):
        members = (info["assignments"][b] == slot).nonzero().flatten()
        assert len(members.div(8, rounding_mode="floor").unique()) == 1 and info["places"][b, slot] in members
        assert not variant[1] or members.max() <= info["places"][b, slot]


@pytest.mark.parametrize("grouping", ["cosine", "kmeans"])
def test_a_chunk_is_compressed_like_a_sequence_of_its_own(grouping):
    chunked, whole = (small(grouping=grouping, k_max=3, chunk_size=size) for size in (8, None))
    x = torch.randn(2, 19, 16)
    mask = torch.ones(2, 19, dtype=torch.bool)
    # Padding in front and within: the tokens move up before they are cut.
    mask[1, [0, 1, 5, 9]] = False
    x[1, ~mask[1]] = float("nan")
    merged, info = chunked.compress(x, mask)
    for b, count in ((0, 19), (1, 15)):
        tokens = x[b, mask[b]].unsqueeze(0)
        parts = [whole.compress(tokens[:, start : start + 8]) for start in range(0, count, 8)]
        torch.testing.assert_close(merged[b, info["mask"][b]], torch.cat([part for part, _ in parts], 1)[0])
        torch.testing.assert_close(info["saliency"][b, mask[b]], torch.cat([i["saliency"] for _, i in parts], 1)[0])
    for b in range(2):
        places = info["places"][b, info["mask"][b]]
        assert info["assignments"][b, places].tolist() == list(range(len(places)))
    assert (info["assignments"][~mask] == -1).all() and (info["places"][~info["mask"]] == 19).all()
    assert info["mask"].sum(1).tolist() == [9, 6] and (info["places"][1, :6].diff() > 0).all()


def test_chunks_have_losses_and_keep_all_where_k_is_their_size():
    module = small(chunk_size=8, gamma=1.0)
    x = torch.randn(2, 19, 16, requires_grad=True)
    _, losses = module(x, 2)
    losses["total"].backward()
    assert x.grad.isfinite().all() and (x.grad != 0).any(-1).all()
    merged, losses = module(x, 8)
    assert torch.equal(merged, x) and losses["fidelity"] == 0
    assert small(chunk_size=100, k_max=4).compress(x)[0].shape == (2, 4, 16)


# Checkpoints


def test_a_saved_compressor_does_the_same(tmp_path):
    module = small(k_max=3, saliency="learned", chunk_size=8, grouping="kmeans", normalisation="fraction", gamma=0.6)
    module.merging.selection.temperature = 0.3
    module.save_pretrained(tmp_path / "new" / "folder")
    loaded = QuickMergePP.from_pretrained(tmp_path / "new" / "folder")
    x = torch.randn(2, 20, 16)
    assert not loaded.training and loaded.merging.selection.temperature == 0.3
    for (merged, losses), (other, other_losses) in [(loaded(x), module.eval()(x))]:
        assert torch.equal(merged, other) and losses == other_losses


def test_a_folder_that_is_no_compressor_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json; pass a folder of save_pretrained"):
        QuickMergePP.from_pretrained(tmp_path)
    small(k_max=3).save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    for damage, message in ((("k_max", "kmax"), "kmax"), (('"prior_layers": 1', '"prior_layers": 2'), "layers.1")):
        (tmp_path / "config.json").write_text(config.replace(*damage))
        with pytest.raises(ValueError, match=f"(?s)another model's config.*{message}"):
            QuickMergePP.from_pretrained(tmp_path)


def test_quickmerge_inference_compresses_to_the_share_and_calls_the_model():
    seen = []

    def model(tokens):
        seen.append(tokens.shape)
        return tokens * 2

    x = torch.randn(100, 16)
    merged, predictions = quickmerge_inference(x, model, entropy_budget=0.29)
    assert merged.shape == (28, 16)
    assert torch.equal(predictions, merged * 2) and seen == [(1, *merged.shape)]
    batched, _ = quickmerge_inference(torch.stack([x, x.flip(0)]), model, 0.29)
    torch.testing.assert_close(batched[0], merged)
    assert quickmerge_inference(x, model, 0.001)[0].shape == (1, 16)


# Prior and losses


@pytest.mark.parametrize("dim", [13, 64])
def test_prefill_and_steps_equal_the_full_forward(dim):
    prior = AutoregressivePrior(dim, num_layers=2)
    x = torch.randn(2, 12, dim)
    full = prior(x)
    first, cache = prior.prefill(x[:, :5])
    one, longer = prior.step(x[:, 5:6], cache)
    rest, last = prior.step(x[:, 6:], longer)
    assert [c.num_tokens for c in (cache, longer, last)] == [5, 6, 12]
    torch.testing.assert_close(torch.cat([first, one, rest], 1), full)
    # The cache was not changed: another continuation can start from it.
    torch.testing.assert_close(prior.step(x[:, 5:6], cache)[0], one)


def test_the_prior_is_causal_and_knows_positions():
    prior = AutoregressivePrior(16, num_layers=2)
    x = torch.randn(1, 10, 16)
    changed = x.clone()
    changed[:, 6:] = torch.randn(1, 4, 16)
    torch.testing.assert_close(prior(x)[:, :6], prior(changed)[:, :6])
    assert (prior(x)[:, 6:] - prior(changed)[:, 6:]).abs().max() > 1e-3
    same = prior(torch.ones(1, 4, 16))
    assert (same[:, 0] - same[:, 3]).abs().max() > 1e-3


@pytest.mark.parametrize("num_queries", [1, 2, 4])
def test_a_merged_key_of_size_n_weighs_like_n_copies(num_queries):
    query, (key, value) = torch.randn(2, 3, num_queries, 8), torch.randn(2, 2, 3, 4, 8)
    sizes = torch.tensor([[1, 3, 2, 1], [2, 1, 1, 4]])
    merged = prior_module.causal_attention(query, key, value, sizes.float().log())
    for b in range(2):
        # The newest query sees every key; each one before it, one key less.
        for i in range(num_queries):
            seen = 4 - (num_queries - 1 - i)
            copies = [x[b, :, :seen].repeat_interleave(sizes[b, :seen], dim=1) for x in (key, value)]
            expected = F.scaled_dot_product_attention(query[b, :, i : i + 1], *copies)
            torch.testing.assert_close(merged[b, :, i : i + 1], expected)


@pytest.mark.parametrize("dim", [13, 64])
def test_the_prior_heeds_sizes_with_a_cache_too(dim):
    prior = AutoregressivePrior(dim, num_layers=2)
    x, sizes = torch.randn(2, 9, dim), torch.randint(1, 20, (2, 9))
    full = prior(x, sizes)
    torch.testing.assert_close(prior(x, torch.ones(2, 9)), prior(x))
    assert (full - prior(x)).abs().max() > 1e-3
    first, cache = prior.prefill(x[:, :4], sizes[:, :4])
    rest, _ = prior.step(x[:, 4:], cache, sizes[:, 4:])
    torch.testing.assert_close(torch.cat([first, rest], 1), full)
    # Sizes may begin or end in the middle: none means 1.
    ones = torch.ones_like(sizes)
    late, _ = prior.step(x[:, 4:], prior.prefill(x[:, :4])[1], sizes[:, 4:])
    torch.testing.assert_close(late, prior(x, torch.cat([ones[:, :4], sizes[:, 4:]], 1))[:, 4:])
    early, _ = prior.step(x[:, 4:], cache)
    torch.testing.assert_close(early, prior(x, torch.cat([sizes[:, :4], ones[:, 4:]], 1))[:, 4:])


def test_empty_slots_are_not_attended_to_and_sizes_reach_ar_predict():
    module = small(k_max=6)
    x = torch.randn(2, 6, 16)
    sizes = torch.tensor([[3.0, 0, 2, 1, 0, 0], [0.0] * 6])
    changed = x.clone()
    changed[:, 1] += 5
    predicted, other = module.ar_predict(x, sizes), module.ar_predict(changed, sizes)
    assert predicted.isfinite().all()
    torch.testing.assert_close(predicted[0, [0, 2, 3, 4, 5]], other[0, [0, 2, 3, 4, 5]])
    half = module.to(torch.float16).ar_predict(x.half(), sizes)
    assert half.isfinite().all() and (half.float() - predicted).abs().max() < 0.05


@pytest.fixture
def xformers(monkeypatch):
    """A double of xformers with the documented layout `[B, T, H, d]` and the bottom-right causal mask."""
    package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    package.__spec__ = ModuleSpec("xformers", None)

    def attention(query, key, value, attn_bias, scale):
        assert attn_bias == "bottom right"
        heads_first = (x.transpose(1, 2).contiguous() for x in (query, key, value))
        seen = torch.ones(query.shape[1], key.shape[1]).tril(key.shape[1] - query.shape[1]).bool()
        return F.scaled_dot_product_attention(*heads_first, attn_mask=seen, scale=scale).transpose(1, 2)

    ops.memory_efficient_attention = attention
    mask = SimpleNamespace(LowerTriangularFromBottomRightMask=lambda: "bottom right")
    ops.fmha = SimpleNamespace(attn_bias=mask)
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    prior_module._memory_efficient_attention.cache_clear()
    yield
    prior_module._memory_efficient_attention.cache_clear()


@pytest.mark.parametrize("num_queries", [1, 3, 7])
def test_the_call_to_xformers_equals_sdpa(xformers, num_queries):
    query, (key, value) = torch.randn(2, 4, num_queries, 8), torch.randn(2, 2, 4, 7, 8)
    fast = prior_module._memory_efficient_attention()(query, key, value, 8**-0.5)
    torch.testing.assert_close(fast, prior_module.causal_attention(query, key, value))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compression_and_prior_on_cuda_equal_the_cpu():
    module = small(k_max=5)
    h = torch.randn(2, 3, 20, 16)
    merged, info = module.compress(h)
    predicted = module.ar_predict(merged)
    module.cuda()
    merged_cuda, info_cuda = module.compress(h.cuda())
    assert torch.equal(info_cuda["assignments"].cpu(), info["assignments"])
    torch.testing.assert_close(merged_cuda.cpu(), merged)
    torch.testing.assert_close(module.ar_predict(merged_cuda).cpu(), predicted, atol=1e-3, rtol=1e-3)


def test_alignment_is_the_error_in_both_directions():
    alignment = BidirectionalARAlignment(16, num_layers=1)
    x = torch.randn(2, 9, 16)
    expected = sum(F.mse_loss(alignment.prior(s)[:, :-1], s[:, 1:]) for s in (x, x.flip(1)))
    torch.testing.assert_close(alignment.compute_alignment_loss(x), expected)
    assert alignment.compute_alignment_loss(x[:, :1]) == 0


def test_fidelity_sees_what_is_lost():
    x = torch.randn(2, 20, 16)
    fidelity = NormBasedFidelityConstraint(0.8)
    # A reference gives 0 for merged tokens of zeros; all is lost: 1 - (1 - 0.8)^2.
    assert fidelity.compute_fidelity_loss(x, torch.zeros(2, 5, 16)).item() == pytest.approx(0.96)
    assert fidelity.compute_fidelity_loss(x, x) == 0
    merged = merger().merge(x, torch.rand(2, 20), torch.tensor([5, 5]))
    error = (merged.unmerge() - x).square().sum((1, 2)) / x.square().sum((1, 2))
    loss = fidelity.compute_fidelity_loss(x, merged.tokens, merged.cluster)
    torch.testing.assert_close(loss, (error - 0.04).mean())
    assert fidelity.compute_fidelity_loss(x, merged.tokens) <= loss
    torch.testing.assert_close(fidelity.compute_fidelity_loss(5 * x, 5 * merged.tokens, merged.cluster), loss)


def test_gamma_has_an_effect():
    # A reference accepts gamma and ignores it.
    x = torch.randn(2, 20, 16)
    loose, strict = (small(gamma=gamma).eval()(x, 5)[1]["fidelity"] for gamma in (0.1, 0.9))
    assert loose < strict


def test_norm_mass_and_entropy_drop():
    x = torch.cat([3 * F.one_hot(torch.tensor([0, 1]), 8), F.one_hot(torch.arange(2, 6), 8)]).float().unsqueeze(0)
    torch.testing.assert_close(norm_mass_retained(x, torch.tensor([2])), torch.tensor([0.6]))
    x = torch.ones(1, 16, 8)
    torch.testing.assert_close(normalised_entropy_drop(x, x[:, :4]), torch.tensor([0.5]))
    live = torch.tensor([[True, True, False, False]])
    padded = x[:, :4].masked_fill(~live.unsqueeze(-1), float("nan"))
    torch.testing.assert_close(normalised_entropy_drop(x, padded, live=live), torch.tensor([0.75]))
    torch.testing.assert_close(normalised_entropy_drop(x, x), torch.tensor([0.0]))


# Wrong input


X = torch.randn(2, 6, 8)
S = torch.rand(2, 6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: merger()(X, S, 0), ValueError, "K must be at least 1, got 0"),
        (lambda: merger()(X, S, 0.5), TypeError, "K must be an integer, got 0.5; for a ratio call ratio_budget"),
        (lambda: merger()(X[0], S, 2), ValueError, r"tokens must be \[B, N, D\]"),
        (lambda: merger()(X, S[:, :3], 2), ValueError, r"saliency must be \[2, 6\], got \[2, 3\]"),
        (lambda: merger()(X, S, 2, S[:1] > 0), ValueError, r"token_mask must be \[2, 6\].*got \[1, 6\]"),
        (lambda: merger()(X.long(), S, 2), TypeError, "floats, got torch.int64"),
        (lambda: merger("nearest"), ValueError, r"one of \['cosine', 'kmeans'\], got 'nearest'"),
        (lambda: merger(temperature=0), ValueError, "temperature must be above 0, got 0"),
        (lambda: merger(epsilon=1), ValueError, "epsilon must lie between 0 and 1, got 1"),
        (lambda: merger(noise=-1), ValueError, "noise must be at least 0, got -1"),
        (lambda: EntropyAwareSaliency(16)(X), ValueError, r"must be \[B, N, 16\].*got \[2, 6, 8\]"),
        (lambda: EntropyAwareSaliency(8)(X[:, :0]), ValueError, "N at least 1"),
        (lambda: EntropyAwareSaliency(8, 0), ValueError, "num_layers must be at least 1, got 0"),
        (lambda: EntropyAwareSaliency(8, direction="up"), ValueError, "'entropy', 'inverse_entropy'"),
        (lambda: small(saliency="loud"), ValueError, "'entropy', 'inverse_entropy', 'learned', 'norm'"),
        (lambda: small(budget="large"), ValueError, r"\['entropy', 'fixed'\], got 'large'"),
        (lambda: small(gamma=2), ValueError, "gamma must be in 0..1, got 2"),
        (lambda: small(input_scale=0), ValueError, "input_scale must be above 0, got 0"),
        (lambda: small(chunk_size=0), ValueError, "chunk_size must be at least 1, got 0"),
        (lambda: small(normalisation="max"), ValueError, "'fraction', 'minmax'"),
        (lambda: small(dim=8).ar_predict(X, S[:1]), ValueError, r"sizes must be \[2, 6\], got \[1, 6\]"),
        (lambda: small(k_max=0), ValueError, "k_max must be at least 1, got 0"),
        (lambda: small(dim=8)(X), ValueError, "K is missing"),
        (lambda: small(dim=8).compress(X), ValueError, "K is missing"),
        (lambda: QuickMergePP(8, dim=8), TypeError, "embedding_dim or its alias dim"),
        (QuickMergePP, TypeError, "embedding_dim or its alias dim"),
        (lambda: QuickMergePP(8, 54), TypeError, "positional"),
        (lambda: quickmerge_inference(X, torch.sin, 1.5), ValueError, "at most 1, got 1.5"),
        (lambda: TemperatureSchedule(0.0), ValueError, "above 0"),
        (lambda: AutoregressivePrior(8, 0), ValueError, "at least 1"),
        (lambda: norm_mass_retained(X, torch.tensor([1])), ValueError, r"keep must be \[2\], got \[1\]"),
        (lambda: merger().merge(X, S, torch.tensor([2, 2])).unmerge(X), ValueError, r"values must be \[2, 2, 'D'\]"),
        (
            lambda: NormBasedFidelityConstraint().compute_fidelity_loss(X, X[:1]),
            ValueError,
            "the tokens' batch of 2, got 1",
        ),
    ],
)
def test_errors_say_what_was_expected_and_given(call, error, message):
    with pytest.raises(error, match=message):
        call()


# The scripts


def test_the_demo_shows_each_step_and_writes_it_down(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--json", str(tmp_path / "new" / "demo.json")])
    runpy.run_path(str(root / "examples" / "demo.py"), run_name="__main__")
    rows = json.loads((tmp_path / "new" / "demo.json").read_text())
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
    value = {(row["call"], row["quantity"]): row["value"] for row in rows}
    assert value["", "shape of the merged tokens"] == [2, 32, 64]
    assert value["losses, step 40", "fidelity"] < value["losses, step 0", "fidelity"]
    assert value["", "change of the first 64 by the last 64"] < 1e-6
    kept = value['budget="entropy"', "tokens kept per sequence"]
    assert kept[0] < kept[1]


@pytest.mark.parametrize(
    ("script", "arguments", "methods"),
    [
        ("bench_kmeans", ["--shapes", "2x32x4x8"], {"qm_spec", "torch Lloyd"}),
        (
            "bench_compress",
            ["--tokens", "32", "--dim", "16", "--chunk-size", "8"],
            {"compress, cosine", "compress, kmeans", "compress, chunks of 8", "k-means alone"},
        ),
    ],
)
def test_the_benchmarks_run_and_record_what_they_measured(root, tmp_path, monkeypatch, script, arguments, methods):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    module = import_module(script)
    if script == "bench_compress":
        monkeypatch.setattr(module, "REFERENCE", (2, 2, 16, 8, 4))
    app = typer.Typer()
    app.command()(module.main)
    out = tmp_path / "out.json"
    done = CliRunner().invoke(app, [*arguments, "--repeats", "1", "--device", "cpu", "--out", str(out)])
    assert done.exit_code == 0, done.output
    results = json.loads(out.read_text())
    assert {row["method"] for row in results["rows"]} >= methods
    assert all(row["time_ms"] > 0 for row in results["rows"])
    assert {"command", "commit", "environment"} <= results.keys()
    for row in results["rows"]:
        assert row["method"] in done.output


def test_kmeans_clusters_as_well_as_plain_lloyds(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    bench = import_module("bench_kmeans")
    points, seeds = bench.clustered_points(2, 128, 8, 16, "cpu")
    ours, plain = (bench.error(points, f(points, seeds, 20), 16) for f in (bench.quickmerge, bench.lloyd))
    assert ours <= 1.02 * plain


# The package


def test_importing_the_package_is_light_and_every_name_resolves():
    code = "import sys, qm_spec; print('torch' in sys.modules, sorted(qm_spec.__all__) == qm_spec.__all__)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout == "False True\n", ran.stderr
    for name in qm_spec.__all__:
        assert callable(getattr(qm_spec, name)) and name in dir(qm_spec)
    with pytest.raises(AttributeError, match="no attribute 'QuickMerge'"):
        _ = qm_spec.QuickMerge
