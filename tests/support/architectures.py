"""Tiny random models of the architectures that hand out hidden states, what is known of each, and an engine for both.

`ARCHITECTURES` and `REFUSED` are the one list: the tests run it, and the page of architectures in the docs names it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VOCABULARY = 64
WINDOW = 32
FULL, SLIDING = "full_attention", "sliding_attention"
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # The smallest that vLLM's attention on a CPU has.
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.3,
}
IN_TURN = {"layer_types": [SLIDING, FULL] * 2, "sliding_window": WINDOW}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True)
class Architecture:
    """One architecture of vLLM's and a tiny model of it.

    Attributes:
        name: in vLLM's registry.
        model_type: of transformers.
        config: what differs from `SIZES`.
        groups: of the KV cache without a drafter and with one.
        quick: whether it runs by `make test`.
        dtype: of the target.
    """

    name: str
    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    groups: tuple[int, int] = (1, 1)
    quick: bool = False
    dtype: str = "float32"


ARCHITECTURES = [
    Architecture("LlamaForCausalLM", "llama", quick=True),
    Architecture("MistralForCausalLM", "mistral", {"sliding_window": None}),
    Architecture("Qwen2ForCausalLM", "qwen2", {"num_attention_heads": 2}),
    Architecture("Qwen3ForCausalLM", "qwen3"),
    Architecture("Qwen3MoeForCausalLM", "qwen3_moe", EXPERTS, quick=True),
    Architecture("GptOssForCausalLM", "gpt_oss", {**EXPERTS, **IN_TURN, "head_dim": 64}, (2, 3), quick=True),
    Architecture(
        "Gemma4ForCausalLM",
        "gemma4_text",
        {**IN_TURN, "global_head_dim": 64, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCABULARY},
        (2, 3),
    ),
    Architecture(
        "GraniteSWAForCausalLM", "granite_swa", {**IN_TURN, "num_attention_heads": 2, "num_key_value_heads": 1}, (2, 3)
    ),
]
# No `SupportsEagle3` in vLLM 0.32.
REFUSED = [
    Architecture("Gemma3ForCausalLM", "gemma3_text", IN_TURN),
    Architecture("Lfm2ForCausalLM", "lfm2", {"layer_types": ["conv", FULL] * 2}),
]


def write_pair(folder: Path, architecture: Architecture) -> tuple[Path, Path]:
    """Write a model and an untrained drafter for it, as `qm-spec init` does; return both folders."""
    from qm_spec.config import MergeConfig
    from qm_spec.training.settings import NewDrafterSettings
    from qm_spec.training.untrained import write_untrained

    target, drafter = write_model(folder / "target", architecture), folder / "drafter"
    # Short, so that prompts of 200 tokens fill and merge groups.
    merge = MergeConfig(window=WINDOW, group_size=8, schedule=(4, 2, 1))
    write_untrained(NewDrafterSettings(target=target, out=drafter, merge=merge))
    return target, drafter


def write_model(folder: Path, architecture: Architecture, seed: int = 0) -> Path:
    """Write a model with random weights, large enough that its answers depend on the prompt, and a tokenizer."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    config = AutoConfig.for_model(architecture.model_type, **{**SIZES, **architecture.config})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    file = folder / "config.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps({**written, "architectures": [architecture.name]}))
    words = Tokenizer(models.WordLevel({f"<{number}>": number for number in range(VOCABULARY)}, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<0>", eos_token="<1>", pad_token="<2>").save_pretrained(
        folder
    )
    return folder
