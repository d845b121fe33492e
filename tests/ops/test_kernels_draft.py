"""`draft_tokens`: whichever path the dispatcher takes, against float64, the reference and the draft loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from draft_cases import DraftCase, PriorSizes, make_case, random_prior
from torch import Tensor

from qm_spec.config import MergeConfig
from qm_spec.drafter.loops.gathered import DraftLoop, dense_weights
from qm_spec.ops import backend
from qm_spec.ops.draft_layer import in_half_the_bytes
from qm_spec.ops.draft_tokens import DraftWeights, draft_tokens_reference

pytestmark = pytest.mark.usefixtures("outputs_start_as_nan")

COMPILED = backend.backend() == "compiled"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = PriorSizes(hidden=48, num_heads=4, num_kv_heads=2, head_dim=16, intermediate=96, vocabulary=200)
# Raw and merged to every level, spans across pages.
SHORT_WINDOW = MergeConfig(window=24, group_size=8, schedule=(4, 2, 1))


def stale_words(cache: Tensor) -> Tensor:
    """Fill with numbers that look like levels and counts, most of them out of range."""
    words = torch.tensor([0.0, 1.0, 3.0, 9.0, 1e30, -5.0, float("nan"), float("inf")])
    cache.view(torch.float32).copy_(words[torch.randint(0, len(words), cache.view(torch.float32).shape)])
    return cache


CASES: dict[str, Callable[[torch.dtype], DraftCase]] = {
    "shipped sizes": lambda dtype: make_case([256], dtype=dtype),
    "first tokens": lambda dtype: make_case([1, 2, 3], SMALL, dtype),
    "different lengths": lambda dtype: make_case([5, 460, 16, 17, 1, 131], SMALL, dtype, config=SHORT_WINDOW),
    "many requests": lambda dtype: make_case(range(1, 40, 2), SMALL, dtype, config=SHORT_WINDOW),
    "one head for all": lambda dtype: make_case([77, 300], replace(SMALL, num_heads=3, num_kv_heads=1), dtype),
    "no grouping": lambda dtype: make_case([50], replace(SMALL, num_kv_heads=4, head_dim=24), dtype),
    "wide heads": lambda dtype: make_case([40, 90], replace(SMALL, num_heads=2, num_kv_heads=1, head_dim=256), dtype),
    "odd sizes": lambda dtype: make_case([33, 9], PriorSizes(35, 3, 3, 10, 51, 73), dtype, config=SHORT_WINDOW),
    # More columns than are added in a row, and a tail.
    "many columns": lambda dtype: make_case([20], replace(SMALL, hidden=1040, intermediate=2100), dtype),
    "many tokens to choose from": lambda dtype: make_case([20], replace(SMALL, vocabulary=262_144), dtype),
    "draft vocabulary": lambda dtype: make_case([77, 9, 300], replace(SMALL, draft_vocabulary=37), dtype),
    "one token to choose": lambda dtype: make_case([20, 5], replace(SMALL, draft_vocabulary=1), dtype),
    "large pages": lambda dtype: make_case([300, 20], SMALL, dtype, page_size=128),
    "stale words": lambda dtype: make_case([460, 3, 70], SMALL, dtype, config=SHORT_WINDOW, stale=stale_words),
    "no far memory": lambda dtype: make_case([90], SMALL, dtype, config=MergeConfig(24, 8, (0,))),
}


@pytest.fixture(params=CASES)
def make(request: pytest.FixtureRequest) -> Callable[[torch.dtype], DraftCase]:
    return CASES[request.param]


def errors(case: DraftCase, ids: Tensor, logits_or_log_probs: Callable[[Tensor], Tensor]) -> tuple[Tensor, float]:
    """Return exact values by float64 where the drafts are `ids`, and the error of plain PyTorch in the case's dtype."""
    exact = logits_or_log_probs(case.replay(ids, torch.float64))
    plain = logits_or_log_probs(case.replay(ids, case.state.dtype).double())
    return exact, (plain - exact).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_distributions_err_at_most_twice_as_much_as_plain_pytorch(make, dtype):
    case, num_drafts = make(dtype), 4
    batch = len(case.state)
    temperature, uniform = torch.ones(batch), torch.rand(batch, num_drafts, dtype=torch.float64)
    ids, probs = case.draft(num_drafts, temperature, uniform)
    assert ids.dtype == torch.int64 and probs.dtype == torch.float32
    assert torch.isfinite(probs).all(), "inf or nan"
    exact, plain_error = errors(case, ids, lambda logits: logits.log_softmax(-1))
    likely = exact > -40
    error = (probs.double().log() - exact)[likely].abs().max().item()
    assert error <= 2 * plain_error + 1e-5, f"{error:.1e} against {plain_error:.1e}"
    torch.testing.assert_close(probs.double().sum(-1), torch.ones(batch, num_drafts, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_drafts", [1, 2, 4, 8])
def test_greedy_drafts_are_the_best_tokens_but_for_near_ties(make, dtype, num_drafts):
    """A near tie: exact logits nearer to the best one than two sums' rounding, each at most twice plain PyTorch's."""
    case = make(dtype)
    ids, probs = case.draft(num_drafts)
    assert ids.shape == (len(case.state), num_drafts) and probs.shape[1] == 0
    exact, plain_error = errors(case, ids, lambda logits: logits)
    behind = exact.max(-1).values - exact.gather(-1, case.rows(ids).unsqueeze(-1)).squeeze(-1)
    assert behind.max().item() <= 4 * plain_error + 1e-5
    if dtype == torch.float32:
        best = exact.sort(-1, descending=True).values
        # Of one token alone nothing is near.
        second = best[..., 1] if best.shape[-1] > 1 else torch.full_like(best[..., 0], float("-inf"))
        clear = best[..., 0] - second > 4 * plain_error + 1e-5
        assert clear.double().mean() > 0.9, "the case has too many ties to show anything"
        reference = draft_tokens_reference(*case.arguments(num_drafts))[0]
        # Behind a tie the drafts go apart.
        same = clear.cumprod(-1).bool()
        assert torch.equal(ids[same], reference[same])


def test_a_float32_target_is_drafted_for_in_half_the_bytes(make):
    """The drafter's checkpoint and the target's head are bfloat16, the engine computes in float32."""
    case = make(torch.float32)
    narrow = {
        name: weight.bfloat16().float() if weight.is_floating_point() else weight
        for name, weight in case.weights._asdict().items()
    }
    wide = replace(case, weights=DraftWeights(**narrow))
    half = replace(case, weights=in_half_the_bytes(wide.weights))
    assert half.weights.head.dtype == half.weights.q_proj.dtype == torch.bfloat16
    assert half.weights.embedding.dtype == half.weights.norm.dtype == half.weights.slopes.dtype == torch.float32
    batch = len(case.state)
    temperature, uniform = torch.ones(batch), torch.rand(batch, 1, dtype=torch.float64)
    for arguments in [(1, temperature, uniform), (1, None, None)]:
        for one, other in zip(half.draft(*arguments), wide.draft(*arguments), strict=True):
            torch.testing.assert_close(one, other)
    for one, other in zip(
        draft_tokens_reference(*half.arguments(4)), draft_tokens_reference(*wide.arguments(4)), strict=True
    ):
        assert torch.equal(one, other)


def test_a_matrix_that_bfloat16_does_not_hold_stays_as_it_is():
    weights = make_case([5], SMALL, torch.float32).weights
    inexact = in_half_the_bytes(weights)
    assert all(one is other for one, other in zip(inexact, weights, strict=True))
    bfloat16 = make_case([5], SMALL, torch.bfloat16).weights
    assert all(one is other for one, other in zip(in_half_the_bytes(bfloat16), bfloat16, strict=True))


def test_each_request_drafts_what_it_drafts_alone(make):
    case = make(torch.float32)
    batch = len(case.state)
    temperature, uniform = torch.full((batch,), 0.7), torch.rand(batch, 4, dtype=torch.float64)
    greedy, _ = case.draft(4)
    ids, probs = case.draft(4, temperature, uniform)
    for number in range(batch):
        one = slice(number, number + 1)
        assert torch.equal(case.request(number).draft(4)[0], greedy[one])
        alone = case.request(number).draft(4, temperature[one], uniform[one])
        if COMPILED:
            assert torch.equal(alone[0], ids[one]) and torch.equal(alone[1], probs[one])


@pytest.mark.skipif(not COMPILED, reason="of the kernel: build it (csrc/README.md)")
def test_every_run_and_number_of_threads_gives_the_same_bits(make):
    case = make(torch.float32)
    temperature, uniform = torch.ones(len(case.state)), torch.rand(len(case.state), 3, dtype=torch.float64)
    expected = case.draft(3, temperature, uniform)
    runs = 100 if case.weights.head.numel() < 1e6 else 5
    threads = torch.get_num_threads()
    try:
        for run in range(runs):
            torch.set_num_threads(1 + run % 3)
            ids, probs = case.draft(3, temperature, uniform)
            assert torch.equal(ids, expected[0]) and torch.equal(probs, expected[1])
    finally:
        torch.set_num_threads(threads)


def test_samples_follow_the_distribution():
    """Evenly spaced draws hit each token as often as its probability says, to within one."""
    draws = 500
    case = make_case([40], replace(SMALL, vocabulary=30), config=SHORT_WINDOW)
    case = DraftCase(
        case.cache,
        case.block_table.expand(draws, -1),
        case.num_tokens.expand(draws),
        case.state.expand(draws, -1),
        case.next_ids.expand(draws),
        case.weights,
        config=case.config,
    )
    uniform = ((torch.arange(draws, dtype=torch.float64) + 0.5) / draws).unsqueeze(1).expand(-1, 2)
    for temperature in (0.3, 1.0, 2.0):
        ids, probs = case.draft(2, torch.full((draws,), temperature), uniform)
        exact = (case.replay(ids, torch.float64)[:, 0] / temperature).softmax(-1)
        torch.testing.assert_close(probs[:, 0].double(), exact, rtol=1e-5, atol=1e-6)
        hits = torch.bincount(ids[:, 0], minlength=30)
        assert (hits - draws * exact[0]).abs().max() <= 1 + 1e-3


def test_a_draw_of_nothing_and_of_almost_all_take_likely_tokens():
    case = make_case([40, 40], SMALL)
    uniform = torch.tensor([[0.0, 0.0], [1 - 2**-53, 1 - 2**-53]], dtype=torch.float64)
    # So cold that all but a few tokens have a probability of 0.
    ids, probs = case.draft(2, torch.full((2,), 0.02), uniform)
    assert (probs.gather(-1, ids.unsqueeze(-1)) > 0).all()
    assert (probs == 0).any()


def test_greedy_requests_of_a_batch_that_samples_stay_greedy():
    case = make_case([40, 7, 90], SMALL)
    temperature = torch.tensor([0.0, 1.5, 1e-6])
    ids, probs = case.draft(4, temperature, torch.rand(3, 4, dtype=torch.float64))
    greedy, _ = case.draft(4)
    assert torch.equal(ids[::2], greedy[::2])
    exact = case.replay(ids, torch.float64)
    exact[1] /= 1.5
    torch.testing.assert_close(probs.double(), exact.softmax(-1), rtol=1e-4, atol=1e-7)


def test_padding_drafts_something_and_changes_nothing():
    case = make_case([40, 0, 9], SMALL, stale=stale_words)
    ids, probs = case.draft(4, torch.ones(3), torch.rand(3, 4, dtype=torch.float64))
    assert ids.min() >= 0 and ids.max() < SMALL.vocabulary
    assert torch.isfinite(probs).all()
    greedy, _ = case.draft(4)
    for number in (0, 2):
        assert torch.equal(case.request(number).draft(4)[0][0], greedy[number])
    assert case.request(1).draft(4)[0].shape == (1, 4), "a batch of padding alone"


def test_any_strides_of_cache_table_and_lengths_will_do():
    case = make_case([40, 300], SMALL, config=SHORT_WINDOW)
    expected, _ = case.draft(4)
    pages, groups, page_size, elements = case.cache.shape
    # As vLLM lays pages out: layers outside, heads inside, room behind.
    roomy = torch.full((pages, page_size, groups, elements + 8), float("nan"))
    cache = roomy[..., :elements].transpose(1, 2)
    cache.copy_(case.cache)
    wide = torch.zeros(2, 2 * case.block_table.shape[1] + 3, dtype=torch.int64)
    table = wide[:, 1 : 2 * case.block_table.shape[1] : 2]
    table.copy_(case.block_table)
    strided = replace(
        case,
        cache=cache,
        block_table=table,
        num_tokens=torch.stack([case.num_tokens] * 2, 1)[:, 0],
        state=torch.stack([case.state] * 2, 1)[:, 0],
        next_ids=torch.stack([case.next_ids.int()] * 2, 1)[:, 0],
    )
    assert torch.equal(strided.draft(4)[0], expected)


def test_a_draft_vocabulary_drafts_the_best_or_drawn_of_its_tokens_as_the_targets_ids():
    """The head of the whole vocabulary drafts the same once all other tokens are out of the question."""
    case = make_case([40, 300, 7], replace(SMALL, draft_vocabulary=37))
    token_ids = case.weights.token_ids
    head = torch.zeros(SMALL.vocabulary, SMALL.hidden)
    head[token_ids] = case.weights.head
    whole = replace(case, weights=case.weights._replace(head=head, token_ids=token_ids[:0]))
    greedy, _ = case.draft(4)
    assert torch.isin(greedy, token_ids).all()
    best = whole.replay(greedy, torch.float32)[..., token_ids].argmax(-1)
    assert torch.equal(greedy, token_ids[best])
    uniform = torch.rand(3, 4, dtype=torch.float64)
    ids, probs = case.draft(4, torch.tensor([0.0, 0.7, 1.3]), uniform)
    assert probs.shape == (3, 4, 37) and torch.equal(ids[0], greedy[0])
    assert (probs.gather(-1, case.rows(ids).unsqueeze(-1)) > 0).all()
    reference = draft_tokens_reference(*case.arguments(4, torch.tensor([0.0, 0.7, 1.3]), uniform))
    assert torch.equal(ids, reference[0])
    torch.testing.assert_close(probs, reference[1], rtol=1e-4, atol=1e-6)


def test_rows_of_the_embedding_behind_the_vocabulary_are_padding():
    case = make_case([40], SMALL)
    expected, _ = case.draft(4)
    embedding = torch.cat([case.weights.embedding, torch.full((24, SMALL.hidden), float("nan"))])
    assert torch.equal(replace(case, weights=case.weights._replace(embedding=embedding)).draft(4)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize(("num_drafts", "next_token_values"), [(1, False), (4, False), (4, True)])
def test_drafts_what_the_loop_drafts_layer_by_layer(num_drafts, next_token_values):
    """The operator with a prior's weights, against `DraftLoop` with its modules."""
    layer = random_prior(SMALL, SHORT_WINDOW, next_token_values=next_token_values).layer
    case = make_case([300, 12], SMALL, config=SHORT_WINDOW)
    embedding, head = case.weights.embedding, case.weights.head
    loop = DraftLoop(layer, lambda ids: embedding[ids], lambda hidden: hidden @ head.T, SHORT_WINDOW)
    inputs = case.cache, case.block_table, case.num_tokens, case.state, case.next_ids
    expected = loop.draft(*inputs, num_drafts, lambda logits: logits.argmax(-1))
    case = replace(case, weights=dense_weights(layer, embedding, head), eps=layer.norm.eps)
    assert torch.equal(case.draft(num_drafts)[0], expected)


@pytest.mark.parametrize("sampled", [False, True])
def test_schema_fake_and_dispatch_fit_the_kernel(sampled):
    case = make_case([20, 5], SMALL)
    noise = (torch.ones(2), torch.rand(2, 3, dtype=torch.float64)) if sampled else (None, None)
    torch.library.opcheck(torch.ops.qm_spec.draft_tokens.default, case.arguments(3, *noise))
    compiled = torch._C._dispatch_has_kernel_for_dispatch_key("qm_spec::draft_tokens", "CPU")
    assert compiled == COMPILED


def test_wrong_arguments_are_refused_by_name():
    case = make_case([20, 5], SMALL)
    weights = case.weights
    wrong = [
        (ValueError, "num_drafts must be at least 1", case, (0,)),
        (ValueError, "must be of 2 requests", replace(case, next_ids=case.next_ids[:1]), (2,)),
        (ValueError, r"q_proj must be \[64, 96\]", _with(case, q_proj=weights.q_proj[:, :48]), (2,)),
        (ValueError, r"next_proj must be \[0, 48\]", _with(case, next_proj=weights.next_proj[:0, :4]), (2,)),
        (ValueError, r"norm must be \[48\]", _with(case, norm=weights.norm[:4]), (2,)),
        (
            ValueError,
            "heads of one size",
            _with(case, **{name: getattr(weights, name)[:16] for name in ("k_proj", "v_proj", "next_proj")}),
            (2,),
        ),
        (ValueError, r"token_ids must be \[200\]", _with(case, token_ids=torch.arange(7)), (2,)),
        (TypeError, "token_ids must be torch.int64", _with(case, token_ids=torch.arange(200).int()), (2,)),
        (TypeError, "head must be torch.float32", _with(case, head=weights.head.half()), (2,)),
        (ValueError, "both be given, or neither", case, (2, torch.ones(2))),
        (ValueError, r"uniform \[2, 2\]", case, (2, torch.ones(2), torch.rand(2, 3, dtype=torch.float64))),
        (TypeError, "uniform float64", case, (2, torch.ones(2), torch.rand(2, 2))),
    ]
    for error, message, arguments, numbers in wrong:
        with pytest.raises(error, match=message):
            arguments.draft(*numbers)


def _with(case: DraftCase, **weights: Tensor) -> DraftCase:
    return replace(case, weights=case.weights._replace(**weights))


def test_numbers_out_of_range_raise_and_do_not_crash():
    case = make_case([20, 5], SMALL)
    table = case.block_table.clone()
    table[0, 0] = len(case.cache)
    for wrong in (
        replace(case, next_ids=torch.tensor([0, SMALL.vocabulary])),
        _with(case, token_ids=torch.full((SMALL.vocabulary,), SMALL.vocabulary)),
        replace(case, block_table=table),
    ):
        with pytest.raises((RuntimeError, IndexError)):
            wrong.draft(2)
