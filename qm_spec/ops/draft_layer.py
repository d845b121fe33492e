"""The arithmetic of the prior's layer, for weights that are modules and for weights that are tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

NUM_AUX_STATES = 3
# Of the norm of the target's states, whose sizes differ from layer to layer.
AUX_STATE_EPS = 1e-6

Weights = TypeVar("Weights", bound=NamedTuple)


@torch.no_grad()
def in_half_the_bytes(weights: Weights) -> Weights:
    """Return the same weights, with a float32 matrix in bfloat16 where that holds it exactly.

    A step takes as long as its weights take to read. The checkpoints of targets in bfloat16 are such. The embedding, of
    which single rows are read, stays the target's own.
    """

    def halved(name: str, weight: Tensor) -> Tensor:
        if name == "embedding" or weight.dtype != torch.float32 or weight.dim() != 2:
            return weight
        half = weight.bfloat16()
        return half if torch.equal(half.float(), weight) else weight

    return weights._make(halved(name, weight) for name, weight in weights._asdict().items())


class DraftLayer:
    """The prior without attention: what a draft step computes before and after it.

    A draft step at position t reads the state `f_t` and the next token's embedding `e(x_{t+1})`, and predicts
    `x_{t+2}`. Keys come from `f_t` alone, values from both or from `f_t` alone, so a prompt costs small projections
    per token; everything else runs only at the rows that are sampled from.

    Attributes:
        num_heads: H.
        num_kv_heads: G.
        head_dim: d.
        norm_aux_states: whether each of the target's states is normed before they are fused.
        slopes: `[H]`, bias per token of distance.
        far_bias: `[H]`, bias of merged entries.
        embed_norm: `[..., D]` to `[..., D]`, as the other norms.
        next_proj: None where values do not tell the next token.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_aux_states: bool
    slopes: Tensor
    far_bias: Tensor
    fc: Callable[[Tensor], Tensor]
    embed_norm: Callable[[Tensor], Tensor]
    state_norm: Callable[[Tensor], Tensor]
    in_proj: Callable[[Tensor], Tensor]
    q_proj: Callable[[Tensor], Tensor]
    k_proj: Callable[[Tensor], Tensor]
    v_proj: Callable[[Tensor], Tensor]
    next_proj: Callable[[Tensor], Tensor] | None
    o_proj: Callable[[Tensor], Tensor]
    mlp_norm: Callable[[Tensor], Tensor]
    gate_proj: Callable[[Tensor], Tensor]
    up_proj: Callable[[Tensor], Tensor]
    down_proj: Callable[[Tensor], Tensor]
    norm: Callable[[Tensor], Tensor]

    def bind(self, weights: Any, eps: float) -> None:
        """Make norms and projections of the weights of a named tuple that are called so.

        Args:
            weights: in any one dtype; a projection without rows is none.
            eps: of the norms.
        """
        for name, weight in weights._asdict().items():
            if name.endswith("norm"):
                setattr(self, name, partial(F.rms_norm, normalized_shape=weight.shape, weight=weight, eps=eps))
            elif name == "fc" or name.endswith("proj"):
                setattr(self, name, partial(F.linear, weight=weight) if len(weight) else None)

    def fuse(self, aux_states: Tensor) -> Tensor:
        """Combine the target's auxiliary states `[..., 3 D]` into the fused state `[..., D]`."""
        if self.norm_aux_states:
            states = aux_states.unflatten(-1, (NUM_AUX_STATES, -1))
            aux_states = F.rms_norm(states, states.shape[-1:], eps=AUX_STATE_EPS).flatten(-2)
        return self.fc(aux_states)

    def keys_values(self, state: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Return unrotated keys and values `[..., G, d]`.

        Args:
            state: `[..., D]`, as in `query`.
            embedding: `[..., D]` of the token after the state's position; not read without `next_proj`.
        """
        x = self.state_norm(state)
        shape = (*state.shape[:-1], self.num_kv_heads, self.head_dim)
        value = self.v_proj(x)
        if self.next_proj is not None:
            value = value + self.next_proj(self.embed_norm(embedding))
        return self.k_proj(x).view(shape), value.view(shape)

    def query(self, embedding: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Begin a draft step: return its queries `[..., H, d]` and its residual stream `[..., D]`.

        Args:
            embedding: `[..., D]` of the token after the state's position.
            state: `[..., D]`, fused at draft step 0, the prior's own output later.
        """
        x = torch.cat([self.embed_norm(embedding), self.state_norm(state)], dim=-1)
        query = self.q_proj(x).view(*state.shape[:-1], self.num_heads, self.head_dim)
        return query, state + self.in_proj(x)

    def finish(self, attended: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """End a draft step: return the vocabulary head's input and the state for the next one.

        Args:
            attended: `[..., H, d]`, the attention's output.
            residual: `[..., D]`, from `query`.

        Returns:
            Two tensors `[..., D]`: the normed state and the state itself.
        """
        state = residual + self.o_proj(attended.flatten(-2))
        x = self.mlp_norm(state)
        state = state + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.norm(state), state
