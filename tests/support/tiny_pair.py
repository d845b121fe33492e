"""A tiny target and a tiny drafter on disk: what discovery and vLLM's configuration read, and no more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

# As many as the sizes below ask for. A file cut in half loses tensor data and not its header.
NUM_WEIGHTS = 65536

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "dtype": "float32",
}


def write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value))


def write_target(folder: Path, words: str = "abcdefgh", **config: Any) -> Path:
    """Write a target's config.json and tokenizer.json, without weights."""
    from tokenizers import Tokenizer, models

    folder.mkdir(parents=True)
    write_json(folder / "config.json", {**LLAMA, **config})
    vocabulary = {word: index for index, word in enumerate(words)}
    Tokenizer(models.WordLevel(vocabulary, unk_token=words[0])).save(str(folder / "tokenizer.json"))
    return folder


def write_drafter(folder: Path, target: Path, d2t: list[int] | None = None, **config: Any) -> Path:
    """Write a drafter's config.json and a model.safetensors that is sound and means nothing."""
    from safetensors.torch import save_file

    from qm_spec.config import ARCHITECTURE
    from qm_spec.discovery import target_fingerprint

    folder.mkdir(parents=True)
    settings = {
        **LLAMA,
        "architectures": [ARCHITECTURE],
        "num_hidden_layers": 1,
        "draft_vocab_size": LLAMA["vocab_size"],
        "max_position_embeddings": 1 << 20,
        "tie_word_embeddings": False,
        "eagle_aux_hidden_state_layer_ids": [1, 3, 5],
        "num_speculative_tokens": 4,
        "target_fingerprint": target_fingerprint(target),
        "quickmerge": {"window": 32, "group_size": 8, "schedule": [4, 2, 1]},
    }
    write_json(folder / "config.json", {**settings, **config})
    tensors = {"weight": torch.zeros(NUM_WEIGHTS)}
    if d2t is not None:
        tensors["d2t"] = torch.tensor(d2t)
    save_file(tensors, folder / "model.safetensors")
    return folder


def edit_json(file: Path, **values: Any) -> None:
    """Change entries of a JSON object on disk; None removes one."""
    content = json.loads(file.read_text())
    for key, value in values.items():
        if value is None:
            del content[key]
        else:
            content[key] = value
    write_json(file, content)


def run_in_vllm(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter in `folder`, outside the source tree; stderr is joined to stdout."""
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
