"""A GGUF file as a Hugging Face folder: what transformers, vLLM and the trainer read."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def dequantise(gguf: Path, folder: Path) -> None:
    """Write a GGUF model as a Hugging Face folder: weights in bfloat16, tokenizer, chat template.

    Args:
        gguf: file of a causal LM of an architecture that transformers reads from GGUF.
        folder: new or empty; nothing but the model is written into it.

    Raises:
        Exception: a file cannot be written; what is raised then is its library's own.
        ValueError: transformers does not know the file's architecture.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Older versions of transformers have no choice: they always dequantise.
    settings: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    _split_as_trained(tokenizer, gguf)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, **settings)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def _split_as_trained(tokenizer: Any, gguf: Path) -> None:
    """Split a text before its merges as the GGUF file says; transformers splits every byte-level BPE like GPT-2's."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    split = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    if split is not None and split.contents() == "smollm":
        # Each digit alone. GPT-2's way takes a space in front along: two spaces and a digit become other tokens.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
