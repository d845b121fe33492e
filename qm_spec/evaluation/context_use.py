"""What a target's context is worth to it, by the distance to the text that tells the next one.

Each dependent span of a document is read twice: in the whole document, and after its last few tokens
alone, without the source that tells it. A model that uses its context has a lower loss with the source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qm_spec.training.dependent import Document

BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
# Tokens of short contexts read in one forward.
_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class ContextUse:
    """Losses of the tokens of one row, in nats per token.

    Attributes:
        distances: tokens from the source to the span, `(least, greatest + 1)`; None is the other text, which
            no source tells.
        num_documents, num_spans, num_tokens: what the means are over.
        loss: in the whole document.
        loss_without: the same tokens without the source; nan for the other text.
        gain: `loss_without - loss`, what the source is worth.
        loss_error, loss_without_error, gain_error: standard errors, documents being what is drawn; nan of
            fewer than two documents.
    """

    distances: tuple[int, int] | None
    num_documents: int
    num_spans: int
    num_tokens: int
    loss: float
    loss_error: float
    loss_without: float
    loss_without_error: float
    gain: float
    gain_error: float


@dataclass(frozen=True)
class _Sums:
    """Sums over one document's tokens of one row."""

    num_spans: int
    num_tokens: int
    nats: float
    nats_without: float


@dataclass(frozen=True)
class _TokenSpan:
    """A dependent span in tokens: `start..end`, and where its source starts and ends."""

    start: int
    end: int
    source: int
    source_end: int

    @property
    def distance(self) -> int:
        return self.start - self.source


def loss_by_distance(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[Document],
    buckets: Sequence[int] = BUCKETS,
    context: int = 32,
    on_progress: Callable[[], None] = lambda: None,
) -> list[ContextUse]:
    """Measure a model's loss on dependent spans by distance, with and without their sources.

    A document longer than the model's positions is cut. Distances outside the buckets are in no row.

    Args:
        model: a causal language model of transformers, in eval mode.
        tokenizer: a fast one, which gives offsets.
        documents: see `qm_spec.training.dependent.generate_many`.
        buckets: edges of the rows in tokens, increasing; the last is not included.
        context: tokens before a span that stay without its source, fewer where the source ends later.
        on_progress: called after each document.

    Returns:
        a row per bucket, then one for the other text; nan where there is nothing.

    Raises:
        ValueError: the buckets do not increase, or begin within the context that stays.
    """
    edges = list(buckets)
    if len(edges) < 2 or any(low >= high for low, high in pairwise(edges)):
        raise ValueError(f"loss_by_distance: buckets must be at least two increasing distances, got {edges}")
    if not 1 <= context < edges[0]:
        raise ValueError(
            f"loss_by_distance: context must be in 1..{edges[0] - 1}, so that no source of the first bucket "
            f"lies in it, got {context}"
        )
    ranges = list(pairwise(edges))
    sums: dict[tuple[int, int] | None, list[_Sums]] = {distances: [] for distances in [*ranges, None]}
    for document in documents:
        ids, spans, is_other = _tokenize(tokenizer, document, getattr(model.config, "max_position_embeddings", None))
        token_ids, num_special = torch.tensor(ids, device=model.device), int(np.argmax(is_other))
        nats = _token_nats(model, token_ids[None])[0]
        for distances in ranges:
            chosen = [span for span in spans if distances[0] <= span.distance < distances[1]]
            if chosen:
                told = np.concatenate([nats[span.start : span.end] for span in chosen])
                without = sum(_nats_without(model, token_ids, chosen, context, num_special))
                sums[distances].append(_Sums(len(chosen), len(told), float(told.sum()), without))
        for span in spans:
            is_other[span.start : span.end] = False
        # Nothing predicts the first token.
        is_other[0] = False
        sums[None].append(_Sums(0, int(is_other.sum()), float(nats[is_other].sum()), np.nan))
        on_progress()
    return [_row(distances, row) for distances, row in sums.items()]


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, document: Document, limit: int | None
) -> tuple[list[int], list[_TokenSpan], np.ndarray]:
    """Return token ids, spans, and `[N]` bool: which tokens are text, and not special ones around it."""
    read = tokenizer(document.text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    is_text = np.asarray(read["special_tokens_mask"]) == 0
    first, end = int(np.argmax(is_text)), len(is_text) - int(np.argmax(is_text[::-1]))
    end = min(end, limit or end)
    starts, ends = np.asarray(read["offset_mapping"])[first:end].T

    def tokens(start: int, stop: int) -> tuple[int, int]:
        """Return the range of the tokens with characters in `start..stop`."""
        return first + int(np.searchsorted(ends, start, "right")), first + int(np.searchsorted(starts, stop, "left"))

    length = ends[-1]
    spans = [
        _TokenSpan(*tokens(span.start, span.end), *tokens(span.source, span.source + span.end - span.start))
        for span in document.spans
        if span.end <= length
    ]
    return read["input_ids"][:end], spans, is_text[:end]


@torch.inference_mode()
def _token_nats(model: PreTrainedModel, token_ids: Tensor) -> np.ndarray:
    """Return the loss of each token of `[B, N]` rows, `[B, N]` float32; 0 for the first, which nothing predicts."""
    logits = model(input_ids=token_ids, use_cache=False).logits[:, :-1].float()
    answers = token_ids[:, 1:]
    nats = F.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="none").view_as(answers)
    return F.pad(nats, (1, 0)).cpu().numpy()


def _nats_without(
    model: PreTrainedModel, token_ids: Tensor, spans: Sequence[_TokenSpan], context: int, num_special: int
) -> Iterator[float]:
    """Yield the loss of each span in sum after at most `context` tokens, none of them the source's.

    The special tokens that begin the document stay too.
    """
    windows = []
    for span in sorted(spans, key=lambda span: span.end - span.start):
        # A span may follow its source at once; one token has to stay, for the first prediction.
        begin = min(max(span.start - context, span.source_end, num_special), span.start - 1)
        windows.append((torch.cat([token_ids[:num_special], token_ids[begin : span.end]]), span.end - span.start))
    count = max(1, _BATCH_TOKENS // len(windows[-1][0]))
    for batch in (windows[i : i + count] for i in range(0, len(windows), count)):
        # Padding follows the text, so a causal model does not see it.
        padded = torch.nn.utils.rnn.pad_sequence([window for window, _ in batch], batch_first=True)
        nats = _token_nats(model, padded)
        for row, (window, length) in zip(nats, batch, strict=True):
            yield float(row[len(window) - length : len(window)].sum())


def _row(distances: tuple[int, int] | None, sums: Sequence[_Sums]) -> ContextUse:
    num_tokens = np.array([document.num_tokens for document in sums], dtype=float)
    nats = np.array([document.nats for document in sums])
    without = np.array([document.nats_without for document in sums])
    return ContextUse(
        distances,
        len(sums),
        sum(document.num_spans for document in sums),
        int(num_tokens.sum()),
        *_mean(nats, num_tokens),
        *_mean(without, num_tokens),
        *_mean(without - nats, num_tokens),
    )


def _mean(nats: np.ndarray, num_tokens: np.ndarray) -> tuple[float, float]:
    """Return the mean per token and its standard error, from sums per document (a ratio estimate)."""
    total, count = num_tokens.sum(), len(nats)
    if not total:
        return np.nan, np.nan
    mean = nats.sum() / total
    if count < 2:
        return float(mean), np.nan
    deviation = nats - mean * num_tokens
    return float(mean), float(np.sqrt(count / (count - 1) * (deviation**2).sum()) / total)
