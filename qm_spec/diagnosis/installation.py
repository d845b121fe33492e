"""What is installed, and what this machine brings: packages, kernels, processor, GPU."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from qm_spec import provenance
from qm_spec.diagnosis.finding import Finding, taken_warnings

# The extra that serving and inspecting need; those of training and evaluation say themselves what they lack.
_EXTRA = "models"
_REINSTALL = "pip install --no-build-isolation -e '.[train]' in a checkout of qm_spec"
# Where NVIDIA's driver lists its GPUs, whatever torch knows of them.
_NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")


def check_packages() -> Iterator[Finding]:
    """Compare the installed packages with what qm_spec's own metadata asks for."""
    from packaging.requirements import Requirement

    try:
        stated = importlib.metadata.requires("qm_spec") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("problem", "qm_spec", "is not installed, so vLLM does not find it", _REINSTALL)
        return
    versions = provenance.versions()
    yield Finding("ok", "qm_spec", f"{versions['qm_spec']}, Python {versions['python']} on {platform.system()}")
    needed = [one for one in map(Requirement, stated) if one.marker is None or one.marker.evaluate({"extra": _EXTRA})]
    fitting = []
    for requirement in needed:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("problem", requirement.name, "is not installed", _pip(requirement))
            continue
        if requirement.specifier.contains(version, prereleases=True):
            fitting.append(f"{requirement.name} {version}")
        else:
            found = f"{version} is installed, qm_spec needs {requirement.specifier}"
            yield Finding("problem", requirement.name, found, _pip(requirement))
    if fitting:
        yield Finding("ok", "packages", ", ".join(fitting))


def _pip(requirement: object) -> str:
    text = str(requirement).partition(";")[0].strip()
    return f"pip install '{text}'"


def check_kernels() -> Iterator[Finding]:
    """Say for each device of this machine whether compiled kernels or PyTorch do the work."""
    try:
        # Kernels that do not load are logged, and said below.
        with taken_warnings():
            from qm_spec.ops import backend
    except RuntimeError as error:
        # Kernels that are asked for and not there, with the way out.
        yield Finding("problem", "kernels", str(error))
        return
    from qm_spec.bench.environment import default_device

    for device in dict.fromkeys(("cpu", default_device())):
        about = f"kernels ({device})"
        if backend.backend(device) == "compiled":
            yield Finding("ok", about, "compiled")
        elif os.environ.get("QM_SPEC_BACKEND") == "reference":
            found = "QM_SPEC_BACKEND=reference, so PyTorch does the work, slower"
            yield Finding("warning", about, found, "unset it to have compiled kernels")
        else:
            found = f"{backend.obstacle(device)}, so PyTorch does the work, slower"
            yield Finding("warning", about, found, backend.how_to_build(device))


def check_processor() -> Iterator[Finding]:
    """Name the processor and its instruction set."""
    import torch

    from qm_spec.bench.environment import describe_environment, multiplies_16_bits

    machine = describe_environment()
    instructions = torch.backends.cpu.get_cpu_capability()
    found = f"{machine['cpu_model']}, {machine['cpu_cores']} cores, {instructions}"
    if machine["device"] == "cpu" and not multiplies_16_bits():
        remedy = "on this CPU serve with --dtype float32"
        yield Finding("warning", "processor", f"{found}: vLLM multiplies bfloat16 slowly on it", remedy)
    else:
        yield Finding("ok", "processor", found)


def check_gpu() -> Iterator[Finding]:
    """Name the GPU that torch can use, or say that there is one which it cannot."""
    import torch

    from qm_spec.bench.environment import describe_environment

    machine = describe_environment()
    if machine["device"] == "cuda":
        yield Finding("ok", "GPU", f"{machine['gpu_model']}, CUDA {machine['cuda']}")
    elif _NVIDIA_GPUS.is_dir() and any(_NVIDIA_GPUS.iterdir()):
        cuda = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        found = f"there is one, and torch {torch.__version__} {cuda} cannot use it, so the CPU works"
        yield Finding("warning", "GPU", found, "make install GPU=1, or a torch for this driver")
    else:
        yield Finding("ok", "GPU", "none, so the CPU works")
