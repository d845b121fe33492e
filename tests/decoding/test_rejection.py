"""Rejection sampling: the rule by itself, and the distribution of what the decoder writes."""

import pytest
import torch
from support.speculation import BareModel, chi_squared_p_value, exact_distribution, logits_of, tiny_llama

from qm_spec import create_speculative_decoder
from qm_spec.decoding import rejection
from qm_spec.decoding.memory_drafter import MemoryDraftModel
from qm_spec.decoding.prior_drafter import untrained_config
from qm_spec.decoding.rejection import verify_greedy, verify_sampled
from qm_spec.decoding.sampling import RowStreams, pick, probabilities
from qm_spec.drafter.prior import QuickMergePrior

# Of each test of a distribution: how often a correct decoder would fail it under another seed.
FALSE_ALARM = 1e-6
VOCAB, NUM_TOKENS, SAMPLES, TEMPERATURE = 5, 4, 6000, 0.8


def uniform_numbers(*shape, seed=2):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_pick_follows_the_weights_at_any_scale_and_never_takes_weight_zero(scale):
    weights = torch.tensor([0.0, 2.0, 0.0, 6.0, 1.0])
    drawn = pick((weights * scale).expand(9000, -1), uniform_numbers(9000, 5))
    observed = torch.bincount(drawn, minlength=5)
    assert observed[weights == 0].sum() == 0
    expected = 9000 * weights / weights.sum()
    assert chi_squared_p_value(observed[weights > 0].double(), expected[weights > 0].double()) > FALSE_ALARM


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_smallest_and_the_largest_number_take_no_token_of_weight_zero(number):
    weights = torch.tensor([[0.0, 2.0, 0.0, 6.0, 0.0]])
    assert pick(weights, torch.full((1, 5), number, dtype=torch.float64)).item() in (1, 3)


def test_rounding_of_the_weights_hardly_ever_changes_the_token():
    # What another batch shape does to float32 logits. A search in the running sum changes five tokens.
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2000, 4096, generator=generator)
    rounded = logits + 1e-5 * torch.randn(2000, 4096, generator=generator)
    uniform = uniform_numbers(2000, 4096)
    changed = pick(logits.softmax(-1), uniform) != pick(rounded.softmax(-1), uniform)
    assert changed.sum() == 0


def test_probabilities_survive_tiny_temperatures_and_forbidden_tokens():
    logits = torch.tensor([[3.0, -float("inf"), 1000.0, 999.0]])
    assert probabilities(logits, 1e-30).tolist() == [[0, 0, 1, 0]]
    torch.testing.assert_close(probabilities(logits, 2.0), torch.softmax(logits / 2, -1))


def test_a_rows_stream_does_not_depend_on_its_neighbours():
    alone, together = RowStreams([7], torch.device("cpu")), RowStreams([3, 7, 9], torch.device("cpu"))
    first = together.draw([4, 2, 0])
    assert torch.equal(first[1, :2], alone.draw([2])[0]) and (first[1, 2:] == 0).all()
    together.select(torch.tensor([1]))
    assert torch.equal(together.draw([3]), alone.draw([3]))


@pytest.mark.parametrize(
    ("drafts", "target", "num_drafted", "accepted", "following"),
    [
        ([1, 2, 3], [1, 2, 3, 4], 3, 3, 4),
        ([1, 2, 3], [1, 9, 3, 4], 3, 1, 9),
        ([1, 2, 3], [9, 2, 3, 4], 3, 0, 9),
        ([1, 2, 3], [1, 2, 3, 4], 1, 1, 2),
        ([], [5], 0, 0, 5),
    ],
    ids=["all and the bonus", "a prefix", "none", "padding does not count", "nothing drafted"],
)
def test_greedy_verification(drafts, target, num_drafted, accepted, following):
    found = verify_greedy(
        torch.tensor([drafts], dtype=torch.int64), torch.tensor([num_drafted]), torch.tensor([target])
    )
    assert [one.tolist() for one in found] == [[accepted], [following]]


def random_probs(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def test_a_draft_from_the_targets_distribution_is_always_kept():
    probs = random_probs(64, 4, 6)
    drafts = torch.randint(6, (64, 3), generator=torch.Generator().manual_seed(1))
    uniform, last = uniform_numbers(64, 3), uniform_numbers(64, 6, seed=3)
    accepted, following = verify_sampled(drafts, torch.full((64,), 3), probs[:, :-1], probs, uniform, last)
    assert accepted.tolist() == [3] * 64
    assert torch.equal(following, pick(probs[:, -1], last))


def test_a_rejected_token_never_comes_back_and_disjoint_drafts_are_all_rejected():
    target, draft = torch.zeros(32, 2, 6), torch.zeros(32, 1, 6)
    target[..., :3], draft[..., 3:] = 1 / 3, 1 / 3
    uniform, last = uniform_numbers(32, 1), uniform_numbers(32, 6, seed=3)
    accepted, following = verify_sampled(
        torch.full((32, 1), 4), torch.ones(32, dtype=torch.long), draft, target, uniform, last
    )
    assert accepted.sum() == 0 and (following < 3).all()


def test_padding_behind_a_rows_drafts_changes_nothing():
    probs, draft = random_probs(8, 4, 6), random_probs(8, 3, 6, seed=1)
    drafts = torch.randint(6, (8, 3), generator=torch.Generator().manual_seed(1))
    uniform, last = uniform_numbers(8, 3), uniform_numbers(8, 6, seed=3)
    short = torch.ones(8, dtype=torch.long)
    padded = verify_sampled(drafts, short, draft, probs, uniform, last)
    alone = verify_sampled(drafts[:, :1], short, draft[:, :1], probs[:, :2], uniform[:, :1], last)
    assert all(torch.equal(one, other) for one, other in zip(padded, alone, strict=True))


def cached_case():
    """A random prior, scaled up so that its distribution is far from the target's and overlaps it."""
    target = tiny_llama(VOCAB)
    torch.manual_seed(1)
    prior = QuickMergePrior(untrained_config(target))
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return target, prior


def reduced_case():
    """The same with a draft vocabulary: most of what the target may write is never drafted."""
    target, _ = cached_case()
    config = untrained_config(target)
    config.draft_vocab_size = 3
    torch.manual_seed(1)
    prior = QuickMergePrior(config)
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    prior.draft_token_ids = torch.tensor([0, 2, 3])
    return target, prior


def bare_case():
    return BareModel(VOCAB), MemoryDraftModel(VOCAB, 24, quickmerge_dim=16, seed=1)


def sample_counts(case, temperature=TEMPERATURE):
    """Return how often each continuation was written, how often it should be, and the statistics."""
    target, drafter = case()
    decoder = create_speculative_decoder(target, drafter=drafter, max_draft_len=2, temperature=temperature)
    prompt = torch.tensor([[1, 3, 0, 2, 4]])
    ids, stats = decoder.generate(prompt.expand(SAMPLES, -1), None, NUM_TOKENS, seed=5, measure_speedup=False)
    digits = torch.tensor([VOCAB**place for place in reversed(range(NUM_TOKENS))])
    observed = torch.bincount((ids[:, -NUM_TOKENS:] * digits).sum(1), minlength=VOCAB**NUM_TOKENS).double()
    expected = SAMPLES * exact_distribution(target, prompt, NUM_TOKENS, VOCAB, TEMPERATURE)
    return observed, expected, stats


@pytest.mark.parametrize("case", [cached_case, reduced_case, bare_case])
def test_the_joint_distribution_of_four_tokens_is_the_targets(case):
    observed, expected, stats = sample_counts(case)
    assert expected.sum() == pytest.approx(SAMPLES)
    assert chi_squared_p_value(observed, expected) > FALSE_ALARM
    # Drafts kept whole are followed by a bonus token, the others by a residual one: both were common.
    assert stats["accepted_per_position"][1] > SAMPLES / 20
    assert stats["drafted_per_position"][0] - stats["accepted_per_position"][0] > SAMPLES / 20


def always_accept(draft_ids, num_drafted, draft_probs, target_probs, uniform, following):
    """Take every draft."""
    return verify_sampled(draft_ids, num_drafted, target_probs[:, :-1], target_probs, uniform, following)


def no_residual(draft_ids, num_drafted, draft_probs, target_probs, uniform, following):
    """Sample anew from p, not from the residual, behind a rejected token."""
    accepted, _ = verify_sampled(draft_ids, num_drafted, draft_probs, target_probs, uniform, following)
    rows = torch.arange(len(accepted))
    return accepted, pick(target_probs[rows, accepted], following)


def shifted_by_one(draft_ids, num_drafted, draft_probs, target_probs, uniform, following):
    """Compare each draft with the target's distribution of the place before."""
    shifted = torch.cat([target_probs[:, :1], target_probs[:, :-1]], 1)
    return verify_sampled(draft_ids, num_drafted, draft_probs, shifted, uniform, following)


@pytest.mark.parametrize("wrong", [always_accept, no_residual, shifted_by_one], ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("case", [cached_case, bare_case])
def test_the_test_of_the_distribution_finds_a_wrong_rule(case, wrong, monkeypatch):
    monkeypatch.setattr(rejection, "verify_sampled", wrong)
    observed, expected, _ = sample_counts(case)
    assert chi_squared_p_value(observed, expected) < FALSE_ALARM


def test_the_test_of_the_distribution_finds_an_ignored_temperature():
    observed, expected, _ = sample_counts(cached_case, temperature=1.0)
    assert chi_squared_p_value(observed, expected) < FALSE_ALARM


def test_the_exact_distribution_is_the_product_of_the_steps():
    target = BareModel(VOCAB)
    prompt = torch.tensor([[2, 0]])
    joint = exact_distribution(target, prompt, 2, VOCAB, 1.0).view(VOCAB, VOCAB)
    first = logits_of(target, prompt)[0, -1].softmax(-1)
    torch.testing.assert_close(joint.sum(1).float(), first)
