"""A repair of vLLM's verification on the CPU, without which sampled output is not the target's."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor


def with_expansion(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `expand_batch_to_tokens` with a CPU path that writes what it returns.

    vLLM's own leaves the result uninitialised there for every type but int64, and divides the
    logits of sampled requests by it.
    """

    @wraps(original)
    def expand_batch_to_tokens(
        x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> Tensor:
        if x.device.type != "cpu":
            return original(x, cu_num_tokens, num_tokens, replace_from, replace_to)
        values = x.masked_fill(x == replace_from, replace_to)
        counts = torch.diff(cu_num_tokens.long(), prepend=cu_num_tokens.new_zeros(1, dtype=torch.int64))
        return values.repeat_interleave(counts, output_size=num_tokens)

    return expand_batch_to_tokens
