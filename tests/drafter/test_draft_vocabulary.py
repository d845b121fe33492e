"""The draft vocabulary: which tokens it holds, and how a checkpoint keeps it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qm_spec.drafter.eagle3 import Eagle3Config, Eagle3Drafter
from qm_spec.drafter.head import draft_head
from qm_spec.drafter.prior import QuickMergePrior
from qm_spec.drafter.prior_config import QuickMergeConfig
from qm_spec.drafter.vocabulary import choose_tokens, coverage, to_offsets, to_token_ids
from qm_spec.training.drafter import give_draft_vocabulary

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
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


# At run time


def make_pair(kind=QuickMergePrior, config=QuickMergeConfig):
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": 64}
    target = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).eval().requires_grad_(False)
    drafter = kind(config(draft_vocab_size=6, **sizes))
    drafter.draft_token_ids = IDS
    return drafter, target


def test_the_head_has_the_targets_rows_of_the_draft_vocabulary():
    drafter, target = make_pair()
    output = torch.randn(2, 5, 32)
    whole, head = target.lm_head(output), draft_head(drafter, target)
    torch.testing.assert_close(head.logits(output), whole[..., IDS])
    assert torch.equal(head.best_tokens(output), IDS[whole[..., IDS].argmax(-1)])
    spread_out = head.vocabulary_logits(output)
    assert spread_out.shape == whole.shape and (spread_out.isfinite().sum(-1) == 6).all()
    assert torch.equal(spread_out[..., IDS], head.logits(output))


def test_a_head_with_a_bias_or_of_another_class_gives_the_same():
    drafter, target = make_pair()
    output = torch.randn(3, 32)
    for head in (nn.Linear(32, 64), nn.Sequential(nn.Linear(32, 64))):
        weight = head.weight if isinstance(head, nn.Linear) else head[0].weight
        head.weight = weight
        target.set_output_embeddings(head)
        torch.testing.assert_close(draft_head(drafter, target).logits(output), head(output)[:, IDS])


def test_eagle3_reads_the_rows_of_its_checkpoint():
    drafter, target = make_pair(Eagle3Drafter, Eagle3Config)
    output = torch.randn(3, 32)
    assert torch.equal(draft_head(drafter, target).logits(output), drafter.lm_head(output))
    assert not torch.allclose(drafter.lm_head(output), target.lm_head(output)[:, IDS])


def test_eagle3_is_given_rows_of_a_head_that_could_be_trained():
    """Training chooses the vocabulary before it freezes the target: the rows must not hang on the target's graph."""
    drafter, target = make_pair(Eagle3Drafter, Eagle3Config)
    target.requires_grad_(True)
    give_draft_vocabulary(drafter, target, torch.arange(64, 0, -1), {63})
    assert drafter.draft_token_ids.tolist() == [0, 1, 2, 3, 4, 63]
    torch.testing.assert_close(drafter.lm_head.weight, target.get_output_embeddings().weight[[0, 1, 2, 3, 4, 63]])
    torch.optim.SGD([parameter for parameter in drafter.parameters() if parameter.requires_grad])


def test_without_a_draft_vocabulary_the_targets_head_is_called_as_it_is():
    _, target = make_pair()
    drafter, output = QuickMergePrior(QuickMergeConfig(vocab_size=64, **SIZES)), torch.randn(3, 32)
    head = draft_head(drafter, target.bfloat16())
    assert torch.equal(head.vocabulary_logits(output), target.lm_head(output.bfloat16()))
    assert torch.equal(head.best_tokens(output), target.lm_head(output.bfloat16()).argmax(-1))


def test_a_draft_vocabulary_larger_than_the_targets_is_refused():
    with pytest.raises(ValueError, match=r"1\.\.64"):
        QuickMergeConfig(vocab_size=64, draft_vocab_size=65, **SIZES)
