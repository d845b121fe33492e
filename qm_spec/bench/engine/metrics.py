"""What vLLM counted about drafts, and the numbers made from counts and times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class DraftCounts:
    """Sums of vLLM's speculation counters; add them over shards, subtract them over time, divide once.

    Args:
        drafts: proposals verified by the target.
        draft_tokens: tokens in those proposals.
        accepted_tokens: drafted tokens that the target kept; its own bonus token is not counted.
        accepted_per_position: the kept ones by their position in the proposal, first position first.
    """

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_position: tuple[int, ...] = ()

    def __add__(self, other: DraftCounts) -> DraftCounts:
        return self._combined(other, 1)

    def __sub__(self, other: DraftCounts) -> DraftCounts:
        return self._combined(other, -1)

    def _combined(self, other: DraftCounts, sign: int) -> DraftCounts:
        length = max(len(self.accepted_per_position), len(other.accepted_per_position))
        mine = _padded(self.accepted_per_position, length)
        theirs = _padded(other.accepted_per_position, length)
        return DraftCounts(
            drafts=self.drafts + sign * other.drafts,
            draft_tokens=self.draft_tokens + sign * other.draft_tokens,
            accepted_tokens=self.accepted_tokens + sign * other.accepted_tokens,
            accepted_per_position=tuple(a + sign * b for a, b in zip(mine, theirs, strict=True)),
        )

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted per drafted token, 0..1; None where nothing was drafted."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else None

    @property
    def acceptance_length(self) -> float | None:
        """Tokens per step with a draft, the bonus token included; None where nothing was drafted."""
        return 1 + self.accepted_tokens / self.drafts if self.drafts else None

    @property
    def acceptance_per_position(self) -> list[float]:
        """Share of all drafts whose token at each position was kept; falls from first to last."""
        return [count / self.drafts for count in self.accepted_per_position] if self.drafts else []


def _padded(values: tuple[int, ...], length: int) -> tuple[int, ...]:
    return values + (0,) * (length - len(values))


@dataclass(frozen=True)
class OutputDifference:
    """How the outputs of two methods differ.

    Args:
        num_prompts: prompts whose token ids are not the same.
        first_position: smallest output position, from 0, at which any of them differs; None if none does.
    """

    num_prompts: int
    first_position: int | None


def compare_outputs(outputs: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> OutputDifference:
    """Compare token ids prompt by prompt; an output that ends early differs where it ends.

    Raises:
        ValueError: the two hold different numbers of prompts.
    """
    if len(outputs) != len(reference):
        raise ValueError(f"compare_outputs: both must hold the same prompts, got {len(outputs)} and {len(reference)}")
    positions = [
        _first_difference(ours, theirs)
        for ours, theirs in zip(outputs, reference, strict=True)
        if list(ours) != list(theirs)
    ]
    return OutputDifference(len(positions), min(positions, default=None))


def _first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int:
    for position, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return position
    return min(len(ours), len(theirs))
