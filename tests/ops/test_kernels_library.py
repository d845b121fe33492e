"""The library's operators: whichever path the dispatcher takes, against float64, the reference and hand-made cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, Sizes
from support.library_exact import EXACT, check, doubled, exact_assign, exact_entropy, tensors
from torch import Tensor

from qm_spec.ops import (
    backend,
    cosine_similarity,
    gumbel_softmax,
    saliency_merge,
    weighted_kmeans_assign,
    weighted_kmeans_update,
)
from qm_spec.ops.gumbel_softmax import philox

pytestmark = pytest.mark.usefixtures("outputs_start_as_nan")

COMPILED = backend.backend() == "compiled"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# One token; about two panels; a tile and a tail; several tiles and a tail, and more terms than are added in a row.
SIZES = [Sizes(2, 1, 3, 1), Sizes(1, 63, 16, 7), Sizes(2, 65, 33, 70), Sizes(3, 97, 8, 33), Sizes(1, 311, 530, 110)]
# Sequences without tokens, tokens without numbers, no sequences, no slots.
EMPTY = [Sizes(2, 0, 4, 3), Sizes(0, 5, 4, 3), Sizes(2, 5, 4, 0)]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Any:
    """Each operator."""
    torch.manual_seed(0)
    return CASES[request.param]


def test_the_compiled_kernels_are_what_runs_where_they_were_built(case) -> None:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"qm_spec::{case.name}", "CPU")
    assert has_kernel == COMPILED


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_twice_pytorchs_own_error(case, dtype: torch.dtype, sizes: Sizes) -> None:
    arguments = case.arguments(sizes, dtype)
    check(case, arguments, case.operator(*arguments))


@pytest.mark.parametrize("sizes", EMPTY, ids=str)
def test_empty_inputs_give_empty_or_zero_outputs(case, sizes: Sizes) -> None:
    arguments = case.arguments(sizes, torch.float32)
    for found, reference in zip(tensors(case.operator(*arguments)), tensors(case.reference(*arguments)), strict=True):
        torch.testing.assert_close(found, reference)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5])
def test_all_tokens_alike(case, value: float) -> None:
    first, *rest = case.arguments(Sizes(2, 101, 20, 9), torch.float32)
    arguments = (torch.full_like(first, value), *rest)
    if case.name == "weighted_kmeans_assign":
        # Every centre is as near as any other.
        arguments = (arguments[0], torch.full_like(arguments[1], value + 1), *arguments[2:])
    check(case, arguments, case.operator(*arguments))


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_small_and_large_magnitudes(case, scale: float) -> None:
    first, *rest = case.arguments(Sizes(1, 130, 40, 11), torch.float32)
    arguments = (first * scale, *rest)
    check(case, arguments, case.operator(*arguments))


def test_a_view_gives_what_its_copy_gives_and_nothing_around_it_changes(case) -> None:
    arguments = case.arguments(Sizes(2, 70, 19, 8), torch.float32)
    expected = tensors(case.operator(*arguments))
    for offset in range(4):
        # In a buffer of a sentinel, with other strides in every dimension.
        buffers, views = [], []
        for x in arguments:
            if isinstance(x, Tensor):
                sentinel = 7 if x.dtype in (torch.int64, torch.bool) else float("nan")
                buffer = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 5), sentinel, dtype=x.dtype)
                view = buffer[..., offset : offset + 2 * x.shape[-1] : 2]
                view.copy_(x)
                buffers.append((buffer, buffer.clone()))
                views.append(view)
            else:
                views.append(x)
        for found, wanted in zip(tensors(case.operator(*views)), expected, strict=True):
            # The references' matrix products depend on the strides.
            torch.testing.assert_close(found, wanted, rtol=0, atol=0 if COMPILED else 1e-6, equal_nan=True)
        for buffer, before in buffers:
            assert torch.equal(buffer.nan_to_num(0.5), before.nan_to_num(0.5))


@pytest.mark.parametrize("name", [name for name in CASES if name != "gumbel_softmax"])
def test_a_batch_of_two_is_two_batches(name: str) -> None:
    torch.manual_seed(1)
    case = CASES[name]
    arguments = case.arguments(Sizes(2, 111, 40, 17), torch.bfloat16)
    together = tensors(case.operator(*arguments))
    for b in range(2):
        alone = tensors(case.operator(*(x[b : b + 1] if isinstance(x, Tensor) else x for x in arguments)))
        for found, wanted in zip(together, alone, strict=True):
            assert torch.equal(found[b : b + 1], wanted)


def test_the_same_for_a_hundred_runs_and_any_number_of_threads(case) -> None:
    arguments = case.arguments(Sizes(2, 300, 40, 40), torch.float32)
    first = tensors(case.operator(*arguments))
    threads = torch.get_num_threads()
    try:
        for run in range(100):
            # The references' matrix products depend on the number of threads.
            if COMPILED:
                torch.set_num_threads(1 + run % 4)
            for found, wanted in zip(tensors(case.operator(*arguments)), first, strict=True):
                assert torch.equal(found, wanted), f"run {run}"
    finally:
        torch.set_num_threads(threads)


def test_opcheck(case) -> None:
    for sizes in (Sizes(2, 7, 5, 3), Sizes(1, 0, 5, 3)):
        torch.library.opcheck(case.operator, case.arguments(sizes, torch.float32))
        torch.library.opcheck(case.operator, case.arguments(sizes, torch.bfloat16))


def test_compiles_as_one_graph(case) -> None:
    compiled = torch.compile(case.operator, fullgraph=True, backend="aot_eager", dynamic=True)
    for sizes in (Sizes(2, 9, 6, 4), Sizes(3, 17, 6, 5)):
        arguments = case.arguments(sizes, torch.float32)
        for found, wanted in zip(tensors(compiled(*arguments)), tensors(case.operator(*arguments)), strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["gumbel_softmax", "cosine_similarity", "saliency_merge"])
def test_the_gradient_is_that_of_the_formula(name: str) -> None:
    torch.manual_seed(2)
    case = CASES[name]
    arguments = case.arguments(Sizes(2, 12, 5, 4), torch.float32)

    def gradients(run: Callable[..., Any], given: tuple[Any, ...]) -> list[Tensor]:
        inputs = [x.requires_grad_() for x in given if isinstance(x, Tensor) and x.is_floating_point()]
        outputs = tensors(run(*given))
        weights = [torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape) for x in outputs]
        loss = sum((x.double() * w).sum() for x, w in zip(outputs, weights, strict=True))
        return list(torch.autograd.grad(loss, inputs))

    found = gradients(case.operator, tuple(x.clone() if isinstance(x, Tensor) else x for x in arguments))
    exact = gradients(EXACT[name], doubled(arguments))
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_entropy_lies_between_one_token_and_all_alike() -> None:
    entropy = torch.ops.qm_spec.attention_entropy
    far = 100 * torch.eye(50).unsqueeze(0)
    assert entropy(far, False).abs().max() == 0
    torch.testing.assert_close(entropy(torch.zeros(1, 50, 8), False), torch.full((1, 50), 50.0).log())
    seen = torch.arange(1.0, 51.0).log().unsqueeze(0)
    torch.testing.assert_close(entropy(torch.zeros(1, 50, 8), True), seen)


def test_causal_entropy_does_not_see_later_tokens() -> None:
    torch.manual_seed(3)
    tokens = torch.randn(1, 200, 24)
    changed = tokens.clone()
    changed[:, 150:] = 50.0
    entropy = torch.ops.qm_spec.attention_entropy
    assert torch.equal(entropy(tokens, True)[:, :150], entropy(changed, True)[:, :150])
    check_causal = exact_entropy(tokens.double(), True)
    torch.testing.assert_close(entropy(tokens, True).double(), check_causal, rtol=0, atol=1e-5)


def test_a_token_that_is_nan_makes_every_row_that_sees_it_nan() -> None:
    tokens = torch.randn(1, 130, 8)
    tokens[0, 100, 3] = float("nan")
    assert torch.ops.qm_spec.attention_entropy(tokens, False).isnan().all()
    seen = torch.ops.qm_spec.attention_entropy(tokens, True)
    assert torch.equal(seen.isnan(), torch.arange(130).unsqueeze(0) >= 100)


def test_philox_gives_the_published_numbers() -> None:
    # Random123's known answers for Philox4x32-10.
    ones = (1 << 64) - 1
    assert philox(4, 0, 0).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(4, 0x299F31D0A4093822, 0x0370734413198A2E).tolist() != philox(4, 0, 0).tolist()
    # All bits of key and offset count, as signed integers too.
    assert torch.equal(philox(8, ones, ones), philox(8, -1, -1))
    assert len({tuple(philox(4, seed, offset).tolist()) for seed in (0, 1, 1 << 40) for offset in (0, 1, 1 << 40)}) == 9


def test_gumbel_noise_depends_on_place_seed_and_offset_alone() -> None:
    logits = torch.zeros(3, 7)
    _, noise = gumbel_softmax(logits, 1.0, seed=5, offset=1)
    # Another shape, another dtype: the same numbers at the same places.
    assert torch.equal(gumbel_softmax(logits.view(7, 3), 1.0, seed=5, offset=1)[1].flatten(), noise.flatten())
    assert torch.equal(gumbel_softmax(logits.half(), 1.0, seed=5, offset=1)[1], noise)
    for seed, offset in ((6, 1), (5, 2), (-5, 1)):
        assert not torch.equal(gumbel_softmax(logits, 1.0, seed=seed, offset=offset)[1], noise)


def test_the_largest_noisy_logit_is_a_draw_from_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    draws = 40_000
    _, noisy = gumbel_softmax(logits.expand(draws, -1), 1.0, seed=11)
    counts = noisy.argmax(-1).bincount(minlength=4).double()
    expected = torch.softmax(logits.double(), 0) * draws
    # Chi-square with 3 degrees of freedom: a right sampler fails at one seed in 10^5, and the seed is fixed.
    assert ((counts - expected).square() / expected).sum() < 25.9


def test_gumbel_softmax_without_noise_is_a_softmax_with_zeros_where_it_is_closed() -> None:
    logits = torch.randn(3, 33)
    logits[:, 5:9] = float("-inf")
    probabilities, perturbed = gumbel_softmax(logits, 0.7, noise=0.0, seed=0)
    torch.testing.assert_close(probabilities, torch.softmax(logits / 0.7, -1), rtol=1e-5, atol=1e-7)
    assert probabilities[:, 5:9].eq(0).all() and torch.equal(perturbed, logits)
    assert perturbed.data_ptr() != logits.data_ptr()


def test_similarity_is_symmetric_and_a_token_of_zeros_is_like_nothing() -> None:
    tokens = torch.randn(2, 205, 30)
    tokens[:, 7] = 0
    similarity = cosine_similarity(tokens)
    if COMPILED:
        assert torch.equal(similarity, similarity.mT)
    assert similarity[:, 7].eq(0).all()
    assert cosine_similarity(tokens[0]).shape == (205, 205) and cosine_similarity(tokens.unsqueeze(0)).ndim == 4


def test_merging_keeps_lone_tokens_counts_everything_and_ignores_padding() -> None:
    tokens = torch.randn(1, 6, 4).to(torch.bfloat16)
    tokens[0, 5] = float("nan")
    cluster = torch.tensor([[0, 2, 2, 4, 2, -1]])
    mass = torch.tensor([[0.3, 1.0, 1.0, 0.7, 2.0, float("nan")]])
    merged, size, total = saliency_merge(tokens, mass, cluster, 5)
    assert torch.equal(merged[0, 0], tokens[0, 0]) and torch.equal(merged[0, 4], tokens[0, 3])
    assert merged[0, [1, 3]].eq(0).all() and torch.isfinite(merged).all()
    assert size.tolist() == [[1, 0, 3, 0, 1]]
    torch.testing.assert_close(total, torch.tensor([[0.3, 0, 4.0, 0, 0.7]]))


def test_a_slot_without_mass_holds_zeros() -> None:
    merged, size, total = saliency_merge(
        torch.ones(1, 2, 3), torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.int64), 1
    )
    assert merged.eq(0).all() and total.eq(0).all() and size.tolist() == [[2.0]]


def test_a_cluster_that_is_not_there_is_an_error() -> None:
    cluster = torch.tensor([[0, 3]])
    with pytest.raises(RuntimeError, match=r"saliency_merge: cluster must be in -1\.\.2, got 3"):
        saliency_merge(torch.ones(1, 2, 3), torch.ones(1, 2), cluster, 3)
    with pytest.raises(RuntimeError, match=r"weighted_kmeans_update: cluster must be in -1\.\.2, got 3"):
        weighted_kmeans_update(
            torch.ones(1, 2, 3), torch.ones(1, 2), cluster, torch.ones(1, 2), torch.ones(1, 3, dtype=torch.bool)
        )


def test_ties_between_centres_go_to_the_first_live_one_wherever_it_stands() -> None:
    torch.manual_seed(4)
    points = torch.randint(-3, 4, (1, 150, 8)).float()
    # The same few centres again and again, over panels and tiles: only their first live copy may win.
    centres = points[:, :10].repeat(1, 21, 1)
    mask, live = torch.ones(1, 150, dtype=torch.bool), torch.ones(1, 210, dtype=torch.bool)
    live[:, :3] = False
    cluster, distance = weighted_kmeans_assign(points, centres, mask, live)
    wanted, exact = exact_assign(points.double(), centres.double(), mask, live)
    # Small integers: float32 is exact.
    assert torch.equal(cluster, wanted) and torch.equal(distance.double(), exact)
    assert cluster.max() < 13


def test_sequences_without_live_slots_and_padding_belong_to_no_cluster() -> None:
    points = torch.randn(2, 5, 3)
    points[0, 4] = float("nan")
    mask = torch.tensor([[True] * 4 + [False], [True] * 5])
    live = torch.tensor([[True, False], [False, False]])
    cluster, distance = weighted_kmeans_assign(points, torch.randn(2, 2, 3), mask, live)
    assert cluster.tolist() == [[0, 0, 0, 0, -1], [-1] * 5]
    assert torch.isfinite(distance).all() and distance[0, 4] == 0


def test_repair_leaves_no_live_slot_empty_and_takes_no_nearest_member() -> None:
    points = torch.ones(1, 6, 2)
    cluster = torch.tensor([[0, 0, 0, 0, 3, -1]])
    distance = torch.tensor([[0.0, 2.0, 1.0, 2.0, 0.0, 9.0]])
    live = torch.tensor([[True, True, True, True]])
    repaired, centres = weighted_kmeans_update(points, torch.ones(1, 6), cluster, distance, live)
    # Tokens 1 and 3 are the farthest alike, and the earlier goes to the earlier slot.
    assert repaired.tolist() == [[0, 1, 0, 2, 3, -1]]
    assert torch.equal(centres, torch.ones(1, 4, 2))
    assert cluster.tolist() == [[0, 0, 0, 0, 3, -1]]


def test_more_slots_than_tokens_leave_the_last_ones_empty() -> None:
    cluster, live = torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 5, dtype=torch.bool)
    distance = torch.tensor([[1.0, 1.0, 1.0]])
    repaired, centres = weighted_kmeans_update(torch.ones(1, 3, 2), torch.ones(1, 3), cluster, distance, live)
    assert repaired.tolist() == [[0, 1, 2]]
    assert centres[0, :3].eq(1).all() and centres[0, 3:].eq(0).all()


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "cosine_similarity: tokens must be", lambda: cosine_similarity(torch.ones(3))),
        (TypeError, "cosine_similarity: tokens must be floats", lambda: cosine_similarity(torch.ones(3, 3).long())),
        (ValueError, "temperature must be above 0, got 0", lambda: gumbel_softmax(torch.ones(3), 0, seed=0)),
        (ValueError, "noise must be at least 0, got -1", lambda: gumbel_softmax(torch.ones(3), 1, seed=0, noise=-1)),
        (TypeError, "logits must be floats", lambda: gumbel_softmax(torch.ones(3).int(), 1, seed=0)),
        (
            ValueError,
            "mass and cluster \\[B, N\\], got \\[1, 2, 3\\], \\[1, 2\\] and \\[1, 3\\]",
            lambda: saliency_merge(torch.ones(1, 2, 3), torch.ones(1, 2), torch.zeros(1, 3).long(), 2),
        ),
        (
            TypeError,
            "cluster int64, got torch.float32, torch.float32 and torch.int32",
            lambda: saliency_merge(torch.ones(1, 2, 3), torch.ones(1, 2), torch.zeros(1, 2).int(), 2),
        ),
        (
            ValueError,
            "centres \\[B, K, D\\], got \\[1, 2, 3\\] and \\[1, 2, 4\\]",
            lambda: weighted_kmeans_assign(
                torch.ones(1, 2, 3), torch.ones(1, 2, 4), torch.ones(1, 2).bool(), torch.ones(1, 2).bool()
            ),
        ),
        (
            TypeError,
            "mask and live must be bool",
            lambda: weighted_kmeans_assign(
                torch.ones(1, 2, 3), torch.ones(1, 2, 3), torch.ones(1, 2), torch.ones(1, 2).bool()
            ),
        ),
        (
            ValueError,
            "weighted_kmeans_update: points must be",
            lambda: weighted_kmeans_update(
                torch.ones(1, 2, 3),
                torch.ones(1, 2),
                torch.zeros(1, 3).long(),
                torch.ones(1, 2),
                torch.ones(1, 2).bool(),
            ),
        ),
    ],
)
def test_bad_arguments_are_refused_with_what_was_expected(
    error: type[Exception], message: str, call: Callable[[], object]
) -> None:
    with pytest.raises(error, match=message):
        call()
