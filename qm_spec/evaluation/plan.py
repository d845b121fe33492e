"""What a benchmark measures: each method under each setting, and the parts that engines measure of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from qm_spec.evaluation.shards import ShardResult, ShardSpec, merge_shards, split_shard


@dataclass(eq=False)
class Measurement:
    """One run of the results in the making: a method under one setting.

    Args:
        engine_name: of the engine that it shares with others, as progress bars show it.
        method: its name.
        drafter: the folder that was asked for; None for methods without.
        shard: everything that is to be measured.
        context_cut: whether the prompts were cut to one length.
        reference: plain decoding under the same setting, which may be this one.
        parts: what the engines are given.
        results: of the parts that are finished.
        failed: parts that were given up.
    """

    engine_name: str
    method: str
    drafter: Path | None
    shard: ShardSpec
    context_cut: bool
    reference: Measurement | None = None
    parts: list[ShardSpec] = field(default_factory=list)
    results: dict[int, ShardResult] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)

    def split(self, num_parts: int) -> None:
        """Set `parts`; see `split_shard`."""
        self.parts = split_shard(self.shard, num_parts)

    @property
    def settled(self) -> bool:
        """Whether every part has been measured or given up."""
        return len(self.results) + len(self.failed) == len(self.parts)

    @property
    def ready(self) -> bool:
        """Whether it can be reported, speed-up included."""
        return self.settled and bool(self.results) and (self.reference is None or self.reference.settled)

    def measured(self) -> tuple[ShardSpec, ShardResult]:
        """Return the prompts that were measured, and what came of them."""
        numbers = sorted(self.results)
        prompts = tuple(prompt for number in numbers for prompt in self.parts[number].prompts)
        return replace(self.shard, prompts=prompts), self._merged(numbers)

    def beside_reference(self) -> tuple[ShardResult, ShardResult] | None:
        """Return this and plain decoding over the parts that both have; None where there are none."""
        if self.reference is None:
            return None
        numbers = sorted(self.results.keys() & self.reference.results.keys())
        return (self._merged(numbers), self.reference._merged(numbers)) if numbers else None

    def _merged(self, numbers: list[int]) -> ShardResult:
        return merge_shards([self.results[number] for number in numbers])
