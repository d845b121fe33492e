"""Vision and text tokens, fused to one short sequence."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qm_spec.compression.sizes import nbytes
from qm_spec.compression.token_compressor import TokenCompressor, merge_info
from qm_spec.quickmerge.inputs import check_tokens, full_mask


class _Fusion(nn.Module):
    """One layer in which merged tokens attend to each other, each weighing like the tokens it holds."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # As many heads as divide the dimension, at most 8.
        self.num_heads = math.gcd(dim, 8)
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, tokens: Tensor, log_size: Tensor) -> Tensor:
        heads = self.qkv(self.attention_norm(tokens)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        # Finite, because a sequence of padding alone attends to nothing else.
        bias = log_size.clamp_min(torch.finfo(torch.float16).min).to(query.dtype)[:, None, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        tokens = tokens + self.out(attended.transpose(1, 2).flatten(2))
        return tokens + self.mlp(tokens)


class MultimodalPipeline(nn.Module):
    """Fuse vision and text tokens; see `create_multimodal_pipeline`."""

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        compressed_dim: int,
        k_max: int,
        *,
        saliency: str = "inverse_entropy",
        grouping: str = "kmeans",
    ) -> None:
        super().__init__()
        if isinstance(k_max, bool) or not isinstance(k_max, int):
            raise TypeError(f"create_multimodal_pipeline: k_max must be an integer, got {k_max!r}")
        if min(vision_dim, text_dim, compressed_dim, k_max) < 1:
            raise ValueError(
                "create_multimodal_pipeline: vision_dim, text_dim, compressed_dim and k_max must be at least 1, "
                f"got {vision_dim}, {text_dim}, {compressed_dim} and {k_max}"
            )
        self.vision_dim = vision_dim
        self.text_dim = text_dim
        self.k_max = k_max
        # The norm puts both modalities on one scale, since the salient tokens of both are compared.
        self.vision = nn.Sequential(nn.Linear(vision_dim, compressed_dim), nn.LayerNorm(compressed_dim))
        self.text = nn.Sequential(nn.Linear(text_dim, compressed_dim), nn.LayerNorm(compressed_dim))
        self.compressor = TokenCompressor(compressed_dim, saliency=saliency, grouping=grouping)
        self.modality = nn.Embedding(2, compressed_dim)
        self.fusion = _Fusion(compressed_dim)

    def forward(
        self,
        vision_tokens: Tensor,
        text_tokens: Tensor,
        vision_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the fused tokens of both modalities, and what was saved.

        Both are projected to one space and merged there as one sequence, vision first, so that a
        plain image leaves its slots to a rich text. Merged tokens then attend to each other.
        Differentiable, projections included; nothing is random.

        Args:
            vision_tokens: `[B, Nv, vision_dim]`, any float dtype; computed in the parameters' dtype.
            text_tokens: `[B, Nt, text_dim]`.
            vision_mask: `[B, Nv]` bool, True = token.
            text_mask: `[B, Nt]` bool, True = token.

        Returns:
            fused `[B, min(k_max, Nv + Nt), compressed_dim]` in the vision tokens' dtype, 0 in empty
            slots; and `merge_info`, in which `assignments` `[B, Nv + Nt]` has the vision tokens
            first and bytes are those of the two inputs and of the fused tokens.

        Raises:
            TypeError: tokens are not floats.
            ValueError: shapes that do not fit.
        """
        check_tokens("MultimodalPipeline vision", vision_tokens, self.vision_dim)
        check_tokens("MultimodalPipeline text", text_tokens, self.text_dim)
        if len(vision_tokens) != len(text_tokens):
            raise ValueError(
                f"MultimodalPipeline: text_tokens must have the batch of {len(vision_tokens)} images, "
                f"got {len(text_tokens)}"
            )
        masks = [
            full_mask("MultimodalPipeline", vision_tokens, vision_mask),
            full_mask("MultimodalPipeline", text_tokens, text_mask),
        ]
        dtype = self.modality.weight.dtype
        projected = torch.cat([self.vision(vision_tokens.to(dtype)), self.text(text_tokens.to(dtype))], 1)
        padded = vision_mask is not None or text_mask is not None
        merged = self.compressor(projected, self.k_max, torch.cat(masks, 1) if padded else None)
        # A merged token is as much text as the tokens it holds.
        is_text = torch.zeros(projected.shape[:2], dtype=torch.int64, device=projected.device)
        is_text[:, vision_tokens.shape[1] :] = 1
        share = _mean_by_cluster(is_text.to(dtype), merged.cluster, merged.size).unsqueeze(-1)
        kind = self.modality.weight[0] * (1 - share) + self.modality.weight[1] * share
        fused = self.fusion(merged.tokens + kind, merged.log_size).masked_fill(~merged.live.unsqueeze(-1), 0.0)
        fused = fused.to(vision_tokens.dtype)
        info = merge_info(projected, merged)
        info["bytes_before"] = nbytes([vision_tokens, text_tokens])
        info["bytes_after"] = nbytes([fused])
        return fused, info


def _mean_by_cluster(values: Tensor, cluster: Tensor, size: Tensor) -> Tensor:
    """Average `values` `[B, N]` over the members of each slot, `[B, K]`."""
    num_slots = size.shape[1]
    label = cluster.masked_fill(cluster < 0, num_slots)
    total = values.new_zeros(len(values), num_slots + 1).scatter_add(1, label, values)[:, :num_slots]
    return total / size.clamp_min(1.0).to(values.dtype)


def create_multimodal_pipeline(
    vision_dim: int = 768,
    text_dim: int = 512,
    compressed_dim: int = 256,
    k_max: int = 64,
    *,
    saliency: str = "inverse_entropy",
    grouping: str = "kmeans",
) -> MultimodalPipeline:
    """Return a pipeline that fuses vision and text tokens to at most `k_max` in all.

    Its projections and its fusion layer begin at random and want training with the model that reads
    the fused tokens; what is merged with what depends on the projections. To merge the image tokens
    of a trained vision-language model see `qm_spec.compression.adapters.vlm`.

    Args:
        vision_dim: of vision tokens.
        text_dim: of text tokens.
        compressed_dim: of fused tokens.
        k_max: fused tokens, of both modalities together, at least 1.
        saliency: `inverse_entropy`, `entropy`, `norm` (nearly the same for all, after the layer norm) or `learned`.
        grouping: `kmeans` or `cosine`.

    Raises:
        TypeError: `k_max` is not an integer.
        ValueError: a setting is out of range.

    Source: the `quickmergepp` README, Vision-Language; merging before fusion, by one budget, is ours.
    """
    return MultimodalPipeline(vision_dim, text_dim, compressed_dim, k_max, saliency=saliency, grouping=grouping)
