"""Drafting at many rows of whole sequences at once: what training and replay ask of a drafter.

A row is a position t that drafting starts from: the target's states up to t and the tokens up to t + 1
are known. Each step feeds a row one more token, x_{t+1} first, and predicts the one behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from qm_spec.config import MergeConfig
from qm_spec.drafter.memory import Memory, merge_levels
from qm_spec.ops.draft_attention import draft_attention

if TYPE_CHECKING:
    from qm_spec.drafter.layer import PriorLayer


class DraftRows(Protocol):
    """Rows `[B, T]` in the middle of drafting."""

    def step(self, embedding: Tensor) -> Tensor:
        """Feed each row the embedding `[B, T, D]` of its next token; return the vocabulary head's input."""
        ...

    def keep(self, columns: Tensor) -> None:
        """Go on with the rows of these columns `[B, T']` int64 alone."""
        ...


class DraftSequences(Protocol):
    """Whole sequences as a drafter has read them."""

    @property
    def num_entries(self) -> int:
        """Entries that each row's scores are computed for, masked ones included."""
        ...

    def rows(self, positions: Tensor) -> DraftRows:
        """Begin to draft at positions `[B, T]` int64; each sees what inference would hold there."""
        ...


class Drafter(Protocol):
    """A drafter checkpoint with the target's embedding and head: `QuickMergePrior` or `Eagle3Drafter`."""

    config: Any

    @property
    def draft_token_ids(self) -> Tensor | None:
        """The target's ids `[Vd]` of the tokens that it can propose; None for the whole vocabulary."""
        ...

    def read(self, aux_states: Tensor, embeddings: Tensor) -> DraftSequences:
        """Read whole sequences: the target's states `[B, N, 3 D]` and the tokens' embeddings `[B, N, D]`."""
        ...


def read_target(
    target: PreTrainedModel, input_ids: Tensor, layers: Sequence[int], **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Return the input states of the target's `layers`, side by side, and its logits.

    Args:
        target: any causal LM of transformers that returns its hidden states.
        input_ids: `[B, N]` int64.
        layers: three, as in `eagle_aux_hidden_state_layer_ids`.
        **kwargs: of the target's forward pass, e.g. `logits_to_keep`.

    Returns:
        `[B, N, 3 D]` float32 and `[B, N, V]`.
    """
    out = target(input_ids=input_ids, output_hidden_states=True, use_cache=False, **kwargs)
    return torch.cat([out.hidden_states[layer] for layer in layers], -1).float(), out.logits


def engine_steps(accepted: Sequence[int]) -> list[int]:
    """Return how many draft tokens each step of an engine accepts that would accept `accepted[i]` at position i.

    The first token comes from the prompt's own pass; each step adds what it accepted and one token more.
    """
    steps, position = [], 0
    while position < len(accepted):
        steps.append(int(accepted[position]))
        position += steps[-1] + 1
    return steps


def columns_of(x: Tensor, columns: Tensor, dim: int = 1) -> Tensor:
    """Return the entries `columns` `[B, T']` (`[B, 1, T']` for dim 2) of `x`'s dimension `dim`, row by row."""
    index = columns.view(*columns.shape, *[1] * (x.ndim - columns.ndim))
    return x.gather(dim, index.expand(*x.shape[:dim], columns.shape[-1], *x.shape[dim + 1 :]))


class PriorSequences:
    """Whole sequences in the prior's merged memory.

    Args:
        layer: the prior.
        config: the merging schedule.
        aux_states: `[B, N, 3 D]`.
        embeddings: `[B, N, D]` of the tokens; what follows the last one is taken for 0, and no row stands there.

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

    def rows(self, positions: Tensor) -> PriorRows:
        """Begin to draft at `[B, T]` int64."""
        return PriorRows(self, positions)


class PriorRows:
    """Rows of `PriorSequences` in the middle of drafting; what they draft stays out of the memory."""

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
        """Feed each row its next token `[B, T, D]`; return the vocabulary head's input `[B, T, D]`."""
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
        """Go on with the rows of these columns `[B, T']` int64 alone."""
        self.bias = columns_of(self.bias, columns.unsqueeze(1), 2)
        self.state, self.keys, self.values = (columns_of(x, columns) for x in (self.state, self.keys, self.values))
