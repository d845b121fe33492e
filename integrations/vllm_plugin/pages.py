"""The draft layer's pages among the target's: of its own size, or those of the target's full attention."""

from __future__ import annotations

import copy
import functools
import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec, UniformTypeKVCacheSpecs

from qm_spec.ops.page import STATE_BYTES, slot_elements

logger = logging.getLogger("vllm.plugins.qm_spec")


def draft_spec(own: AttentionSpec, target: Mapping[str, KVCacheSpec]) -> AttentionSpec:
    """Return the spec of the draft layer: `own`, or that of the target's full attention where it saves groups.

    Where layers are of several kinds (full attention, sliding windows, Mamba), vLLM makes all groups as large as the
    smallest kind. A page of another size is a kind of its own, so every group would shrink to one layer, and each step
    would build tables for all of them. With the target's spec the layer is one more of a kind that is there.

    Args:
        own: with room for merge state.
        target: specs of the target's layers by name.
    """
    if _of_one_kind(own, target):
        return own
    hosts = Counter(spec for spec in target.values() if _holds(spec, own))
    return hosts.most_common(1)[0][0] if hosts else own


def target_specs(vllm_config: VllmConfig, draft_layer: Any) -> dict[str, KVCacheSpec]:
    """Return the specs of all layers with a cache of their own but the draft's, as the runners collect them."""
    from vllm.v1.worker.utils import customize_attention_spec

    specs = {}
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        shares = getattr(layer, "kv_sharing_target_layer_name", None)
        if layer is draft_layer or shares or not isinstance(layer, AttentionLayerBase):
            continue
        spec = layer.get_kv_cache_spec(vllm_config)
        if isinstance(spec, AttentionSpec):
            spec = customize_attention_spec(layer.get_attn_backend(), spec)
        if spec is not None:
            specs[name] = spec
    return specs


def view_pages(cache: Tensor, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Return the cache that vLLM gives the draft layer as `[pages, G, P, C]` in `dtype`.

    In the target's pages ours begin where they begin, and the rest of each stays unused.

    Args:
        cache: `[pages, heads, P, elements]`, of the draft layer's own spec or of the target's.
        num_kv_heads: G.
        head_dim: d.
        dtype: of keys and values.

    Raises:
        ValueError: a page is not one run of bytes.
    """
    elements = slot_elements(head_dim, dtype)
    if cache.dtype == dtype and cache.shape[1] == num_kv_heads and cache.shape[3] == elements:
        return cache
    cache = cache.view(dtype)
    num_pages, heads, page_size, theirs = cache.shape
    last = sum((size - 1) * stride for size, stride in zip(cache.shape[1:], cache.stride()[1:], strict=True))
    if last + 1 != heads * page_size * theirs:
        raise ValueError(
            f"qm_spec: pages of the cache must each be one run of bytes, got strides {cache.stride()} for "
            f"{list(cache.shape)}; set VLLM_KV_CACHE_LAYOUT to one of LBNHC, LBHNC, BLNHC, BLHNC"
        )
    shape = num_pages, num_kv_heads, page_size, elements
    return cache.as_strided(shape, (cache.stride(0), page_size * elements, elements, 1))


def count_groups(
    vllm_config: VllmConfig, spec: AttentionSpec, name: str, target: Mapping[str, KVCacheSpec]
) -> tuple[int, int]:
    """Return how many groups of layers the target's cache has without the draft layer, and how many with it.

    Args:
        vllm_config: of the engine.
        spec: of the draft layer.
        name: of the draft layer.
        target: specs of the target's layers by name.
    """
    if _of_one_kind(spec, target):
        return 1, 1
    return num_groups(vllm_config, target), num_groups(vllm_config, {**target, name: spec})


def warn_of_groups(vllm_config: VllmConfig, own: AttentionSpec, name: str, target: Mapping[str, KVCacheSpec]) -> None:
    """Say once how many groups a page costs that fits into none of the target's."""
    alone, with_ours = count_groups(vllm_config, own, name, target)
    if with_ours <= alone + 1:
        return
    pages = sorted({spec.page_size_bytes for spec in target.values() if type(spec) is FullAttentionSpec})
    retrain = "train the drafter anew (for such targets qm-spec train picks heads that fit a 16-bit cache), "
    _warn_once(
        f"qm_spec: with the drafter vLLM splits the target's cache into {with_ours} groups instead of {alone}, and "
        "every step builds tables for each: outputs are right, steps are slower. The drafter's page of "
        f"{own.page_size_bytes} bytes does not fit into one of the target's full attention "
        f"({pages or 'it has none'}). To keep the target's groups, {retrain if pages else ''}serve with "
        "--disable-hybrid-kv-cache-manager, which takes more memory, or with VLLM_KV_CACHE_LAYOUT=BLHNC where the "
        "target's attention takes that"
    )


def num_groups(vllm_config: VllmConfig, specs: Mapping[str, KVCacheSpec]) -> int:
    """Return how many groups vLLM will make of layers, in the layout that it will choose."""
    from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout

    from qm_spec.integrations.vllm_plugin.compat import get_kv_cache_groups

    # Both write into their arguments, and the engine resolves the layout later, for itself.
    vllm_config, specs = copy.copy(vllm_config), dict(specs)
    vllm_config.cache_config = copy.copy(vllm_config.cache_config)
    layouts = [layout.name for layout in get_supported_kv_cache_layouts(get_current_attn_backends(vllm_config))]
    resolve_kv_cache_layout(vllm_config, [layouts], specs.values())
    return len(get_kv_cache_groups(vllm_config, specs))


def _of_one_kind(own: AttentionSpec, target: Mapping[str, KVCacheSpec]) -> bool:
    return UniformTypeKVCacheSpecs.is_uniform_type({**target, "": own})


def _holds(spec: KVCacheSpec, own: AttentionSpec) -> bool:
    """Tell whether a page of full attention has room for one of ours, with state words at their alignment."""
    return (
        # No heir: those have pages of other kinds, and merge with their own only.
        type(spec) is FullAttentionSpec
        and spec.block_size == own.block_size
        and spec.tokens_per_state == 1
        and spec.unpadded_page_size_bytes >= own.unpadded_page_size_bytes
        and spec.page_size_bytes % STATE_BYTES == 0
    )


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
