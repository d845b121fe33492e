"""Several values per setting on the command line: what to measure, and what to take of what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qm_spec.bench.settings import Sweep

_KINDS: dict[str, Callable[[str], Any]] = {
    "num_speculative_tokens": int,
    "temperature": float,
    "concurrency": int,
    "context_lengths": int,
}


def parse_sweep(entries: Sequence[str]) -> Sweep:
    """Read entries such as `num_speculative_tokens=1..8` and `temperature=0,1`; one text may hold several.

    Raises:
        ValueError: a name is unknown or stands twice, or its values are not numbers, each once.
    """
    found: dict[str, tuple[Any, ...]] = {}
    for entry in (part for text in entries for part in text.split()):
        name, _, values = entry.partition("=")
        if name not in _KINDS or name in found:
            raise ValueError(
                f"sweep: each of {', '.join(sorted(_KINDS))} may be given once as NAME=VALUES, got {entry!r}"
            )
        found[name] = parse_values(values, _KINDS[name], f"sweep: {name}")
    return Sweep(**found)


def parse_values(text: str, kind: Callable[[str], Any], name: str) -> tuple[Any, ...]:
    """Read numbers as 1,2,8 or 1..8, or both together.

    Raises:
        ValueError: they are none, or one stands twice; the message begins with `name`.
    """
    values: list[Any] = []
    try:
        for entry in filter(None, (entry.strip() for entry in text.split(","))):
            first, dots, last = entry.partition("..")
            values += range(int(first), int(last) + 1) if dots else [kind(entry)]
    except ValueError as error:
        shape = "integers" if kind is int else "numbers"
        raise ValueError(f"{name}: must be {shape} like 1,2,8 or 1..8, got {text!r}") from error
    if not values or len(set(values)) < len(values):
        raise ValueError(f"{name}: must be different numbers like 1,2,8 or 1..8, got {text!r}")
    return tuple(values)
