"""The table of a benchmark's runs, in Markdown that is also aligned in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Run = dict[str, Any]

_COLUMNS: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("method", lambda run: run["method"]),
    ("context", lambda run: f"{'' if run['context_cut'] else '~'}{run['context_tokens']}"),
    ("tokens/s", lambda run: _number(run["output_tokens_per_s"], ".1f")),
    ("speedup", lambda run: _number(run["speedup"], ".2f")),
    ("accept length", lambda run: _number(run["acceptance_length"], ".2f")),
    ("accept rate", lambda run: _number(run["acceptance_rate"], ".2f")),
    ("tokens/step", lambda run: _number(run["tokens_per_step"], ".2f")),
    ("TTFT ms", lambda run: _number(run["ttft_ms_p50"], ".1f")),
    ("TPOT ms", lambda run: _number(run["tpot_ms_p50"], ".1f")),
    ("lossless", lambda run: lossless_cell(run)),
)
_SWEPT: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("K", lambda run: str(run["num_speculative_tokens"] or _MISSING)),
    ("temperature", lambda run: f"{run['temperature']:g}"),
    ("concurrency", lambda run: str(run["concurrency"])),
)
_MISSING = "-"


def _number(value: float | None, form: str) -> str:
    return _MISSING if value is None else format(value, form)


def lossless_cell(run: Run) -> str:
    """Say whether the outputs equal plain decoding's, and if not how many differ and from which token."""
    if run["lossless"] is None:
        return _MISSING
    if run["lossless"]:
        return "yes"
    return (
        f"no: {run['num_prompts_different']} of {run['num_prompts']} prompts, first at token {run['first_difference']}"
    )


def format_table(runs: Sequence[Run]) -> str:
    """Return one row per run, the method to the left and numbers to the right; "-" for what is not known.

    What a sweep varies has a column of its own.
    """
    varied = [(name, cell) for name, cell in _SWEPT if len({cell(run) for run in runs} - {_MISSING}) > 1]
    columns = [_COLUMNS[0], *varied, *_COLUMNS[1:]]
    return align_table([name for name, _ in columns], [[cell(run) for _, cell in columns] for run in runs])


def align_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose first column stands to the left and the others to the right."""
    # A rule of one character is none in Markdown.
    widths = [max(2, *(len(row[i]) for row in [header, *rows])) for i in range(len(header))]
    lines = [_line(header, widths), _rule(widths), *(_line(row, widths) for row in rows)]
    return "\n".join(lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = [
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return f"| {' | '.join([first, *others])} |"


def _rule(widths: Sequence[int]) -> str:
    first, *others = widths
    return f"| {' | '.join(['-' * first, *('-' * (width - 1) + ':' for width in others)])} |"
