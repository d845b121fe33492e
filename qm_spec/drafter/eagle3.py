"""EAGLE-3, the drafter that ours is compared with: a checkpoint that vLLM runs with its own code.

The arithmetic is that of vLLM's `llama_eagle3.py`: three states of the target are fused by one matrix, and one
decoder layer, whose attention reads `[norm(e(x_{t+1})); norm(f_t)]` with rotary position t, predicts x_{t+2}.

Source: EAGLE-3, Li et al. 2025, arXiv 2503.01840.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, PreTrainedModel

from qm_spec.drafter.anchors import columns_of
from qm_spec.drafter.prior_config import check_draft_vocab_size
from qm_spec.drafter.vocabulary import DraftVocabulary
from qm_spec.ops.draft_attention import draft_attention

NUM_AUX_STATES = 3
# The name by which vLLM finds its own class.
ARCHITECTURE = "LlamaForCausalLMEagle3"
# vLLM has no sinks. It does not know this name either, so it refuses such a checkpoint instead of drafting without.
SINKS_ARCHITECTURE = "LlamaForCausalLMEagle3WithSinks"


class Eagle3Config(LlamaConfig):
    """Sizes of an EAGLE-3 drafter, in vLLM's format.

    Embedding and vocabulary head are the target's: with `draft_vocab_size` equal to `vocab_size` and neither
    `lm_head`, `d2t` nor `embed_tokens` in the checkpoint, vLLM shares both. With a draft vocabulary the checkpoint
    holds `d2t` and, as `lm_head`, the target's rows of these tokens.

    vLLM runs full attention, and a sliding window by `layer_types`. It has no attention sinks, so a drafter with a
    window and sinks is measured by `bench/acceptance/replay.py` alone.

    Args:
        target_fingerprint: of the one target this drafter was trained for.
        eagle_aux_hidden_state_layer_ids: target layers whose input states are fused; vLLM's name.
        num_speculative_tokens: draft steps unrolled in training, and the default K.
        sliding_window: tokens attended, the row's own included; all of them when None.
        attention_sinks: first tokens of the sequence that stay visible behind the window.
        fc_norm: bring each of the target's states to one size before they are fused (EAGLE-3.1).
        draft_vocab_size: tokens that it can propose; None for the whole vocabulary.
        **kwargs: `LlamaConfig` settings.

    Raises:
        ValueError: settings out of range.
    """

    def __init__(
        self,
        target_fingerprint: str = "",
        eagle_aux_hidden_state_layer_ids: list[int] | None = None,
        num_speculative_tokens: int = 4,
        sliding_window: int | None = None,
        attention_sinks: int = 0,
        fc_norm: bool = False,
        draft_vocab_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        if num_speculative_tokens < 1:
            raise ValueError(f"Eagle3Config: num_speculative_tokens must be at least 1, got {num_speculative_tokens}")
        if sliding_window is not None and sliding_window < num_speculative_tokens:
            raise ValueError(
                f"Eagle3Config: sliding_window must hold the {num_speculative_tokens} drafted tokens, "
                f"got {sliding_window}; leave it out for full attention"
            )
        if attention_sinks < 0 or (attention_sinks and sliding_window is None):
            raise ValueError(
                f"Eagle3Config: attention_sinks must be at least 0 and belong to a sliding_window, "
                f"got {attention_sinks} with sliding_window={sliding_window}"
            )
        self.target_fingerprint = target_fingerprint
        self.eagle_aux_hidden_state_layer_ids = list(eagle_aux_hidden_state_layer_ids or [])
        self.num_speculative_tokens = num_speculative_tokens
        self.sliding_window = sliding_window
        self.attention_sinks = attention_sinks
        self.fc_norm = fc_norm
        if sliding_window is not None:
            kwargs["layer_types"] = ["sliding_attention"]
        kwargs.setdefault("num_hidden_layers", 1)
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
        self.architectures = [SINKS_ARCHITECTURE if attention_sinks else ARCHITECTURE]
        self.draft_vocab_size = check_draft_vocab_size("Eagle3Config", draft_vocab_size, self.vocab_size)


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Turn `[..., heads, d]` to rotary positions `[...]`, first half against second half.

    Source: RoFormer, Su et al. 2021, arXiv 2104.09864, in the order of dimensions that Llama uses.
    """
    size = x.shape[-1]
    frequency = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32, device=x.device) / size)
    angle = positions[..., None, None].float() * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Eagle3Attention(nn.Module):
    """The projections of the decoder layer's attention; queries, keys and values read `[..., 2 D]`."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.head_dim, self.theta = config.head_dim, config.rope_parameters["rope_theta"]
        inputs, query_size = 2 * config.hidden_size, config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(inputs, query_size, bias=False)
        self.k_proj = nn.Linear(inputs, kv_size, bias=False)
        self.v_proj = nn.Linear(inputs, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def query(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return rotated queries `[..., H, d]`."""
        return rotate(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), positions, self.theta)

    def keys_values(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return rotated keys and plain values `[..., G, d]`."""
        keys, values = (projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.k_proj, self.v_proj))
        return rotate(keys, positions, self.theta), values


class Eagle3MLP(nn.Module):
    """Llama's gated MLP."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., D]` to `[..., D]`."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Eagle3Layer(nn.Module):
    """The decoder layer without the attention itself; names of modules are the checkpoint's."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(size, eps)
        self.hidden_norm = nn.RMSNorm(size, eps)
        self.self_attn = Eagle3Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(size, eps)
        self.mlp = Eagle3MLP(config)

    def inputs(self, embedding: Tensor, state: Tensor) -> Tensor:
        """Return what the projections read, `[..., 2 D]`, of a token's embedding and the state before it."""
        return torch.cat([self.input_layernorm(embedding), self.hidden_norm(state)], -1)

    def finish(self, attended: Tensor, state: Tensor) -> Tensor:
        """Return the next state `[..., D]` of the attention's output `[..., H, d]` and this state."""
        state = state + self.self_attn.o_proj(attended.flatten(-2))
        return state + self.mlp(self.post_attention_layernorm(state))


class Eagle3Drafter(DraftVocabulary, PreTrainedModel):
    """EAGLE-3 as a checkpoint: `from_pretrained`, and `save_pretrained` of a folder that vLLM runs."""

    config_class = Eagle3Config
    config: Eagle3Config
    base_model_prefix = "eagle3"

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config)
        norms = [nn.RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(NUM_AUX_STATES)]
        self.fc_norm = nn.ModuleList(norms) if config.fc_norm else None
        self.fc = nn.Linear(NUM_AUX_STATES * config.hidden_size, config.hidden_size, bias=False)
        self.midlayer = Eagle3Layer(config)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.init_draft_vocabulary(config.draft_vocab_size, config.vocab_size)
        # vLLM takes the rows of a draft vocabulary from the checkpoint; here they are the target's, and not trained.
        self.lm_head = None
        if self.d2t is not None:
            self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False).requires_grad_(False)
        self.post_init()

    def read(self, aux_states: Tensor, embeddings: Tensor) -> Eagle3Sequences:
        """Read whole sequences: the target's states `[B, N, 3 D]` and the tokens' embeddings `[B, N, D]`."""
        return Eagle3Sequences(self, aux_states, embeddings)

    def fuse(self, aux_states: Tensor) -> Tensor:
        """Combine the target's auxiliary states `[..., 3 D]` into the fused state `[..., D]`."""
        if self.fc_norm is not None:
            chunks = aux_states.chunk(NUM_AUX_STATES, -1)
            aux_states = torch.cat([norm(chunk) for norm, chunk in zip(self.fc_norm, chunks, strict=True)], -1)
        return self.fc(aux_states)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save a drafter folder; its config names vLLM's class, not this one."""
        architectures = self.config.architectures
        super().save_pretrained(save_directory, **kwargs)
        self.config.architectures = architectures
        self.config.save_pretrained(save_directory)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Eagle3Layer):
            # As our prior begins: the identity on the fused state.
            nn.init.zeros_(module.self_attn.o_proj.weight)
            nn.init.zeros_(module.mlp.down_proj.weight)


class Eagle3Sequences:
    """Whole sequences as keys and values of verified tokens.

    Position t holds the state of t and the embedding of x_{t+1}, so the last token has no entry yet. Keys and
    values read no attention output, so an anchor needs no other one.

    Args:
        drafter: its weights and its window.
        aux_states: `[B, N, 3 D]`.
        embeddings: `[B, N, D]` of the tokens.

    Attributes:
        states: `[B, N, D]`, fused.
        keys: `[B, G, N - 1, d]`, rotated.
        values: `[B, G, N - 1, d]`.
    """

    def __init__(self, drafter: Eagle3Drafter, aux_states: Tensor, embeddings: Tensor) -> None:
        self.layer, self.norm, self.config = drafter.midlayer, drafter.norm, drafter.config
        self.states = drafter.fuse(aux_states)
        x = self.layer.inputs(embeddings[:, 1:], self.states[:, :-1])
        self.places = torch.arange(x.shape[1], device=x.device)
        keys, values = self.layer.self_attn.keys_values(x, self.places)
        self.keys, self.values = keys.transpose(1, 2), values.transpose(1, 2)

    @property
    def num_entries(self) -> int:
        """Verified tokens."""
        return len(self.places)

    def bias(self, newest: Tensor, position: Tensor) -> Tensor:
        """Return the mask `[B, 1, T, N - 1]`, 0 or -inf, of rows that stand some steps behind `newest`.

        Args:
            newest: `[B, T]`, the last position whose token was verified when drafting began.
            position: `[B, T]`, of the row itself.
        """
        visible = self.places <= newest.unsqueeze(-1)
        if self.config.sliding_window is not None:
            near = self.places > position.unsqueeze(-1) - self.config.sliding_window
            visible &= near | (self.places < self.config.attention_sinks)
        bias = self.keys.new_zeros(visible.shape).masked_fill(~visible, float("-inf"))
        return bias.unsqueeze(1)

    def anchors(self, positions: Tensor) -> Eagle3Anchors:
        """Begin to draft at `[B, T]` int64."""
        return Eagle3Anchors(self, positions)


class Eagle3Anchors:
    """Anchors in `Eagle3Sequences` in the middle of drafting, with keys and values of what they drafted.

    This is EAGLE-3's training-time test: later steps read the drafter's own states.
    """

    def __init__(self, sequences: Eagle3Sequences, positions: Tensor) -> None:
        self.sequences, self.positions = sequences, positions
        states, config = sequences.states, sequences.config
        self.state = columns_of(states, positions)
        self.keys = states.new_zeros(*positions.shape, 0, config.num_key_value_heads, config.head_dim)
        self.values = self.keys
        # Rotary positions are in the keys; distance adds nothing to the scores.
        self.slopes = states.new_zeros(config.num_attention_heads)
        self.num_steps = 0

    def step(self, embedding: Tensor) -> Tensor:
        """Feed each anchor its next token `[B, T, D]`; return the vocabulary head's input `[B, T, D]`."""
        sequences, layer = self.sequences, self.sequences.layer
        position = self.positions + self.num_steps
        x = layer.inputs(embedding, self.state)
        # In step 0 the row's own entry is among the verified ones.
        if self.num_steps > 0:
            own_key, own_value = layer.self_attn.keys_values(x, position)
            self.keys = torch.cat([self.keys, own_key.unsqueeze(2)], 2)
            self.values = torch.cat([self.values, own_value.unsqueeze(2)], 2)
        attended = draft_attention(
            layer.self_attn.query(x, position),
            sequences.keys,
            sequences.values,
            sequences.bias(self.positions, position),
            self.keys,
            self.values,
            self.slopes,
        )
        self.state = layer.finish(attended, self.state)
        self.num_steps += 1
        return sequences.norm(self.state)

    def keep(self, columns: Tensor) -> None:
        """Go on with the anchors of these columns `[B, T']` int64 alone."""
        self.positions = columns_of(self.positions, columns)
        self.state, self.keys, self.values = (columns_of(x, columns) for x in (self.state, self.keys, self.values))
