"""The fingerprint of a target model, and what else its files say: what a drafter must agree with to fit it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qm_spec.discovery.files import read_json, shown, target_file

# Canonical key -> the names it goes by. A list of what counts, because transformers adds keys to
# a config when it saves one, and other keys in each version.
_DEFINING_KEYS = {
    "model_type": ("model_type",),
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size",),
    "intermediate_size": ("intermediate_size",),
    "moe_intermediate_size": ("moe_intermediate_size",),
    "num_hidden_layers": ("num_hidden_layers",),
    "num_attention_heads": ("num_attention_heads",),
    "num_key_value_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "kv_lora_rank": ("kv_lora_rank",),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "num_experts_per_tok": ("num_experts_per_tok",),
    "hidden_act": ("hidden_act",),
}

# Read where there is no tokenizer.json, as bytes.
_VOCABULARY_FILES = (
    "tokenizer.model",
    "tekken.json",
    "tiktoken.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


def target_fingerprint(target: str | Path, revision: str | None = None) -> str:
    """Return 16 hex digits that name a target's architecture and tokenizer.

    Counted: model type, sizes, activation, rotary base, and the tokenizer's ids and merges.
    Left out: what saving again or serving changes without making another model (dtype, attention
    implementation, quantisation, generation settings, rope scaling and the context length), and the
    weights: two fine-tunings of one model share a fingerprint.

    Args:
        target: a local folder, or a hub id that transformers can find.
        revision: of the hub id.

    Raises:
        FileNotFoundError: the target has no config.json or no tokenizer.
        ValueError: a file is not readable JSON.
    """
    config = read_json(target_file(target, "config.json", revision))
    defining = {"config": _defining_values(config), "tokenizer": _tokenizer_content(target, revision)}
    text = json.dumps(defining, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def target_sizes(target: str | Path, revision: str | None = None) -> dict[str, int]:
    """Return the width and the vocabulary that a target's config states, where it does."""
    text_config = _text_config(read_json(target_file(target, "config.json", revision)))
    sizes = {name: getattr(text_config, name, None) for name in ("hidden_size", "vocab_size")}
    return {name: size for name, size in sizes.items() if size is not None}


def end_token_ids(target: str | Path, revision: str | None = None) -> list[int]:
    """Return the tokens that end the target's answers, none where it names none."""
    for name in ("generation_config.json", "config.json"):
        try:
            values = read_json(target_file(target, name, revision))
        except (FileNotFoundError, ValueError):
            continue
        ends = values.get("eos_token_id", (values.get("text_config") or {}).get("eos_token_id"))
        if ends is not None:
            return ends if isinstance(ends, list) else [ends]
    return []


def _defining_values(config: dict[str, Any]) -> dict[str, Any]:
    text_config = _text_config(config)
    values: dict[str, Any] = {"outer_model_type": config.get("model_type")}
    for key, names in _DEFINING_KEYS.items():
        values[key] = next((v for name in names if (v := getattr(text_config, name, None)) is not None), None)
    # Defaults that one writer of a config states and another leaves out.
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    if values["head_dim"] is None and values["hidden_size"] and values["num_attention_heads"]:
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    values["rope_theta"] = _rope_theta(text_config)
    return {key: value for key, value in values.items() if value is not None}


def _text_config(config: dict[str, Any]) -> Any:
    """Return the language model's settings as attributes, with the defaults that transformers knows."""
    from transformers import CONFIG_MAPPING

    if config.get("model_type") in CONFIG_MAPPING:
        known = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).get_text_config()
        # Else transformers refuses to tell a size in which layers differ, as in Gemma 4. What the file states names it.
        known.allow_global_per_layer_attribute_access = True
        return known
    return SimpleNamespace(**config.get("text_config", config))


def _rope_theta(config: Any) -> list[float] | None:
    """Return the rotary base, or one per kind of layer where the config states several."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [entry for entry in parameters.values() if isinstance(entry, dict)] or [parameters]
    bases = [entry["rope_theta"] for entry in nested if entry.get("rope_theta") is not None]
    if not bases and getattr(config, "rope_theta", None) is not None:
        bases = [config.rope_theta]
    return sorted(float(base) for base in bases) or None


def _tokenizer_content(target: str | Path, revision: str | None) -> Any:
    try:
        return _ids_and_merges(target_file(target, "tokenizer.json", revision))
    except FileNotFoundError:
        digests = _vocabulary_digests(target, revision)
    if not digests:
        raise FileNotFoundError(
            f"{shown(target)} holds no tokenizer: expected tokenizer.json or one of {', '.join(_VOCABULARY_FILES)}; "
            "save the target's tokenizer beside its config.json"
        )
    return digests


def _ids_and_merges(file: Path) -> dict[str, Any]:
    """Return the id of every token and the merge rules, without how a writer spells them."""
    content = read_json(file)
    model = content.get("model") or {}
    vocabulary = model.get("vocab") or {}
    if isinstance(vocabulary, list):
        # A unigram model lists pairs of token and score; the place is the id.
        vocabulary = {piece: index for index, (piece, *_) in enumerate(vocabulary)}
    ids = dict(vocabulary) | {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    # tokenizers wrote a merge as "a b" before 0.20 and as ["a", "b"] since.
    merges = [m.split(" ", 1) if isinstance(m, str) else list(m) for m in model.get("merges") or []]
    return {"ids": sorted(ids.items()), "merges": merges}


def _vocabulary_digests(target: str | Path, revision: str | None) -> dict[str, str]:
    digests = {}
    for name in _VOCABULARY_FILES:
        try:
            file = target_file(target, name, revision)
        except FileNotFoundError:
            continue
        digests[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return digests
