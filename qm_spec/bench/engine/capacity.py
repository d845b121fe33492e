"""How many engines fit beside each other, and how little of the memory each needs for its KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

GIB = 1 << 30
# What an engine takes beside weights and KV cache: its processes, and on a GPU the context and captured graphs.
_OVERHEAD_BYTES = {"cpu": GIB * 3 // 2, "cuda": 3 * GIB}
_USABLE = 0.9
# A block of the cache at most, which every request may fill in part.
_BLOCK_TOKENS = 128
# Layers of a drafter that are as wide as the target's, generously.
_DRAFT_LAYERS = 2
_KV_MARGIN = 1.25
_LEAST_KV_BYTES = GIB // 4


def kv_cache_bytes(config: Any, lengths: Sequence[int], concurrency: int, most_tokens: int, dtype: str) -> int | None:
    """Return the size of a KV cache that holds any `concurrency` of the requests at once, and little more.

    Args:
        config: the target's text config, as transformers reads it.
        lengths: of the prompts, in tokens.
        most_tokens: that a request puts out and drafts.
        dtype: of the keys and values.

    Returns:
        None where the config does not say what a token takes.
    """
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    layers, hidden = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if not (heads and layers and hidden):
        return None
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    token_bytes = 2 * heads * head_dim * (layers + _DRAFT_LAYERS) * _item_bytes(dtype)
    longest = sorted(lengths, reverse=True)[:concurrency]
    # vLLM wants room for one request of the full length, whatever is asked of it.
    tokens = sum(longest) + len(longest) * (most_tokens + _BLOCK_TOKENS)
    return max(_LEAST_KV_BYTES, int(_KV_MARGIN * tokens * token_bytes))


def _item_bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def engine_bytes(target: Path, config: Any, dtype: str, kv_bytes: int | None, device: str) -> int:
    """Estimate what an engine takes of the memory of its device, "cpu" or "cuda"."""
    stored = sum(file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in target.glob(pattern))
    widened = _item_bytes(dtype) / _item_bytes(str(getattr(config, "dtype", dtype)).removeprefix("torch."))
    return int(stored * max(1.0, widened)) + (kv_bytes or 2 * GIB) + _OVERHEAD_BYTES[device]


def free_bytes(device: str) -> int | None:
    """Return the free memory of a device, None where it is not known."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    information = Path("/proc/meminfo")
    if not information.exists():
        return None
    found = (line.split() for line in information.read_text().splitlines() if line.startswith("MemAvailable:"))
    return next((1024 * int(kib) for _, kib, *_ in found), None)


def engines_at_once(each_bytes: int, device: str) -> int | None:
    """Return how many engines of a size fit the free memory, at least 2; None where it is not known."""
    free = free_bytes(device)
    return None if free is None else max(2, int(_USABLE * free / each_bytes))
