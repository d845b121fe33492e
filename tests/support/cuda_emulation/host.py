"""The host code of the CUDA operators, compiled by nvcc and called through the dispatcher, over emulated kernels."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import FOLDER, Emulation

TORCH = Path(torch.__file__).parent


def link(compiler: str, cuda_home: Path, objects: Iterable[Path], folder: Path) -> Path:
    """Link objects of nvcc with stand-ins for CUDA into a library in `folder`; a symbol that nobody has is an error."""
    compiled, library = folder / "host.o", folder / "host.so"
    include = f"-I{cuda_home / 'include'}"
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", include, "-c", str(FOLDER / "host.cpp")]
    subprocess.run([*command, "-o", str(compiled)], check=True)
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    # Its own symbols go before those of torch.
    command = [compiler, "-shared", "-Wl,-Bsymbolic", "-Wl,--no-undefined", str(compiled), *map(str, objects)]
    subprocess.run([*command, *libraries, "-o", str(library)], check=True)
    return library


class Host(TorchDispatchMode):
    """While it is entered, the operators of this package go to their CUDA implementation.

    It can be loaded once in a process, and only under a torch without CUDA.
    """

    def __init__(self, library: Path, kernels: Emulation) -> None:
        super().__init__()
        torch.ops.load_library(str(library))
        self.kernels = kernels
        ctypes.CDLL(str(library)).run_kernels_by(kernels.launch)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "qm_spec":
            return func(*args, **(kwargs or {}))
        return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **(kwargs or {}))
