"""The three pipelines on random inputs, and a language model that generates with a merged cache."""

from __future__ import annotations

from typing import Any

import torch

from qm_spec import create_diffusion_pipeline, create_llm_pipeline, create_multimodal_pipeline


def show(what: str, info: dict[str, Any]) -> None:
    """Print what went in and what came out."""
    tokens = f"{info['input_tokens']:4} -> {info['output_tokens']:3} tokens ({info['ratio']:.2f}x)"
    print(f"{what:24}{tokens}, {info['bytes_before'] / 1024:6.0f} -> {info['bytes_after'] / 1024:5.0f} KiB")


def main() -> None:
    """Run all examples; takes seconds on a CPU."""
    torch.manual_seed(0)

    # Vision and text, fused to one sequence of 64 tokens.
    multimodal = create_multimodal_pipeline(vision_dim=768, text_dim=512, k_max=64)
    _, info = multimodal(torch.randn(2, 196, 768), torch.randn(2, 77, 512))
    show("vision and text", info)

    # A diffusion model: its prompt, and features that get their shape again after the block.
    diffusion = create_diffusion_pipeline(unet_dim=320, text_dim=768, k_max=32)
    _, info = diffusion.compress_text_embeddings(torch.randn(2, 77, 768))
    show("prompt embeddings", info)
    features = torch.randn(2, 320, 16, 16)
    tokens, info = diffusion.compress_unet_features(features, keep=128)
    show("UNet features", info)
    restored = diffusion.restore_unet_features(tokens, info)
    print(f"{'':24}{list(features.shape)} -> {list(tokens.shape)} -> {list(restored.shape)}")

    # A language model's cache: keys and values by one assignment, head by head.
    llm = create_llm_pipeline(model_dim=4096, k_max=128)
    merged = llm.merge_kv_cache(torch.randn(1, 512, 4, 128), torch.randn(1, 512, 4, 128))
    show("keys and values", merged.info)

    # The same in generate, with the rotation of keys taken into account.
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(settings).eval()
    cache = create_llm_pipeline(model_dim=64, k_max=64).make_cache(model, window=32)
    ids = model.generate(torch.randint(256, (1, 400)), past_key_values=cache, max_new_tokens=50, do_sample=False)
    print(f"{'generate':24}{ids.shape[1]} tokens seen, {cache.num_entries} entries kept, {cache.nbytes / 1024:.0f} KiB")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
