"""A new prior: its global heads find where the newest token stood before, and copy what followed it."""

import pytest
import torch
from torch.nn import functional as F

from qm_spec.drafter.prior import QuickMergePrior
from qm_spec.drafter.prior_config import QuickMergeConfig

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 16,
    "norm_aux_states": True,
    "next_token_values": True,
}


def copied_after_the_newest_token(layers):
    """Return where the last head looks for token 5, and which token it writes, after text that holds 0, 1, 2..."""
    torch.manual_seed(1)
    layer = QuickMergePrior(QuickMergeConfig(eagle_aux_hidden_state_layer_ids=layers, **SIZES)).layer
    embeddings = F.one_hot(torch.arange(16), 32).float()
    # The first of the three states is the embedding; the others say nothing.
    states = layer.fuse(torch.cat([embeddings, torch.randn(16, 64)], -1))[:15]
    keys, values = layer.keys_values(states, embeddings[1:])
    query, _ = layer.query(embeddings[5], states[-1])
    place = int((keys[:, -1] @ query[-1]).argmax())
    written = layer.o_proj.weight[:, -64:] @ values[place, -1]
    return place, int(written[:16].argmax())


@torch.no_grad()
def test_a_new_prior_that_reads_the_embedding_copies_what_followed():
    assert copied_after_the_newest_token([0, 2, 3]) == (5, 6)


@torch.no_grad()
@pytest.mark.parametrize("change", [{"next_token_values": False}, {"norm_aux_states": False}, {}])
def test_nothing_is_wired_where_it_could_not_work(change):
    layers = [0, 2, 3] if change else [1, 2, 3]
    layer = QuickMergePrior(QuickMergeConfig(eagle_aux_hidden_state_layer_ids=layers, **{**SIZES, **change})).layer
    assert not layer.o_proj.weight.any(), "it begins as the identity on the fused state"
