"""What a compression saved, counted on the tensors themselves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the elements of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def compression_report(
    before: Iterable[Tensor], after: Iterable[Tensor], tokens_before: Tensor, tokens_after: Tensor
) -> dict[str, Any]:
    """Return how many tokens and bytes went in and came out.

    Args:
        before: tensors that went in.
        after: tensors that came out and that the next model reads.
        tokens_before: `[B]` int64, tokens of each sequence, without padding.
        tokens_after: `[B]` int64, the same after, without empty slots.

    Returns:
        `input_tokens` and `output_tokens` of the longest sequence; `ratio`, tokens in over tokens
        out in the whole batch, so that padding earns nothing; `bytes_before` and `bytes_after`.
    """
    return {
        "input_tokens": int(tokens_before.max()),
        "output_tokens": int(tokens_after.max()),
        "ratio": int(tokens_before.sum()) / max(int(tokens_after.sum()), 1),
        "bytes_before": nbytes(before),
        "bytes_after": nbytes(after),
    }
