"""`append_states_`: whichever path the dispatcher takes, against float64, the reference and the prior's layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from draft_cases import PriorSizes, StatesCase, make_states_case, random_prior
from torch import Tensor

from qm_spec.config import MergeConfig
from qm_spec.drafter.loops.gathered import state_weights
from qm_spec.ops import append_kv_, backend
from qm_spec.ops.append_states import append_states_reference
from qm_spec.ops.draft_layer import in_half_the_bytes
from qm_spec.ops.page import slot_elements, split_page

pytestmark = pytest.mark.usefixtures("outputs_start_as_nan")

COMPILED = backend.backend() == "compiled"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = PriorSizes(hidden=48, num_heads=4, num_kv_heads=2, head_dim=16, intermediate=96, vocabulary=200)


def without_next(case: StatesCase) -> StatesCase:
    return replace(case, weights=case.weights._replace(next_proj=case.weights.next_proj[:0]))


CASES: dict[str, Callable[[torch.dtype], StatesCase]] = {
    "shipped sizes": lambda dtype: make_states_case(5, dtype=dtype),
    "one token": lambda dtype: make_states_case(1, SMALL, dtype),
    "many tokens": lambda dtype: make_states_case(70, SMALL, dtype),
    "odd sizes": lambda dtype: make_states_case(9, PriorSizes(35, 3, 3, 10, 51, 73), dtype),
    "large pages": lambda dtype: make_states_case(20, SMALL, dtype, page_size=128),
    # More columns than are added in a row, and a tail.
    "many columns": lambda dtype: make_states_case(3, replace(SMALL, hidden=1040), dtype),
    "values of the state alone": lambda dtype: without_next(make_states_case(7, SMALL, dtype)),
    "states as they are": lambda dtype: replace(make_states_case(7, SMALL, dtype), norm_aux_states=False),
}


@pytest.fixture(params=CASES)
def make(request: pytest.FixtureRequest) -> Callable[[torch.dtype], StatesCase]:
    return CASES[request.param]


def in_dtype(case: StatesCase, dtype: torch.dtype) -> StatesCase:
    """Return the case in another dtype, with a cache of its own in at least float32."""
    pages, groups, page_size, _ = case.cache.shape
    head_dim = len(case.weights.k_proj) // groups
    kept = torch.float32 if dtype == torch.float64 else dtype
    return replace(
        case,
        cache=torch.zeros(pages, groups, page_size, slot_elements(head_dim, kept), dtype=kept),
        aux_states=case.aux_states.to(dtype),
        weights=case.weights._make(weight.to(dtype) for weight in case.weights),
    )


def read(case: StatesCase, run: Callable[[StatesCase], Tensor]) -> dict[str, Tensor]:
    """Return the fused states and what the cache holds after a step, in float64, by name."""
    fused = run(case)
    keys, values, _ = split_page(case.cache, len(case.weights.k_proj) // case.cache.shape[1])
    page_size = case.cache.shape[2]
    page, offset = case.slots // page_size, case.slots % page_size
    return {
        "fused": fused.double(),
        "keys": keys[page, :, offset].double(),
        "values": values[page, :, offset].double(),
    }


def by_reference(case: StatesCase) -> Tensor:
    return append_states_reference(*case.arguments())


@pytest.mark.parametrize("dtype", DTYPES)
def test_errs_at_most_twice_as_much_as_plain_pytorch(make, dtype):
    case = make(dtype)
    ours = read(case, StatesCase.append)
    exact, plain = (read(in_dtype(case, one), by_reference) for one in (torch.float64, dtype))
    assert case.append().dtype == dtype
    for name, expected in exact.items():
        error, plain_error = ((one[name] - expected).abs().max().item() for one in (ours, plain))
        assert error <= 2 * plain_error + 1e-5 * expected.abs().max().item(), f"{name}: {error:.1e}, {plain_error:.1e}"


def test_slots_begin_with_one_token_of_mass_one_and_padding_is_not_kept():
    case = make_states_case(6, SMALL)
    case.slots[[1, 4]] = -1
    case.cache[1:].fill_(7.0)
    before = case.cache.clone()
    case.append()
    written = case.slots[case.slots >= 0] - case.cache.shape[2]
    state = split_page(case.cache, SMALL.head_dim)[2]
    assert torch.equal(state[1, :, written], torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(2, len(written), 4))
    others = [slot for slot in range(case.cache.shape[2]) if slot not in written.tolist()]
    assert torch.equal(case.cache[1, :, others], before[1, :, others])


def test_a_step_is_what_the_layer_makes_of_it():
    """The operator with a prior's weights, against its modules and `append_kv_`."""
    layer = random_prior(SMALL, MergeConfig()).layer
    case = make_states_case(9, SMALL)
    weights = state_weights(layer, case.weights.embedding)
    case = replace(case, weights=weights, eps=layer.norm.eps, norm_aux_states=layer.norm_aux_states)
    expected = case.cache.clone()
    states = layer.fuse(case.aux_states)
    append_kv_(expected, *layer.keys_values(states, weights.embedding[case.next_ids]), case.slots)
    torch.testing.assert_close(case.append(), states)
    torch.testing.assert_close(case.cache, expected)


@pytest.mark.skipif(not COMPILED, reason="of the kernel: build it (csrc/README.md)")
def test_a_token_is_read_alike_in_any_batch_and_by_any_number_of_threads(make):
    case = make(torch.float32)
    expected = case.append()
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert torch.equal(case.append(), expected)
    finally:
        torch.set_num_threads(threads)
    for row in range(len(expected)):
        one = slice(row, row + 1)
        alone = replace(case, aux_states=case.aux_states[one], next_ids=case.next_ids[one].int(), slots=case.slots[one])
        assert torch.equal(alone.append(), expected[one])


def test_a_float32_target_is_read_for_with_half_the_bytes(make):
    case = make(torch.float32)
    wide = replace(case, weights=case.weights._make(weight.bfloat16().float() for weight in case.weights))
    half = replace(wide, weights=in_half_the_bytes(wide.weights), cache=torch.zeros_like(wide.cache))
    assert half.weights.fc.dtype == half.weights.k_proj.dtype == torch.bfloat16
    assert half.weights.embedding.dtype == half.weights.state_norm.dtype == torch.float32
    torch.testing.assert_close(half.append(), wide.append())
    torch.testing.assert_close(half.cache, wide.cache)


def test_schema_fake_and_dispatch_fit_the_kernel():
    torch.library.opcheck(torch.ops.qm_spec.append_states_.default, make_states_case(3, SMALL).arguments())
    assert torch._C._dispatch_has_kernel_for_dispatch_key("qm_spec::append_states_", "CPU") == COMPILED


def test_wrong_arguments_are_refused_by_name():
    case = make_states_case(4, SMALL)
    weights = case.weights

    def given(**tensors: Tensor) -> StatesCase:
        return replace(case, weights=weights._replace(**tensors))

    wrong = [
        (ValueError, r"aux_states must be \[T, 144\]", replace(case, aux_states=case.aux_states[:, :-1])),
        (ValueError, r"next_ids and slots must be \[4\]", replace(case, next_ids=case.next_ids[1:])),
        (TypeError, "slots must be int64", replace(case, slots=case.slots.int())),
        (
            ValueError,
            "k_proj must have rows for 2 heads",
            given(k_proj=weights.fc[:31, :48]),
        ),
        (ValueError, r"v_proj must be \[32, 48\]", given(v_proj=weights.v_proj[1:])),
        (TypeError, "fc must be torch.float32", given(fc=weights.fc.half())),
        (
            TypeError,
            "state_norm must be",
            given(state_norm=weights.state_norm.bfloat16()),
        ),
    ]
    for error, message, one in wrong:
        with pytest.raises(error, match=message):
            one.append()


@pytest.mark.skipif(not COMPILED, reason="of the kernel: build it (csrc/README.md)")
def test_a_token_that_the_target_does_not_have_is_refused():
    case = make_states_case(4, SMALL)
    case.next_ids[2] = SMALL.vocabulary
    with pytest.raises(RuntimeError, match=r"token ids must be in 0..199, got 200"):
        case.append()
