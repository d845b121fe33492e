"""Blocks of rows, so that a product of all tokens with all tokens is never held whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Scores per block: 2 MiB stay in a CPU core's cache, and a GPU wants few large launches.
_CPU_ELEMENTS, _GPU_ELEMENTS = 1 << 19, 1 << 26
# With fewer rows a matrix product would read its other side more often than it computes.
_MIN_ROWS = 64


def row_blocks(tokens: Tensor, num_columns: int) -> Iterator[slice]:
    """Yield consecutive slices that cover the rows 0..N of a product `[..., N, num_columns]`.

    Args:
        tokens: `[..., N, D]`; its batch and device decide how many rows fit.
        num_columns: of the product.
    """
    *batch, num_rows, _ = tokens.shape
    limit = _CPU_ELEMENTS if tokens.device.type == "cpu" else _GPU_ELEMENTS
    size = max(_MIN_ROWS, limit // max(1, torch.Size(batch).numel() * num_columns))
    for start in range(0, max(1, num_rows), size):
        yield slice(start, min(start + size, num_rows))


def over_rows(function: Callable[..., Tensor], tokens: Tensor, *others: Tensor | None, num_columns: int) -> Tensor:
    """Return `function(rows, tokens, *others)` of all blocks of rows, joined along dimension -2.

    Where gradients are wanted, blocks are computed again in the backward pass instead of being kept.

    Args:
        function: of a slice of 0..N; returns `[..., R, X]` for its R rows.
        tokens: `[..., N, D]`.
        others: further arguments of the function.
        num_columns: of the product that the function holds, `[..., R, num_columns]`.
    """
    first, *rest = row_blocks(tokens, num_columns)
    if not rest:
        return function(first, tokens, *others)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (tokens, *others)):
        again = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([again(rows, tokens, *others) for rows in (first, *rest)], dim=-2)
    block = function(first, tokens, *others)
    # Made before the other blocks: small results between their large ones would keep the heap from shrinking.
    whole = block.new_empty(*block.shape[:-2], tokens.shape[-2], block.shape[-1])
    whole[..., first, :] = block
    for rows in rest:
        whole[..., rows, :] = function(rows, tokens, *others)
    return whole
