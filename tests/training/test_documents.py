"""Documents of training: what is learned of them, and how they share batches."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qm_spec.drafter.anchors import engine_steps
from qm_spec.drafter.prior import QuickMergePrior
from qm_spec.drafter.prior_config import QuickMergeConfig
from qm_spec.training.documents import Document, DocumentBatches, windows
from qm_spec.training.drafter import DraftTraining, give_draft_vocabulary, token_counts

VOCAB = 50
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def answered(num_prompt, num_output, seed=0):
    ids = np.random.default_rng(seed).integers(0, VOCAB, num_prompt + num_output)
    return Document.answered(ids[:num_prompt], ids[num_prompt:])


@pytest.fixture(scope="module")
def target():
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_hidden_layers=4, head_dim=8)
    return LlamaForCausalLM(config).eval()


def make_training(target, draft_vocab_size=None):
    torch.manual_seed(1)
    config = QuickMergeConfig(
        **SIZES,
        head_dim=8,
        eagle_aux_hidden_state_layer_ids=[0, 2, 3],
        num_speculative_tokens=3,
        norm_aux_states=True,
        draft_vocab_size=draft_vocab_size,
        quickmerge={"window": 24, "group_size": 8, "schedule": [4, 1]},
    )
    prior = QuickMergePrior(config)
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return DraftTraining(prior, target)


def test_rows_begin_where_an_engine_begins_to_draft():
    # The prompt's pass gives the first answer token; the first draft is of the second, from the prompt's last position.
    assert answered(5, 4).rows.tolist() == [4, 5, 6]
    assert Document.answered([1, 2, 3], [7]).rows.tolist() == []


def test_all_tokens_of_text_are_learned_but_those_without_a_state_before_them():
    (window,) = windows(np.arange(9), 8)
    assert window.rows.tolist() == [0, 1, 2, 3, 4, 5]


def test_each_document_is_in_one_batch_of_like_documents():
    documents = [answered(4, 5 + number % 40, number) for number in range(200)]
    batches = DocumentBatches(documents, rows_per_batch=64, shuffle_seed=0)
    seen, padding = [], 0
    for number in range(len(batches)):
        batch = batches[number]
        seen += [tuple(ids[:length].tolist()) for ids, length in zip(batch["input_ids"], batch["lengths"], strict=True)]
        padding += int((batch["rows"] < 0).sum())
    assert sorted(seen) == sorted(tuple(document.token_ids.tolist()) for document in documents)
    assert padding < 0.15 * batches.num_rows


def test_a_document_gives_at_most_so_many_rows_and_others_in_each_epoch():
    batches = DocumentBatches([answered(4, 60)], rows_per_batch=8, rows_per_document=8)
    first, again = batches[0]["rows"], batches[0]["rows"]
    batches.begin_epoch(1)
    second = batches[0]["rows"]
    assert first.shape == (1, 8) and not torch.equal(first, second)
    # Whoever goes on with an epoch gets its rows.
    assert torch.equal(first, again)


def test_data_without_anything_to_learn_is_refused():
    with pytest.raises(ValueError, match="no document has a token to learn"):
        DocumentBatches([Document(np.arange(5), np.zeros(5, dtype=bool))], 8)


@pytest.mark.parametrize("draft_vocab_size", [None, 12])
def test_a_document_is_learned_as_if_it_were_alone(target, draft_vocab_size):
    """Neither padding nor the other documents of a batch change what is accepted, nor the loss."""
    training = make_training(target, draft_vocab_size)
    documents = [answered(3, 9, 0), answered(20, 12, 1), answered(2, 40, 2)]
    if draft_vocab_size:
        give_draft_vocabulary(training.drafter, target, token_counts(documents, VOCAB), {2})
        training = DraftTraining(training.drafter, target)
    training.drafter.config.num_speculative_tokens = 1
    alone = [training(**DocumentBatches([document], 1000)[0]) for document in documents]
    # In the batch they stand by size, as here.
    together = training(**DocumentBatches(documents, 1000)[0])
    rows = [len(document.rows) for document in documents]
    loss = sum(number * one["loss"] for number, one in zip(rows, alone, strict=True)) / sum(rows)
    torch.testing.assert_close(together["loss"], loss)
    for number, row, one in zip(rows, together["accepted"], alone, strict=True):
        assert torch.equal(row[:number], one["accepted"][0]) and (row[number:] == -1).all()


def test_only_answers_are_learned(target):
    """What the prompt says about its own tokens does not count, only what it says about the answer."""
    training = make_training(target)
    document = answered(10, 6)
    loss = training(**DocumentBatches([document], 100)[0])["loss"]
    more = Document(document.token_ids, np.ones(16, dtype=bool))
    assert not torch.allclose(loss, training(**DocumentBatches([more], 100)[0])["loss"])
    grown = training(**{**DocumentBatches([document], 100)[0], "lengths": torch.tensor([16])})["loss"]
    torch.testing.assert_close(grown, loss)


def test_a_draft_vocabulary_counts_what_it_misses_as_rejected(target):
    document = answered(4, 30)
    ids = torch.from_numpy(document.token_ids.astype(np.int64))[None]
    best = target(ids).logits.argmax(-1)[0, document.rows + 1]
    # A vocabulary without any token that the target would choose.
    others = sorted(set(range(VOCAB)) - set(best.tolist()))[:8]
    training = make_training(target, 8)
    training.drafter.draft_token_ids = torch.tensor(others)
    training = DraftTraining(training.drafter, target).eval()
    accepted = training(**DocumentBatches([document], 100)[0])["accepted"]
    assert (accepted == 0).all()


def test_an_engine_steps_over_what_it_accepts():
    assert engine_steps([2, 9, 9, 0, 1, 9, 3]) == [2, 0, 1, 3]
