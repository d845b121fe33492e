"""Where a measurement runs: the machine's description and the environment of vLLM's processes."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

from qm_spec.provenance import versions

# Memory that no allocation outgrows: freed activations then stay with the process between steps.
_KEEP_FREED_BYTES = "10000000000"
KV_CACHE_GIB = "VLLM_CPU_KVCACHE_SPACE"


def available_cores() -> int:
    """Return the number of CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_engine_environment() -> dict[str, str]:
    """Return the whole environment for a process that runs vLLM on the CPU.

    It is this process's environment with vLLM's CPU settings added; a setting that the user has made
    stays. Only `LD_PRELOAD` is changed: Intel's OpenMP runtime, which vLLM's speculation on x86 wants
    loaded first, is put in front, in the place of GNU's, where this Python environment has it.
    """
    environment = dict(os.environ)
    defaults = {
        KV_CACHE_GIB: "2",
        # Pinned threads of several engines would share the same cores.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(available_cores()),
        "MALLOC_TRIM_THRESHOLD_": _KEEP_FREED_BYTES,
        "MALLOC_MMAP_THRESHOLD_": _KEEP_FREED_BYTES,
    }
    for name, value in defaults.items():
        environment.setdefault(name, value)
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    preloaded = environment.get("LD_PRELOAD", "")
    if openmp.exists() and openmp.name not in preloaded:
        # vLLM puts GNU's runtime there when it is configured in this process, and ends where it finds both.
        others = [one for one in preloaded.split(":") if one and not Path(one).name.startswith("libgomp")]
        environment["LD_PRELOAD"] = ":".join([str(openmp), *others])
    return environment


def engine_environment(device: str, *, as_served: bool = False) -> dict[str, str]:
    """Return the environment of an engine's process on `device`, "cpu" or "cuda".

    Args:
        as_served: run it as `vllm serve` and `vllm.LLM` do, in processes beside the caller's, and leave the size of its
            KV cache to its settings. Else on a CPU all of it is in one process, since another one would share its few
            cores, which suits work that nobody times.
    """
    if device != "cpu":
        return dict(os.environ)
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1" if as_served else "0", **cpu_engine_environment()}
    if as_served and KV_CACHE_GIB not in os.environ:
        # vLLM prefers it to what it is given.
        del environment[KV_CACHE_GIB]
    return environment


def default_device() -> str:
    """Return "cuda" where torch finds a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def multiplies_16_bits() -> bool:
    """Return whether vLLM multiplies bfloat16 fast on this processor: on x86 that needs AVX512-BF16 or AMX."""
    import torch

    has = torch.cpu.get_capabilities()
    return platform.machine() != "x86_64" or bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def describe_environment() -> dict[str, Any]:
    """Return what decides a measured speed: versions, processor, cores, and the GPU where there is one."""
    described: dict[str, Any] = {
        "versions": versions(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_model": _cpu_model(),
        "cpu_cores": available_cores(),
        "device": default_device(),
    }
    if described["device"] == "cuda":
        import torch

        described["gpu_model"] = torch.cuda.get_device_name()
        described["cuda"] = torch.version.cuda
    return described


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
