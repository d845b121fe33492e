"""Diffusion models: text embeddings and UNet features with fewer tokens, and the way back."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qm_spec.compression.token_compressor import TokenCompressor, merge_info
from qm_spec.quickmerge.merging import unmerge


class DiffusionPipeline(nn.Module):
    """Compress what a diffusion model reads; see `create_diffusion_pipeline`."""

    def __init__(
        self, unet_dim: int, text_dim: int, k_max: int, *, saliency: str = "inverse_entropy", grouping: str = "kmeans"
    ) -> None:
        super().__init__()
        if isinstance(k_max, bool) or not isinstance(k_max, int):
            raise TypeError(f"create_diffusion_pipeline: k_max must be an integer, got {k_max!r}")
        if k_max < 1:
            raise ValueError(f"create_diffusion_pipeline: k_max must be at least 1, got {k_max}")
        self.k_max = k_max
        self.text = TokenCompressor(text_dim, saliency=saliency, grouping=grouping)
        self.unet = TokenCompressor(unet_dim, saliency=saliency, grouping=grouping)

    def compress_text_embeddings(
        self, text_embeddings: Tensor, token_mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Merge a prompt's embeddings, which cross-attention reads as a set, to `min(k_max, N)`.

        Args:
            text_embeddings: `[B, N, text_dim]`, any float dtype.
            token_mask: `[B, N]` bool, True = token.

        Returns:
            `[B, min(k_max, N), text_dim]`, and `merge_info`.

        Raises:
            TypeError: embeddings are not floats.
            ValueError: shapes that do not fit.
        """
        merged = self.text(text_embeddings, self.k_max, token_mask)
        return merged.tokens, merge_info(text_embeddings, merged)

    def compress_unet_features(self, features: Tensor, keep: int | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Merge a UNet block's features to K tokens; `restore_unet_features` is the way back.

        Args:
            features: `[B, unet_dim, H, W]`, or `[B, N, unet_dim]`; any float dtype.
            keep: K, at least 1; None takes `k_max`. Features want a K in proportion to H W.

        Returns:
            `[B, min(K, N), unet_dim]`, and `merge_info` with `shape`, that of the features.

        Raises:
            TypeError: features are not floats.
            ValueError: shapes that do not fit.
        """
        if features.ndim not in (3, 4):
            raise ValueError(
                f"compress_unet_features: features must be [B, C, H, W] or [B, N, C], got {list(features.shape)}"
            )
        tokens = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features
        merged = self.unet(tokens, self.k_max if keep is None else keep)
        return merged.tokens, {**merge_info(tokens, merged), "shape": features.shape}

    def restore_unet_features(self, values: Tensor, info: dict[str, Any]) -> Tensor:
        """Give each place of the features the value of its merged token.

        Args:
            values: `[B, K, C]`, merged tokens or what a block made of them; C may have changed.
            info: from `compress_unet_features`.

        Returns:
            `[B, C, H, W]` or `[B, N, C]`, as the features were.

        Raises:
            ValueError: values are not of `[B, K, ...]` that `info` belongs to.
        """
        if values.ndim != 3 or values.shape[:2] != info["mask"].shape:
            raise ValueError(
                f"restore_unet_features: values must be {[*info['mask'].shape, 'C']}, got {list(values.shape)}"
            )
        tokens = unmerge(values, info["assignments"])
        if len(info["shape"]) == 3:
            return tokens
        return tokens.transpose(1, 2).unflatten(2, info["shape"][2:])


def create_diffusion_pipeline(
    unet_dim: int = 768,
    text_dim: int = 512,
    k_max: int = 32,
    *,
    saliency: str = "inverse_entropy",
    grouping: str = "kmeans",
) -> DiffusionPipeline:
    """Return a pipeline that compresses text embeddings and UNet features to `k_max` tokens.

    It has no parameters, but for saliency `learned`. For a whole pipeline of the diffusers library
    see `qm_spec.compression.adapters.diffusers`.

    Args:
        unet_dim: channels of the features.
        text_dim: of text embeddings.
        k_max: tokens kept per sequence, at least 1; above N all stay as they are.
        saliency: `inverse_entropy`, `entropy`, `norm` or `learned`.
        grouping: `kmeans` or `cosine`.

    Raises:
        TypeError: `k_max` is not an integer.
        ValueError: a setting is out of range.

    Source: the `quickmergepp` README, Diffusion Models; the way back after ToMe for Stable Diffusion,
    arXiv 2303.17604.
    """
    return DiffusionPipeline(unet_dim, text_dim, k_max, saliency=saliency, grouping=grouping)
