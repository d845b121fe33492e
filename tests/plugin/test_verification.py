"""The repairs of vLLM's sampling on the CPU."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.speculation import chi_squared_p_value

from qm_spec.integrations.vllm_plugin.patches.cpu_expansion import with_expansion
from qm_spec.integrations.vllm_plugin.patches.cpu_no_drafts import with_plain_sampling
from qm_spec.integrations.vllm_plugin.patches.cpu_seeds import with_seeds_of_read_prompts
from qm_spec.integrations.vllm_plugin.patches.min_tokens import with_drafts_counted
from qm_spec.integrations.vllm_plugin.patches.seed_numbers import with_numbered_rows
from qm_spec.integrations.vllm_plugin.verification import verify_drawn


def unused(*args):
    raise AssertionError("vLLM's own function was called on the CPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_each_value_is_repeated_for_its_tokens(dtype):
    values = torch.tensor([3, 0, 5, 7], dtype=dtype)
    ends = torch.tensor([2, 3, 3, 6], dtype=torch.int32)
    expanded = with_expansion(unused)(values, ends, 6)
    assert expanded.dtype == dtype and expanded.tolist() == [3, 3, 0, 7, 7, 7]


def test_a_temperature_keeps_its_fraction_and_greedy_requests_get_the_stand_in():
    temperature = torch.tensor([0.7, 0.0, 1.3])
    expanded = with_expansion(unused)(temperature, torch.tensor([1, 3, 4]), 4, replace_from=0, replace_to=1)
    torch.testing.assert_close(expanded, torch.tensor([0.7, 1.0, 1.0, 1.3]))


def test_other_devices_keep_vllms_function():
    calls = []
    x = torch.empty(2, device="meta")
    with_expansion(lambda *args: calls.append(args) or x)(x, torch.empty(2, device="meta"), 4)
    assert len(calls) == 1


def test_a_step_without_drafts_is_sampled_as_by_plain_decoding_on_a_cpu():
    """Of its own vLLM verifies it, and takes the largest top-k of no rows."""
    sample = with_plain_sampling(lambda runner, logits, metadata: metadata)
    logits, none, some = (
        torch.empty(2, 8),
        SimpleNamespace(num_draft_tokens=[0, 0]),
        SimpleNamespace(num_draft_tokens=[0, 1]),
    )
    assert sample(None, logits, none) is None
    assert sample(None, logits, some) is some
    assert sample(None, logits.to("meta"), none) is none
    assert sample(None, logits, None) is None


@dataclass
class Metadata:
    logitsprocs: Any
    spec_token_ids: list[list[int]]


def test_stop_tokens_are_masked_until_min_tokens_are_there_drafts_counted():
    """Four requests, two stop tokens; the last one, of structured output, has its stop tokens back where none is left.

    The first has 1 token and 2 drafts of 4 tokens, the second 3 drafts, the third none.
    """
    rows = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3], dtype=torch.int32)
    tokens = torch.tensor([5, 6] * 4, dtype=torch.int32)
    minimum = {row: (4, [9], [5, 6], row == 3) for row in range(4)}
    min_tokens = SimpleNamespace(
        min_toks=minimum, logits_slice=(rows, tokens), restore_logits_slice=(rows[6:], tokens[6:])
    )
    others = SimpleNamespace()
    processors = SimpleNamespace(non_argmax_invariant=[others, min_tokens])
    metadata = Metadata(processors, [[1, 2], [1, 2, 3], [], [1, 2, 3, 4]])
    logits = torch.empty(4, 8)
    apply = with_drafts_counted(lambda _, logits, metadata, bonus: metadata)
    assert apply(None, logits, metadata, False) is metadata
    assert apply(None, logits.to("meta"), metadata, True) is metadata
    first, counted = apply(None, logits, metadata, True).logitsprocs.non_argmax_invariant
    assert first is others and counted.logits_slice[0].tolist() == [0, 0, 2, 2]
    assert counted.logits_slice[1].tolist() == [5, 6, 5, 6] and counted.restore_logits_slice[0].numel() == 0
    # The drafts' own rows are masked by it in the same step.
    assert processors.non_argmax_invariant == [others, min_tokens] and min_tokens.logits_slice[0] is rows
    assert apply(None, logits, Metadata(processors, [[]] * 4), True).logitsprocs is processors


@pytest.mark.parametrize(("device", "seen"), [("cpu", [2]), ("cuda", [0, 2])])
def test_no_number_is_drawn_from_the_seed_of_a_prompt_that_is_being_read(device, seen):
    generators = {row: torch.Generator() for row in (0, 2)}
    runner = SimpleNamespace(
        device=torch.device(device),
        input_batch=SimpleNamespace(generators=dict(generators), num_reqs=3),
        # What stands behind the batch's requests is of an earlier one.
        discard_request_mask=SimpleNamespace(np=np.array([True, True, False, True])),
    )
    sample_tokens = with_seeds_of_read_prompts(lambda runner, _: sorted(runner.input_batch.generators))
    assert sample_tokens(runner, None) == seen
    assert runner.input_batch.generators == generators

    def fail(runner, _):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        with_seeds_of_read_prompts(fail)(runner, None)
    assert runner.input_batch.generators == generators


# Verification of drafts that were drawn

VOCABULARY, REQUESTS, FALSE_ALARM = 5, 20_000, 1e-6


def distributions(seed, *shape):
    return (1.5 * torch.randn(*shape, VOCABULARY, generator=torch.Generator().manual_seed(seed))).softmax(-1)


@pytest.mark.parametrize("certain", [False, True], ids=["drawn", "copied"])
def test_what_is_written_is_distributed_as_the_targets(certain):
    """Two drafts: the joint distribution of the first two tokens is p(a) p(b | a), whatever drafts them."""
    torch.manual_seed(0)
    first, second = distributions(1), distributions(2, VOCABULARY)
    draft_first, draft_second = distributions(3), distributions(4, VOCABULARY)
    if certain:
        draft_first, draft_second = torch.eye(VOCABULARY)[2], torch.eye(VOCABULARY)[[1, 2, 3, 4, 0]]
    one = draft_first.expand(REQUESTS, -1).multinomial(1)
    two = draft_second[one.squeeze(1)].multinomial(1)
    drafts = torch.cat([one, two], 1)
    probs = torch.stack([draft_first.expand(REQUESTS, -1), draft_second[one.squeeze(1)]], 1).flatten(0, 1)
    logits = torch.stack([first.expand(REQUESTS, -1), second[one.squeeze(1)]], 1).flatten(0, 1).log()
    output = verify_drawn(
        drafts.flatten(),
        [2] * REQUESTS,
        2,
        None if certain else probs,
        logits,
        torch.full((REQUESTS, 1), 4),
        torch.full((REQUESTS,), 0.7),
    )
    observed = torch.bincount(output[:, 0].long(), minlength=VOCABULARY).double()
    assert chi_squared_p_value(observed, REQUESTS * first.double()) > FALSE_ALARM
    kept = output[:, 1] >= 0
    assert REQUESTS / 20 < kept.sum() < REQUESTS
    # Of those whose first draft was kept the next token follows the target's, given that draft.
    for token in output[kept, 0].unique().tolist():
        following = output[kept & (output[:, 0] == token), 1].long()
        observed = torch.bincount(following, minlength=VOCABULARY).double()
        assert chi_squared_p_value(observed, len(following) * second[token].double()) > FALSE_ALARM
    assert (output[(output[:, 2] >= 0), 2] == 4).all(), "the bonus token follows where both were kept"


def test_the_test_of_the_distribution_finds_drafts_that_are_all_kept():
    torch.manual_seed(0)
    first, draft = distributions(1), distributions(3)
    drafts = draft.expand(REQUESTS, -1).multinomial(1).squeeze(1)
    observed = torch.bincount(drafts, minlength=VOCABULARY).double()
    assert chi_squared_p_value(observed, REQUESTS * first.double()) < FALSE_ALARM


def test_greedy_requests_keep_the_targets_best_tokens_and_numbers_of_drafts_may_differ():
    logits = torch.full((5, VOCABULARY), -30.0)
    best = torch.tensor([1, 3, 2, 0, 4])
    logits[range(5), best] = 30.0
    drafts = torch.tensor([1, 3, 4, 0, -1])
    output = verify_drawn(
        drafts, [3, 0, 1, 1], 4, None, logits, torch.tensor([[4], [3], [2], [1]]), torch.tensor([0.0, 0.0, 0.0, 1.0])
    )
    assert output.tolist() == [[1, 3, 2, -1, -1], [3, -1, -1, -1, -1], [0, 2, -1, -1, -1], [4, -1, -1, -1, -1]]
    assert output.dtype == torch.int32


def test_a_token_that_the_target_cannot_write_is_never_kept_nor_recovered():
    logits = torch.zeros(4000, VOCABULARY)
    logits[:, 2:] = -torch.inf
    drafts = torch.arange(4000) % VOCABULARY
    output = verify_drawn(
        drafts, [1] * 4000, 1, None, logits, torch.zeros(4000, 1, dtype=torch.int64), torch.ones(4000)
    )
    assert (output[:, 0] < 2).all() and (output[drafts >= 2, 1] == -1).all()


def test_drafts_of_the_targets_own_distribution_are_all_kept():
    probs = distributions(1, 500)
    drafts = probs.multinomial(1).squeeze(1)
    output = verify_drawn(drafts, [1] * 500, 1, probs, probs.log(), torch.full((500, 1), 3), torch.ones(500))
    assert torch.equal(output[:, 0], drafts.int()) and (output[:, 1] == 3).all()


def test_what_vllm_alone_knows_is_left_to_vllm():
    """Seeds without numbers, modes that it was asked for, and batches that are all greedy."""
    replaced = with_numbered_rows(lambda *args, **named: "vLLM's")
    one = torch.zeros(1, dtype=torch.int64)

    def verify(generators=None, all_greedy=False, **named):
        sampling = SimpleNamespace(generators=generators or {}, all_greedy=all_greedy, temperature=torch.ones(1))
        return replaced(one, [1], 1, one + 1, None, torch.zeros(1, 3), torch.ones(1, 1).long(), sampling, **named)

    assert verify(all_greedy=True) == verify({0: torch.Generator()}) == verify(synthetic_mode=True) == "vLLM's"
    assert verify(synthetic_mode=False, use_fp64_gumbel=False).shape == (1, 2)
