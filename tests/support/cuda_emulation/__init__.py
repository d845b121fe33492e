"""The CUDA kernels of the merged cache, compiled for the CPU and run there: see `cuda_on_cpu.h`."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from qm_spec.config import MergeConfig

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[2]
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Array(ctypes.Structure):
    """A tensor, as `kernels.cpp` takes it."""

    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_int64 * 4), ("stride", ctypes.c_int64 * 4))


class Config(ctypes.Structure):
    """A packed `MergeConfig`, as `kernels.cpp` takes it."""

    _fields_ = (("packed", ctypes.POINTER(ctypes.c_int64)), ("size", ctypes.c_int64))


def build(compiler: str, folder: Path) -> Path:
    """Compile the kernels into a library in `folder` and return its path."""
    compiled, library = folder / "cuda_emulation.o", folder / "cuda_emulation.so"
    # The runtime's checks of jumps know nothing of stacks other than the thread's own.
    flags = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"]
    folders = [f"-I{FOLDER / 'include'}", f"-I{FOLDER}", f"-I{ROOT}"]
    command = [compiler, *flags, "-fsanitize=alignment", *folders, "-c", str(FOLDER / "kernels.cpp")]
    subprocess.run([*command, "-o", str(compiled)], check=True)
    # Without the sanitizer's library: cuda_on_cpu.h has what is called of it.
    subprocess.run([compiler, "-shared", str(compiled), "-o", str(library)], check=True)
    return library


class Emulation:
    """The operators, with the signatures of `qm_spec.ops`.

    Attributes:
        seed: decides the order in which the emulated threads go on.
        num_splits: of `merged_attention`; 0 leaves the choice to the code that launches it.
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.launches.restype = ctypes.c_char_p
        self.seed = 0
        self.num_splits = 0

    def launches(self) -> str:
        """List the grids, blocks and shared memory of the last call's launches, one a line."""
        return self._library.launches().decode()

    @property
    def launch(self) -> ctypes._CFuncPtr:
        """Run a kernel as `host.cpp` asks for it."""
        return self._library.launch

    def fault(self, number: int) -> Tensor:
        """Run a kernel of `faults.h` and return what it writes."""
        out = torch.full((64,), float("nan"))
        self._call("fault", out, [out, number])
        return out

    def append_kv_(self, cache: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """See `qm_spec.ops.append_kv_`."""
        self._call("append_kv", cache, [cache, key, value, slots])

    def merge_groups_(
        self, cache: Tensor, block_table: Tensor, frontier: Tensor, head_dim: int, config: MergeConfig
    ) -> None:
        """See `qm_spec.ops.merge_groups_`."""
        rest = [ctypes.c_int64(head_dim), ctypes.byref(_config(config))]
        self._call("merge_groups", cache, [cache, block_table, frontier, *rest])

    def merged_attention(
        self,
        query: Tensor,
        cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        query_start_loc: Tensor,
        slopes: Tensor,
        far_bias: Tensor,
        max_rows: int,
        config: MergeConfig,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `qm_spec.ops.merged_attention`; outputs begin as NaN."""
        out = torch.full_like(query, float("nan"))
        lse, entropy = torch.full((2, *query.shape[:2]), float("nan"))
        inputs = [query, cache, block_table, seq_lens, query_start_loc, slopes, far_bias]
        settings = [ctypes.c_int64(max_rows), ctypes.byref(_config(config))]
        self._call("merged_attention", cache, [*inputs, *settings, out, lse, entropy, self.num_splits])
        return out, lse, entropy

    def _call(self, name: str, cache: Tensor, arguments: list) -> None:
        function = getattr(self._library, name)
        function.restype = ctypes.c_char_p
        converted = [ctypes.byref(_array(a)) if isinstance(a, Tensor) else a for a in arguments]
        error = function(TYPES[cache.dtype], ctypes.c_uint64(self.seed), *converted)
        if error is not None:
            raise RuntimeError(error.decode())


def _array(tensor: Tensor) -> Array:
    padding = [1] * (4 - tensor.ndim)
    numbers = ctypes.c_int64 * 4
    return Array(tensor.data_ptr(), numbers(*tensor.shape, *padding), numbers(*tensor.stride(), *padding))


def _config(config: MergeConfig) -> Config:
    packed = config.pack()
    return Config((ctypes.c_int64 * len(packed))(*packed), len(packed))
