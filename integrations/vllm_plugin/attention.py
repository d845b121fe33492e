"""The prior's attention layer in vLLM: backend, metadata and implementation over the merged cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from qm_spec.config import MergeConfig
from qm_spec.integrations.vllm_plugin import compat
from qm_spec.integrations.vllm_plugin.cuda_graphs import can_capture
from qm_spec.integrations.vllm_plugin.pages import count_groups, draft_spec, target_specs, view_pages, warn_of_groups
from qm_spec.integrations.vllm_plugin.patches.v2_speculator import SPECULATOR
from qm_spec.integrations.vllm_plugin.registry import is_registered
from qm_spec.ops import append_kv_, merge_groups_, merged_attention
from qm_spec.ops.page import slot_elements


@dataclass
class QuickMergeMetadata:
    """Views of the runner's own tensors, never copies: captured graphs replay without a rebuild.

    Attributes:
        num_actual_tokens: T, rows without graph padding.
        query_start_loc: `[B + 1]` int32.
        seq_lens: `[B]` int32, rejected drafts included at draft step 0.
        block_table: `[B, columns]` int32.
        slot_mapping: `[T]` int64.
    """

    num_actual_tokens: int
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor


class QuickMergeMetadataBuilder(AttentionMetadataBuilder[QuickMergeMetadata]):
    """Hands the common metadata through."""

    supports_draft_decode_metadata_update: ClassVar[bool] = True

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> AttentionCGSupport:
        """Return `ALWAYS` where vLLM will not capture this layer, or may, else `NEVER`.

        `NEVER` makes vLLM lower the target's graphs to piecewise ones. It captures the layer with its own speculator of
        the V2 runner only: V1 runs drafters outside of full graphs, and our speculator decides for itself.
        """
        outside = not vllm_config.use_v2_model_runner or is_registered() or compat.in_force(SPECULATOR)
        return AttentionCGSupport.ALWAYS if outside or can_capture(vllm_config) else AttentionCGSupport.NEVER

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> QuickMergeMetadata:
        """Return views of what the runner has built."""
        common = common_attn_metadata
        return QuickMergeMetadata(
            common.num_actual_tokens,
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            common.slot_mapping,
        )

    def update_draft_decode_metadata(self, metadata: QuickMergeMetadata) -> None:
        """Do nothing: the metadata are views, so they are up to date."""


class QuickMergeImpl(AttentionImpl[QuickMergeMetadata]):
    """Appends, merges and attends, all inside `forward`, where the metadata of the step are valid."""

    def __init__(  # noqa: PLR0913 - vLLM's
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str | None = None,
        kv_sharing_target_layer_name: str | None = None,
        *,
        merge: MergeConfig,
        max_rows: int,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.merge = merge
        self.max_rows = max_rows
        # Set by the model once its parameters exist: `[H]` each.
        self.slopes: Tensor
        self.far_bias: Tensor

    def verified_tokens(self, metadata: QuickMergeMetadata) -> Tensor:
        """Return `[B]` int32: tokens of each request that no rejection can take back.

        Up to `max_rows` rows may be one verified token and drafts; more rows are prompt. A request
        without rows, or whose slots are padding, counts as empty, so that nothing of it is merged.
        """
        starts, ends = metadata.query_start_loc[:-1].long(), metadata.query_start_loc[1:].long()
        num_rows = ends - starts
        drafts = (num_rows - 1).masked_fill(num_rows > self.max_rows, 0)
        slots = metadata.slot_mapping
        padded = slots[starts.clamp_max(len(slots) - 1)] < 0
        return (metadata.seq_lens - drafts).masked_fill(padded | (num_rows <= 0), 0).int()

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: QuickMergeMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Return `output`, filled: attention of the newest rows of each request, 0 elsewhere."""
        output.zero_()
        if attn_metadata is None or kv_cache.numel() == 0:
            return output
        num_rows = attn_metadata.num_actual_tokens
        append_kv_(kv_cache, key[:num_rows], value[:num_rows], attn_metadata.slot_mapping[:num_rows])
        frontier = self.verified_tokens(attn_metadata)
        merge_groups_(kv_cache, attn_metadata.block_table, frontier, self.head_size, self.merge)
        attended, _, _ = merged_attention(
            query[:num_rows],
            kv_cache,
            attn_metadata.block_table,
            attn_metadata.seq_lens,
            attn_metadata.query_start_loc,
            self.slopes,
            self.far_bias,
            self.max_rows,
            self.merge,
        )
        output[:num_rows] = attended
        return output


class QuickMergeBackend(AttentionBackend):
    """Tells vLLM how the prior's cache is laid out and who works on it."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        """Return a member of vLLM's `AttentionBackendEnum`, as `Attention` demands."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[QuickMergeImpl]:
        """Return the implementation."""
        return QuickMergeImpl

    @staticmethod
    def get_builder_cls() -> type[QuickMergeMetadataBuilder]:
        """Return the metadata builder."""
        return QuickMergeMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[Any]:
        """Accept every page size that holds whole groups."""
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Accept every layout whose pages are runs of bytes, in vLLM's own order: the operators go by strides."""
        return KVCacheLayout.LBNHC, KVCacheLayout.LBHNC, KVCacheLayout.BLNHC, KVCacheLayout.BLHNC

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Drafts never decide a token, so they do not touch the target's invariance."""
        return True


class MergedAttention(Attention):
    """`Attention` whose pages hold keys, values and merge state.

    Attributes:
        count_groups: returns how many groups of layers the target's cache has without and with this one.
        at_start: called once, as soon as there are pages: all else of the engine is settled by then.
    """

    count_groups: Callable[[], tuple[int, int]] | None = None
    at_start: Callable[[], None] | None = None

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """Return the full-attention spec with room for the merge state, or the target's, see `draft_spec`."""
        own = super().get_kv_cache_spec(vllm_config)
        own = replace(own, state_content_bytes=slot_elements(own.head_size, own.dtype) * own.dtype.itemsize)
        target = target_specs(vllm_config, self)
        spec = draft_spec(own, target)
        if spec is own:
            warn_of_groups(vllm_config, own, self.layer_name, target)
        self.count_groups = partial(count_groups, vllm_config, spec, self.layer_name, target)
        return spec

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Keep the cache as `[pages, G, P, C]`, whosever spec it was made from."""
        self.kv_cache = view_pages(kv_cache, self.num_kv_heads, self.head_size, self.kv_cache_torch_dtype)
        if self.at_start is not None and kv_cache.numel():
            tell, self.at_start = self.at_start, None
            tell()
