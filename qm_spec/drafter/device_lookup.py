"""Suffix lookup for many requests at once, on any device and without a value read on the host."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qm_spec.drafter.suffix_index import MAX_LENGTH

# Tokens that are compared at a time, so that a large batch of long texts takes about 80 MB and not as much as it likes.
_BLOCK_TOKENS = 1 << 22


class Copies(NamedTuple):
    """What lookups draft behind the newest tokens of B requests.

    Attributes:
        token_ids: `[B, K]` int64, 0 where nothing matches.
        lengths: `[B]` int64, tokens of the suffix that was found again, 0 where nothing matches.
    """

    token_ids: Tensor
    lengths: Tensor


def find_copies(
    token_ids: Tensor,
    places: Tensor,
    num_tokens: Tensor,
    min_length: int,
    num_drafts: int,
    max_length: int = MAX_LENGTH,
) -> Copies:
    """Find each request's newest tokens in its own text, and copy what followed them there.

    The rule is that of `SuffixIndex.look_up`: of the places of the longest match the latest, and a copy that meets the
    newest token goes round. Here all places are compared, so a common suffix is followed back to the beginning.

    Args:
        token_ids: `[R, L]` int32 or int64, L at least 1, texts; what stands behind their ends does not matter.
        places: `[B]` int64, a row of these for each request.
        num_tokens: `[B]`, tokens of each text, the newest included; texts longer than L find nothing.
        min_length: shortest suffix that counts, in tokens, at least 1.
        num_drafts: K.
        max_length: longest that is tried.
    """
    width, lengths = token_ids.shape[1], num_tokens.long().unsqueeze(1)
    suffix = _gather(token_ids, places, lengths - 1 - _range(max_length, lengths))
    best = torch.full_like(lengths[:, 0], -1, dtype=torch.int32)
    columns = max(max_length, _BLOCK_TOKENS // max(1, len(places)))
    for start in range(0, width, columns):
        best = torch.maximum(best, _best_match(token_ids, places, lengths, suffix, start, columns, min_length))
    # Of the match: where it ends, and how many tokens of it agree.
    found = (best >= 0) & (lengths[:, 0] <= width)
    agree, ends = (best // width).masked_fill(~found, 0).long(), best % width + 1
    period = (lengths[:, 0] - ends).clamp_min(1)
    copied = _gather(token_ids, places, ends.unsqueeze(1) + _range(num_drafts, lengths) % period.unsqueeze(1))
    return Copies(copied.long().masked_fill(~found.unsqueeze(1), 0), agree)


def _best_match(
    token_ids: Tensor, places: Tensor, lengths: Tensor, suffix: Tensor, start: int, columns: int, min_length: int
) -> Tensor:
    """Return `[B]` `length * L + last token` of the best match that ends in these columns, -1 where there is none."""
    width, max_length = token_ids.shape[1], suffix.shape[1]
    before = min(start, max_length - 1)
    texts = token_ids[:, start - before : start + columns][places]
    last = _range(texts.shape[1] - before, lengths) + start
    # The newest token is no match of itself. Tokens before a text's beginning agree with nothing.
    agrees, length = last < lengths - 1, torch.zeros_like(texts[:, before:], dtype=torch.uint8)
    for back in range(max_length):
        shifted = texts[:, max(before - back, 0) : texts.shape[1] - back]
        missing = agrees.shape[1] - shifted.shape[1]
        same = shifted == suffix[:, back : back + 1]
        agrees = agrees & torch.nn.functional.pad(same, (missing, 0), value=False)
        length = length + agrees
    score = length.int() * width + last.int()
    return score.masked_fill(length < min_length, -1).amax(1)


def _gather(token_ids: Tensor, places: Tensor, columns: Tensor) -> Tensor:
    """Return the tokens of `[B, N]` columns, -1 where there are none."""
    inside = (columns >= 0) & (columns < token_ids.shape[1])
    found = token_ids[places.unsqueeze(1), columns.clamp(0, token_ids.shape[1] - 1)]
    return found.masked_fill(~inside, -1)


def _range(stop: int, like: Tensor) -> Tensor:
    return torch.arange(stop, device=like.device)
