"""What this machine reaches: bytes per second of a copy, operations per second of a matrix product."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from qm_spec.simulation.hardware import Hardware

# Larger than the caches, so that the copy is the memory's.
_COPIED_BYTES = 1 << 27
# On a CPU, small enough that other work seldom interrupts a product.
_MATRIX = {"cpu": 512, "cuda": 8192}
_DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16", "float16", "float32")}


def measure_hardware(name: str, device: str = "cpu", repeats: int = 15) -> Hardware:
    """Measure a device; the host's overheads are not measured and stay 0.

    The fastest of the repeats counts: other work on a machine only ever slows it down. A copy reads and
    writes, and both are counted.

    Args:
        name: for the hardware file.
        device: "cpu", with torch's number of threads, or "cuda".
        repeats: of the copy; products take ten times as many.

    Raises:
        ValueError: the device is not one of these, or not there.
    """
    if device not in _MATRIX or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"measure_hardware: device must be cpu, or cuda where torch finds a GPU, got {device}")
    source = torch.ones(_COPIED_BYTES, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    copied_s, unrest = _fastest_s(lambda: copy.copy_(source), device, repeats)
    flops_per_s = {}
    for dtype in _DTYPES[device]:
        matrix = torch.randn(_MATRIX[device], _MATRIX[device], device=device, dtype=getattr(torch, dtype))
        multiply: Callable[[], object] = partial(torch.matmul, matrix, matrix)
        multiplied_s, ratio = _fastest_s(multiply, device, 10 * repeats)
        unrest = max(unrest, ratio)
        flops_per_s[dtype] = 2 * _MATRIX[device] ** 3 / multiplied_s
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    return Hardware(
        name=name,
        source=f"measured with torch {torch.__version__}{threads}: copy of {_COPIED_BYTES >> 20} MiB, "
        f"product of matrices of {_MATRIX[device]}, the fastest of many (the median took up to {unrest:.1f} times "
        "as long); overheads not measured",
        flops_per_s=flops_per_s,
        memory_bytes_per_s=2 * _COPIED_BYTES / copied_s,
        memory_bytes=float(_memory_bytes(device)),
    )


def _fastest_s(action: Callable[[], object], device: str, repeats: int) -> tuple[float, float]:
    """Return the seconds of the fastest of the repeats, and how many times as long the median took."""

    def elapsed_s() -> float:
        begin = time.perf_counter()
        action()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    elapsed_s()
    times = [elapsed_s() for _ in range(repeats)]
    return min(times), statistics.median(times) / min(times)


def _memory_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
