"""A transformers cache that keeps new tokens as they are and merges the old ones."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qm_spec.compression.kv_merging import KeyValueEntries, KeyValueMerger
from qm_spec.compression.rotary import Rotary
from qm_spec.compression.sizes import nbytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Attention of models whose cache asks for proportional attention: model.set_attn_implementation(PROPORTIONAL).
PROPORTIONAL = "quickmerge_proportional"
# Old tokens that wait before they are merged one step at a time; each merge looks at all old entries.
_MERGE_EVERY = 16
_FIELDS = ("keys", "values", "mass", "size", "position")
_PROMPT = ("prompt_size", "prompt_position")


def _proportional_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """SDPA with the logarithm of each entry's size added to its scores.

    Source: ToMe, arXiv 2210.09461, proportional attention.
    """
    # The cache hands it over on the tensor, since models pass nothing else from the cache to attention.
    log_size = getattr(key, "log_size", None)
    if log_size is not None:
        num_queries, num_keys = query.shape[2], key.shape[2]
        if attention_mask is None:
            # What SDPA's is_causal would be, which does not go with a mask.
            attention_mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
            attention_mask = attention_mask.tril(num_keys - num_queries)
        if attention_mask.dtype == torch.bool:
            attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(
                ~attention_mask, torch.finfo(query.dtype).min
            )
        bias = log_size.to(query.dtype).repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        attention_mask = attention_mask + bias.unsqueeze(2)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)


AttentionInterface.register(PROPORTIONAL, _proportional_attention)
AttentionMaskInterface.register(PROPORTIONAL, sdpa_mask)


class QuickMergeLayer(CacheLayerMixin):
    """One layer's keys and values: first tokens, merged entries, newest tokens.

    Slots of a sequence stand at the right end and are `min(slots, its tokens)` in number, so that the
    masks transformers makes from a 2-D attention mask, with the newest column last, fit them.

    Args:
        merger: how old entries are merged.
        k_max: merged entries at most, or None.
        ratio: merged entries per old token of the longest sequence, or None.
        window: newest tokens that stay as they are.
        sinks: first tokens of each sequence that do.
        prompt_size: `[B, M]` float32, tokens in each of the first M columns, 0 at padding; None for
            one in each.
        prompt_position: `[B, M]` integers, of those columns; None counts them from 0.
        proportional: hand the logarithm of the sizes to attention.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    # None before the first token, as in all layers of transformers.
    keys: Any
    values: Any

    def __init__(
        self,
        merger: KeyValueMerger,
        *,
        k_max: int | None,
        ratio: float | None,
        window: int,
        sinks: int,
        prompt_size: Tensor | None,
        prompt_position: Tensor | None,
        proportional: bool,
    ) -> None:
        super().__init__()
        self.merger = merger
        self.k_max = k_max
        self.ratio = ratio
        self.window = window
        self.sinks = sinks
        self.prompt_size = prompt_size
        self.prompt_position = prompt_position
        self.proportional = proportional
        self.cumulative_length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin an empty memory for sequences of this shape, dtype and device."""
        batch, heads = key_states.shape[:2]
        self.dtype, self.device = key_states.dtype, key_states.device
        for field in _PROMPT:
            prompt = getattr(self, field)
            if prompt is not None:
                if batch % len(prompt):
                    raise ValueError(
                        f"QuickMergeCache: attention_mask must have the batch of {batch} sequences, got {len(prompt)}"
                    )
                # Beams, and several samples of a prompt, stand side by side.
                setattr(self, field, prompt.to(self.device).repeat_interleave(batch // len(prompt), dim=0))
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.mass = torch.zeros(batch, heads, 0, device=self.device)
        self.size = torch.zeros(batch, heads, 0, device=self.device)
        self.position = torch.zeros(batch, heads, 0, dtype=torch.int32, device=self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the new tokens' keys and values, merge what has grown old, and return what attention reads now.

        The tokens of this call still see the entries from before the merge.

        Args:
            key_states: `[B, H, N, d]`, rotated.
            value_states: `[B, H, N, d]`.

        Returns:
            keys and values `[B, H, T + N, d]` of T stored entries and the new tokens.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, heads, num_new = key_states.shape[:3]
        begin, end = self.cumulative_length, self.cumulative_length + num_new
        self.cumulative_length = end
        size, position = self._columns(torch.arange(begin, end, device=self.device))
        keys: Any = torch.cat([self.keys, key_states], dim=2)
        values = torch.cat([self.values, value_states], dim=2)
        self.keys, self.values = keys, values
        shape = (batch, heads, num_new)
        self.mass = torch.cat([self.mass, self.mass.new_zeros(shape)], dim=2)
        self.size = torch.cat([self.size, size.unsqueeze(1).expand(shape)], dim=2)
        self.position = torch.cat([self.position, position.unsqueeze(1).expand(shape).int()], dim=2)
        if self.proportional:
            # Padding is masked anyway; log 0 would be NaN where it is masked twice.
            keys.log_size = self.size.clamp_min(1.0).log()
        self._merge_old(at_once=num_new > 1)
        return keys, values

    def _columns(self, column: Tensor) -> tuple[Tensor, Tensor]:
        """Return sizes and positions `[b, N]` of columns `[N]`, b the batch, or 1 where all rows are alike."""
        size, position = torch.ones_like(column, dtype=torch.float32).unsqueeze(0), column.unsqueeze(0)
        if self.prompt_size is not None:
            last = self.prompt_size.shape[1] - 1
            size = torch.where(column <= last, self.prompt_size[:, column.clamp_max(last)], size)
        if self.prompt_position is not None:
            last = self.prompt_position.shape[1] - 1
            position = self.prompt_position[:, column.clamp_max(last)] + (column - last).clamp_min(0)
        return size, position

    def _merge_old(self, at_once: bool) -> None:
        num_slots = self.keys.shape[2]
        # The same for all heads: counts depend on lengths alone.
        full = self.size[:, 0] > 0
        slot = torch.arange(num_slots, device=self.device)
        old = full & (full.cumsum(-1) > self.sinks) & (slot < num_slots - self.window)
        num_old = int(old.sum(-1).max()) if num_slots > self.window + self.sinks else 0
        budget = self._budget()
        if num_old <= budget or not (at_once or num_old >= budget + _MERGE_EVERY):
            return
        batch, heads = self.keys.shape[:2]
        entries = KeyValueEntries(*(getattr(self, field).flatten(0, 1) for field in _FIELDS))
        rows = old.repeat_interleave(heads, dim=0)
        merged, _ = self.merger(entries, rows, torch.full_like(rows[:, 0], budget, dtype=torch.int64))
        for field in _FIELDS:
            setattr(self, field, getattr(merged, field).unflatten(0, (batch, heads)))

    def _budget(self) -> int:
        if self.ratio is None:
            assert self.k_max is not None
            return self.k_max
        padding = 0 if self.prompt_size is None else int((self.prompt_size == 0).sum(-1).min())
        longest = self.cumulative_length - padding
        return max(1, int(self.ratio * max(longest - self.window - self.sinks, 0)))

    def get_seq_length(self) -> int:
        """Return the tokens seen, merged or not: the next token's column."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many entries the next attention reads, and the column of the mask that the first takes."""
        stored = self.keys.shape[2] if self.is_initialized else 0
        return stored + query_length, self.cumulative_length - stored

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: merged tokens cannot be taken apart.

        Raises:
            RuntimeError: always; speculative and contrastive decoding of transformers need it.
        """
        raise RuntimeError(
            "QuickMergeCache: merged tokens cannot be removed, so assisted decoding does not work with it; "
            "use greedy, sampling or beam search, or a DynamicCache"
        )

    def reset(self) -> None:
        """Forget all tokens; the next prompt is taken to be padded as the last."""
        self.keys = self.values = None
        self.is_initialized = False
        self.cumulative_length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences of these indices, as beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of these indices."""
        if self.is_initialized:
            for field in (*_FIELDS, *_PROMPT):
                if getattr(self, field) is not None:
                    setattr(self, field, getattr(self, field)[indices.to(self.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        if self.is_initialized:
            sequences = torch.arange(self.batch_size, device=self.device)
            self.batch_select_indices(sequences.repeat_interleave(repeats))

    @property
    def batch_size(self) -> int:
        """Sequences, or -1 before the first token."""
        return self.keys.shape[0] if self.is_initialized else -1

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored: keys, values, and 12 bytes of mass, size and position per entry."""
        return nbytes(getattr(self, field) for field in _FIELDS) if self.is_initialized else 0


class QuickMergeCache(Cache):
    """A cache for `generate(past_key_values=cache)` that merges tokens beyond the newest `window`.

    The first `sinks` and the newest `window` tokens of each sequence stay as they are; the others are
    merged, layer by layer and head by head, to `k_max` entries, or to `ratio` of them. A prompt is
    read whole before it is merged; afterwards old tokens are merged 16 at a time. While nothing has
    to be merged, the output is that of a DynamicCache.

    Use one cache per batch of sequences; `reset()` empties it. A batch merges at the same steps, so a
    short sequence in it may be merged a few steps earlier than alone.

    Args:
        model: a causal language model of transformers, with full attention in all layers.
        k_max: merged entries per layer and head, at least 1.
        ratio: merged entries per old token, above 0 and at most 1, in place of `k_max`.
        window: newest tokens kept, at least 1.
        sinks: first tokens kept, at least 0.
        attention_mask: `[B, N]` of the prompt, where sequences are padded on the left; without it
            padding would be merged like text.
        token_sizes: `[B, N]`, in place of `attention_mask` where the prompt's columns hold several
            tokens each (`merge_image_tokens`): tokens in each column, 0 at padding.
        merger: how entries are merged; None takes `KeyValueMerger` with the model's own rotary
            embedding, and with an epsilon of 0.01 if `proportional`.
        proportional: let an entry of n tokens weigh like n in attention, which loses less where the
            context matters. Asks for `model.set_attn_implementation(PROPORTIONAL)` first.

    Raises:
        TypeError: neither or both of `k_max` and `ratio` are given.
        ValueError: a setting is out of range, padding is not on the left, or the model's attention
            or rotary embedding is of a kind that a merge would get wrong.

    Source: ours, with QuickMerge++ (arXiv 2508.13204) for the merge and StreamingLLM
    (arXiv 2309.17453) for sinks and window.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        k_max: int | None = None,
        ratio: float | None = None,
        window: int = 128,
        sinks: int = 4,
        attention_mask: Tensor | None = None,
        token_sizes: Tensor | None = None,
        position_ids: Tensor | None = None,
        merger: KeyValueMerger | None = None,
        proportional: bool = False,
    ) -> None:
        if (k_max is None) == (ratio is None):
            raise TypeError(f"QuickMergeCache: give k_max or ratio, got {k_max} and {ratio}")
        if k_max is not None and k_max < 1:
            raise ValueError(f"QuickMergeCache: k_max must be at least 1, got {k_max}")
        if ratio is not None and not 0 < ratio <= 1:
            raise ValueError(f"QuickMergeCache: ratio must be above 0 and at most 1, got {ratio}")
        if window < 1 or sinks < 0:
            raise ValueError(f"QuickMergeCache: window must be at least 1 and sinks 0, got {window} and {sinks}")
        config = model.config.get_text_config(decoder=True)
        _check_attention(config)
        if proportional and config._attn_implementation != PROPORTIONAL:
            raise ValueError(
                f"QuickMergeCache: proportional=True needs attention {PROPORTIONAL!r}, got "
                f"{config._attn_implementation!r}; call model.set_attn_implementation({PROPORTIONAL!r})"
            )
        if merger is None:
            merger = KeyValueMerger(epsilon=0.01 if proportional else 1e-5, rotary=Rotary.from_model(model))
        make_layer = partial(
            QuickMergeLayer,
            merger=merger,
            k_max=k_max,
            ratio=ratio,
            window=window,
            sinks=sinks,
            prompt_size=_prompt_size(attention_mask if token_sizes is None else token_sizes),
            prompt_position=position_ids,
            proportional=proportional,
        )
        super().__init__(layers=[make_layer() for _ in range(config.num_hidden_layers)])

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored, measured on the tensors."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def num_entries(self) -> int:
        """Slots that attention reads per head, of the first layer; all layers have as many."""
        first = self.layers[0]
        return first.keys.shape[2] if first.is_initialized else 0


def _check_attention(config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    # Where there are no layer types, a window alone makes the model slide.
    slides = getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None)
    if kinds != {"full_attention"} or slides:
        raise ValueError(
            f"QuickMergeCache: all layers of {config.model_type} must have full attention, got "
            f"{sorted(kinds)} with a window of {getattr(config, 'sliding_window', None)}; "
            "a sliding window counts tokens, which merged entries no longer are; while contexts stay "
            "below the window, set config.sliding_window = None"
        )
    if "flash" in config._attn_implementation or "flex" in config._attn_implementation:
        raise ValueError(
            f"QuickMergeCache: attention must be 'sdpa', 'eager' or {PROPORTIONAL!r}, "
            f"got {config._attn_implementation!r}; call model.set_attn_implementation('sdpa')"
        )


def _prompt_size(sizes: Tensor | None) -> Tensor | None:
    if sizes is None:
        return None
    mask = sizes > 0
    if mask.ndim != 2 or bool((mask[:, 1:] < mask[:, :-1]).any()) or not bool(mask[:, -1].all()):
        raise ValueError(
            f"QuickMergeCache: attention_mask must be [B, N] with padding on the left only, got {list(mask.shape)}; "
            "set tokenizer.padding_side = 'left'"
        )
    return sizes.float()
