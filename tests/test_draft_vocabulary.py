"""The draft vocabulary: which tokens it holds, and how a checkpoint keeps it."""

from __future__ import annotations

import pytest
import torch

from qm_spec.drafter.config import QuickMergeConfig
from qm_spec.drafter.eagle3 import Eagle3Config, Eagle3Drafter
from qm_spec.drafter.prior import QuickMergePrior
from qm_spec.drafter.vocabulary import choose_tokens, coverage, to_offsets, to_token_ids

SIZES = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
IDS = torch.tensor([0, 2, 3, 7, 19, 63])


def test_the_most_frequent_tokens_are_chosen_in_rising_order():
    counts = torch.tensor([5, 0, 9, 9, 1, 7])
    assert choose_tokens(counts, 3).tolist() == [2, 3, 5]


def test_of_equally_frequent_tokens_the_lower_ids_are_chosen():
    assert choose_tokens(torch.ones(100), 7).tolist() == list(range(7))


def test_required_tokens_are_chosen_though_they_never_occurred():
    assert choose_tokens(torch.tensor([5, 0, 9, 0]), 2, required=[3]).tolist() == [2, 3]


@pytest.mark.parametrize("size", [0, 1, 5])
def test_a_size_that_cannot_be_had_is_refused(size):
    with pytest.raises(ValueError, match=r"in 2\.\.4 tokens"):
        choose_tokens(torch.ones(4), size, required=[0, 3])


def test_coverage_is_the_share_of_written_tokens():
    assert coverage(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 3])) == pytest.approx(0.6)


def test_offsets_and_ids_are_each_others_inverse():
    assert torch.equal(to_token_ids(to_offsets(IDS)), IDS)


def test_ids_that_do_not_rise_are_refused():
    with pytest.raises(ValueError, match="must rise"):
        to_offsets(torch.tensor([3, 3, 4]))


def test_a_checkpoint_keeps_the_draft_vocabulary(tmp_path):
    drafter = QuickMergePrior(QuickMergeConfig(vocab_size=64, draft_vocab_size=6, **SIZES))
    drafter.draft_token_ids = IDS
    drafter.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = QuickMergePrior.from_pretrained(tmp_path)
    assert loaded.draft_token_ids.dtype == torch.int64
    assert torch.equal(loaded.draft_token_ids, IDS)


def test_a_checkpoint_without_one_has_the_whole_vocabulary(tmp_path):
    QuickMergePrior(QuickMergeConfig(vocab_size=64, **SIZES)).save_pretrained(tmp_path)
    loaded = QuickMergePrior.from_pretrained(tmp_path)
    assert loaded.draft_token_ids is None and loaded.config.draft_vocab_size == 64


def test_eagle3_keeps_its_tokens_and_their_rows_of_the_head_for_vllm(tmp_path):
    drafter = Eagle3Drafter(Eagle3Config(vocab_size=64, draft_vocab_size=6, **SIZES))
    drafter.draft_token_ids = IDS
    drafter.save_pretrained(tmp_path)
    loaded = Eagle3Drafter.from_pretrained(tmp_path)
    assert torch.equal(loaded.draft_token_ids, IDS)
    assert torch.equal(loaded.lm_head.weight, drafter.lm_head.weight) and loaded.lm_head.weight.shape == (6, 32)


def test_a_draft_vocabulary_larger_than_the_targets_is_refused():
    with pytest.raises(ValueError, match=r"1\.\.64"):
        QuickMergeConfig(vocab_size=64, draft_vocab_size=65, **SIZES)
