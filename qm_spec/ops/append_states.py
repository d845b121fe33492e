"""`append_states_`: fuse the target's states of new tokens, and write their keys and values into the cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qm_spec.ops.append_kv import append_kv_reference
from qm_spec.ops.draft_layer import NUM_AUX_STATES, DraftLayer
from qm_spec.ops.page import check_page

torch.library.define(
    "qm_spec::append_states_",
    "(Tensor(a!) cache, Tensor aux_states, Tensor next_ids, Tensor slots, Tensor[] weights, float eps, "
    "bool norm_aux_states) -> Tensor",
)


class StateWeights(NamedTuple):
    """What the prior reads a token with, in the order of the operator.

    Attributes:
        embedding: `[X, D]`, of each of the target's token ids.
        fc: `[D, 3 D]`.
        embed_norm: `[D]`.
        state_norm: `[D]`.
        k_proj: `[G d, D]`.
        v_proj: `[G d, D]`.
        next_proj: `[G d, D]`, or `[0, D]` where values do not tell the next token.
    """

    embedding: Tensor
    fc: Tensor
    embed_norm: Tensor
    state_norm: Tensor
    k_proj: Tensor
    v_proj: Tensor
    next_proj: Tensor


class _StateLayer(DraftLayer):
    """The part of the layer that reads a token, on plain weights."""

    def __init__(self, weights: StateWeights, eps: float, num_kv_heads: int, norm_aux_states: bool) -> None:
        self.norm_aux_states = norm_aux_states
        self.num_kv_heads, self.head_dim = num_kv_heads, len(weights.k_proj) // num_kv_heads
        self.bind(weights, eps)


def append_states_reference(
    cache: Tensor,
    aux_states: Tensor,
    next_ids: Tensor,
    slots: Tensor,
    weights: list[Tensor],
    eps: float,
    norm_aux_states: bool,
) -> Tensor:
    """Compute `append_states_` in plain PyTorch; the weights are those of `StateWeights`."""
    w = StateWeights(*(x.to(aux_states.dtype) for x in weights))
    layer = _StateLayer(w, eps, cache.shape[1], norm_aux_states)
    state = layer.fuse(aux_states)
    key, value = layer.keys_values(state, F.embedding(next_ids, w.embedding))
    append_kv_reference(cache, key, value, slots)
    return state


torch.library.impl("qm_spec::append_states_", "default", append_states_reference)


@torch.library.register_fake("qm_spec::append_states_")
def _append_states_fake(
    cache: Tensor,
    aux_states: Tensor,
    next_ids: Tensor,
    slots: Tensor,
    weights: list[Tensor],
    eps: float,
    norm_aux_states: bool,
) -> Tensor:
    return aux_states.new_empty(len(aux_states), len(weights[1]))


def append_states_(
    cache: Tensor,
    aux_states: Tensor,
    next_ids: Tensor,
    slots: Tensor,
    weights: StateWeights,
    eps: float,
    *,
    norm_aux_states: bool,
) -> Tensor:
    """Fuse the target's states of T tokens and write their keys and values into `cache`, as `append_kv_` does.

    Each weight is read once, which a decode step waits for. A prompt's many rows are better multiplied by the library.

    Args:
        cache: `[pages, G, P, C]`, changed in place; page 0 is a scratch page.
        aux_states: `[T, 3 D]`, the target's states.
        next_ids: `[T]` int32 or int64, the token after each of them.
        slots: `[T]` int64, `page * P + offset`; negative rows are padding and are not kept.
        weights: in the states' dtype; matrices may be in bfloat16, see `in_half_the_bytes` of `draft_layer.py`.
        eps: of the norms but that of the target's states.
        norm_aux_states: whether each of the target's states is normed before they are fused.

    Returns:
        The fused states `[T, D]`.

    Raises:
        TypeError: weights or numbers of another dtype.
        ValueError: shapes that do not fit each other.
    """
    hidden = len(weights.fc)
    if aux_states.ndim != 2 or aux_states.shape[1] != NUM_AUX_STATES * hidden:
        raise ValueError(
            f"append_states_: aux_states must be [T, {NUM_AUX_STATES * hidden}], got {list(aux_states.shape)}"
        )
    rows, kv_size = len(aux_states), len(weights.k_proj)
    if next_ids.shape != (rows,) or slots.shape != (rows,):
        raise ValueError(
            f"append_states_: next_ids and slots must be [{rows}], got {list(next_ids.shape)} and {list(slots.shape)}"
        )
    if slots.dtype != torch.int64:
        raise TypeError(f"append_states_: slots must be int64, got {slots.dtype}")
    if kv_size % cache.shape[1]:
        raise ValueError(f"append_states_: k_proj must have rows for {cache.shape[1]} heads, got {kv_size}")
    check_page(cache, kv_size // cache.shape[1])
    shapes = {
        "embedding": (len(weights.embedding), hidden),
        "fc": (hidden, NUM_AUX_STATES * hidden),
        "k_proj": (kv_size, hidden),
        "v_proj": (kv_size, hidden),
        "next_proj": (kv_size if len(weights.next_proj) else 0, hidden),
    }
    for name, weight in weights._asdict().items():
        shape = shapes.get(name, (hidden,))
        if weight.shape != shape:
            raise ValueError(f"append_states_: {name} must be {list(shape)}, got {list(weight.shape)}")
        if weight.dtype != aux_states.dtype and (name not in shapes or weight.dtype != torch.bfloat16):
            raise TypeError(f"append_states_: {name} must be {aux_states.dtype} as the states are, got {weight.dtype}")
    return torch.ops.qm_spec.append_states_(cache, aux_states, next_ids, slots, list(weights), eps, norm_aux_states)
