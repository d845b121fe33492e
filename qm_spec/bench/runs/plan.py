"""What a benchmark measures: methods under settings, the parts that engines measure of them, and in what order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qm_spec.bench.engine.shards import PassResult, ShardResult, ShardSpec, split_shard
from qm_spec.bench.results.turns import Turn

# Prompts of a turn with several requests in flight, in times their number: when the last ones end, slots run empty.
_WAVES_PER_TURN = 4

# A part's number and a pass's.
Key = tuple[int, int]


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
        parts: of the prompts, which a turn or an actor measures each.
        results: the passes over parts that are finished.
        plain: of them, plain decoding's in the same turn.
        failed: parts that were given up.
        dtype: of the target as an engine resolved it.
    """

    engine_name: str
    method: str
    drafter: Path | None
    shard: ShardSpec
    context_cut: bool
    reference: Measurement | None = None
    parts: list[ShardSpec] = field(default_factory=list)
    results: dict[Key, PassResult] = field(default_factory=dict)
    plain: dict[Key, PassResult] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    dtype: str = ""

    def split_for_turns(self) -> None:
        """Set `parts` to what engines decode in turn, once each: a prompt, or some waves of requests in flight.

        A trace keeps its pace and is one part.
        """
        whole = replace(self.shard, repeats=1, warm_up=False)
        size = 1 if whole.concurrency == 1 else _WAVES_PER_TURN * whole.concurrency
        is_trace = any(prompt.arrival_s is not None for prompt in whole.prompts)
        self.parts = split_shard(whole, 1 if is_trace else math.ceil(len(whole.prompts) / size))

    def split_for_actors(self, num_actors: int) -> None:
        """Set `parts` to what that many engines decode side by side, with all passes; see `split_shard`."""
        self.parts = split_shard(self.shard, num_actors)

    @property
    def warm_up(self) -> ShardSpec:
        """What an engine decodes before a turn of this setting is timed."""
        return replace(self.shard, repeats=0)

    def take(self, part: int, result: ShardResult) -> None:
        """Keep all passes of a part, which an actor has measured."""
        self.dtype = result.dtype
        self.results |= {(part, number): one for number, one in enumerate(result.passes)}

    def take_turn(self, key: Key, result: ShardResult, plain: ShardResult | None) -> None:
        """Keep one pass of a part, and plain decoding's in the same turn."""
        self.dtype = result.dtype
        (self.results[key],) = result.passes
        if plain is not None:
            (self.plain[key],) = plain.passes

    def take_plain_from_reference(self) -> None:
        """Compare with plain decoding of the same part and pass, whenever and wherever that was measured."""
        if self.reference is not None:
            self.plain = {key: one for key, one in self.reference.results.items() if key in self.results}

    @property
    def is_settled(self) -> bool:
        """Whether every part has been measured or given up."""
        return len({part for part, _ in self.results}) + len(self.failed) == len(self.parts)

    def turns(self) -> list[Turn]:
        """Return what was measured, part by part."""
        found = []
        for number, part in enumerate(self.parts):
            keys = sorted(key for key in self.results if key[0] == number)
            if keys:
                passes = tuple((self.results[key], self.plain.get(key)) for key in keys)
                found.append(Turn(part.prompts, passes))
        return found


@dataclass(frozen=True)
class Round:
    """Engines that are alive together for one pass, and take turns.

    Args:
        number: of the pass.
        engines: their names, plain decoding's first.
        turns: in order: the number of the setting, and of the part, None for a warm-up.
    """

    number: int
    engines: tuple[str, ...]
    turns: tuple[tuple[int, int | None], ...]


def plan_rounds(engines: Mapping[str, Sequence[Measurement]], num_passes: int, at_once: int | None) -> list[Round]:
    """Return what is left to measure, pass by pass, in groups that fit the memory, each with plain decoding of its own.

    A turn that lacks a method is taken again by that method and plain decoding, so that they stand next to each other
    in time.

    Args:
        engines: by name their measurements, one per setting and in the same order; plain decoding's comes first.
        at_once: engines that may be alive together, at least 2; None for any number.
    """
    plain, *others = engines
    size = len(others) if at_once is None else at_once - 1
    rounds = []
    for number in range(num_passes):
        missing = {name: _missing(measured, number) for name, measured in engines.items()}
        waiting = [name for name in others if missing[name]]
        groups = [waiting[begin : begin + size] for begin in range(0, len(waiting), max(1, size))] or [[]]
        for place, group in enumerate(groups):
            wanted = set[Key]().union(*(missing[name] for name in (group if place else (plain, *group))))
            if wanted:
                rounds.append(Round(number, (plain, *group), tuple(_with_warm_ups(sorted(wanted)))))
    return rounds


def _missing(measured: Sequence[Measurement], number: int) -> set[Key]:
    """Return the settings and parts that lack a pass."""
    return {
        (setting, part)
        for setting, one in enumerate(measured)
        for part in range(len(one.parts))
        if (part, number) not in one.results
    }


def _with_warm_ups(turns: Sequence[tuple[int, int]]) -> list[tuple[int, int | None]]:
    """Put a warm-up before the first turn of each setting."""
    found: list[tuple[int, int | None]] = []
    for setting, part in turns:
        if not found or found[-1][0] != setting:
            found.append((setting, None))
        found.append((setting, part))
    return found
