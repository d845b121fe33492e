"""The pipelines: what they save, what they keep, and that a model's output says so."""

import json
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from qm_spec import create_diffusion_pipeline, create_llm_pipeline, create_multimodal_pipeline
from qm_spec.compression.kv_merging import KeyValueEntries, KeyValueMerger
from qm_spec.compression.rotary import Rotary
from qm_spec.compression.token_compressor import TokenCompressor
from qm_spec.quickmerge.merging import unmerge

needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
needs_diffusers = pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def nbytes(*tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


# The package


def test_importing_and_running_the_pipelines_needs_torch_alone():
    code = (
        "import sys, torch\n"
        "from qm_spec import create_multimodal_pipeline, create_diffusion_pipeline, create_llm_pipeline\n"
        "create_multimodal_pipeline(8, 8, 8, 4)(torch.randn(1, 9, 8), torch.randn(1, 9, 8))\n"
        "create_diffusion_pipeline(8, 8, 4).compress_text_embeddings(torch.randn(1, 9, 8))\n"
        "create_llm_pipeline(8, 4).compress_kv_cache(torch.randn(1, 9, 2, 4), torch.randn(1, 9, 2, 4))\n"
        "assert not {'transformers', 'diffusers', 'vllm'} & set(sys.modules), 'heavy import'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pipelines_without_learned_parts_hold_no_memory():
    # The reference's pipeline allocates 9.8 GB at model_dim 4096 and uses none of it.
    assert nbytes(*create_llm_pipeline(4096, 128).parameters()) == 0
    assert nbytes(*create_diffusion_pipeline().parameters()) == 0
    assert nbytes(*create_multimodal_pipeline().parameters()) < 5e6


# Multimodal


def test_fused_output_has_k_max_tokens_and_the_report_is_measured():
    vision, text = torch.randn(2, 196, 768), torch.randn(2, 77, 512)
    fused, info = create_multimodal_pipeline()(vision, text)
    assert fused.shape == (2, 64, 256)
    assert (info["input_tokens"], info["output_tokens"]) == (273, 64)
    assert info["ratio"] == 273 / 64
    assert info["bytes_before"] == nbytes(vision, text)
    assert info["bytes_after"] == nbytes(fused)
    assert info["sizes"].sum(1).tolist() == [273, 273]
    assert all(set(row.tolist()) == set(range(64)) for row in info["assignments"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k_max", "num_vision", "num_text"), [(1, 5, 3), (64, 5, 3), (6, 5, 1), (3, 1, 9)])
def test_fusion_at_all_sizes_and_dimensions_not_divisible_by_eight(k_max, num_vision, num_text, dtype):
    pipeline = create_multimodal_pipeline(vision_dim=13, text_dim=7, compressed_dim=15, k_max=k_max)
    fused, info = pipeline(torch.randn(2, num_vision, 13, dtype=dtype), torch.randn(2, num_text, 7, dtype=dtype))
    assert fused.shape == (2, min(k_max, num_vision + num_text), 15) and fused.dtype == dtype
    assert torch.isfinite(fused).all() and fused.abs().sum(-1).min() > 0
    assert info["output_tokens"] == fused.shape[1]


def test_fusing_merged_copies_equals_fusing_the_copies():
    # Merged tokens weigh like all they hold, so a merge of equal tokens changes nothing.
    vision = torch.cat([torch.randn(2, 1, 12), torch.randn(2, 1, 12).expand(-1, 20, -1)], 1)
    text = torch.randn(2, 1, 10).expand(-1, 9, -1)
    pipeline = create_multimodal_pipeline(12, 10, 16, k_max=3)
    fused, info = pipeline(vision, text)
    assert info["sizes"].tolist() == [[1, 20, 9]] * 2
    pipeline.k_max = 30
    whole, _ = pipeline(vision, text)
    torch.testing.assert_close(unmerge(fused, info["assignments"]), whole, atol=1e-5, rtol=0)


def test_fusion_ignores_padding_and_does_each_sequence_alone():
    pipeline = create_multimodal_pipeline(12, 10, 16, k_max=6)
    vision, text = torch.randn(2, 9, 12), torch.randn(2, 8, 10)
    vision_mask, text_mask = torch.ones(2, 9, dtype=torch.bool), torch.ones(2, 8, dtype=torch.bool)
    vision_mask[1, 4:], text_mask[1, :5] = False, False
    vision[~vision_mask] = float("nan")
    text[~text_mask] = float("nan")
    fused, info = pipeline(vision, text, vision_mask, text_mask)
    torch.testing.assert_close(fused[:1], pipeline(vision[:1], text[:1])[0])
    torch.testing.assert_close(fused[1:], pipeline(vision[1:, :4], text[1:, 5:])[0])
    # Padding earns nothing: 17 and 7 tokens became 6 and 6.
    assert info["ratio"] == (17 + 7) / (6 + 6)


def test_fusion_trains_its_projections():
    with torch.enable_grad():
        pipeline = create_multimodal_pipeline(12, 10, 16, k_max=6)
        pipeline(torch.randn(2, 9, 12), torch.randn(2, 8, 10))[0].square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in pipeline.parameters())


# Diffusion


def test_text_embeddings_are_compressed_and_the_report_is_measured():
    text = torch.randn(2, 77, 512, dtype=torch.bfloat16)
    compressed, info = create_diffusion_pipeline().compress_text_embeddings(text)
    assert compressed.shape == (2, 32, 512) and compressed.dtype == torch.bfloat16
    assert (info["input_tokens"], info["output_tokens"], info["ratio"]) == (77, 32, 77 / 32)
    assert (info["bytes_before"], info["bytes_after"]) == (nbytes(text), nbytes(compressed))


@pytest.mark.parametrize("keep", [1, 5, 12, 99])
@pytest.mark.parametrize("shape", [(2, 9, 3, 4), (2, 12, 9)])
def test_unet_features_get_their_shape_again(shape, keep):
    features = torch.randn(shape)
    pipeline = create_diffusion_pipeline(unet_dim=9, text_dim=4, k_max=2)
    tokens, info = pipeline.compress_unet_features(features, keep)
    assert tokens.shape == (2, min(keep, 12), 9)
    restored = pipeline.restore_unet_features(tokens, info)
    assert restored.shape == features.shape
    if keep >= 12:
        assert torch.equal(restored, features)
    # A block may change the channels.
    assert pipeline.restore_unet_features(tokens[..., :5], info).numel() == 2 * 12 * 5


def test_unet_features_of_flat_regions_are_restored_exactly():
    # Four regions of one value each fit into eight tokens.
    regions = torch.randn(1, 9, 2, 2)
    features = regions.repeat_interleave(4, 2).repeat_interleave(4, 3)
    pipeline = create_diffusion_pipeline(9, 4)
    tokens, info = pipeline.compress_unet_features(features, 8)
    torch.testing.assert_close(pipeline.restore_unet_features(tokens, info), features, atol=1e-6, rtol=0)


def test_duplicates_give_no_zeros():
    # The reference turns duplicate tokens into zeros.
    x = torch.ones(1, 40, 8)
    compressed, info = create_diffusion_pipeline(8, 8, k_max=16).compress_text_embeddings(x)
    torch.testing.assert_close(compressed, torch.ones(1, 16, 8))
    assert info["sizes"].sum() == 40


# Language models: keys and values


def test_keys_and_values_share_one_assignment():
    key, value = torch.randn(2, 50, 3, 16), torch.randn(2, 50, 3, 12)
    llm = create_llm_pipeline(64, k_max=8)
    new_key, new_value = llm.compress_kv_cache(key, value)
    assert new_key.shape == (2, 8, 3, 16) and new_value.shape == (2, 8, 3, 12)
    merged = llm.merge_kv_cache(key, value)
    # Keys that carry their value inside go through one merge together, so both halves must agree.
    inside = torch.cat([key, key], -1)
    both = llm.merge_kv_cache(inside, inside)
    assert torch.equal(both.key, both.value)
    # Values are means of the tokens of each cluster, of every head by itself.
    for b, h in ((0, 0), (1, 2)):
        for slot in range(8):
            members = merged.cluster[b, :, h] == slot
            inside = value[b, members, h]
            low, high = inside.amin(0) - 1e-5, inside.amax(0) + 1e-5
            assert ((merged.value[b, slot, h] >= low) & (merged.value[b, slot, h] <= high)).all()
            assert merged.size[b, slot, h] == members.sum()
            assert members[merged.place[b, slot, h]]
    assert not torch.equal(merged.cluster[0, :, 0], merged.cluster[0, :, 1]), "heads merge by their own keys"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("k_max", "num_tokens"), [(1, 9), (9, 9), (50, 9), (4, 1)])
def test_kv_cache_at_all_sizes(k_max, num_tokens, dtype):
    key, value = (
        torch.randn(2, 2, num_tokens, 5, dtype=dtype).transpose(1, 2),
        torch.randn(2, num_tokens, 2, 5).to(dtype),
    )
    merged = create_llm_pipeline(8, k_max).merge_kv_cache(key, value)
    assert merged.key.shape == (2, min(k_max, num_tokens), 2, 5) and merged.key.dtype == dtype
    assert torch.isfinite(merged.key).all() and torch.isfinite(merged.value).all()
    if k_max >= num_tokens:
        assert torch.equal(merged.key, key) and torch.equal(merged.value, value)
    assert merged.info["bytes_before"] == nbytes(key, value)
    assert merged.info["bytes_after"] == nbytes(merged.key, merged.value)


def test_kv_cache_of_padded_sequences_is_that_of_each_alone():
    key, value = torch.randn(3, 30, 2, 6), torch.randn(3, 30, 2, 6)
    mask = torch.ones(3, 30, dtype=torch.bool)
    mask[1, :11], mask[2, 4:] = False, False
    key[~mask], value[~mask] = float("nan"), float("nan")
    llm = create_llm_pipeline(8, k_max=7)
    merged = llm.merge_kv_cache(key, value, mask)
    assert merged.mask.sum(1).tolist() == [7, 7, 4]
    assert merged.size.sum(1).tolist() == [[30, 30], [19, 19], [4, 4]]
    for b in range(3):
        alone = llm.merge_kv_cache(key[b : b + 1, mask[b]], value[b : b + 1, mask[b]])
        live = merged.mask[b]
        torch.testing.assert_close(merged.key[b, live], alone.key[0])
        torch.testing.assert_close(merged.value[b, live], alone.value[0])
        assert not merged.key[b, ~live].any()


def test_attention_to_merged_copies_weighed_by_size_equals_attention_to_the_copies():
    # One token once, then another 41 times, by norms of which the first is the more salient.
    key, value = (
        torch.cat([3 * torch.ones(2, 1, 2, 8), torch.randn(2, 1, 2, 8).expand(-1, 41, -1, -1)], 1) for _ in "kv"
    )
    query = torch.randn(2, 2, 3, 8)
    merged = create_llm_pipeline(8, k_max=2).merge_kv_cache(key, value)
    assert merged.size[0, :, 0].tolist() == [1, 41]

    def attend(key, value, bias=None):
        return F.scaled_dot_product_attention(query, key.transpose(1, 2), value.transpose(1, 2), attn_mask=bias)

    weighed = attend(merged.key, merged.value, merged.log_size.expand(-1, -1, 3, -1))
    torch.testing.assert_close(weighed, attend(key, value), atol=1e-5, rtol=0)
    assert (attend(merged.key, merged.value) - attend(key, value)).abs().max() > 0.01


def test_hidden_states_are_merged_causally():
    states = torch.randn(2, 40, 16)
    merged, info = create_llm_pipeline(16, k_max=9).compress_hidden_states(states)
    assert merged.shape == (2, 9, 16) and info["ratio"] == 40 / 9
    place = info["places"].gather(1, info["assignments"])
    assert (place >= torch.arange(40)).all()


# Rotary


def rotary(dim=8):
    return Rotary(1.0 / 100 ** (torch.arange(0, dim, 2) / dim))


def test_rotary_turns_pairs_of_halves_and_back():
    x, position = torch.randn(3, 5, 8), torch.randint(0, 1000, (3, 5))
    turned = rotary().rotate(x, position)
    pairs = torch.complex(x[..., :4].double(), x[..., 4:].double())
    exact = pairs * torch.polar(torch.ones(()).double(), position[..., None] * rotary().inverse_frequencies.double())
    torch.testing.assert_close(turned, torch.cat([exact.real, exact.imag], -1).float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(rotary().rotate(turned, -position), x, atol=1e-5, rtol=0)


def test_merging_rotated_keys_is_rotating_merged_keys():
    # The exact algebra: keys of tokens at positions p_j merge to R(p_s) sum_j w_j k_j, s the salient one.
    content, value, position = torch.randn(2, 20, 8), torch.randn(2, 20, 8), torch.arange(20).expand(2, 20)
    ones = torch.ones(2, 20)

    def merge(keys, rotary):
        entries = KeyValueEntries(keys, value, 0 * ones, ones, position)
        return KeyValueMerger(rotary=rotary)(entries, ones.bool(), torch.tensor([5, 5]))

    plain, plain_cluster = merge(content, None)
    turned, turned_cluster = merge(rotary().rotate(content, position), rotary())
    assert torch.equal(plain_cluster, turned_cluster)
    torch.testing.assert_close(turned.keys, rotary().rotate(plain.keys, plain.position), atol=1e-5, rtol=0)
    torch.testing.assert_close(turned.values, plain.values)


def test_equal_keys_at_different_positions_do_not_blur():
    # Averaged as they are, keys turned by different angles cancel each other.
    content = torch.ones(1, 30, 8)
    position = torch.arange(30)[None]
    keys = rotary().rotate(content, position)
    entries = KeyValueEntries(keys, keys, torch.zeros(1, 30), torch.ones(1, 30), position)
    norms = []
    for one in (rotary(), None):
        merged, _ = KeyValueMerger(rotary=one)(entries, torch.ones(1, 30).bool(), torch.tensor([2]))
        norms.append(merged.keys.norm(dim=-1).min().item())
    assert norms[0] == pytest.approx(8**0.5, rel=1e-5)
    assert norms[1] < 0.8 * norms[0]


def test_entries_that_nothing_joins_stay_bit_by_bit():
    keys, position = torch.randn(1, 12, 8), torch.arange(12)[None]
    mergeable = torch.zeros(1, 12, dtype=torch.bool)
    mergeable[:, 2:9] = True
    entries = KeyValueEntries(keys, keys, torch.zeros(1, 12), torch.ones(1, 12), position)
    merged, cluster = KeyValueMerger(rotary=rotary())(entries, mergeable, torch.tensor([3]))
    assert merged.keys.shape[1] == 2 + 3 + 3
    assert torch.equal(merged.keys[:, :2], keys[:, :2]) and torch.equal(merged.keys[:, 5:], keys[:, 9:])
    assert cluster[0, :2].tolist() == [0, 1] and cluster[0, 9:].tolist() == [5, 6, 7]
    alone = merged.size[0] == 1
    assert torch.equal(merged.values[0, alone], keys[0, merged.position[0, alone]])


def test_repeated_merging_keeps_mass_and_sizes():
    entries = KeyValueEntries(
        torch.randn(2, 30, 8),
        torch.randn(2, 30, 8),
        torch.zeros(2, 30),
        torch.ones(2, 30),
        torch.arange(30).expand(2, 30),
    )
    merger = KeyValueMerger(rotary=rotary())
    first, _ = merger(entries, torch.ones(2, 30).bool(), torch.tensor([10, 10]))
    second, cluster = merger(first, torch.ones(2, 10).bool(), torch.tensor([4, 4]))
    assert second.size.sum(1).tolist() == [30, 30]
    torch.testing.assert_close(second.mass.sum(1), first.mass.sum(1))
    # Weights are those of the tokens inside, so values are the same as if they were summed in one go.
    weights = torch.zeros(2, 4).scatter_add(1, cluster, first.mass)
    summed = torch.zeros(2, 4, 8).scatter_add(
        1, cluster[..., None].expand(-1, -1, 8), first.values * first.mass[..., None]
    )
    torch.testing.assert_close(second.values, summed / weights[..., None], atol=1e-5, rtol=0)


# Language models: the cache


def tiny(family="llama", **settings):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, set_seed

    set_seed(0)
    config = CONFIG_MAPPING[family](
        **{
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
            "initializer_range": 0.2,
            **settings,
        }
    )
    return AutoModelForCausalLM.from_config(config).eval()


def prompt(lengths=(40, 25)):
    ids = torch.randint(1, 97, (len(lengths), max(lengths)))
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def generate(model, inputs, **settings):
    return model.generate(**inputs, **{"max_new_tokens": 30, "do_sample": False, **settings})


FAMILIES = [
    ("llama", {}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("mistral", {"sliding_window": None}),
]


@needs_transformers
@pytest.mark.parametrize(("family", "settings"), FAMILIES)
def test_output_is_plain_generates_where_nothing_is_merged(family, settings):
    from qm_spec.compression.kv_cache import QuickMergeCache

    model, inputs = tiny(family, **settings), prompt()
    cache = QuickMergeCache(model, k_max=100, window=8, attention_mask=inputs["attention_mask"])
    assert torch.equal(generate(model, inputs, past_key_values=cache), generate(model, inputs))
    assert cache.num_entries == cache.get_seq_length() == 69


@needs_transformers
@pytest.mark.parametrize(("family", "settings"), FAMILIES)
@pytest.mark.parametrize("proportional", [False, True])
def test_left_padded_batch_is_each_sequence_alone(family, settings, proportional):
    from qm_spec.compression.kv_cache import PROPORTIONAL, QuickMergeCache

    # No token comes twice: of two copies of a key, rounding would decide which one is kept.
    model = tiny(family, **settings)
    if proportional:
        model.set_attn_implementation(PROPORTIONAL)
    lengths, ids = (40, 25, 7), torch.stack([1 + torch.randperm(96)[:62] for _ in range(3)])
    mask = torch.arange(62) >= 40 - torch.tensor(lengths)[:, None]
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    # Qwen3 normalises keys, so untrained ones have one norm, and rounding would rank them.
    merger = KeyValueMerger("inverse_entropy", rotary=Rotary.from_model(model))
    cut = {"k_max": 6, "window": 8, "sinks": 2, "proportional": proportional, "merger": merger}
    together = QuickMergeCache(model, attention_mask=mask[:, :40], **cut)
    alone = [QuickMergeCache(model, **cut) for _ in lengths]
    begin = 0
    # A prompt, single tokens, several at once.
    for end in (40, *range(41, 59), 62):
        step = {"attention_mask": mask[:, :end].long(), "position_ids": position[:, begin:end]}
        logits = model(ids[:, begin:end], past_key_values=together, **step).logits
        for row, length in enumerate(lengths):
            # Merging of a batch is done at the same steps, so the shortest row goes its own way in the end.
            if length > 7 or end <= 49:
                own = ids[row : row + 1, max(begin, 40 - length) : end]
                exact = model(own, past_key_values=alone[row]).logits[0]
                torch.testing.assert_close(logits[row, -len(exact) :], exact, atol=1e-4, rtol=1e-4)
        begin = end
    assert together.layers[0].size.sum(-1).tolist() == [[62, 62], [47, 47], [29, 29]]
    assert together.num_entries == 2 + 6 + 8


@needs_transformers
def test_cache_is_bounded_and_measured_on_its_tensors():
    from qm_spec.compression.kv_cache import QuickMergeCache

    model, inputs = tiny(), prompt((60,))
    cache = QuickMergeCache(model, k_max=10, window=8, sinks=2)
    model(**inputs, past_key_values=cache)
    assert cache.num_entries == 2 + 10 + 8
    assert cache.get_seq_length() == 60 and cache.get_mask_sizes(5, 0) == (25, 40)
    # 2 layers, 2 heads, 20 entries: keys and values of 8 floats, and mass, size, position.
    assert cache.nbytes == 2 * 2 * 20 * (2 * 8 * 4 + 12)
    layer = cache.layers[0]
    assert layer.size.sum(-1).tolist() == [[60, 60]]
    assert (layer.size[..., :2] == 1).all() and (layer.size[..., -8:] == 1).all()
    assert (layer.position.diff(dim=-1) > 0).all()
    for _ in range(50):
        model(torch.tensor([[5]]), past_key_values=cache)
        assert cache.num_entries < 2 + 10 + 8 + 16
    assert layer.size.sum(-1).tolist() == [[110, 110]]


@needs_transformers
def test_first_and_newest_tokens_are_untouched():
    from transformers import DynamicCache

    from qm_spec.compression.kv_cache import QuickMergeCache

    model, inputs = tiny(), prompt((60,))
    cache, plain = QuickMergeCache(model, k_max=10, window=8, sinks=2), DynamicCache()
    model(**inputs, past_key_values=cache)
    model(**inputs, past_key_values=plain)
    for layer, exact in zip(cache.layers, plain.layers, strict=True):
        for name in ("keys", "values"):
            ours, theirs = getattr(layer, name), getattr(exact, name)
            assert torch.equal(ours[:, :, :2], theirs[:, :, :2]) and torch.equal(ours[:, :, -8:], theirs[:, :, -8:])


@needs_transformers
def test_ratio_grows_with_the_text():
    from qm_spec.compression.kv_cache import QuickMergeCache

    model = tiny()
    cache = QuickMergeCache(model, ratio=0.25, window=8, sinks=0)
    model(**prompt((48,)), past_key_values=cache)
    assert cache.num_entries == 8 + 10
    model(torch.randint(1, 97, (1, 80)), past_key_values=cache)
    assert cache.num_entries == 8 + 30


@needs_transformers
def test_proportional_attention_sees_merged_copies_as_the_copies():
    from types import SimpleNamespace

    from qm_spec.compression.kv_cache import QuickMergeLayer, _proportional_attention

    # Not rotated and of one norm, so that the first four, which differ, are salient and the copies join them.
    settings = {"ratio": None, "window": 1, "sinks": 0, "prompt_size": None, "prompt_position": None}
    layer = QuickMergeLayer(KeyValueMerger(), k_max=4, proportional=True, **settings)
    keys = torch.eye(8)[[0, 1, 2, 3, 0, 0, 1, 0, 3, 0, 0, 0, 2]].expand(1, 2, -1, -1)
    values, query, new = 3 * keys, torch.randn(1, 4, 1, 8), torch.randn(1, 2, 1, 8)
    layer.update(keys, values)
    key, value = layer.update(new, new)
    assert layer.size[0, 0].tolist() == [7, 2, 1, 2, 1, 1]
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)

    def attend(key, value):
        return _proportional_attention(module, query, key, value, None, scaling=1.0)[0]

    exact = attend(torch.cat([keys, new], 2), torch.cat([values, new], 2))
    torch.testing.assert_close(attend(key, value), exact, atol=1e-5, rtol=0)
    # A tensor without sizes is attended to as always.
    assert (attend(key.clone(), value) - exact).abs().max() > 0.01


@needs_transformers
def test_beams_samples_and_reset():
    from qm_spec.compression.kv_cache import QuickMergeCache

    model, inputs = tiny(), prompt()
    cache = QuickMergeCache(model, k_max=100, window=8, attention_mask=inputs["attention_mask"])
    assert torch.equal(
        generate(model, inputs, past_key_values=cache, num_beams=3), generate(model, inputs, num_beams=3)
    )
    cache = QuickMergeCache(model, k_max=5, window=8)
    first = generate(model, {"input_ids": inputs["input_ids"][:1]}, past_key_values=cache)
    cache.reset()
    assert cache.nbytes == 0 and cache.get_seq_length() == 0
    assert torch.equal(generate(model, {"input_ids": inputs["input_ids"][:1]}, past_key_values=cache), first)
    sampled = QuickMergeCache(model, k_max=5, window=8, attention_mask=inputs["attention_mask"])
    settings = {"do_sample": True, "num_beams": 2, "num_return_sequences": 2}
    assert generate(model, inputs, past_key_values=sampled, **settings).shape == (4, 70)


@needs_transformers
def test_bfloat16_model_and_the_pipelines_cache():
    model, inputs = tiny().bfloat16(), prompt()
    llm = create_llm_pipeline(model_dim=32, k_max=5)
    cache = llm.make_cache(model, window=8, attention_mask=inputs["attention_mask"])
    assert generate(model, inputs, past_key_values=cache).shape == (2, 70)
    assert cache.layers[0].keys.dtype == torch.bfloat16 and torch.isfinite(cache.layers[0].keys).all()


@needs_transformers
def test_models_whose_keys_a_merge_would_get_wrong_are_refused():
    from qm_spec.compression.kv_cache import QuickMergeCache

    interleaved = tiny("cohere")
    with pytest.raises(ValueError, match="another layout"):
        QuickMergeCache(interleaved, k_max=4)
    with pytest.raises(ValueError, match="another layout"):
        QuickMergeCache(tiny("phi", num_key_value_heads=4, partial_rotary_factor=0.5), k_max=4)
    with pytest.raises(ValueError, match="one rotary embedding"):
        QuickMergeCache(tiny("gpt2", n_embd=32, n_layer=2, n_head=4), k_max=4)
    with pytest.raises(ValueError, match="change with the length"):
        QuickMergeCache(tiny(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), k_max=4)
    with pytest.raises(ValueError, match="full attention"):
        QuickMergeCache(tiny("mistral", sliding_window=16), k_max=4)
    # Without rotation the layout does not matter.
    cache = QuickMergeCache(interleaved, k_max=4, window=8, merger=KeyValueMerger())
    assert generate(interleaved, prompt((40,)), past_key_values=cache).shape == (1, 70)


@needs_transformers
def test_errors_of_the_cache_name_the_way_out():
    from qm_spec.compression.kv_cache import QuickMergeCache

    model, inputs = tiny(), prompt()
    for settings in ({}, {"k_max": 3, "ratio": 0.5}):
        with pytest.raises(TypeError, match="k_max or ratio"):
            QuickMergeCache(model, **settings)
    for settings in (
        {"k_max": 0},
        {"ratio": 0.0},
        {"ratio": 1.5},
        {"k_max": 3, "window": 0},
        {"k_max": 3, "sinks": -1},
    ):
        with pytest.raises(ValueError, match="must be"):
            QuickMergeCache(model, **settings)
    with pytest.raises(ValueError, match="padding_side"):
        QuickMergeCache(model, k_max=3, attention_mask=inputs["attention_mask"].flip(1))
    with pytest.raises(ValueError, match="set_attn_implementation"):
        QuickMergeCache(model, k_max=3, proportional=True)
    cache = QuickMergeCache(model, k_max=3, attention_mask=torch.ones(3, 40))
    with pytest.raises(ValueError, match="batch of 2"):
        model(**inputs, past_key_values=cache)
    with pytest.raises(RuntimeError, match="cannot be removed"):
        cache.crop(-1)


# Adapters


@pytest.fixture(scope="module")
def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, set_seed

    set_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=100,
        eos_token_id=None,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=99)
    return LlavaForConditionalGeneration(config).eval()


def picture_prompt():
    """Two rows: one image in 30 tokens, two images in 50; 16 placeholders each; padded on the left."""
    ids = torch.randint(1, 99, (2, 50))
    ids[0, 25:41] = ids[1, 3:19] = ids[1, 30:46] = 99
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(3, 3, 32, 32)}


@needs_transformers
def test_image_tokens_of_a_llava_are_merged(llava):
    from qm_spec.compression.adapters.vlm import merge_image_tokens

    inputs = picture_prompt()
    short, info = merge_image_tokens(llava, 5, **inputs)
    assert short["attention_mask"].sum(1).tolist() == [30 - 11, 50 - 22]
    assert (info["input_tokens"], info["output_tokens"]) == (50, 28)
    assert (info["image_tokens_before"], info["image_tokens_after"]) == (48, 15)
    assert info["ratio"] == 80 / 47 and info["bytes_after"] == nbytes(short["inputs_embeds"])
    assert info["token_sizes"].sum(1).tolist() == [30, 50]
    # Text keeps its positions, a merged token has that of its place.
    assert short["position_ids"][1, -4:].tolist() == [46, 47, 48, 49]
    assert llava.generate(**short, max_new_tokens=6, do_sample=False).shape == (2, 6)


@needs_transformers
def test_llava_reads_what_it_did_where_no_image_token_is_merged(llava):
    from qm_spec.compression.adapters.vlm import merge_image_tokens

    inputs = picture_prompt()
    same, info = merge_image_tokens(llava, 16, **inputs)
    assert info["ratio"] == 1
    # In the row without padding, positions are those that the model gives itself.
    exact = llava(**inputs).logits[1]
    torch.testing.assert_close(llava(**same).logits[1], exact)
    exact = llava.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(llava.generate(**same, max_new_tokens=8, do_sample=False), exact[:, 50:])


@needs_transformers
def test_llava_weighs_merged_tokens_by_their_size(llava):
    from qm_spec.compression.adapters.vlm import merge_image_tokens
    from qm_spec.compression.kv_cache import PROPORTIONAL, QuickMergeCache

    short, info = merge_image_tokens(llava, 5, **picture_prompt())
    plain = llava(**short).logits
    llava.set_attn_implementation(PROPORTIONAL)
    try:
        sizes = {"token_sizes": info["token_sizes"], "position_ids": short["position_ids"]}
        cache = QuickMergeCache(llava, ratio=1.0, **sizes, proportional=True)
        weighed = llava(**short, past_key_values=cache).logits
        assert torch.equal(cache.layers[0].size[:, 0], info["token_sizes"])
        assert torch.equal(cache.layers[1].position[:, 1].long(), short["position_ids"])
        # Text in front of the first image sees none of it.
        text = short["attention_mask"].bool() & (info["token_sizes"].cumsum(-1) <= 3)
        torch.testing.assert_close(weighed[text], plain[text], atol=1e-5, rtol=1e-4)
        assert (weighed[:, -1] - plain[:, -1]).abs().max() > 1e-3
        # Decoding goes on from the last position.
        llava(input_ids=torch.tensor([[5], [5]]), past_key_values=cache)
        assert cache.layers[0].position[:, 0, -1].tolist() == [30, 50]
    finally:
        llava.set_attn_implementation("sdpa")


@needs_transformers
def test_image_adapter_refuses_what_it_would_get_wrong(llava):
    from qm_spec.compression.adapters.vlm import merge_image_tokens

    inputs = picture_prompt()
    with pytest.raises(ValueError, match="as LLaVA has"):
        merge_image_tokens(tiny(), 5, **inputs)
    inputs["input_ids"][1, 30] = 1
    with pytest.raises(ValueError, match="one placeholder"):
        merge_image_tokens(llava, 5, **inputs)
    with pytest.raises(ValueError, match="one placeholder"):
        merge_image_tokens(llava, 5, **{**inputs, "pixel_values": inputs["pixel_values"][:1]})


@pytest.fixture(scope="module")
def unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()


def test_prompt_and_negative_get_the_same_number_of_tokens():
    from qm_spec.compression.adapters.diffusers import PromptMerger

    positive, negative = torch.randn(2, 77, 32), torch.randn(2, 77, 32)
    new, new_negative = PromptMerger(20)(positive, negative)
    assert new.shape == new_negative.shape == (2, 20, 32)
    # The begin token stays, and neither depends on the other.
    assert torch.equal(new[:, 0], positive[:, 0]) and torch.equal(new_negative[:, 0], negative[:, 0])
    alone, none = PromptMerger(20)(positive)
    torch.testing.assert_close(alone, new)
    assert none is None
    assert torch.equal(PromptMerger(99)(positive)[0], positive)
    with pytest.raises(ValueError, match="like prompt_embeds"):
        PromptMerger(20)(positive, negative[:, :50])
    with pytest.raises(ValueError, match="keep_first"):
        PromptMerger(1)


@needs_diffusers
def test_unet_with_everything_kept_is_unchanged_and_restored(unet):
    from qm_spec.compression.adapters.diffusers import merged_attention

    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 9, 32)
    exact = unet(latents, 5, text).sample
    before = dict(unet.attn_processors)
    with merged_attention(unet, keep=1.0, log_size=torch.zeros(2, 9)):
        torch.testing.assert_close(unet(latents, 5, text).sample, exact, atol=1e-5, rtol=0)
    with merged_attention(unet, keep=0.5):
        half = unet(latents, 5, text).sample
    assert half.shape == exact.shape and 0 < (half - exact).norm() < 0.5 * exact.norm()
    assert unet.attn_processors == before
    with pytest.raises(ValueError, match="merge the prompt first"), merged_attention(unet, log_size=torch.zeros(2, 4)):
        unet(latents, 5, text)
    assert unet.attn_processors == before


@needs_diffusers
def test_unet_reads_a_merged_prompt_of_copies_like_the_copies(unet):
    from qm_spec.compression.adapters.diffusers import PromptMerger, merged_attention

    latents = torch.randn(2, 4, 8, 8)
    text = torch.cat([torch.randn(2, 6, 32), torch.randn(2, 1, 32).expand(-1, 30, -1)], 1)
    merged = PromptMerger(7, compress=TokenCompressor(32, grouping="kmeans")).merge(text)
    exact = unet(latents, 5, text).sample
    with merged_attention(unet, log_size=merged.log_size):
        weighed = (unet(latents, 5, merged.prompt_embeds).sample - exact).norm()
    plain = (unet(latents, 5, merged.prompt_embeds).sample - exact).norm()
    assert merged.info["output_tokens"] == 7 and weighed < 0.5 * plain


@needs_diffusers
@needs_transformers
def test_stable_diffusion_pipeline_takes_merged_prompts(unet):
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    from qm_spec.compression.adapters.diffusers import PromptMerger, merged_attention

    text = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=100,
        eos_token_id=99,
    )
    vae = AutoencoderKL(
        block_out_channels=[16, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=8,
        latent_channels=4,
    )
    encoder = CLIPTextModel(text).eval()
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=encoder,
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    embeds, negative = encoder(torch.randint(1, 99, (2, 77))).last_hidden_state.chunk(2)

    def draw(embeds, negative):
        return pipe(
            prompt_embeds=embeds,
            negative_prompt_embeds=negative,
            num_images_per_prompt=2,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images

    exact = draw(embeds, negative)
    merged = PromptMerger(12).merge(embeds, negative)
    with merged_attention(unet, keep=0.5, log_size=merged.log_size):
        images = draw(merged.prompt_embeds, merged.negative_prompt_embeds)
    assert images.shape == exact.shape and torch.isfinite(images).all()
    merged = PromptMerger(77).merge(embeds, negative)
    with merged_attention(unet, log_size=merged.log_size):
        torch.testing.assert_close(draw(merged.prompt_embeds, merged.negative_prompt_embeds), exact, atol=1e-4, rtol=0)


# Bad input


@pytest.mark.parametrize(
    "create", [create_multimodal_pipeline, create_diffusion_pipeline, create_llm_pipeline], ids=lambda f: f.__name__
)
def test_bad_settings_are_refused_by_name(create):
    for bad in (0.5, True, None):
        with pytest.raises(TypeError, match="k_max must be an integer"):
            create(k_max=bad)
    with pytest.raises(ValueError, match="at least 1"):
        create(k_max=0)
    with pytest.raises(ValueError, match="must be one of"):
        create(saliency="loud")
    with pytest.raises(ValueError, match="must be one of"):
        create(grouping="dbscan")


def test_bad_tensors_are_refused_by_name():
    with pytest.raises(ValueError, match="batch of 2 images"):
        create_multimodal_pipeline(8, 8, 8)(torch.randn(2, 4, 8), torch.randn(3, 4, 8))
    with pytest.raises(ValueError, match=r"\[B, N, 8\]"):
        create_multimodal_pipeline(8, 8, 8)(torch.randn(2, 4, 9), torch.randn(2, 4, 8))
    with pytest.raises(TypeError, match="floats"):
        create_diffusion_pipeline(8, 8).compress_text_embeddings(torch.ones(2, 4, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[B, C, H, W\]"):
        create_diffusion_pipeline(8, 8).compress_unet_features(torch.randn(8, 8))
    tokens, info = create_diffusion_pipeline(8, 8).compress_unet_features(torch.randn(1, 8, 3, 3), 4)
    with pytest.raises(ValueError, match="values must be"):
        create_diffusion_pipeline(8, 8).restore_unet_features(tokens[:, :2], info)
    with pytest.raises(ValueError, match="same B, S and H"):
        create_llm_pipeline(8).compress_kv_cache(torch.randn(1, 9, 2, 4), torch.randn(1, 9, 3, 4))
    with pytest.raises(ValueError, match="dimensions"):
        rotary().rotate(torch.randn(1, 3, 6), torch.zeros(1, 3))


@needs_transformers
def test_the_multimodal_example_prints_and_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    example = Path(__file__).parents[2] / "examples" / "multimodal.py"
    monkeypatch.setattr(sys, "argv", ["multimodal.py", "--json", str(tmp_path / "new" / "rows.json")])
    runpy.run_path(str(example), run_name="__main__")
    rows = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert len(capsys.readouterr().out.splitlines()) == len(rows) == 5
    assert all(row["output_tokens"] < row["input_tokens"] for row in rows)
    assert all(row["bytes_after"] < row["bytes_before"] for row in rows)
