"""A causal LM of transformers as the target: its key/value cache, and the states that a prior reads."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Settings of a generation config that change logits, and those that change them for sampling only.
_PROCESSORS = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
    "min_length",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "repetition_penalty",
    "sequence_bias",
    "suppress_tokens",
)
_SAMPLING = ("epsilon_cutoff", "eta_cutoff", "min_p", "top_k", "top_p", "typical_p")


class CachedTarget:
    """Reads each token of a sequence once.

    Args:
        model: a decoder-only model of transformers.
        aux_layers: layers whose input states the drafter reads, `hidden_states` indices.

    Raises:
        ValueError: the model generates no text, has an encoder, or keeps a state that cannot be
            taken back (recurrent layers, linear attention).
    """

    def __init__(self, model: PreTrainedModel, aux_layers: Sequence[int]) -> None:
        check_model(model)
        self.module = model
        self.aux_layers = tuple(aux_layers)
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        self.options = inspect.signature(model.forward).parameters.keys()

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.module.get_input_embeddings().weight.device

    def start(self, batch: int, capacity: int, hidden_states: Tensor | None) -> CachedRun:
        """Begin a call with an empty cache; it grows as it needs.

        Raises:
            ValueError: encoder states are given, which a decoder-only model has no use for.
        """
        if hidden_states is not None:
            raise ValueError(
                "generate: hidden_states must be None for a transformers model, whose own states the drafter reads, "
                f"got {list(hidden_states.shape)}; leave them out"
            )
        return CachedRun(self, batch)


class CachedRun:
    """The caches of one call's rows.

    Rows accept different numbers of tokens, so their lengths differ. They stand in the cache with
    their ends together and padding in front, which is moved when rejected tokens are dropped: the
    distance between two slots of a row is the distance of their tokens, as sliding windows need it.
    Layers that look back a window keep all their slots: a window that has moved on could not be
    moved back.
    """

    def __init__(self, target: CachedTarget, batch: int) -> None:
        self.target = target
        self.cache = DynamicCache()
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=target.device)
        self.num_slots = 0

    def read(self, token_ids: Tensor, columns: Tensor | None = None, states: bool = True) -> tuple[Tensor, Tensor]:
        """Run the target on the next tokens of each row; `keep` says afterwards which of them stay.

        Args:
            token_ids: `[B, n]` int64, any padding behind a row's own tokens.
            columns: `[B]`, the one column of each row whose logits are wanted; None wants all.
            states: whether auxiliary states are wanted.

        Returns:
            logits `[B, n, V]`, or `[B, 1, V]` at `columns`; auxiliary states `[B, n, A D]`, A = 0
            where none are wanted.
        """
        num_new = token_ids.shape[1]
        offset = torch.arange(num_new, device=token_ids.device)
        options: dict[str, Any] = {}
        if "position_ids" in self.target.options:
            options["position_ids"] = self.lengths.unsqueeze(1) + offset
        if columns is not None and "logits_to_keep" in self.target.options:
            # A prompt's logits at every position would outweigh the model's own activations.
            offset = torch.unique(columns)
            options["logits_to_keep"] = offset
        out = self.target.module(
            input_ids=token_ids,
            attention_mask=self._mask(num_new),
            past_key_values=self.cache,
            use_cache=True,
            output_hidden_states=states,
            **options,
        )
        logits = out.logits.to(self.target.device)
        if columns is not None:
            place = torch.searchsorted(offset, columns)
            logits = logits[torch.arange(len(columns), device=logits.device), place].unsqueeze(1)
        layers = self.target.aux_layers if states else ()
        if not layers:
            return logits, logits.new_empty(*token_ids.shape, 0)
        return logits, torch.cat([out.hidden_states[layer].to(self.target.device) for layer in layers], -1)

    def keep(self, counts: Tensor) -> None:
        """Keep the first `counts` `[B]` of the tokens just read, and drop the others from the cache."""
        self.lengths = self.lengths + counts
        # One look at the device for all that the host must know.
        longest, least, most = torch.stack([self.lengths.max(), counts.min(), counts.max()]).tolist()
        first = self.num_slots - longest
        if least == most:
            begin, end = first + most, self.num_slots + most
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, begin:end], layer.values[:, :, begin:end]
        else:
            slots = torch.arange(longest, device=counts.device) + first + counts.unsqueeze(1)
            # Slots before a row's first token are masked; any content does.
            slots = slots.clamp_min(0)[:, None, :, None]
            for layer in self.cache.layers:
                layer.keys, layer.values = _take(layer.keys, slots), _take(layer.values, slots)
        self.num_slots = longest

    def select(self, rows: Tensor) -> None:
        """Keep only these rows `[n]`."""
        self.lengths = self.lengths[rows]
        for layer in self.cache.layers:
            layer.keys, layer.values = (
                layer.keys[rows.to(layer.keys.device)],
                layer.values[rows.to(layer.values.device)],
            )

    def _mask(self, num_new: int) -> Tensor | None:
        """Return `[B, slots + n]`, 0 at the padding in front, or None where there is none."""
        padding = self.num_slots - self.lengths
        if not bool(padding.any()):
            return None
        slots = torch.arange(self.num_slots + num_new, device=self.lengths.device)
        return (slots >= padding.unsqueeze(1)).long()


def _take(states: Tensor, slots: Tensor) -> Tensor:
    """Return `states[b, h, slots[b]]` of `[B, H, S, d]` for slots `[B, 1, n, 1]`."""
    return states.gather(2, slots.to(states.device).expand(-1, states.shape[1], -1, states.shape[3]))


def unapplied_settings(model: PreTrainedModel, sampling: bool) -> dict[str, Any]:
    """Return what the model's generation config says that a decoder from logits alone does not follow.

    Args:
        model: of transformers.
        sampling: whether tokens are sampled.
    """
    names = _PROCESSORS + (_SAMPLING if sampling else ())
    values = {name: getattr(model.generation_config, name, None) for name in names}
    # 0 and 1 are what these settings are when they do nothing.
    return {name: value for name, value in values.items() if value is not None and value not in (0, 1, [])}


def check_model(model: PreTrainedModel) -> None:
    """Refuse a model of transformers that cannot be decoded speculatively.

    Raises:
        ValueError: see `CachedTarget`.
    """
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"create_speculative_decoder: target_model must be decoder-only, got the encoder-decoder {name}; "
            "wrap it in an nn.Module that returns logits from token ids and encoder_hidden_states"
        )
    if not model.can_generate() or model.get_output_embeddings() is None:
        raise ValueError(
            f"create_speculative_decoder: target_model must be a causal LM, got {name}, which has no vocabulary head; "
            "load it with AutoModelForCausalLM"
        )
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    # Not by subclass: layers that hold a recurrent state besides are subclasses too.
    fixed = sorted(kind.__name__ for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer})
    if fixed or model._is_stateful:  # noqa: SLF001 - of transformers, which has no public name for it
        raise ValueError(
            f"create_speculative_decoder: {name} keeps a state from which rejected tokens cannot be dropped "
            f"({', '.join(fixed) or 'recurrent'}); decode it with its own generate()"
        )
