"""Samples of requests with seeds that do not depend on what is drafted, on a CPU.

vLLM's sampler there takes one number of a request's generator for each token and adds noise to the logits that this
number fixes (Gumbel-max). Verification does the same here: at each position it samples the target's token by the number
of that position, and a draft is accepted if it is that token (drafter-invariant speculative decoding, Daliri et al.
2024, arXiv 2408.07978). So a request has the sample of plain decoding with the same seed, in any batch and whatever is
drafted. Drafts are sampled with the same noise, so they are accepted nearly as often as by rejection sampling.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def supported() -> bool:
    """Tell whether this vLLM samples by such numbers."""
    return hasattr(torch.ops._C, "fused_gumbel_argmax")


def draw_numbers(generator: torch.Generator, count: int) -> Tensor:
    """Take the numbers of so many tokens, as vLLM's sampler does: `[count]` int64."""
    return torch.randint(0, 2**31, (count,), generator=generator)


def next_numbers(generator: torch.Generator, count: int) -> Tensor:
    """Return the numbers of the next tokens, `[count]` int64, and leave the generator as it is."""
    state = generator.get_state()
    numbers = draw_numbers(generator, count)
    generator.set_state(state)
    return numbers


def sample(logits: Tensor, numbers: Tensor) -> Tensor:
    """Sample the tokens that these numbers fix.

    Args:
        logits: `[n, V]`, over the temperature. V is the target's vocabulary: noise goes by token id.
        numbers: `[n]` int64.

    Returns:
        `[n]` int64 token ids.
    """
    token_ids: Tensor = torch.ops._C.fused_gumbel_argmax(logits.float().contiguous(), numbers.contiguous())
    return token_ids


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
