"""Repairs of vLLM's sampling on the CPU: of verification, which is not the target's otherwise, and of seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy as np
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


@contextmanager
def without_seeds_of_unread_prompts(runner: Any) -> Iterator[None]:
    """Hide the generators of requests whose prompts are still being read, if `runner` is on a CPU.

    What is sampled for them is dropped, and must take no number from a seeded request. vLLM turns the generator back
    afterwards, which a CPU's refuses.
    """
    seeds, batch = {}, runner.input_batch
    if runner.device.type == "cpu" and batch.generators:
        unread = np.nonzero(runner.discard_request_mask.np[: batch.num_reqs])[0].tolist()
        seeds = {row: batch.generators.pop(row) for row in unread if row in batch.generators}
    try:
        yield
    finally:
        batch.generators.update(seeds)


def with_seeds_of_read_prompts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the runner's `sample_tokens` that draws nothing from the seed of a request whose prompt is being read."""

    @wraps(original)
    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        with without_seeds_of_unread_prompts(self):
            return original(self, grammar_output)

    return sample_tokens
