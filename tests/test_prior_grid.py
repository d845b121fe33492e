"""The grid of priors with one thing changed: each variant changes what it says, and nothing else."""

import json
from pathlib import Path

import pytest
import torch
from prior_grid import DEFAULT, VARIANTS, ZOO, Rotary, budget_entries, over_all, prior_of, table, train

from qm_spec.config import MergeConfig
from qm_spec.drafter.config import QuickMergeConfig
from qm_spec.drafter.rows import PriorSequences
from qm_spec.evaluation.long_context import LongContextRow
from qm_spec.evaluation.statistics import Estimate

WINDOW = 48
NUM_TOKENS = 300


def sequences_of(name: str) -> PriorSequences:
    torch.manual_seed(0)
    variant = VARIANTS[name]
    config = QuickMergeConfig(
        target_fingerprint="x",
        eagle_aux_hidden_state_layer_ids=[0, 2, 3],
        num_speculative_tokens=2,
        vocab_size=32,
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        norm_aux_states=True,
        next_token_values=True,
        quickmerge=MergeConfig(**{"window": WINDOW, **variant.merge}).to_dict(),
    )
    prior = prior_of(variant)(config).eval()
    generator = torch.Generator().manual_seed(1)
    aux_states = torch.randn(1, NUM_TOKENS, 192, generator=generator)
    return prior.read(aux_states, torch.randn(1, NUM_TOKENS, 64, generator=generator))


@torch.no_grad()
def outputs_of(name: str) -> torch.Tensor:
    sequences = sequences_of(name)
    rows = sequences.rows(torch.tensor([[30, 290]]))
    return rows.step(torch.ones(1, 2, 64))[0]


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != DEFAULT])
def test_a_variant_drafts_otherwise_where_memory_is_merged_and_alike_where_it_is_not(name: str) -> None:
    near, far = (outputs_of(name) - outputs_of(DEFAULT)).abs().amax(-1).tolist()
    assert far > 1e-5
    # Slopes and the bias of what is far begin otherwise where a window says so.
    assert near == 0 or "window" in VARIANTS[name].merge or name in ("flat", "rotary")


@torch.no_grad()
def test_pruned_entries_are_tokens_of_the_text_and_merged_ones_are_not() -> None:
    for name, expected in ((DEFAULT, False), ("pruned", True)):
        entries = sequences_of(name).memory.entries
        raw, merged = entries.keys[0, 0, :NUM_TOKENS], entries.keys[0, 0, NUM_TOKENS:]
        copies = (merged.unsqueeze(1) == raw).all(-1).any(-1).all().item()
        assert copies == expected, name


@torch.no_grad()
def test_counts_and_slopes_can_be_left_out() -> None:
    assert sequences_of(DEFAULT).memory.entries.count.max() == 256, "a span of 16 groups"
    assert sequences_of("uncounted").memory.entries.count.max() == 1
    assert sequences_of("pruned").memory.entries.count.max() == 1
    bias = sequences_of("flat").rows(torch.tensor([[50]])).bias
    assert (bias[..., :51] == 0).all()


@torch.no_grad()
def test_a_budget_by_entropy_keeps_all_tokens_in_as_many_entries_as_each_group_asks_for() -> None:
    torch.manual_seed(0)
    # The later groups have keys ever more unlike each other.
    keys = torch.randn(12, 16, 8) * torch.linspace(0.2, 2, 12).view(-1, 1, 1)
    values, mass, count = torch.randn(12, 16, 8), torch.rand(12, 16) + 0.1, torch.ones(12, 16)
    merged = budget_entries(keys, values, mass, count, 9)
    used = (merged.count > 0).sum(-1)
    assert 1 <= used.min() < 4 and used.max() == 9 and abs(used.float().mean() - 6) < 1.5
    assert used[-3:].min() > used[:3].max()
    assert (merged.count.sum(-1) == 16).all() and torch.allclose(merged.mass.sum(-1), mass.sum(-1))
    total = (merged.values * merged.mass.unsqueeze(-1)).sum(-2)
    assert torch.allclose(total, (values * mass.unsqueeze(-1)).sum(-2), atol=1e-5)


@torch.no_grad()
def test_rotated_keys_are_compared_by_their_distance_alone() -> None:
    layer = sequences_of(DEFAULT).layer
    state, embedding = torch.randn(1, 1, 64), torch.randn(1, 1, 64)

    def score(of_query: int, of_key: int) -> torch.Tensor:
        query, _ = Rotary(layer, torch.tensor([[of_query]])).query(embedding, state)
        key, _ = Rotary(layer, torch.tensor([[of_key]])).keys_values(state, embedding)
        return (query[0, 0, 0] * key[0, 0, 0]).sum()

    assert torch.allclose(score(7, 3), score(104, 100), atol=1e-4)
    assert not torch.allclose(score(7, 3), score(8, 3), atol=1e-3)


@pytest.mark.parametrize("name", ["norm", "learned", "random"])
def test_a_saliency_is_positive_and_the_same_for_the_same_keys(name: str) -> None:
    keys = torch.randn(3, 16, 8)
    saliency = VARIANTS[name].saliency
    assert saliency is not None
    mass = saliency(keys)
    assert mass.shape == (3, 16) and (mass > 0).all()
    assert torch.equal(mass, saliency(keys.clone()))


def test_only_the_learned_saliency_is_trained() -> None:
    keys = torch.randn(1, 16, 8, requires_grad=True)
    VARIANTS["learned"].saliency(keys).sum().backward()
    assert keys.grad[..., 0].abs().min() > 0 and not keys.grad[..., 1:].any()


def test_the_table_sums_a_prompt_over_its_lengths_and_compares_with_the_default() -> None:
    def row(name: str, domain: str, context: int, tokens: tuple[int, ...]) -> LongContextRow:
        return LongContextRow(domain, context, name, Estimate(2.0), (), tokens, (2, 4), None)

    rows = [row(DEFAULT, "novels", 64, (4, 8)), row(DEFAULT, "novels", 128, (6, 8)), row(DEFAULT, "code", 64, (2, 4))]
    rows += [row("flat", "novels", 64, (8, 16)), row("flat", "novels", 128, (12, 16)), row("flat", "code", 64, (4, 8))]
    whole = over_all("flat", rows)
    assert (whole.tokens, whole.steps) == ((20, 32, 4, 8), (4, 8, 2, 4))
    stages = {name: {"valid_acceptance_length": 2.5} for name in (DEFAULT, "flat")}
    lines = table({"variants": stages, "entries_attended": {DEFAULT: [9], "flat": [7]}}, rows).splitlines()
    assert lines[0] == "| | validation AL | keys | all | novels 64 | novels 128 | code 64 |"
    assert lines[2].startswith("| default | 2.50 | 9 | AL 1.78 |")
    assert lines[3].startswith("| flat | 2.50 | 7 | 2.00")


def test_what_was_trained_otherwise_is_not_taken_for_this(tmp_path: Path) -> None:
    stage = {"target_fingerprint": "another", "steps": 240, "seed": 0}
    (tmp_path / "provenance.json").write_text(json.dumps({"stages": [stage]}))
    with pytest.raises(ValueError, match=r"was trained with \{'target_fingerprint': 'another'\}.*name another --out"):
        train(DEFAULT, ZOO / "target", [], tmp_path, None, 240, 0, 768, 0)
