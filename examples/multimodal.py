"""The three pipelines on random inputs, and a language model that generates with a merged cache."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from qm_spec import create_diffusion_pipeline, create_llm_pipeline, create_multimodal_pipeline

REPORTED = ("input_tokens", "output_tokens", "ratio", "bytes_before", "bytes_after")


def line(row: dict[str, Any]) -> str:
    """Return what went in and what came out, as the table shows it."""
    tokens = f"{row['input_tokens']:4} -> {row['output_tokens']:3} tokens ({row['ratio']:.2f}x)"
    return f"{row['what']:24}{tokens}, {row['bytes_before'] / 1024:6.0f} -> {row['bytes_after'] / 1024:5.0f} KiB"


def tour() -> list[dict[str, Any]]:
    """Run all examples and return a row of each."""
    torch.manual_seed(0)
    rows = []

    def note(what: str, info: dict[str, Any]) -> None:
        rows.append({"what": what, **{key: info[key] for key in REPORTED}})

    # Vision and text, fused to one sequence of 64 tokens.
    multimodal = create_multimodal_pipeline(vision_dim=768, text_dim=512, k_max=64)
    _, info = multimodal(torch.randn(2, 196, 768), torch.randn(2, 77, 512))
    note("vision and text", info)

    # A diffusion model: its prompt, and features that get their shape again after the block.
    diffusion = create_diffusion_pipeline(unet_dim=320, text_dim=768, k_max=32)
    _, info = diffusion.compress_text_embeddings(torch.randn(2, 77, 768))
    note("prompt embeddings", info)
    features = torch.randn(2, 320, 16, 16)
    tokens, info = diffusion.compress_unet_features(features, keep=128)
    note("UNet features", info)
    restored = diffusion.restore_unet_features(tokens, info)
    assert restored.shape == features.shape

    # A language model's cache: keys and values by one assignment, head by head.
    llm = create_llm_pipeline(model_dim=4096, k_max=128)
    merged = llm.merge_kv_cache(torch.randn(1, 512, 4, 128), torch.randn(1, 512, 4, 128))
    note("keys and values", merged.info)

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
    # The newest token was never read. Keys and values are float32.
    seen, whole = ids.shape[1] - 1, 2 * settings.num_hidden_layers * settings.hidden_size * 4
    info = {"input_tokens": seen, "output_tokens": cache.num_entries, "ratio": seen / cache.num_entries}
    note("cache while generating", {**info, "bytes_before": seen * whole, "bytes_after": cache.nbytes})
    return rows


def main() -> None:
    """Print the examples as a table; with `--json` also write it to a file. Takes seconds on a CPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there as well")
    arguments = parser.parse_args()
    with torch.no_grad():
        rows = tour()
    print("\n".join(line(row) for row in rows))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
