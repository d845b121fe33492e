"""Time, throughput and peak memory of `QuickMergePP.compress`, beside a plain k-means of the same tokens."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench_kmeans import devices, elapsed_ms, lloyd
from script import run_main, with_plain_errors

# L, B, T, D, K. The first is the shape at which the reference implementation was timed.
REFERENCE = (4, 4, 512, 128, 128)
LENGTHS = (128, 512, 1024, 2048, 4096)
# Recorded once, on another machine: the `quickmergepp` code by its own benchmark, float32, CPU.
REFERENCE_MS = 1162.0
KMEANS_ITERATIONS = 5

EXAMPLES = """
Examples:

    python benchmarks/bench_compress.py

    python benchmarks/bench_compress.py --threads 1 --tokens 512,8192 --chunk-size 64
"""


def peak_mib(action: Callable[[], Any], device: str) -> float | None:
    """Return the memory that an action needs above what is held before it, MiB; None where it cannot be known."""
    from qm_spec.bench.reduction.cost import peak_bytes

    if device == "cpu":
        found = peak_bytes(action)
        return None if found is None else found / 2**20
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    action()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


Shape = tuple[int, int, int, int, int]


def compressions(shape: Shape, device: str, chunk_size: int | None) -> dict[str, Callable[[], Any]]:
    """Return what is timed at one shape, by name."""
    from qm_spec import QuickMergePP

    layers, batch, tokens, dim, keep = shape
    states = torch.randn(layers, batch, tokens, dim, generator=torch.Generator().manual_seed(0)).to(device)
    seeds = (torch.arange(keep, device=device) * tokens // keep).expand(batch, -1)
    modules = {
        f"compress, {grouping}": QuickMergePP(dim=dim, k_max=keep, grouping=grouping)
        for grouping in ("cosine", "kmeans")
    }
    if chunk_size is not None:
        kept = max(1, keep * chunk_size // tokens)
        modules[f"compress, chunks of {chunk_size}"] = QuickMergePP(dim=dim, k_max=kept, chunk_size=chunk_size)
    return {
        **{name: partial(module.to(device).eval().compress, states) for name, module in modules.items()},
        "k-means alone": partial(lloyd, states[-1], seeds, KMEANS_ITERATIONS),
    }


def measure(shape: Shape, device: str, repeats: int, chunk_size: int | None) -> list[dict[str, Any]]:
    """Return a row per method at one shape; the methods take turns, so that all meet the same load."""
    actions = compressions(shape, device, chunk_size)
    times: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        elapsed_ms(action, device)
    for _ in range(repeats):
        for name, action in actions.items():
            times[name].append(elapsed_ms(action, device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return [
        {
            "device": device,
            **dict(zip(("layers", "batch", "tokens", "dim", "kept"), shape, strict=True)),
            "method": name,
            "time_ms": median,
            "time_ms_min": min(times[name]),
            "tokens_per_s": 1000 * shape[1] * shape[2] / median,
            "over_kmeans_alone": median / medians["k-means alone"],
            # Another machine's time: a rough measure only.
            "recorded_reference_over_this": REFERENCE_MS / median
            if shape == REFERENCE and name.startswith("compress")
            else None,
        }
        for name, median in medians.items()
    ]


@with_plain_errors
def main(
    tokens: Annotated[str, typer.Option(metavar="T,...", help="Lengths beside the reference's shape; K = T / 4.")] = (
        ",".join(map(str, LENGTHS))
    ),
    dim: Annotated[int, typer.Option(min=1, help="D of those lengths; 4 layers, batch 1.")] = 128,
    chunk_size: Annotated[int | None, typer.Option(min=1, help="Time chunks of so many tokens too.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or both where there is a GPU (auto).")] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each method, in turn.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch on the CPU; its own choice by default.")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Results.")] = Path("results/bench_compress.json"),
) -> None:
    """Time `compress` on random states, by both groupings.

    "k-means alone" is five iterations of plain Lloyd's in PyTorch on the last layer, without a saliency,
    in the same run. "reference" is 1162 ms over our time: that was recorded with the reference
    implementation on another machine, so it is a rough measure.
    """
    from qm_spec import provenance
    from qm_spec.bench.environment import describe_environment
    from qm_spec.bench.results.table import align_table

    if threads is not None:
        torch.set_num_threads(threads)
    lengths = [int(part) for part in tokens.split(",") if part.strip()]
    if any(length < 1 for length in lengths):
        raise ValueError(f"tokens: lengths must be at least 1, got {tokens}")
    shapes = [REFERENCE, *((4, 1, length, dim, max(1, length // 4)) for length in lengths)]
    plan = [(shape, place) for place in devices(device) for shape in shapes]
    with torch.no_grad():
        rows = [row for shape, place in plan for row in measure(shape, place, repeats, chunk_size)]
        # After all times: measuring memory makes the C library give it back at once, which takes time.
        memory = [
            peak_mib(action, place)
            for shape, place in plan
            for action in compressions(shape, place, chunk_size).values()
        ]
    rows = [{**row, "peak_mib": peak} for row, peak in zip(rows, memory, strict=True)]
    results = {
        **provenance.conditions(),
        "environment": describe_environment() | {"threads": torch.get_num_threads()},
        "recorded_elsewhere": {"reference_ms": REFERENCE_MS, "shape": REFERENCE, "machine": "another one"},
        "repeats": repeats,
        "rows": rows,
    }
    provenance.write_record(out, results)
    header = ["L x B x T x D, K", "device", "method", "ms", "M tokens/s", "peak MiB", "x k-means", "reference*"]
    body = [
        [
            f"{row['layers']} x {row['batch']} x {row['tokens']} x {row['dim']}, {row['kept']}",
            row["device"],
            row["method"],
            f"{row['time_ms']:.1f}",
            f"{row['tokens_per_s'] / 1e6:.3f}",
            "-" if row["peak_mib"] is None else f"{row['peak_mib']:.1f}",
            f"{row['over_kmeans_alone']:.2f}",
            "-"
            if row["recorded_reference_over_this"] is None
            else f"{row['recorded_reference_over_this']:.0f}x faster",
        ]
        for row in rows
    ]
    typer.echo(align_table(header, body))
    typer.echo(f"* {REFERENCE_MS:.0f} ms of the reference implementation, recorded elsewhere on another machine")
    typer.echo(f"results: {out}", err=True)


if __name__ == "__main__":
    run_main(main, EXAMPLES)
