"""Settings of the merged cache: frozen, validated, unknown keys refused."""

from __future__ import annotations

import dataclasses
import itertools
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# The name that vLLM knows the draft model by; it must begin with Eagle3.
ARCHITECTURE = "Eagle3QuickMergeForCausalLM"
# By name, the sign of a token's attention entropy in its saliency. A kernel knows a saliency by its place here.
SALIENCIES = {"entropy": 1.0, "inverse_entropy": -1.0}
# Tokens that a new drafter keeps raw: most turns of a chat. Acceptance hardly differs from 64 to 512
# (docs/results/long-context.md). A checkpoint that names no window was trained with `MergeConfig`'s 128.
TRAINED_WINDOW = 512
# A checkpoint may come from anywhere, and these decide how much memory is asked for and how far distances are shifted.
MOST_WINDOW = 2**20
MOST_GROUP_SIZE = 256
MOST_LEVELS = 16
MOST_DRAFTS = 256


@dataclass(frozen=True)
class MergeConfig:
    """How the drafter's cache is merged as its tokens grow old.

    A group is `group_size` consecutive tokens. While fewer than `window` tokens follow it, it is
    raw. At `window` tokens it is merged to `schedule[0]` entries, and each time its distance
    doubles to the next number of `schedule`. A schedule that ends in 1 goes on faster: each time the
    distance doubles, four neighbouring entries become one, by two levels, so an entry spans 4
    groups, then 16, 64... Every doubling of the context then adds half as many entries as the one
    before it, and what is attended hardly grows with N. A schedule that ends in another number
    stays there.

    Attributes:
        window: tokens kept raw behind the newest one.
        group_size: tokens merged together; must divide the page size.
        schedule: entries per group at each level, strictly falling; `(0,)` empties the far memory,
            which leaves a sliding window.
        saliency: `entropy` takes tokens of high attention entropy for salient, `inverse_entropy`
            those of low entropy. The two reference implementations of the paper disagree.
        temperature: of the softmax over the saliencies of a group (paper: tau).
        epsilon: mass of a token that is not selected at all (paper: eps).
        doublings: how often an entry's span doubles after the schedule has come to 1; from then on
            what is attended grows with N again. With the other defaults, 12 doublings end at 65536
            tokens an entry, as many tokens behind the newest one.

    Source: QuickMerge++, arXiv 2508.13204; the schedule is ours.
    """

    window: int = 128
    group_size: int = 16
    schedule: tuple[int, ...] = (8, 4, 2, 1)
    saliency: str = "entropy"
    temperature: float = 0.5
    epsilon: float = 0.01
    doublings: int = 12

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", tuple(self.schedule))
        for name, value in (("window", self.window), ("group_size", self.group_size), ("doublings", self.doublings)):
            if type(value) is not int:
                raise TypeError(f"MergeConfig: {name} must be an integer, got {value!r}")
        if not all(type(count) is int for count in self.schedule):
            raise TypeError(f"MergeConfig: schedule must hold integers, got {self.schedule}")
        if not 2 <= self.group_size <= MOST_GROUP_SIZE:
            raise ValueError(f"MergeConfig: group_size must be in 2..{MOST_GROUP_SIZE}, got {self.group_size}")
        if not self.group_size + 2 <= self.window <= MOST_WINDOW:
            raise ValueError(
                f"MergeConfig: window must be in {self.group_size + 2} (group_size + 2)..{MOST_WINDOW}, "
                f"got {self.window}"
            )
        if len(self.schedule) > MOST_LEVELS:
            raise ValueError(f"MergeConfig: schedule must have at most {MOST_LEVELS} numbers, got {len(self.schedule)}")
        counts = (self.group_size, *self.schedule)
        falling = all(new < old for old, new in itertools.pairwise(counts))
        positive = all(count >= 1 for count in self.schedule)
        if self.schedule != (0,) and not (self.schedule and falling and positive):
            raise ValueError(
                f"MergeConfig: schedule must fall strictly from below group_size = {self.group_size} to 1 or more, "
                f"or be (0,) for no far memory, got {self.schedule}"
            )
        if not 0 <= self.doublings <= 16:
            raise ValueError(f"MergeConfig: doublings must be in 0..16, got {self.doublings}")
        if self.saliency not in SALIENCIES:
            raise ValueError(f"MergeConfig: saliency must be one of {tuple(SALIENCIES)}, got {self.saliency!r}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"MergeConfig: temperature must be above 0 and finite, got {self.temperature}")
        if not 0 < self.epsilon < 1:
            raise ValueError(f"MergeConfig: epsilon must lie between 0 and 1, got {self.epsilon}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MergeConfig:
        """Build from a checkpoint's `quickmerge` entry.

        Raises:
            TypeError: a value is of another kind.
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

    def pack(self) -> list[int]:
        """Return the settings as operators take them; floats are the bits of a float64.

        The kernels read them in `csrc/merge_config.h`.
        """
        saliency = list(SALIENCIES).index(self.saliency)
        bits = struct.unpack("2q", struct.pack("2d", self.temperature, self.epsilon))
        settings = (self.window, self.group_size, self.doublings, saliency, *bits)
        return [len(self.schedule), *self.schedule, *settings]

    @classmethod
    def unpack(cls, packed: Sequence[int]) -> MergeConfig:
        """Build from what `pack` returned.

        Raises:
            ValueError: another number of values, or one is out of range.
        """
        levels = packed[0] if packed else 0
        if len(packed) != levels + 7:
            raise ValueError(f"MergeConfig: packed must hold a schedule and 6 settings, got {list(packed)}")
        window, group_size, doublings, saliency, *bits = packed[levels + 1 :]
        if not 0 <= saliency < len(SALIENCIES):
            raise ValueError(f"MergeConfig: saliency must be in 0..{len(SALIENCIES) - 1}, got {saliency}")
        temperature, epsilon = struct.unpack("2d", struct.pack("2q", *bits))
        schedule = tuple(packed[1 : levels + 1])
        return cls(window, group_size, schedule, list(SALIENCIES)[saliency], temperature, epsilon, doublings)

    @property
    def max_speculative_tokens(self) -> int:
        """The deepest draft for which only verified tokens are ever merged."""
        return min(self.window - self.group_size - 1, MOST_DRAFTS)

    @property
    def spans(self) -> tuple[int, ...]:
        """Groups that an entry spans at each level 1, 2...: 1 within the schedule, then 2, 4, 8..."""
        doublings = self.doublings if self.schedule[-1] == 1 else 0
        return (1,) * len(self.schedule) + tuple(2 << number for number in range(doublings))

    @property
    def level_distances(self) -> tuple[int, ...]:
        """Tokens that must follow a group, or a span, before each level.

        Window, 2 window, 4 window... within the schedule; past it two levels share a distance.
        """
        counts = len(self.schedule)
        past = (counts + number // 2 for number in range(len(self.spans) - counts))
        return tuple(self.window << power for power in (*range(counts), *past))

    def entries_attended(self, num_tokens: int) -> int:
        """Count the entries one KV head attends to after `num_tokens` verified tokens."""
        total, group = 0, 0
        counts = (self.group_size, *self.schedule)
        while group < num_tokens // self.group_size:
            level, span = 0, 1
            for limit, groups in zip(self.level_distances, self.spans, strict=True):
                if num_tokens - (group // groups + 1) * groups * self.group_size < limit:
                    break
                level, span = level + 1, groups
            total += counts[level] if level < len(counts) else 1
            group += span
        return total + num_tokens % self.group_size
