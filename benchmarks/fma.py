"""What the processor's multiply-add units could do at most, which bounds whatever is made of products."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).resolve().with_name("fma.cpp")
# Some milliseconds each.
ROUNDS = 1_000_000


def peak_flops_per_s(threads: int, repeats: int) -> float | None:
    """Return the float32 operations per second of `threads` threads, the best of several times.

    Args:
        threads: run at once; each takes the time of its own loop.
        repeats: times that it is measured.

    Returns:
        Multiplications and additions per second; None where there is no C++ compiler.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        module = Path(folder, "fma.so")
        options = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        subprocess.run([compiler, *options, str(SOURCE), "-o", str(module)], check=True)
        loop = ctypes.CDLL(str(module)).fma_flops_per_s
    loop.argtypes, loop.restype = [ctypes.c_long], ctypes.c_double
    with ThreadPoolExecutor(threads) as pool:
        return max(sum(pool.map(loop, [ROUNDS] * threads)) for _ in range(repeats))
