"""EAGLE-3's rows are a plain causal layer's, its checkpoint is vLLM's format, its size is the prior's."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from qm_spec.config import MergeConfig
from qm_spec.drafter.checkpoint import load_drafter
from qm_spec.drafter.eagle3 import Eagle3Config, Eagle3Drafter
from qm_spec.drafter.prior import QuickMergePrior
from qm_spec.training.drafter import drafter_config, eagle3_config, new_drafter, num_parameters

VOCAB, HIDDEN, HEADS, GROUPS, HEAD, STEPS, LENGTH = 16, 32, 4, 2, 8, 3, 40
WINDOWS = [(None, 0), (9, 0), (9, 2)]


def make_config(sliding_window=None, attention_sinks=0, **kwargs):
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": HEAD,
        "vocab_size": VOCAB,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
        "num_speculative_tokens": STEPS,
    }
    return Eagle3Config(sliding_window=sliding_window, attention_sinks=attention_sinks, **{**sizes, **kwargs})


def make_drafter(*window):
    torch.manual_seed(1)
    drafter = Eagle3Drafter(make_config(*window)).eval()
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return drafter


def causal_layer(drafter, embeddings, states):
    """Return the head's input and the state at the last of M tokens, written as a decoder layer is.

    Args:
        drafter: its weights and window.
        embeddings: `[M, D]`, of each position's next token.
        states: `[M, D]`, fused ones and then the drafter's own.
    """
    layer, attn, config = drafter.midlayer, drafter.midlayer.self_attn, drafter.config
    x = torch.cat([layer.input_layernorm(embeddings), layer.hidden_norm(states)], -1)
    q, k, v = ((p(x).view(1, len(x), -1, HEAD).transpose(1, 2)) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
    place = torch.arange(len(x))
    q, k = apply_rotary_pos_emb(q, k, *LlamaRotaryEmbedding(config)(x[None], place[None]))
    mask = place[None] <= place[:, None]
    if config.sliding_window is not None:
        # vLLM's window holds the row's own token.
        mask &= (place[:, None] - place[None] < config.sliding_window) | (place[None] < config.attention_sinks)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    state = states + attn.o_proj(attended[0].transpose(0, 1).flatten(1))
    h = layer.post_attention_layernorm(state)
    state = state + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h))
    return drafter.norm(state)[-1], state[-1]


@pytest.mark.parametrize("window", WINDOWS)
@torch.no_grad()
def test_rows_are_those_of_a_causal_layer(window):
    """It fails for a wrong position, a key of the wrong token, a window off by one or a missing provisional key."""
    drafter = make_drafter(*window)
    aux, embeddings = torch.randn(2, LENGTH, 3 * HIDDEN), torch.randn(2, LENGTH, HIDDEN)
    rows = torch.tensor([[0, 1, 7, 8, 20, LENGTH - STEPS - 1], [3, 9, 10, 11, 30, 31]])
    drafts = drafter.read(aux, embeddings).anchors(rows)
    outputs = [
        drafts.step(embeddings.gather(1, (rows + 1 + step).unsqueeze(-1).expand(-1, -1, HIDDEN)))
        for step in range(STEPS)
    ]
    fused = drafter.fc(aux)
    for sequence in range(2):
        for column, row in enumerate(rows[sequence].tolist()):
            states = fused[sequence, : row + 1]
            for step in range(STEPS):
                expected, state = causal_layer(drafter, embeddings[sequence, 1 : row + 2 + step], states)
                states = torch.cat([states, state[None]])
                torch.testing.assert_close(outputs[step][sequence, column], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_window_and_sinks_matter():
    aux, embeddings = torch.randn(1, LENGTH, 3 * HIDDEN), torch.randn(1, LENGTH, HIDDEN)
    rows = torch.tensor([[8, 30]])
    full, window, sinks = (
        make_drafter(*settings).read(aux, embeddings).anchors(rows).step(embeddings[:, rows[0] + 1])
        for settings in WINDOWS
    )
    assert torch.equal(full[0, 0], window[0, 0]) and torch.equal(full[0, 0], sinks[0, 0]), "9 tokens fill the window"
    for a, b in ((full, window), (full, sinks), (window, sinks)):
        assert not torch.allclose(a[0, 1], b[0, 1], atol=1e-3)


def tiny_target(**sizes):
    config = LlamaConfig(
        vocab_size=300, intermediate_size=128, rope_parameters={"rope_theta": 5e4, "rope_type": "default"}, **sizes
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


SIZES = [
    {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4},
    {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64, "num_hidden_layers": 20},
    {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 8},
]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("intermediate_size", [None, 96, 1111])
def test_parameters_are_the_priors_within_two_percent(sizes, intermediate_size):
    target = tiny_target(**sizes)
    prior = drafter_config(target, "f" * 16, MergeConfig(), 4, intermediate_size)
    eagle3 = eagle3_config(target, prior)
    ours, theirs = num_parameters(QuickMergePrior, prior), num_parameters(Eagle3Drafter, eagle3)
    assert abs(theirs - ours) <= 0.02 * ours, f"{theirs} against {ours}"
    # Bytes per key and value, and what is read of the target, are equal too.
    for name in ("num_key_value_heads", "head_dim", "eagle_aux_hidden_state_layer_ids", "num_attention_heads"):
        assert getattr(eagle3, name) == getattr(prior, name)
    assert eagle3.rope_parameters["rope_theta"] == 5e4


def test_the_window_holds_as_many_entries_as_the_prior_attends_to():
    target = tiny_target(**SIZES[0])
    prior = drafter_config(target, "f" * 16, MergeConfig(), 4)
    config = new_drafter("eagle3-window", target, prior, 8192).config
    assert config.sliding_window + config.attention_sinks == prior.merge.entries_attended(8192) == 432
    assert new_drafter("eagle3", target, prior, 8192).config.sliding_window is None
    with pytest.raises(ValueError, match=r"one of \('quickmerge', 'eagle3', 'eagle3-window'\), got 'eagle2'"):
        new_drafter("eagle2", target, prior, 8192)


@pytest.mark.parametrize("window", WINDOWS)
def test_the_checkpoint_is_vllms_format_and_loads_again(window, tmp_path):
    drafter = make_drafter(*window).to(torch.bfloat16)
    drafter.save_pretrained(tmp_path)
    projections = {f"self_attn.{name}_proj" for name in "qkvo"} | {
        f"mlp.{name}_proj" for name in ("gate", "up", "down")
    }
    norms = {"input_layernorm", "hidden_norm", "post_attention_layernorm"}
    expected = {f"midlayer.{name}.weight" for name in projections | norms} | {"fc.weight", "norm.weight"}
    # No embedding, no head, no d2t: vLLM takes the target's.
    assert set(load_file(tmp_path / "model.safetensors")) == expected
    config = json.loads((tmp_path / "config.json").read_text())
    # vLLM would leave sinks out without a word; under a name it does not know it refuses.
    assert config["architectures"] == ["LlamaForCausalLMEagle3" + "WithSinks" * bool(window[1])]
    assert config["draft_vocab_size"] == config["vocab_size"] == VOCAB
    assert config.get("layer_types") == (["sliding_attention"] if window[0] else None)
    loaded = load_drafter(tmp_path)
    assert isinstance(loaded, Eagle3Drafter)
    assert (loaded.config.sliding_window, loaded.config.attention_sinks) == window
    for name, weight in drafter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.float())


def test_normed_states_have_one_size(tmp_path):
    drafter = Eagle3Drafter(make_config(fc_norm=True))
    states = torch.randn(1, 5, 3 * HIDDEN)
    large = states.unflatten(-1, (3, HIDDEN)) * torch.tensor([0.3, 1.0, 100.0])[:, None]
    torch.testing.assert_close(drafter.fuse(large.flatten(-2)), drafter.fuse(states), rtol=1e-3, atol=1e-3)
    drafter.save_pretrained(tmp_path)
    assert {f"fc_norm.{number}.weight" for number in range(3)} <= set(load_file(tmp_path / "model.safetensors"))


def test_other_architectures_are_not_loaded(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ValueError, match=r"Eagle3QuickMergeForCausalLM.*got LlamaForCausalLM"):
        load_drafter(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sliding_window": 2}, "must hold the 3 drafted tokens, got 2"),
        ({"attention_sinks": 4}, "belong to a sliding_window"),
        ({"sliding_window": 8, "attention_sinks": -1}, "at least 0"),
        ({"num_speculative_tokens": 0}, "at least 1, got 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_config(**settings)
