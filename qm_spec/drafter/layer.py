"""The prior's layer as a module: what training and checkpoints hold of it, and where its heads begin."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from qm_spec.drafter.prior_config import QuickMergeConfig
from qm_spec.ops.draft_layer import NUM_AUX_STATES, DraftLayer

# How the global heads begin, see `wire_recall`: the query that looks for the newest token, against keys of unit size
# per element; what the state adds to it; and what is found, against the residual stream.
RECALL_SHARPNESS = 3.0
RECALL_DOUBT = 0.3
RECALL_STRENGTH = 1.0


class LinearFactory(Protocol):
    """Makes a bias-free linear layer; `split` says how tensor parallelism may cut it."""

    def __call__(self, inputs: int, outputs: int, split: str, name: str) -> nn.Module:
        """Return the layer. `split` is `column`, `row` or `none`."""
        ...


def plain_linear(inputs: int, outputs: int, split: str, name: str) -> nn.Module:  # noqa: ARG001 - a LinearFactory
    """Make an uncut `nn.Linear`."""
    return nn.Linear(inputs, outputs, bias=False)


class PriorLayer(nn.Module, DraftLayer):
    """The prior without its target: fusion, projections, MLP and norms, but no attention.

    Args:
        config: sizes; `num_attention_heads` and `num_key_value_heads` are the whole model's.
        linear: makes the projections; vLLM passes its tensor-parallel ones.
        shards: tensor-parallel ranks that the heads are spread over.
        prefix: of the layers' names.
    """

    def __init__(
        self,
        config: QuickMergeConfig,
        linear: LinearFactory = plain_linear,
        shards: int = 1,
        prefix: str = "",
    ) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.head_dim = config.head_dim
        self.norm_aux_states = config.norm_aux_states
        self.num_heads = config.num_attention_heads // shards
        self.num_kv_heads = max(1, config.num_key_value_heads // shards)
        query_size = config.num_attention_heads * config.head_dim
        kv_size = max(config.num_key_value_heads, shards) * config.head_dim

        def make(name: str, inputs: int, outputs: int, split: str) -> nn.Module:
            return linear(inputs, outputs, split, f"{prefix}{name}")

        self.fc = make("fc", NUM_AUX_STATES * hidden, hidden, "none")
        self.embed_norm = nn.RMSNorm(hidden, eps)
        self.state_norm = nn.RMSNorm(hidden, eps)
        self.in_proj = make("in_proj", 2 * hidden, hidden, "none")
        self.q_proj = make("q_proj", 2 * hidden, query_size, "column")
        self.k_proj = make("k_proj", hidden, kv_size, "column")
        self.v_proj = make("v_proj", hidden, kv_size, "column")
        self.next_proj = make("next_proj", hidden, kv_size, "column") if config.next_token_values else None
        self.o_proj = make("o_proj", query_size, hidden, "row")
        self.mlp_norm = nn.RMSNorm(hidden, eps)
        self.gate_proj = make("gate_proj", hidden, config.intermediate_size, "column")
        self.up_proj = make("up_proj", hidden, config.intermediate_size, "column")
        self.down_proj = make("down_proj", config.intermediate_size, hidden, "row")
        self.norm = nn.RMSNorm(hidden, eps)
        self.slopes = nn.Parameter(torch.empty(self.num_heads))
        self.far_bias = nn.Parameter(torch.empty(self.num_heads))
        self.reset_biases(config.merge.window)

    @torch.no_grad()
    def reset_biases(self, window: int) -> None:
        """Spread the heads from local to global, as ALiBi does; far entries start at the window's edge."""
        heads = torch.arange(1, self.num_heads + 1)
        self.slopes.copy_(2.0 ** (-8.0 * heads / self.num_heads))
        # A steep head would give far entries no weight, and so no gradient to change that.
        self.far_bias.copy_((-self.slopes * window).clamp_min(-4.0))

    @torch.no_grad()
    def wire_recall(self) -> None:
        """Begin with global heads that look for the newest token and copy what followed it.

        The first of the fused states must be the target's embedding. Attention to the same token earlier, over
        values that tell the next token, is an induction head in one layer (Olsson et al. 2022, "In-context learning
        and induction heads"). Training finds this very late, and what else makes a place the right one soon.
        """
        weight = dict(self.named_parameters())
        hidden, head_dim = len(weight["fc.weight"]), self.head_dim
        # Of the last key/value head the half that looks furthest.
        heads = (self.num_heads // self.num_kv_heads + 1) // 2
        size = heads * head_dim
        key_of_embedding = weight["k_proj.weight"][-head_dim:] @ weight["fc.weight"][:, :hidden]
        query = weight["q_proj.weight"][-size:]
        query[:, :hidden] = RECALL_SHARPNESS * key_of_embedding.repeat(heads, 1)
        query[:, hidden:] *= RECALL_DOUBT
        value = weight["next_proj.weight"][-head_dim:]
        weight["o_proj.weight"][:, -size:] = RECALL_STRENGTH * value.T.repeat(1, heads)
