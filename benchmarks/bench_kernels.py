"""Measure the kernels: time, share of the memory's bandwidth, and speed against PyTorch, in one table."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from cases import Case
from plans import PLANS
from rich.console import Console
from rich.progress import track
from rich.table import Table
from script import run_main
from torch import Tensor

from qm_spec.ops import backend
from qm_spec.provenance import conditions, write_record

# Larger than the last-level cache of any machine this is meant for.
COPIED_BYTES = 1 << 28
MATRIX = 2048
# Until a call takes no less time than the one before.
WARMING_CALLS = 3

EXAMPLES = """
Examples:

    python benchmarks/bench_kernels.py --out results/kernels.json

    python benchmarks/bench_kernels.py saliency_merge merge_groups --threads 1
"""


@dataclass(frozen=True)
class Measurement:
    """One row: an operator at one size.

    Attributes:
        operator: its name.
        sizes: in words.
        dtype: of its floats.
        time_ms: median of the operator's times, each right after untimed calls of it (or after what undoes its
            changes): the caches hold as much of what it reads as they can.
        time_ms_p10: lower decile.
        time_ms_p90: upper decile.
        cold_ms: median where more than the caches hold was read before each call instead.
        reference_ms: median of its PyTorch reference.
        alternative_ms: median of the alternative; None where there is none.
        alternative: in words.
        moved_bytes: what must be read and written, each once; more of it per second than a copy moves means that
            it came from the cache.
        flops: of the products that the result is made of, each once; None where it is bound by memory.
    """

    operator: str
    sizes: str
    dtype: str
    time_ms: float
    time_ms_p10: float
    time_ms_p90: float
    cold_ms: float
    reference_ms: float
    alternative_ms: float | None
    alternative: str
    moved_bytes: int
    flops: int | None


def elapsed_ms(run: Callable[[], Any], device: str) -> float:
    """Time one call."""
    if device == "cpu":
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e3
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin_event.record()
    run()
    end_event.record()
    torch.cuda.synchronize()
    return begin_event.elapsed_time(end_event)


def alternate(
    runs: Iterable[Callable[[], Any]], device: str, rounds: int, before: Callable[[], Any] = lambda: None
) -> list[list[float]]:
    """Time each of `runs` in turn, so that what else the machine does falls on all of them; call `before` untimed."""
    runs = list(runs)
    for run in runs:
        before()
        run()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, spent in zip(runs, times, strict=True):
            before()
            spent.append(elapsed_ms(run, device))
    return times


def measure(case: Case, sizes: Any, dtype: torch.dtype, device: str, rounds: int) -> Measurement:
    """Time a case's operator, reference and alternative."""
    torch.manual_seed(0)
    arguments = tuple(x.to(device) if isinstance(x, Tensor) else x for x in case.arguments(sizes, dtype))
    outputs = case.operator(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    runs = [case.operator, case.reference, *([case.alternative] if case.alternative else [])]
    other = torch.ones(COPIED_BYTES // 4, device=device)

    def warm() -> None:
        if case.restore:
            case.restore(*arguments)
        else:
            for _ in range(WARMING_CALLS):
                case.operator(*arguments)

    def evict() -> None:
        warm()
        other.sum()

    with torch.no_grad():
        times = alternate([partial(run, *arguments) for run in runs], device, rounds, warm)
        (cold,) = alternate([partial(case.operator, *arguments)], device, rounds, evict)
    inputs_and_outputs = sum(x.nbytes for x in (*arguments, *outputs) if isinstance(x, Tensor))
    deciles = statistics.quantiles(times[0], n=10)
    return Measurement(
        case.name,
        str(sizes),
        str(dtype).removeprefix("torch."),
        statistics.median(times[0]),
        deciles[0],
        deciles[-1],
        statistics.median(cold),
        statistics.median(times[1]),
        statistics.median(times[2]) if case.alternative else None,
        case.alternative_name,
        case.moved_bytes(sizes, dtype) if case.moved_bytes else inputs_and_outputs,
        case.flops(sizes) if case.flops else None,
    )


def ceilings(device: str, rounds: int) -> tuple[float, float]:
    """Measure what the machine can do: bytes per second of a copy, and float32 operations per second of torch.mm."""
    source = torch.ones(COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(MATRIX, MATRIX, device=device)
    copy, product = alternate([lambda: target.copy_(source), lambda: matrix @ matrix], device, rounds)
    return 2 * COPIED_BYTES / min(copy) * 1e3, 2 * MATRIX**3 / min(product) * 1e3


def table(rows: list[Measurement], bandwidth: float, product: float) -> Table:
    """Lay the measurements out."""
    title = f"copy {bandwidth / 1e9:.1f} GB/s, torch.mm {product / 1e9:.0f} GFLOP/s (float32), measured in this run"
    result = Table(title=title)
    for name in ("operator", "sizes", "dtype"):
        result.add_column(name, no_wrap=True)
    for name in ("ms", "cold ms", "MB", "of copy", "GFLOP/s", "of torch.mm", "x reference", "x alternative"):
        result.add_column(name, justify="right")
    result.add_column("alternative", no_wrap=True)
    for row in rows:
        rate = row.flops / row.time_ms * 1e3 if row.flops else None
        result.add_row(
            row.operator,
            row.sizes,
            row.dtype,
            f"{row.time_ms:.3f}",
            f"{row.cold_ms:.3f}",
            f"{row.moved_bytes / 1e6:.1f}",
            f"{row.moved_bytes / row.time_ms * 1e3 / bandwidth:.0%}",
            f"{rate / 1e9:.0f}" if rate else "",
            f"{rate / product:.0%}" if rate else "",
            f"{row.reference_ms / row.time_ms:.1f}",
            f"{row.alternative_ms / row.time_ms:.1f}" if row.alternative_ms else "",
            row.alternative,
        )
    return result


def run_cases(names: list[str], device: str, threads: int | None, rounds: int) -> dict[str, Any]:
    """Measure some of `PLANS`, print the table, and return the record."""
    if threads:
        torch.set_num_threads(threads)
    if backend.backend(device) != "compiled":
        print(f"kernels: {device} runs the references, so nothing can be faster; see csrc/README.md", file=sys.stderr)
    bandwidth, product = ceilings(device, rounds)
    planned = [plan for name in names for plan in PLANS[name]]
    progress = track(planned, "measuring", console=Console(stderr=True), transient=True)
    rows = [measure(case, sizes, dtype, device, rounds) for case, sizes, dtype in progress]
    # Wide enough for every column, also where there is no terminal.
    Console(width=max(170, Console().width)).print(table(rows, bandwidth, product))
    return {
        **conditions(),
        "backend": backend.backend(device),
        "device": torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "copy_bytes_per_s": bandwidth,
        "mm_float32_flops_per_s": product,
        "rows": [asdict(row) for row in rows],
    }


def main(
    operators: Annotated[
        list[str] | None, typer.Argument(metavar="OPERATOR...", help=f"Of {', '.join(PLANS)}.", show_default="all")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="torch's own")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Times that each is measured.")] = 21,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the record here, a line a row.")] = None,
) -> None:
    """Measure the kernels beside their references and the obvious alternative, in turn."""
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"device must be cpu or cuda, got {device}")
    names = operators or list(PLANS)
    if unknown := [name for name in names if name not in PLANS]:
        raise typer.BadParameter(f"operators are {', '.join(PLANS)}, got {', '.join(unknown)}")
    record = run_cases(names, device, threads, rounds)
    if out is not None:
        write_record(out, record)


if __name__ == "__main__":
    run_main(main, EXAMPLES)
