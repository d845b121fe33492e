"""Language models: key-value caches and hidden states with fewer tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qm_spec.compression.kv_merging import KeyValueEntries, KeyValueMerger
from qm_spec.compression.rotary import Rotary
from qm_spec.compression.sizes import compression_report
from qm_spec.compression.token_compressor import TokenCompressor, merge_info
from qm_spec.quickmerge.inputs import check_tokens, full_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qm_spec.compression.kv_cache import QuickMergeCache


@dataclass(frozen=True)
class MergedKeyValue:
    """Keys and values of fewer entries; shorter sequences have empty slots in front.

    Attributes:
        key: `[B, K, H, D]`, 0 in empty slots.
        value: `[B, K, H, D']`.
        size: `[B, K, H]` float32, tokens in each entry; they sum to the sequence's tokens.
        place: `[B, K, H]` int64, position of each entry, rising.
        cluster: `[B, S, H]` int64, the slot of each token, -1 at padding.
        mask: `[B, K]` bool, False at empty slots.
        info: `compression_report` of keys and values together.
    """

    key: Tensor
    value: Tensor
    size: Tensor
    place: Tensor
    cluster: Tensor
    mask: Tensor
    info: dict[str, Any]

    @property
    def log_size(self) -> Tensor:
        """`[B, H, 1, K]` float32 to add to attention scores, so that n merged tokens weigh like n; -inf if empty."""
        return self.size.log().permute(0, 2, 1).unsqueeze(2)


class LLMPipeline(nn.Module):
    """Compress what a language model holds; see `create_llm_pipeline`."""

    def __init__(
        self,
        model_dim: int,
        k_max: int,
        *,
        saliency: str = "inverse_entropy",
        grouping: str = "kmeans",
        merger: KeyValueMerger | None = None,
    ) -> None:
        super().__init__()
        if isinstance(k_max, bool) or not isinstance(k_max, int):
            raise TypeError(f"create_llm_pipeline: k_max must be an integer, got {k_max!r}")
        if k_max < 1:
            raise ValueError(f"create_llm_pipeline: k_max must be at least 1, got {k_max}")
        self.k_max = k_max
        self.hidden = TokenCompressor(model_dim, saliency=saliency, grouping=grouping, causal=True)
        self._given_merger = merger
        self.merger = merger or KeyValueMerger()

    def compress_kv_cache(self, key: Tensor, value: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return keys and values of `min(k_max, S)` entries; see `merge_kv_cache` for all there is to know."""
        merged = self.merge_kv_cache(key, value, token_mask)
        return merged.key, merged.value

    def merge_kv_cache(self, key: Tensor, value: Tensor, token_mask: Tensor | None = None) -> MergedKeyValue:
        """Merge keys and values by one assignment for both, found on the keys, head by head.

        Args:
            key: `[B, S, H, D]`, any float dtype; rotated, if the merger has a `rotary`.
            value: `[B, S, H, D']`.
            token_mask: `[B, S]` bool, True = token.

        Raises:
            TypeError: keys or values are not floats.
            ValueError: shapes that do not fit.
        """
        if key.ndim != 4 or value.ndim != 4 or key.shape[:3] != value.shape[:3]:
            raise ValueError(
                "merge_kv_cache: key and value must be [B, S, H, D] of the same B, S and H, "
                f"got {list(key.shape)} and {list(value.shape)}"
            )
        batch, num_tokens, heads = key.shape[:3]
        # One row per head of each sequence.
        keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (key, value))
        check_tokens("merge_kv_cache", keys)
        check_tokens("merge_kv_cache", values)
        mask = full_mask("merge_kv_cache", key[:, :, 0, 0], token_mask)
        rows = mask.repeat_interleave(heads, dim=0)
        # Padding may hold NaN, and a weight of 0 would not silence that.
        keys = keys.masked_fill(~rows.unsqueeze(-1), 0.0)
        position = torch.arange(num_tokens, device=key.device).expand_as(rows)
        entries = KeyValueEntries(keys, values, torch.zeros_like(rows, dtype=torch.float32), rows.float(), position)
        with torch.autocast(key.device.type, enabled=False):
            merged, cluster = self.merger(entries, rows, torch.full_like(position[:, 0], self.k_max))

        def by_token(x: Tensor) -> Tensor:
            return x.unflatten(0, (batch, heads)).transpose(1, 2)

        size = by_token(merged.size)
        live = size[:, :, 0] > 0
        new_key, new_value = by_token(merged.keys), by_token(merged.values)
        info = compression_report([key, value], [new_key, new_value], mask.sum(-1), live.sum(-1))
        place, cluster = by_token(merged.position), by_token(cluster)
        return MergedKeyValue(new_key, new_value, size, place, cluster, live, info)

    def compress_hidden_states(
        self, hidden_states: Tensor, token_mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Merge hidden states to `min(k_max, S)`, in an order that a decoder can read from left to right.

        No merged state holds a token later than its place.

        Args:
            hidden_states: `[B, S, model_dim]`, any float dtype.
            token_mask: `[B, S]` bool, True = token.

        Returns:
            `[B, min(k_max, S), model_dim]`, and `merge_info`.

        Raises:
            TypeError: states are not floats.
            ValueError: shapes that do not fit.
        """
        merged = self.hidden(hidden_states, self.k_max, token_mask)
        return merged.tokens, merge_info(hidden_states, merged)

    def make_cache(
        self,
        model: PreTrainedModel,
        *,
        window: int = 128,
        sinks: int = 4,
        attention_mask: Tensor | None = None,
        proportional: bool = False,
    ) -> QuickMergeCache:
        """Make a cache of this pipeline's `k_max` for `model.generate(past_key_values=cache)`.

        A merger that the pipeline was given is taken, with the model's own rotation. For the
        arguments and errors see `qm_spec.compression.kv_cache.QuickMergeCache`; needs transformers.
        """
        from qm_spec.compression.kv_cache import QuickMergeCache

        return QuickMergeCache(
            model,
            k_max=self.k_max,
            window=window,
            sinks=sinks,
            attention_mask=attention_mask,
            merger=self._given_merger and replace(self._given_merger, rotary=Rotary.from_model(model)),
            proportional=proportional,
        )


def create_llm_pipeline(
    model_dim: int = 4096,
    k_max: int = 128,
    *,
    saliency: str = "inverse_entropy",
    grouping: str = "kmeans",
    merger: KeyValueMerger | None = None,
) -> LLMPipeline:
    """Return a pipeline that compresses key-value caches and hidden states to `k_max` tokens.

    It has no parameters. What a merge costs depends on the model; `docs/results/pipelines.md` has
    measurements.

    Args:
        model_dim: of hidden states.
        k_max: tokens kept per sequence, at least 1; above N all stay as they are.
        saliency: of hidden states, `inverse_entropy`, `entropy`, `norm` or `learned`.
        grouping: of hidden states, `kmeans` or `cosine`.
        merger: of keys and values; None takes `KeyValueMerger()`, for keys before rotation. For
            rotated ones give `KeyValueMerger(rotary=Rotary.from_model(model))`.

    Raises:
        TypeError: `k_max` is not an integer.
        ValueError: a setting is out of range.

    Source: the `quickmergepp` README, LLM Optimizations.
    """
    return LLMPipeline(model_dim, k_max, saliency=saliency, grouping=grouping, merger=merger)
