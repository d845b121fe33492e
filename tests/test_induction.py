"""Layers that copy, wired by hand."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qm_spec.training.induction import CODE, HISTORY, plant_induction, protect_induction
from qm_spec.training.optimizer import Muon

VOCAB, DEPTH = 512, 2


@pytest.fixture(scope="module")
def old() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=192,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        # As in a trained model, the layers write much more than the embedding holds.
        model.get_input_embeddings().weight.mul_(10)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(1000)
    return model


@pytest.fixture(scope="module")
def planted(old: LlamaForCausalLM) -> LlamaForCausalLM:
    return plant_induction(old, torch.randint(VOCAB, (1, 64)), keep_layers=[0, 1, 3], depth=DEPTH, seed=1)


@torch.no_grad()
@pytest.mark.parametrize("distance", [64, 500, 3000])
def test_copies_what_followed_the_last_time(planted: LlamaForCausalLM, distance: int) -> None:
    generator = torch.Generator().manual_seed(distance)
    text = torch.randint(VOCAB, (distance,), generator=generator)
    again = text[:48]
    stream = planted(torch.cat([text, again])[None], output_hidden_states=True).hidden_states[DEPTH + 2][0]
    code = slice(192, 192 + CODE)
    guesses = (stream[:, code] @ planted.get_input_embeddings().weight[:, code].T).argmax(-1)
    # Four tokens of the passage tell where it goes on.
    assert (guesses[distance + 3 : -1] == again[4:]).float().mean() > 0.9
    assert (guesses[3 : distance - 1] == text[4:]).float().mean() < 0.1


@torch.no_grad()
def test_the_old_layers_compute_what_they_did(old: LlamaForCausalLM, planted: LlamaForCausalLM) -> None:
    input_ids = torch.randint(VOCAB, (1, 32))
    states = planted(input_ids, output_hidden_states=True).hidden_states
    # The rotary base differs, which these random layers hardly feel; the new channels are next to nothing.
    expected = old(input_ids, output_hidden_states=True).hidden_states
    for ours, theirs in zip(states[1 : DEPTH + 1], expected[1 : DEPTH + 1], strict=True):
        error = (ours[..., :192] - theirs).norm() / theirs.norm()
        assert error < 0.1


def test_the_output_layer_reads_the_copied_code_alone(planted: LlamaForCausalLM) -> None:
    extra = planted.model.norm.weight[192:]
    assert (extra[:CODE] > 0).all() and (extra[CODE:] == 0).all()


def test_other_shapes_are_refused(old: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"depth must be in 1\.\.2, got 3"):
        plant_induction(old, torch.zeros(1, 4, dtype=torch.long), keep_layers=[0, 1], depth=3)
    config = LlamaConfig(
        vocab_size=8, hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=32
    )
    with pytest.raises(ValueError, match="one key/value head and a head size of 64"):
        plant_induction(LlamaForCausalLM(config), torch.zeros(1, 4, dtype=torch.long), keep_layers=[0], depth=1)


def test_training_keeps_the_wiring(planted: LlamaForCausalLM) -> None:
    model = copy.deepcopy(planted).train()
    protect_induction(model)
    optimizer = Muon(model.named_parameters(), lr=0.1, adam_lr=0.1)
    input_ids = torch.randint(VOCAB, (2, 32))
    model(input_ids, labels=input_ids).loss.backward()
    optimizer.step()
    reserved = slice(192, 192 + CODE + 1 + HISTORY)
    for name, before in planted.named_parameters():
        after = model.get_parameter(name)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert torch.equal(after[reserved], before[reserved]), name
        if name.startswith(f"model.layers.{DEPTH}.self_attn") or name.startswith(f"model.layers.{DEPTH + 1}.self_attn"):
            assert torch.equal(after, before), name
    table, before = model.get_input_embeddings().weight, planted.get_input_embeddings().weight
    assert torch.equal(table[:, reserved], before[:, reserved])
    assert not torch.equal(table[:, :192], before[:, :192])
