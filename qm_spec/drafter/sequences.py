"""Whole sequences as the prior reads them, and drafting at many anchors in them at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qm_spec.config import MergeConfig
from qm_spec.drafter.anchors import columns_of
from qm_spec.drafter.layer import PriorLayer
from qm_spec.drafter.memory import Memory, merge_levels
from qm_spec.ops.draft_attention import draft_attention


class PriorSequences:
    """Whole sequences in the prior's merged memory.

    Args:
        layer: the prior.
        config: the merging schedule.
        aux_states: `[B, N, 3 D]`.
        embeddings: `[B, N, D]` of the tokens; what follows the last one is taken for 0, and no anchor stands there.

    Attributes:
        states: `[B, N, D]`, fused.
        memory: raw and merged entries with their mask.
    """

    def __init__(self, layer: PriorLayer, config: MergeConfig, aux_states: Tensor, embeddings: Tensor) -> None:
        self.layer = layer
        self.states = layer.fuse(aux_states)
        following = F.pad(embeddings[:, 1:], (0, 0, 0, 1))
        keys, values = (x.transpose(1, 2) for x in layer.keys_values(self.states, following))
        self.memory = Memory.build(keys, values, merge_levels(keys, values, config), config)

    @property
    def num_entries(self) -> int:
        """Raw tokens and the merged entries of every level."""
        return len(self.memory.group)

    def anchors(self, positions: Tensor) -> PriorAnchors:
        """Begin to draft at `[B, T]` int64."""
        return PriorAnchors(self, positions)


class PriorAnchors:
    """Anchors in `PriorSequences` in the middle of drafting; what they draft stays out of the memory."""

    def __init__(self, sequences: PriorSequences, positions: Tensor) -> None:
        layer, memory = sequences.layer, sequences.memory
        self.layer, self.entries = layer, memory.entries
        self.bias = memory.bias(positions, layer.slopes, layer.far_bias)
        self.raw_slopes = layer.slopes.view(-1, 1, 1) * memory.entries.raw[:, None, None]
        states = sequences.states
        self.state = columns_of(states, positions)
        self.keys = states.new_zeros(*positions.shape, 0, layer.num_kv_heads, layer.head_dim)
        self.values = self.keys
        self.num_steps = 0

    def step(self, embedding: Tensor) -> Tensor:
        """Feed each anchor its next token `[B, T, D]`; return the vocabulary head's input `[B, T, D]`."""
        layer = self.layer
        if self.num_steps > 0:
            own_key, own_value = layer.keys_values(self.state, embedding)
            self.keys = torch.cat([self.keys, own_key.unsqueeze(2)], 2)
            self.values = torch.cat([self.values, own_value.unsqueeze(2)], 2)
        query, residual = layer.query(embedding, self.state)
        attended = draft_attention(
            query,
            self.entries.keys,
            self.entries.values,
            self.bias - self.num_steps * self.raw_slopes,
            self.keys,
            self.values,
            layer.slopes,
        )
        output, self.state = layer.finish(attended, residual)
        self.num_steps += 1
        return output

    def keep(self, columns: Tensor) -> None:
        """Go on with the anchors of these columns `[B, T']` int64 alone."""
        self.bias = columns_of(self.bias, columns.unsqueeze(1), 2)
        self.state, self.keys, self.values = (columns_of(x, columns) for x in (self.state, self.keys, self.values))
