"""The draft loop: all K draft steps of a batch in one call, over the paged merged cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qm_spec.config import MergeConfig
from qm_spec.drafter.layer import PriorLayer
from qm_spec.ops import append_kv_, merge_groups_
from qm_spec.ops.append_states import StateWeights
from qm_spec.ops.draft_tokens import DraftWeights, draft_steps
from qm_spec.ops.entries import gather_entries


def dense_weights(layer: PriorLayer, embedding: Tensor, head: Tensor, token_ids: Tensor | None = None) -> DraftWeights:
    """Return what `draft_tokens` needs of a prior on one rank and of its target's embedding and head.

    Args:
        layer: the prior.
        embedding: `[X, D]`.
        head: `[Vd, D]`, contiguous.
        token_ids: `[Vd]` int64 of the head's rows; None where they are the whole vocabulary.
    """
    # Between the target's two and the biases of the heads the fields are the layer's own modules.
    nothing = layer.slopes.new_empty(0, embedding.shape[1])
    modules = [getattr(layer, name) for name in DraftWeights._fields[2:-3]]
    own = [nothing if module is None else module.weight for module in modules]
    ids = head.new_empty(0, dtype=torch.int64) if token_ids is None else token_ids
    return DraftWeights._make([embedding, head, *own, layer.slopes, layer.far_bias, ids])


def state_weights(layer: PriorLayer, embedding: Tensor) -> StateWeights:
    """Return what `append_states_` needs of a prior on one rank and of its target's embedding `[X, D]`."""
    modules = [getattr(layer, name) for name in StateWeights._fields[1:]]
    nothing = layer.slopes.new_empty(0, embedding.shape[1])
    return StateWeights(embedding, *(nothing if module is None else module.weight for module in modules))


class DraftLoop:
    """Drafts with one gather of the merged cache for all K steps, for any target and any way to sample.

    Where the target's embedding and head are plain weights, `draft_tokens` does the same in one operator.

    The provisional keys and values of drafted tokens stay in this loop: the true ones
    come from the target's states after verification, so nothing unverified enters the cache.

    Args:
        layer: the prior.
        embed: token ids `[n]` to embeddings `[n, D]`.
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

    def remember(self, cache: Tensor, states: Tensor, next_ids: Tensor, slots: Tensor) -> None:
        """Write the keys and values of fused states into the cache.

        Args:
            cache: `[pages, G, P, C]`, changed in place.
            states: `[T, D]`.
            next_ids: `[T]`, the token after each of them.
            slots: `[T]` int64; negative rows are padding.
        """
        # Prompts are long: nothing is looked up for a prior that would not read it.
        following = states if self.layer.next_proj is None else self.embed(next_ids)
        keys, values = self.layer.keys_values(states, following)
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
        merge_groups_(cache, block_table, num_tokens, self.layer.head_dim, self.config)
        entries = gather_entries(cache, block_table, num_tokens, self.layer.head_dim, self.config)
        return draft_steps(
            self.layer, self.embed, self.compute_logits, sample, entries, num_tokens, state, next_ids, num_drafts
        )
