"""Which path the operators take, and that the user is told."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qm_spec.ops import backend

needs_kernels = pytest.mark.skipif(backend.backend() != "compiled", reason="the CPU kernels were not built")

REPORT = """
import logging
logging.basicConfig(level="INFO", format="%(message)s")
import torch
import qm_spec.ops
from qm_spec.ops import backend, saliency_merge
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key("qm_spec::saliency_merge", "CPU")
merged, size, mass = saliency_merge(torch.ones(1, 2, 3), torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.int64), 1)
print(backend.backend(), has_kernel, merged.tolist())
"""


def report(choice: str | None, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Say in a new interpreter which path the operators took, with the package of `folder` in place of ours."""
    environment = {name: value for name, value in os.environ.items() if name != "QM_SPEC_BACKEND"}
    if choice is not None:
        environment["QM_SPEC_BACKEND"] = choice
    if folder is not None:
        environment["PYTHONPATH"] = str(folder)
    return subprocess.run([sys.executable, "-c", REPORT], env=environment, cwd="/", capture_output=True, text=True)


@pytest.fixture
def without_kernels(root: Path, tmp_path: Path) -> Path:
    """A folder with the package as it is where no compiler was."""
    shutil.copytree(root / "qm_spec", tmp_path / "qm_spec", ignore=shutil.ignore_patterns("*.so", "__pycache__", "zoo"))
    return tmp_path


@needs_kernels
@pytest.mark.parametrize("choice", [None, "auto", "compiled"])
def test_kernels_that_were_built_are_taken(choice: str | None) -> None:
    ran = report(choice)
    assert ran.stdout == "compiled True [[[1.0, 1.0, 1.0]]]\n", ran.stderr
    # Said once, however many operators there are.
    assert ran.stderr.count("qm_spec operators: cpu compiled") == 1


def test_the_reference_can_be_forced() -> None:
    ran = report("reference")
    assert ran.stdout == "reference False [[[1.0, 1.0, 1.0]]]\n", ran.stderr
    assert ran.stderr.count("qm_spec operators: cpu reference") == 1


def test_the_package_works_without_kernels(without_kernels: Path) -> None:
    ran = report(None, without_kernels)
    assert ran.stdout == "reference False [[[1.0, 1.0, 1.0]]]\n", ran.stderr
    assert "cpu reference (QM_SPEC_BACKEND=auto)" in ran.stderr


def test_asking_for_kernels_that_were_not_built_is_an_error(without_kernels: Path) -> None:
    ran = report("compiled", without_kernels)
    assert ran.returncode == 1
    assert "RuntimeError: QM_SPEC_BACKEND=compiled: qm_spec._C was not built; build them: pip install" in ran.stderr


def test_kernels_that_do_not_load_are_an_error_only_where_they_were_asked_for(without_kernels: Path) -> None:
    (without_kernels / "qm_spec/_C.abi3.so").write_bytes(b"no library")
    ran = report("compiled", without_kernels)
    assert ran.returncode == 1
    assert "do not load" in ran.stderr and "QM_SPEC_BACKEND=reference" in ran.stderr
    ran = report(None, without_kernels)
    assert ran.stdout.startswith("reference False"), ran.stderr
    assert "do not load" in ran.stderr and "the slower references run in their place" in ran.stderr
    assert report("reference", without_kernels).stdout.startswith("reference False")


def test_an_unknown_choice_lists_the_choices() -> None:
    ran = report("fast")
    assert ran.returncode == 1
    assert "QM_SPEC_BACKEND must be one of auto, compiled, reference, got 'fast'" in ran.stderr
