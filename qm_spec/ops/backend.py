"""The backend: compiled kernels where they were built, the PyTorch references elsewhere.

Schema, fake and reference of every operator stand in Python. The modules `qm_spec._C` (CPU) and
`qm_spec._C_cuda`, where they were built, add kernels for a device to those operators, and the
dispatcher prefers them. `QM_SPEC_BACKEND` chooses:

    auto        (default) compiled kernels where they were built and load
    compiled    compiled kernels, and an error without them
    reference   the references; nothing compiled is loaded
"""

from __future__ import annotations

import functools
import logging
import os
from importlib.machinery import PathFinder
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

CHOICES = ("auto", "compiled", "reference")
MODULES = {"cpu": "qm_spec._C", "cuda": "qm_spec._C_cuda"}


@functools.cache
def load() -> frozenset[str]:
    """Load the compiled kernels that `QM_SPEC_BACKEND` asks for, once, and log which path is taken.

    Returns:
        The device types that have compiled kernels now.

    Raises:
        ValueError: `QM_SPEC_BACKEND` is none of the choices.
        RuntimeError: `compiled` was asked for and the kernels were not built, or they do not load.
    """
    choice = os.environ.get("QM_SPEC_BACKEND", "auto")
    if choice not in CHOICES:
        raise ValueError(f"QM_SPEC_BACKEND must be one of {', '.join(CHOICES)}, got {choice!r}")
    # A CUDA library does not load under a torch without CUDA, and nothing there would call it.
    devices = ["cpu", "cuda"] if torch.version.cuda else ["cpu"]
    compiled = frozenset(device for device in devices if choice != "reference" and _load_module(device, choice))
    paths = (f"{device} {'compiled' if device in compiled else 'reference'}" for device in devices)
    logger.info("qm_spec operators: %s (QM_SPEC_BACKEND=%s)", ", ".join(paths), choice)
    return compiled


def backend(device_type: str = "cpu") -> str:
    """Return the path that operators take on a device: `compiled` or `reference`."""
    return "compiled" if device_type in load() else "reference"


def how_to_build(device_type: str) -> str:
    """Say how the kernels of a device come to be."""
    switch = "QM_SPEC_CUDA=1 " if device_type == "cuda" else ""
    return f"build them: {switch}pip install --no-build-isolation -e . (see csrc/README.md)"


def obstacle(device_type: str) -> str | None:
    """Return why a device's compiled kernels were not built or do not load, None where they are loaded now."""
    name = MODULES[device_type]
    origin = _library(name)
    if origin is None:
        return f"{name} was not built"
    try:
        torch.ops.load_library(origin)
    except OSError as error:
        # As after an upgrade of torch, which gives the loader's reason as the cause.
        return f"the kernels in {origin} do not load: {error.__cause__ or error}"
    return None


def _library(name: str) -> str | None:
    # Beside this package only: an editable install would offer its own to a copy from elsewhere.
    spec = PathFinder.find_spec(name, [str(Path(__file__).parents[1])])
    return None if spec is None else spec.origin


def _load_module(device: str, choice: str) -> bool:
    problem = obstacle(device)
    if problem is None:
        return True
    if choice == "compiled":
        raise RuntimeError(
            f"QM_SPEC_BACKEND=compiled: {problem}; {how_to_build(device)}, or set QM_SPEC_BACKEND=reference"
        )
    if _library(MODULES[device]) is not None:
        logger.warning(
            "qm_spec: %s; the slower references run in their place. To have kernels again %s",
            problem,
            how_to_build(device),
        )
    return False
