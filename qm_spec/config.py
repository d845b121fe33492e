"""Settings of the merged cache: frozen, validated, unknown keys refused."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The name that vLLM knows the draft model by; it must begin with Eagle3.
ARCHITECTURE = "Eagle3QuickMergeForCausalLM"
SALIENCIES = ("entropy", "inverse_entropy")


@dataclass(frozen=True)
class MergeConfig:
    """How the drafter's cache is merged as its tokens grow old.

    A group is `group_size` consecutive tokens. While fewer than `window` tokens follow it, it is
    raw. At `window` tokens it is merged to `schedule[0]` entries, and each time its distance
    doubles to the next number of `schedule`. The last number stays.

    Attributes:
        window: tokens kept raw behind the newest one.
        group_size: tokens merged together; must divide the page size.
        schedule: entries per group at each level, strictly falling; `(0,)` empties the far memory,
            which leaves a sliding window.
        saliency: `entropy` takes tokens of high attention entropy for salient, `inverse_entropy`
            those of low entropy. The two reference implementations of the paper disagree.
        temperature: of the softmax over the saliencies of a group (paper: tau).
        epsilon: mass of a token that is not selected at all (paper: eps).

    Source: QuickMerge++, arXiv 2508.13204; the schedule is ours.
    """

    window: int = 128
    group_size: int = 16
    schedule: tuple[int, ...] = (8, 4, 2, 1)
    saliency: str = "entropy"
    temperature: float = 0.5
    epsilon: float = 0.01

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", tuple(self.schedule))
        if self.group_size < 2:
            raise ValueError(f"MergeConfig: group_size must be at least 2, got {self.group_size}")
        if self.window < self.group_size + 2:
            raise ValueError(
                f"MergeConfig: window must be at least group_size + 2 = {self.group_size + 2}, got {self.window}"
            )
        counts = (self.group_size, *self.schedule)
        falling = all(new < old for old, new in itertools.pairwise(counts))
        positive = all(count >= 1 for count in self.schedule)
        if self.schedule != (0,) and not (self.schedule and falling and positive):
            raise ValueError(
                f"MergeConfig: schedule must fall strictly from below group_size = {self.group_size} to 1 or more, "
                f"or be (0,) for no far memory, got {self.schedule}"
            )
        if self.saliency not in SALIENCIES:
            raise ValueError(f"MergeConfig: saliency must be one of {SALIENCIES}, got {self.saliency!r}")
        if not self.temperature > 0:
            raise ValueError(f"MergeConfig: temperature must be above 0, got {self.temperature}")
        if not 0 < self.epsilon < 1:
            raise ValueError(f"MergeConfig: epsilon must lie between 0 and 1, got {self.epsilon}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MergeConfig:
        """Build from a checkpoint's `quickmerge` entry.

        Raises:
            ValueError: a key is unknown, or a value is out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"MergeConfig: unknown settings {unknown}; known are {sorted(known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**dataclasses.asdict(self), "schedule": list(self.schedule)}

    @property
    def max_speculative_tokens(self) -> int:
        """The deepest draft for which only verified tokens are ever merged."""
        return self.window - self.group_size - 1

    @property
    def level_distances(self) -> tuple[int, ...]:
        """Tokens that must follow a group before each level: window, 2 window, 4 window..."""
        return tuple(self.window << level for level in range(len(self.schedule)))

    def entries_attended(self, num_tokens: int) -> int:
        """Count the entries one KV head attends to after `num_tokens` verified tokens."""
        total = 0
        counts = (self.group_size, *self.schedule)
        for group in range(num_tokens // self.group_size):
            distance = num_tokens - (group + 1) * self.group_size
            total += counts[sum(distance >= limit for limit in self.level_distances)]
        return total + num_tokens % self.group_size
