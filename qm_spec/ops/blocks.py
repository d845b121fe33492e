"""Blocks of rows, so that a product of all tokens with all tokens is never held whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Scores per block: 2 MiB stay in a CPU core's cache, and a GPU wants few large launches.
_CPU_ELEMENTS, _GPU_ELEMENTS = 1 << 19, 1 << 26
# With fewer rows a matrix product would read its other side more often than it computes.
_MIN_ROWS = 64


def over_rows(function: Callable[..., Tensor], tokens: Tensor, *others: Tensor | None, num_columns: int) -> Tensor:
    """Return `function(rows, tokens, *others)` of consecutive slices of rows, joined along dimension -2.

    Where gradients are wanted a block is computed again in the backward pass, so that blocks are not
    kept; a single block is.

    Args:
        function: of a slice of 0..N; returns `[..., R, X]` for its R rows.
        tokens: `[..., N, D]`, N at least 1.
        others: further arguments of the function.
        num_columns: of the product that the function holds, `[..., R, num_columns]`.
    """
    *batch, num_rows, _ = tokens.shape
    limit = _CPU_ELEMENTS if tokens.device.type == "cpu" else _GPU_ELEMENTS
    size = max(_MIN_ROWS, limit // max(1, torch.Size(batch).numel() * num_columns))
    if size >= num_rows:
        return function(slice(0, num_rows), tokens, *others)
    again = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (tokens, *others))
    blocks = []
    for start in range(0, num_rows, size):
        rows = slice(start, min(start + size, num_rows))
        if again:
            blocks.append(checkpoint(function, rows, tokens, *others, use_reentrant=False, preserve_rng_state=False))
        else:
            blocks.append(function(rows, tokens, *others))
    return torch.cat(blocks, dim=-2)
