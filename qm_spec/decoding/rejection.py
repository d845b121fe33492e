"""Verification of drafted tokens: which stand, and which token the target puts behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from qm_spec.decoding.sampling import RowStreams, pick, probabilities


def accepted_prefix(agrees: Tensor, num_drafted: Tensor) -> Tensor:
    """Count the leading True of each row, among its own drafted tokens.

    Args:
        agrees: `[B, K]` bool.
        num_drafted: `[B]` int64, 0..K; columns beyond are padding.

    Returns:
        `[B]` int64, 0..num_drafted.
    """
    own = torch.arange(agrees.shape[1], device=agrees.device) < num_drafted.unsqueeze(1)
    return (agrees & own).long().cumprod(1).sum(1)


def verify_greedy(draft_ids: Tensor, num_drafted: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the drafted tokens that the target's argmax repeats.

    Args:
        draft_ids: `[B, K]` int64.
        num_drafted: `[B]` int64, 0..K, drafted tokens of each row; the others are padding.
        target_ids: `[B, K + 1]` int64, the target's argmax after 0..K drafted tokens.

    Returns:
        accepted `[B]` int64, and the target's token behind the accepted ones `[B]` int64: the
        correction of the first wrong draft, or the bonus token where none was wrong.

    Source: Leviathan et al. 2023, arXiv 2211.17192, Algorithm 1 at temperature 0.
    """
    accepted = accepted_prefix(draft_ids == target_ids[:, :-1], num_drafted)
    return accepted, target_ids.gather(1, accepted.unsqueeze(1)).squeeze(1)


def verify_sampled(
    draft_ids: Tensor,
    num_drafted: Tensor,
    draft_probs: Tensor,
    target_probs: Tensor,
    uniform: Tensor,
    following: Tensor,
) -> tuple[Tensor, Tensor]:
    """Keep drafted tokens by rejection sampling; the output is distributed as the target's own.

    A token x of the draft distribution q is kept with probability min(1, p(x) / q(x)). Behind the
    kept ones follows a sample of norm(max(p - q, 0)) where one was rejected, of p where none was.

    Args:
        draft_ids: `[B, K]` int64, sampled from `draft_probs`.
        num_drafted: `[B]` int64, 0..K, drafted tokens of each row; the others are padding.
        draft_probs: `[B, K, V]` float32, q.
        target_probs: `[B, K + 1, V]` float32, p after 0..K drafted tokens.
        uniform: `[B, K]` float64, 0 <= u < 1: one number per drafted token.
        following: `[B, V]` float64, 0 <= u < 1: for the token behind them, see `pick`.

    Returns:
        accepted `[B]` int64, and the token behind them `[B]` int64.

    Source: Leviathan et al. 2023, arXiv 2211.17192, Algorithm 1.
    """
    index = draft_ids.unsqueeze(-1)
    wanted = target_probs[:, :-1].gather(-1, index).squeeze(-1)
    proposed = draft_probs.gather(-1, index).squeeze(-1)
    # Strictly less, so that a token of p = 0 is refused also by u = 0.
    accepted = accepted_prefix(uniform * proposed < wanted, num_drafted)
    rows = torch.arange(len(accepted), device=accepted.device)
    weights = target_probs[rows, accepted]
    if draft_probs.shape[1]:
        rejected = draft_probs[rows, accepted.clamp_max(draft_probs.shape[1] - 1)]
        residual = (weights - rejected).clamp_min(0)
        # p = q leaves no residual; nothing is rejected then but by rounding.
        usable = (accepted < num_drafted) & (residual.sum(-1) > 0)
        weights = torch.where(usable.unsqueeze(-1), residual, weights)
    return accepted, pick(weights, following)


class Rule(Protocol):
    """How tokens are drawn and verified, for the rows of one call."""

    def first(self, logits: Tensor) -> Tensor:
        """Return the target's token `[B]` after the prompt, from logits `[B, V]`."""
        ...

    def begin(self, num_drafted: Tensor) -> None:
        """Begin a step that drafts `num_drafted` `[B]` tokens."""
        ...

    def draft(self, logits: Tensor) -> Tensor:
        """Return the next drafted token `[B]` from the draft's logits `[B, V]`."""
        ...

    def verify(self, draft_ids: Tensor, num_drafted: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return accepted `[B]` and the token behind them `[B]`, from the target's logits `[B, K + 1, V]`."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keep only these rows `[n]`."""
        ...


class GreedyRule:
    """Temperature 0: both models take their argmax."""

    def first(self, logits: Tensor) -> Tensor:
        """Return the argmax."""
        return logits.argmax(-1)

    def begin(self, num_drafted: Tensor) -> None:
        """Do nothing: no random number is needed."""

    def draft(self, logits: Tensor) -> Tensor:
        """Return the argmax."""
        return logits.argmax(-1)

    def verify(self, draft_ids: Tensor, num_drafted: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See `verify_greedy`."""
        return verify_greedy(draft_ids, num_drafted, logits.argmax(-1))

    def select(self, rows: Tensor) -> None:
        """Do nothing: no row has a state."""


class SamplingRule:
    """Temperature above 0: both models sample at it, each row with its own random numbers.

    A step that drafts k tokens of a row takes (k + 1) V + k numbers of its stream: V for each token
    that is drawn, of the draft or behind it, and k to accept.

    Args:
        temperature: above 0.
        seeds: one per row.
        device: of the logits.
    """

    def __init__(self, temperature: float, seeds: Sequence[int], device: torch.device) -> None:
        self.temperature = temperature
        self.streams = RowStreams(seeds, device)
        self.num_drafted = torch.empty(0)
        self.draft_probs: list[Tensor] = []

    def first(self, logits: Tensor) -> Tensor:
        """Sample from the target."""
        return pick(probabilities(logits, self.temperature), self.streams.draw([logits.shape[-1]] * len(logits)))

    def begin(self, num_drafted: Tensor) -> None:
        """Forget the drafts of the step before."""
        self.num_drafted = num_drafted
        self.draft_probs = []

    def draft(self, logits: Tensor) -> Tensor:
        """Sample from the draft, and remember its distribution."""
        probs = probabilities(logits, self.temperature)
        # A row that drafts less than the others takes no numbers for what is padding.
        drafting = self.num_drafted > len(self.draft_probs)
        self.draft_probs.append(probs)
        return pick(probs, self.streams.draw((drafting * logits.shape[-1]).tolist()))

    def verify(self, draft_ids: Tensor, num_drafted: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See `verify_sampled`."""
        target_probs = probabilities(logits, self.temperature)
        draft_probs = torch.stack(self.draft_probs, 1) if self.draft_probs else target_probs[:, :0]
        uniform = self.streams.draw(num_drafted.tolist())
        following = self.streams.draw([logits.shape[-1]] * len(logits))
        return verify_sampled(draft_ids, num_drafted, draft_probs, target_probs, uniform, following)

    def select(self, rows: Tensor) -> None:
        """Keep only these rows `[n]`."""
        self.streams.select(rows)
