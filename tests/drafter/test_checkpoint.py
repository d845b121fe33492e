"""A drafter folder: written, read back, and refused when it is not whole."""

import json

import pytest
import torch

from qm_spec.config import ARCHITECTURE, MergeConfig
from qm_spec.drafter.prior import QuickMergePrior
from qm_spec.drafter.prior_config import QuickMergeConfig

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_keeps_every_weight_and_setting(tmp_path, dtype):
    merge = MergeConfig(window=48, schedule=(4, 1), saliency="inverse_entropy")
    config = QuickMergeConfig(
        **SIZES, target_fingerprint="0123456789abcdef", num_speculative_tokens=3, quickmerge=merge.to_dict()
    )
    prior = QuickMergePrior(config).to(dtype)
    prior.save_pretrained(tmp_path)
    again = QuickMergePrior.from_pretrained(tmp_path, dtype=dtype)
    assert again.config.merge == merge
    assert again.config.num_speculative_tokens == 3
    assert again.config.target_fingerprint == "0123456789abcdef"
    expected = prior.state_dict()
    assert expected.keys() == again.state_dict().keys()
    for name, weight in again.state_dict().items():
        assert weight.dtype == dtype and torch.equal(weight, expected[name]), name


def test_the_folder_is_what_vllm_looks_for(tmp_path):
    QuickMergePrior(QuickMergeConfig(**SIZES)).save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["architectures"] == [ARCHITECTURE]
    assert stored["model_type"] == "llama"
    assert stored["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    # Below the target's length vLLM would stop drafting for the whole batch.
    assert stored["max_position_embeddings"] == 1 << 20
    assert stored["rope_parameters"]["rope_type"] == "default"


def test_a_config_with_unknown_merge_settings_is_refused(tmp_path):
    QuickMergePrior(QuickMergeConfig(**SIZES)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text())
    stored["quickmerge"]["windw"] = 1
    file.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="windw"):
        QuickMergePrior.from_pretrained(tmp_path)


@pytest.mark.parametrize("depth", [0, 112])
def test_a_depth_outside_the_window_is_refused(depth):
    with pytest.raises(ValueError, match=r"1\.\.111"):
        QuickMergeConfig(**SIZES, num_speculative_tokens=depth)


def test_the_untrained_prior_passes_the_fused_state_through():
    torch.manual_seed(0)
    layer = QuickMergePrior(QuickMergeConfig(**SIZES)).layer
    state, embedding = torch.randn(2, 3, 32)
    query, residual = layer.query(embedding, state)
    _, new_state = layer.finish(torch.randn(query.shape), residual)
    assert torch.equal(new_state, state)
