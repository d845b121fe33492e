"""Language modelling over a reduced context, without a look at the future.

A window is C tokens of context and T of continuation. The context passes the first l decoder layers as
it is, is reduced to K tokens, and the other layers hold only these. The continuation is never reduced:
each of its tokens attends to the context and, causally, to the continuation. Only predictions made at
continuation tokens count, so no prediction can see its own answer in a merged token.

Letters: B sequences, C context tokens, K tokens kept, T continuation tokens, l depth, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from qm_spec.bench.reduction import Method, Reducer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

WHOLE, NONE = "1x", "none"


@dataclass(frozen=True)
class Prefix:
    """A context as the layers below the reduction left it.

    Attributes:
        states: `[l + 1, B, C, D]`, the embeddings and the outputs of the first l layers.
        keys_values: of these layers, each `[B, G, C, d]`.
    """

    states: Tensor
    keys_values: tuple[tuple[Tensor, Tensor], ...]


@dataclass
class Context:
    """What the model remembers: a context, reduced or not, and the tokens read since.

    Attributes:
        cache: keys and values of all layers; of the first l they are never reduced.
        log_size: `[B, K]` added to the scores of the reduced tokens; None where all sizes are 1.
        num_tokens: C, tokens before the reduction.
        num_kept: K.
        num_read: tokens read after the context.
    """

    cache: DynamicCache
    log_size: Tensor | None
    num_tokens: int
    num_kept: int
    num_read: int = 0

    def copy(self) -> Context:
        """Return a context that can be read on without changing this one."""
        cache = _make_cache([(layer.keys, layer.values) for layer in self.cache.layers])
        return Context(cache, self.log_size, self.num_tokens, self.num_kept, self.num_read)

    @property
    def kv_bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(x.numel() * x.element_size() for layer in self.cache.layers for x in (layer.keys, layer.values))


def empty_context() -> Context:
    """Return the memory of a model that has read nothing."""
    return Context(DynamicCache(), None, num_tokens=0, num_kept=0)


class ReducedLanguageModel:
    """A Llama model of transformers that can reduce its context at one depth.

    Args:
        model: in eval mode; its weights are not changed.
        depth: l, decoder layers below the reduction, 0..layers - 1; 0 reduces the embeddings.
        proportional: add the log of a merged token's size to its attention scores (ToMe).

    Raises:
        ValueError: the depth is out of range.
    """

    def __init__(self, model: LlamaForCausalLM, depth: int, proportional: bool = True) -> None:
        if not 0 <= depth < len(model.model.layers):
            raise ValueError(
                f"ReducedLanguageModel: depth must be in 0..{len(model.model.layers) - 1}, got {depth}; "
                "0 reduces the embeddings"
            )
        self.model = model
        self.depth = depth
        self.proportional = proportional

    @torch.inference_mode()
    def read(self, token_ids: Tensor) -> Prefix:
        """Pass a context `[B, C]` int64 through the layers below the reduction."""
        states = [self.model.model.embed_tokens(token_ids)]
        position = torch.arange(token_ids.shape[1], device=token_ids.device).unsqueeze(0)
        cache = DynamicCache()
        for layer in range(self.depth):
            states.append(self._run(states[-1], position, None, cache, range(layer, layer + 1)))
        return Prefix(torch.stack(states), tuple((layer.keys, layer.values) for layer in cache.layers))

    @torch.inference_mode()
    def reduce(self, prefix: Prefix, reducer: Reducer | None, keep: int) -> tuple[Context, Tensor]:
        """Reduce a context that was read and pass it through the other layers.

        Args:
            prefix: see `read`.
            reducer: None keeps every token.
            keep: K; merged tokens stand, for rotary embedding and causal mask, at their `place`.

        Returns:
            the context, and the logits `[B, V]` at its last token.
        """
        states, num_tokens = prefix.states[-1], prefix.states.shape[2]
        position = torch.arange(num_tokens, device=states.device).unsqueeze(0)
        log_size = mask = None
        if reducer is not None:
            merged = reducer(prefix.states, keep)
            states, position = merged.tokens, merged.place
            if self.proportional and bool((merged.size > 1).any()):
                log_size = merged.log_size.to(states.dtype)
                mask = log_size[:, None, None, :] + _causal(states.shape[1], 0, states)
        cache = _make_cache(prefix.keys_values)
        states = self._run(states, position, mask, cache, range(self.depth, len(self.model.model.layers)))
        return Context(cache, log_size, num_tokens, states.shape[1]), self._logits(states[:, -1])

    def prefill(self, token_ids: Tensor, reducer: Reducer | None, keep: int) -> tuple[Context, Tensor]:
        """Read a context `[B, C]` and reduce it; returns what `reduce` does."""
        return self.reduce(self.read(token_ids), reducer, keep)

    @torch.inference_mode()
    def extend(self, context: Context, token_ids: Tensor) -> Tensor:
        """Read `[B, T]` tokens that follow a context; they are added to it.

        Returns:
            `[B, T, V]`, row t predicts what follows token t.
        """
        num_new, read = token_ids.shape[1], context.num_read
        states = self.model.model.embed_tokens(token_ids)
        start = context.num_tokens + read
        position = torch.arange(start, start + num_new, device=token_ids.device).unsqueeze(0)
        # One new token sees all there is.
        alone = num_new == 1
        mask = None if alone else _causal(num_new, start, states)
        states = self._run(states, position, mask, context.cache, range(self.depth))
        if context.log_size is not None:
            bias = F.pad(context.log_size, (0, read + num_new))[:, None, None, :]
            mask = bias if alone else bias + _causal(num_new, context.num_kept + read, states)
        elif not alone:
            mask = _causal(num_new, context.num_kept + read, states)
        states = self._run(states, position, mask, context.cache, range(self.depth, len(self.model.model.layers)))
        context.num_read += num_new
        return self._logits(states)

    def _run(self, states: Tensor, position: Tensor, mask: Tensor | None, cache: DynamicCache, layers: range) -> Tensor:
        inner = self.model.model
        rotary = inner.rotary_emb(states, position_ids=position)
        for layer in layers:
            states = inner.layers[layer](
                states,
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
                position_embeddings=rotary,
            )
        return states

    def _logits(self, states: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.norm(states))


def _make_cache(keys_values: Sequence[tuple[Tensor, Tensor]]) -> DynamicCache:
    """Return a cache over these tensors; it grows by new tensors, so they themselves never change."""
    cache = DynamicCache()
    for layer, (key, value) in enumerate(keys_values):
        cache.update(key, value, layer)
    return cache


def _causal(num_new: int, num_before: int, like: Tensor) -> Tensor:
    """Return `[T, before + T]`: 0 at tokens before and at new ones up to the row's own, lowest elsewhere."""
    blocked = torch.full((num_new, num_before + num_new), torch.finfo(like.dtype).min, dtype=like.dtype)
    return blocked.to(like.device).triu(num_before + 1)


@dataclass(frozen=True)
class Score:
    """Predictions of one window: nats of the right tokens in sum, how many came first, and of how many."""

    nats: float
    correct: int
    num_tokens: int


def score_continuation(logits: Tensor, token_ids: Tensor) -> Score:
    """Score the predictions of a continuation's tokens but its first, which the context predicts.

    Args:
        logits: `[B, T, V]`, see `ReducedLanguageModel.extend`.
        token_ids: `[B, T]` int64.
    """
    predictions, answers = logits[:, :-1].float().flatten(0, 1), token_ids[:, 1:].flatten()
    nats = F.cross_entropy(predictions, answers, reduction="sum").item()
    return Score(nats, int((predictions.argmax(-1) == answers).sum()), len(answers))


def score_window(
    model: ReducedLanguageModel,
    token_ids: Tensor,
    num_context: int,
    methods: Iterable[Method],
    ratios: Iterable[float],
    seed: int = 0,
) -> dict[str, Score]:
    """Score a window under every method and ratio, beside the whole context and none.

    Args:
        model: reads and reduces.
        token_ids: `[C + T]` int64.
        num_context: C.
        methods: see `qm_spec.bench.reduction.METHODS`.
        ratios: C / K, above 1; see `tokens_kept`.
        seed: of the methods that draw.

    Returns:
        scores by `1x`, `none` and `run_name(method, ratio)`.
    """
    context_ids, continuation = token_ids[None, :num_context], token_ids[None, num_context:]
    prefix = model.read(context_ids)

    def score(context: Context) -> Score:
        return score_continuation(model.extend(context, continuation), continuation)

    scores = {WHOLE: score(model.reduce(prefix, None, num_context)[0]), NONE: score(empty_context())}
    for method in methods:
        for ratio in ratios:
            context, _ = model.reduce(prefix, method.make(seed), tokens_kept(num_context, ratio))
            scores[run_name(method.name, ratio)] = score(context)
    return scores


def tokens_kept(num_tokens: int, ratio: float) -> int:
    """Return K of a reduction by `ratio`, never more than that leaves, at least 1."""
    return max(1, int(num_tokens / ratio))


def run_name(method: str, ratio: float) -> str:
    """Return the name of a method at a ratio, such as `tome@1.5x`."""
    return f"{method}@{ratio:g}x"


def cut_windows(documents: Sequence[Sequence[int]], length: int, count: int, seed: int = 0) -> Tensor:
    """Draw `count` windows of `length` tokens that do not overlap, none over two documents.

    The first windows of a larger draw are those of a smaller one.

    Returns:
        `[count, length]` int64; fewer where the documents hold fewer.

    Raises:
        ValueError: no document is long enough.
    """
    starts = [(d, i) for d, ids in enumerate(documents) for i in range(0, len(ids) - length + 1, length)]
    if not starts:
        longest = max(map(len, documents), default=0)
        raise ValueError(
            f"text: windows of {length} tokens need a document as long, the longest has {longest}; "
            "pass --text FOLDER or a shorter --context"
        )
    order = torch.randperm(len(starts), generator=torch.Generator().manual_seed(seed))[:count]
    return torch.tensor([documents[d][i : i + length] for d, i in (starts[j] for j in order.tolist())])
