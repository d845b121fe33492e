"""Speed-up by task, as Spec-Bench's leaderboard prints it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from qm_spec.bench.results.file import RequestRow
from qm_spec.bench.workloads.catalogue import SPEC_BENCH_TASKS

_TASKS = tuple(dict.fromkeys(SPEC_BENCH_TASKS.values()))


def with_tasks(rows: Sequence[RequestRow]) -> list[RequestRow]:
    """Return requests of Spec-Bench with their tasks in place of their categories."""
    return [
        row if row.category is None else replace(row, category=SPEC_BENCH_TASKS.get(row.category, row.category))
        for row in rows
    ]


def task_names(rows: Sequence[RequestRow]) -> list[str]:
    """Return the categories of requests, Spec-Bench's own first and in its order; none where there is but one."""
    found = dict.fromkeys(row.category for row in rows if row.category is not None)
    names = [name for name in _TASKS if name in found] + [name for name in found if name not in _TASKS]
    return names if len(names) > 1 else []


def task_header(tasks: Sequence[str]) -> list[str]:
    """Return the head of the table whose lines `task_line` makes."""
    return ["Models", *tasks, "#Mean Accepted Tokens", "Overall"]


def task_line(name: str, tasks: Sequence[str], rows: Sequence[RequestRow], plain: Sequence[RequestRow]) -> list[str]:
    """Return a method's line: the speed-up of each task, the mean accepted tokens, and the speed-up of all requests.

    A speed-up is the mean over requests of output tokens per second, by the same mean of plain decoding; accepted
    tokens are counted per draft with the target's own token. Both as Spec-Bench's `evaluation/speed.py` does, so short
    requests weigh as much as long ones; elsewhere this package divides sums.

    Args:
        rows, plain: requests of the method and of plain decoding.
    """
    drafts = sum(row.num_drafts for row in rows)
    accepted = f"{1 + sum(row.num_accepted_tokens for row in rows) / drafts:.2f}" if drafts else "1.00"
    return [name, *(_speedup(rows, plain, task) for task in tasks), accepted, _speedup(rows, plain, None)]


def _speedup(rows: Sequence[RequestRow], plain: Sequence[RequestRow], task: str | None) -> str:
    ours, theirs = (
        [row.output_tokens / row.latency_s for row in side if task is None or row.category == task]
        for side in (rows, plain)
    )
    return f"{statistics.fmean(ours) / statistics.fmean(theirs):.2f}x" if ours and theirs else "-"
