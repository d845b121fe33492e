"""Compare a record of the kernels' benchmark with an earlier one of the same machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]
# What two records must have in common; the rest of a machine cancels in the ratios.
_CONDITIONS = ("backend", "device", "threads")


@dataclass(frozen=True)
class Change:
    """An operator at one size in both records.

    Args:
        before_ms, after_ms: medians.
        slowdown: how many times as long it takes as before, by the reference's time in the same run. Both ran in turn,
            so what else the machine did falls on both.
    """

    operator: str
    sizes: str
    dtype: str
    before_ms: float
    after_ms: float
    slowdown: float

    def regressed(self, tolerance: float) -> bool:
        """Whether it is slower by more than a share of `tolerance`."""
        return self.slowdown > 1 + tolerance

    def __str__(self) -> str:
        return (
            f"{self.operator} {self.sizes} {self.dtype}: {self.before_ms:.3f} -> {self.after_ms:.3f} ms, "
            f"{self.slowdown:.2f} times as long beside its reference"
        )


@dataclass(frozen=True)
class Comparison:
    """Changes of what both records hold, and the names of what only one of them does."""

    changes: tuple[Change, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]

    def regressions(self, tolerance: float) -> list[Change]:
        """Return what is slower by more than `tolerance`, worst first."""
        found = [change for change in self.changes if change.regressed(tolerance)]
        return sorted(found, key=lambda change: change.slowdown, reverse=True)


def read_record(file: Path) -> Record:
    """Read what `kernels.py --save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such record.
    """
    if not file.is_file():
        raise FileNotFoundError(f"compare: {file} does not exist; write a baseline with --save {file}")
    record = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or not {"rows", *_CONDITIONS} <= record.keys():
        raise ValueError(f"compare: {file} must be a record of the kernels' benchmark; write one with --save")
    return record


def compare_records(before: Record, after: Record) -> Comparison:
    """Match two records row by row.

    Raises:
        ValueError: they were made under different conditions, or have no row in common.
    """
    differing = [name for name in _CONDITIONS if before[name] != after[name]]
    if differing:
        shown = "; ".join(f"{name} {before[name]} and {after[name]}" for name in differing)
        raise ValueError(f"compare: both records must have the same {', '.join(_CONDITIONS)}, got {shown}")
    old, new = (_by_name(record["rows"]) for record in (before, after))
    shared = [name for name in new if name in old]
    if not shared:
        raise ValueError("compare: the records must share an operator at one size, got none in common")
    return Comparison(
        tuple(_change(old[name], new[name]) for name in shared),
        tuple(" ".join(name) for name in old if name not in new),
        tuple(" ".join(name) for name in new if name not in old),
    )


def _by_name(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(row["operator"], row["sizes"], row["dtype"]): row for row in rows}


def _change(before: dict[str, Any], after: dict[str, Any]) -> Change:
    relative = [row["time_ms"] / row["reference_ms"] for row in (before, after)]
    return Change(
        after["operator"],
        after["sizes"],
        after["dtype"],
        before["time_ms"],
        after["time_ms"],
        relative[1] / relative[0],
    )
