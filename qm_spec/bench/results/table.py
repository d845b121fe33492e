"""The table of a benchmark's runs, in Markdown that is also aligned in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Run = dict[str, Any]
_MISSING = "-"


def interval_cell(found: Run) -> str:
    """Return the interval of a speed-up, of a run or of a category of it."""
    if found["speedup_low"] is None or found["speedup_high"] is None:
        return _MISSING
    return f"{found['speedup_low']:.2f} to {found['speedup_high']:.2f}"


def difference_cell(value: float, interval: Sequence[float | None], scale: float = 1, digits: int = 3) -> str:
    """Return a signed value and half the width of its interval, where it has one."""
    low, high = interval
    half = "" if low is None or high is None else f" ± {scale * (high - low) / 2:.{digits}f}"
    return f"{scale * value:+.{digits}f}{half}"


def lossless_cell(run: Run) -> str:
    """Say whether the outputs equal plain decoding's, and if not how many differ and from which token."""
    if run["lossless"] is None:
        return _MISSING
    if run["lossless"]:
        return "yes"
    return (
        f"no: {run['num_prompts_different']} of {run['num_prompts']} prompts, first at token {run['first_difference']}"
    )


_COLUMNS: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("method", lambda run: run["method"]),
    ("context", lambda run: f"{'' if run['context_cut'] else '~'}{run['context_tokens']}"),
    ("tokens/s", lambda run: _number(run["output_tokens_per_s"], ".1f")),
    ("speedup", lambda run: _number(run["speedup"], ".2f")),
    ("95% interval", interval_cell),
    ("decode only", lambda run: _number(run["decode_speedup"], ".2f")),
    ("accept length", lambda run: _number(run["acceptance_length"], ".2f")),
    ("tokens/step", lambda run: _number(run["tokens_per_step"], ".2f")),
    ("TTFT ms", lambda run: _number(run["ttft_ms_p50"], ".1f")),
    ("TPOT ms", lambda run: _number(run["tpot_ms_p50"], ".1f")),
    ("lossless", lossless_cell),
)
_SWEPT: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("K", lambda run: str(run["num_speculative_tokens"] or _MISSING)),
    ("temperature", lambda run: f"{run['temperature']:g}"),
    ("concurrency", lambda run: str(run["concurrency"])),
)


def _number(value: float | None, form: str) -> str:
    return _MISSING if value is None else format(value, form)


def format_table(runs: Sequence[Run]) -> str:
    """Return one row per run, the method to the left and numbers to the right; "-" for what is not known.

    What a sweep varies has a column of its own.
    """
    varied = [(name, cell) for name, cell in _SWEPT if len({cell(run) for run in runs} - {_MISSING}) > 1]
    columns = [_COLUMNS[0], *varied, *_COLUMNS[1:]]
    return align_table([name for name, _ in columns], [[cell(run) for _, cell in columns] for run in runs])


def category_tables(runs: Sequence[Run]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return for each setting what was measured of each category: a title, the head, and a line per category.

    A cell has the speed-up with its interval, and the acceptance length by tokens per step. The last line names the
    category in which a method is slowest beside plain decoding.
    """
    found = []
    listed = [run for run in runs if run.get("categories")]
    settings = dict.fromkeys((run["temperature"], run["concurrency"], run["context_tokens"]) for run in listed)
    for setting in settings:
        some = [run for run in listed if (run["temperature"], run["concurrency"], run["context_tokens"]) == setting]
        names = [_run_label(run, some) for run in some]
        by_category = [{one["category"]: one for one in run["categories"]} for run in some]
        # An interruption may leave a run without some.
        categories = dict.fromkeys(name for one in by_category for name in one)
        rows = [
            [
                name,
                str(max(one[name]["num_prompts"] for one in by_category if name in one)),
                *(_category_cell(one.get(name)) for one in by_category),
            ]
            for name in categories
        ]
        rows.append(["(slowest)", _MISSING, *(_slowest(run["categories"]) for run in some)])
        temperature, concurrency, context = setting
        title = f"temperature {temperature:g}, concurrency {concurrency}, {context} tokens of context"
        found.append((title, ["category", "prompts", *names], rows))
    return found


def format_categories(runs: Sequence[Run]) -> str:
    """Return `category_tables` as text, nothing where prompts have no categories."""
    return "\n\n".join(
        f"speed-up (95% interval), acceptance length / tokens per step: {title}\n\n{align_table(header, rows)}"
        for title, header, rows in category_tables(runs)
    )


def _run_label(run: Run, runs: Sequence[Run]) -> str:
    several = sum(other["method"] == run["method"] for other in runs) > 1
    return f"{run['method']} K={run['num_speculative_tokens']}" if several else run["method"]


def _category_cell(found: Run | None) -> str:
    if found is None:
        return _MISSING
    interval = interval_cell(found)
    spread = "" if interval == _MISSING else f" ({interval})"
    accepted = _number(found["acceptance_length"], ".2f")
    return f"{_number(found['speedup'], '.2f')}{spread}, {accepted} / {found['tokens_per_step']:.2f}"


def _slowest(categories: Sequence[Run]) -> str:
    known = [one for one in categories if one["speedup"] is not None]
    if not known:
        return _MISSING
    least = min(known, key=lambda one: one["speedup"])
    return f"{least['speedup']:.2f} {least['category']}"


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
