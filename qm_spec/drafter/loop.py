"""The draft loop: all K draft steps of a batch in one call, over the paged merged cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qm_spec.config import MergeConfig
from qm_spec.drafter.attention import draft_attention
from qm_spec.drafter.prior import PriorLayer
from qm_spec.ops import append_kv_, merge_groups_
from qm_spec.ops.entries import entry_bias, gather_entries


class DraftLoop:
    """Drafts with one gather of the merged cache for all K steps.

    The provisional keys and values of drafted tokens stay in this loop: the true ones
    come from the target's states after verification, so nothing unverified enters the cache.

    Args:
        layer: the prior.
        embed: token ids `[B]` to embeddings `[B, D]`.
        compute_logits: `[B, D]` to logits `[B, V]`.
        config: the merging schedule.
    """

    def __init__(
        self,
        layer: PriorLayer,
        embed: Callable[[Tensor], Tensor],
        compute_logits: Callable[[Tensor], Tensor],
        config: MergeConfig,
    ) -> None:
        self.layer = layer
        self.embed = embed
        self.compute_logits = compute_logits
        self.config = config

    def remember(self, cache: Tensor, states: Tensor, slots: Tensor) -> None:
        """Write the keys and values of fused states into the cache.

        Args:
            cache: `[pages, G, P, C]`, changed in place.
            states: `[T, D]`.
            slots: `[T]` int64; negative rows are padding.
        """
        keys, values = self.layer.keys_values(states)
        append_kv_(cache, keys, values, slots)

    def draft(
        self,
        cache: Tensor,
        block_table: Tensor,
        num_tokens: Tensor,
        state: Tensor,
        next_ids: Tensor,
        num_drafts: int,
        sample: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Merge what has grown old, then draft.

        Args:
            cache: `[pages, G, P, C]`, holding the verified tokens; changed in place by merging.
            block_table: `[B, columns]` int32.
            num_tokens: `[B]` int32, verified tokens in the cache.
            state: `[B, D]`, fused state of the newest of them.
            next_ids: `[B]`, the token that follows it.
            num_drafts: K.
            sample: logits `[B, V]` to token ids `[B]`.

        Returns:
            `[B, K]` token ids.
        """
        layer = self.layer
        merge_groups_(cache, block_table, num_tokens, layer.head_dim, self.config)
        entries = gather_entries(cache, block_table, num_tokens, layer.head_dim, self.config)
        row = (num_tokens.long() - 1).unsqueeze(1)
        bias = entry_bias(entries, row, layer.slopes.float(), layer.far_bias.float())
        raw_slopes = layer.slopes.float().view(-1, 1, 1) * entries.raw[:, None, None]
        keys, values = entries.keys.to(state.dtype), entries.values.to(state.dtype)

        shape = (len(state), 1, num_drafts - 1, layer.num_kv_heads, layer.head_dim)
        draft_keys, draft_values = state.new_empty(shape), state.new_empty(shape)
        token_ids, drafted = next_ids, []
        for step in range(num_drafts):
            if step > 0:
                own_key, own_value = layer.keys_values(state)
                draft_keys[:, 0, step - 1], draft_values[:, 0, step - 1] = own_key, own_value
                bias = bias - raw_slopes
            query, residual = layer.query(self.embed(token_ids), state)
            attended = draft_attention(
                query.unsqueeze(1),
                keys,
                values,
                bias.to(state.dtype),
                draft_keys[:, :, :step],
                draft_values[:, :, :step],
                layer.slopes,
            )
            output, state = layer.finish(attended.squeeze(1), residual)
            token_ids = sample(self.compute_logits(output))
            drafted.append(token_ids)
        return torch.stack(drafted, dim=1)
