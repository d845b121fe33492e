"""Sampling by a race of exponential clocks, with a stream of random numbers for each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Return the distribution of logits `[..., V]` at a temperature above 0, float32."""
    logits = logits.float()
    # The difference cannot overflow at a tiny temperature, as the logits themselves could.
    return torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, dim=-1)


def pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """Return the token whose clock rings first: token v rings after an exponential time of rate `weights[v]`.

    Rounding of the weights, which differs from batch to batch, changes a token only where two clocks
    ring at nearly one time. A search in the running sum would change it at each of the V borders:
    with 49152 tokens and an error of 1e-6, at one draw in a hundred, and here at one in a hundred thousand.

    Args:
        weights: `[..., V]`, not negative, not all 0; they need not add up to 1.
        uniform: `[..., V]` float64, 0 <= u < 1.

    Returns:
        `[...]` int64; a token of weight 0 is never returned.
    """
    times = -torch.log1p(-uniform) / weights
    return times.masked_fill(weights == 0, torch.inf).argmin(-1)


class RowStreams:
    """One stream of uniform numbers per row, so that a row's numbers do not depend on its neighbours.

    Args:
        seeds: one per row.
        device: where the numbers are used; they are drawn on the CPU, the same on every machine.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.device = device
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(self, counts: Sequence[int]) -> Tensor:
        """Return the next `counts[i]` numbers of each row's stream, `[B, max(counts)]` float64, 0 behind them."""
        uniform = torch.zeros(len(counts), max(counts), dtype=torch.float64)
        for row, (generator, count) in enumerate(zip(self.generators, counts, strict=True)):
            uniform[row, :count] = torch.rand(count, generator=generator, dtype=torch.float64)
        return uniform.to(self.device)

    def select(self, rows: Tensor) -> None:
        """Keep only these rows `[n]`."""
        self.generators = [self.generators[row] for row in rows.tolist()]
