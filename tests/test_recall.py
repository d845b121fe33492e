"""Recall: which places a row should look at, which entries hold them, and the loss."""

import math

import pytest
import torch

from qm_spec.config import MergeConfig
from qm_spec.drafter.config import QuickMergeConfig
from qm_spec.drafter.memory import Memory, merge_levels
from qm_spec.drafter.prior import QuickMergePrior
from qm_spec.drafter.recall import earlier_places, recall_loss

MERGE = MergeConfig(window=24, group_size=8, schedule=(4, 2, 1), doublings=4)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 16,
    "next_token_values": True,
    "quickmerge": MERGE.to_dict(),
}


def test_places_are_those_of_the_same_two_tokens_followed_by_the_same():
    torch.manual_seed(0)
    text = torch.randint(3, (2, 40))
    rows = torch.tensor([[5, 20, 36], [1, 30, 35]])
    for step in range(3):
        found = earlier_places(text, rows, rows + 1 + step)
        for batch, places in enumerate(found.tolist()):
            tokens = text[batch].tolist()
            for row, mine in zip(rows[batch].tolist(), places, strict=True):
                newest = row + 1 + step
                wanted = tokens[newest - 1 : newest + 2]
                expected = [0 < j <= row and len(wanted) == 3 and tokens[j - 1 : j + 2] == wanted for j in range(40)]
                assert mine == expected
    assert found.any()


@pytest.mark.parametrize("schedule", [(4, 2, 1), (3,), (0,)])
def test_entries_hold_the_tokens_that_were_merged_into_them(schedule):
    torch.manual_seed(0)
    merge = MergeConfig(window=24, group_size=8, schedule=schedule, doublings=4)
    length = 700
    # Values that name their tokens: a merged one has a share of each.
    keys, values = torch.randn(1, 2, length, 8), torch.eye(length).expand(1, 2, length, length)
    levels = merge_levels(keys, values, merge)
    memory = Memory.build(keys, values, levels, merge)
    rows = torch.tensor([[30, 199, 431, 690]])
    wanted = (torch.rand(1, 4, length) < 0.03) & (torch.arange(length) <= rows.unsqueeze(-1))
    visible = memory.bias(rows, torch.zeros(2), torch.zeros(2))[:, 0].isfinite()
    for head in range(2):
        expected = ((memory.entries.values[:, head].unsqueeze(1) > 0) & wanted.unsqueeze(2)).any(-1) & visible
        assert torch.equal(memory.holding(levels, head, rows, wanted), expected)
        assert expected.any()


def make_rows(token_ids, positions, aux_layers=(1, 2, 3), **sizes):
    torch.manual_seed(1)
    layers = list(aux_layers)
    config = QuickMergeConfig(eagle_aux_hidden_state_layer_ids=layers, norm_aux_states=True, **{**SIZES, **sizes})
    prior = QuickMergePrior(config)
    embeddings = torch.nn.functional.one_hot(token_ids, 32).float()
    # The first of the three states is the embedding; the others say nothing.
    aux = torch.cat([embeddings, torch.randn(*token_ids.shape, 64)], -1)
    sequences = prior.read(aux, embeddings)
    drafts = sequences.rows(positions)
    index = (positions + 1).unsqueeze(-1).expand(-1, -1, 32)
    output = drafts.step(embeddings.gather(1, index))
    return prior, sequences, drafts, output


def test_the_loss_is_the_share_of_attention_that_misses():
    torch.manual_seed(3)
    token_ids = torch.randint(3, (1, 60))
    # Inside the window every entry is a token.
    positions = torch.tensor([[3, 15, 21]])
    prior, sequences, drafts, _ = make_rows(token_ids, positions)
    layer, nats = prior.layer, []
    for row, position in enumerate(positions[0].tolist()):
        places = earlier_places(token_ids, positions, positions + 1)[0, row]
        if not places.any():
            continue
        for head in range(4 - layer.num_global_heads, 4):
            scores = drafts.query[0, row, head] @ sequences.memory.entries.keys[0, 1, : position + 1].T / math.sqrt(8)
            age = position - torch.arange(position + 1)
            shares = (scores - layer.slopes[head] * age).softmax(-1)
            nats.append(-shares[places[: position + 1]].sum().log())
    assert nats and layer.num_global_heads == 1
    expected = torch.stack(nats).mean() * math.sqrt(len(nats) / 3)
    loss = recall_loss(sequences, drafts, token_ids)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert layer.q_proj.weight.grad[-8:].abs().sum() > 0 and layer.k_proj.weight.grad[-8:].abs().sum() > 0
    assert layer.q_proj.weight.grad[:-8].abs().sum() == 0, "other heads are left alone"


def test_text_without_repetition_has_no_recall_loss():
    token_ids = torch.arange(16).unsqueeze(0)
    _, sequences, drafts, _ = make_rows(token_ids, torch.tensor([[9]]))
    assert recall_loss(sequences, drafts, token_ids) == 0


def test_a_new_prior_that_reads_the_embedding_copies_what_followed():
    token_ids = torch.arange(16).unsqueeze(0).clone()
    token_ids[0, 15] = 5
    positions = torch.tensor([[14]])
    found = {}
    for layers in ((0, 2, 3), (1, 2, 3)):
        prior, sequences, drafts, _ = make_rows(token_ids, positions, layers, head_dim=64)
        keys = sequences.memory.entries.keys[0, 1, :15]
        place = int((drafts.query[0, 0, -1] @ keys.T).argmax())
        # What the last head writes for the value found there is most like the embedding of the token behind it.
        copied = prior.layer.o_proj.weight[:, -64:] @ sequences.values[0, 1, place]
        found[layers] = place, int(copied[:16].argmax())
    assert found[0, 2, 3] == (5, 6)
    assert found[1, 2, 3] != (5, 6), "without the embedding nothing is wired"
