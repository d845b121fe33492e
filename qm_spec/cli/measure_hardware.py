"""`qm-spec measure-hardware`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def measure_hardware(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Hardware file, for simulate.")],
    name: Annotated[str, typer.Option(help="Of the device, for the tables.")] = "this machine",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure what this machine reaches: a copy's bytes and a matrix product's operations per second.

    The overheads in the file stay 0; what a step of plain decoding takes beyond its prediction is step_overhead_s.

    Example: `qm-spec measure-hardware --out mine.json`
    """
    from qm_spec.simulation.measure import measure_hardware

    found = measure_hardware(name, device)
    found.write(out)
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in found.flops_per_s.items())
    typer.echo(f"saved {out}: {found.memory_bytes_per_s / 1e9:.1f} GB/s, {rates}")
