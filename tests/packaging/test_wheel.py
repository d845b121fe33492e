"""The wheel with kernels for CPUs and GPUs, installed into an empty environment and looked into.

`make wheel` builds it and runs these tests on it. nvcc takes minutes: `make test` tries the link alone, of one kernel.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

CUDA_HOME = os.environ.get("CUDA_HOME", "/usr/local/cuda")
# Of torch's CUDA library, which a torch without CUDA does not have.
OF_LIBTORCH_CUDA = {
    "aoti_torch_get_current_cuda_stream",
    "torch_c10_cuda_check_msg",
    "torch_c10_cuda_free_error_msg",
}
REPORT = """
import torch
torch.version.cuda = {cuda!r}
from qm_spec.ops import backend, saliency_merge
merged, _, _ = saliency_merge(torch.ones(1, 2, 3), torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.int64), 1)
print(backend.__file__, backend.backend("cpu"), backend.backend("cuda"), merged.tolist())
"""


def output(*command: str | Path, **environment: str) -> str:
    """Return what a program of the binary utilities prints."""
    ran = subprocess.run(
        command,
        env={**os.environ, **environment},
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return ran.stdout


def assert_fits_every_torch(library: Path) -> None:
    """Assert that a library of CUDA kernels needs torch's libraries and the system's alone."""
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", library)))
    # Where torch has CUDA, libtorch leads to libtorch_cuda.
    assert "libtorch.so" in needed
    assert {name for name in needed if "cuda" in name or "cudart" in name} == set()
    linked = output("ldd", "-r", library, LD_LIBRARY_PATH=str(Path(torch.__file__).parent / "lib"))
    assert "not found" not in linked
    assert set(re.findall(r"undefined symbol: (\w+)", linked)) <= OF_LIBTORCH_CUDA
    # A second CUDA runtime in the process, torch's, must neither be called by the kernels nor call them.
    exported = output("nm", "-D", "--defined-only", library)
    assert re.findall(r" (?:__)?cuda\w+", exported) == []


@pytest.mark.skipif(shutil.which(f"{CUDA_HOME}/bin/nvcc") is None, reason="there is no nvcc; set CUDA_HOME")
def test_the_cuda_kernels_link_beside_a_torch_without_cuda(root: Path, tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "qm_spec/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(root / name, tmp_path / name)
    others = [path.name for path in (root / "csrc/cuda").glob("*.cu") if path.name != "append_kv.cu"]
    shutil.copytree(root / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns(*others))
    switches = {"QM_SPEC_BUILD": "none", "QM_SPEC_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0"}
    ran = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tmp_path,
        env={**os.environ, **switches},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    [library] = (tmp_path / "qm_spec").glob("*.so")
    assert_fits_every_torch(library)


# What `make wheel` made


@pytest.fixture(scope="module")
def wheel() -> Path:
    if "QM_SPEC_WHEEL" not in os.environ:
        pytest.skip("the wheel with CUDA kernels takes minutes to build: `make wheel` does it and runs this")
    return Path(os.environ["QM_SPEC_WHEEL"]).resolve()


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed in it, and nothing else."""
    site = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-index", "--no-compile", "--quiet", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    return site


def report(site: Path, cuda: str | None) -> subprocess.CompletedProcess[str]:
    """Say in a new interpreter which operators run, under a torch that says it was built for this CUDA."""
    code = f"import sys; sys.path.insert(0, {str(site)!r})" + REPORT.format(cuda=cuda)
    environment = {name: value for name, value in os.environ.items() if name != "QM_SPEC_BACKEND"}
    return subprocess.run([sys.executable, "-I", "-c", code], env=environment, cwd=site, capture_output=True, text=True)


def test_the_wheel_holds_both_kernels_and_no_library_of_torch(wheel: Path) -> None:
    assert re.search(r"-cp310-abi3-manylinux_\d+_\d+_\w+\.whl$", wheel.name)
    libraries = {name for name in zipfile.ZipFile(wheel).namelist() if ".so" in name}
    assert libraries == {"qm_spec/_C.abi3.so", "qm_spec/_C_cuda.abi3.so"}


def test_the_installed_wheel_runs_its_kernels_on_the_cpu(site: Path) -> None:
    ran = report(site, torch.version.cuda)
    cuda = "compiled" if torch.version.cuda else "reference"
    assert ran.stdout == f"{site}/qm_spec/ops/backend.py compiled {cuda} [[[1.0, 1.0, 1.0]]]\n", ran.stderr
    assert ran.stderr == ""


@pytest.mark.skipif(torch.version.cuda is not None, reason="the CUDA kernels load under this torch")
def test_cuda_kernels_that_do_not_load_fall_back_without_a_traceback(site: Path) -> None:
    ran = report(site, "13.0")
    assert ran.stdout.endswith(" compiled reference [[[1.0, 1.0, 1.0]]]\n"), ran.stderr
    assert re.search(
        "_C_cuda.abi3.so do not load: .*undefined symbol: (" + "|".join(OF_LIBTORCH_CUDA) + ")", ran.stderr
    )
    assert "the slower references run in their place" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_the_installed_cuda_kernels_fit_every_torch(site: Path) -> None:
    assert_fits_every_torch(site / "qm_spec/_C_cuda.abi3.so")


def test_every_cuda_kernel_is_there_for_the_a100_the_h100_and_as_ptx(site: Path, root: Path) -> None:
    folders = [f"{CUDA_HOME}/bin", *map(str, Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/bin"))]
    cuobjdump = shutil.which("cuobjdump", path=os.pathsep.join(folders))
    assert cuobjdump is not None, "`make wheel` installs nvidia-cuda-cuobjdump"
    library = site / "qm_spec/_C_cuda.abi3.so"
    listed = output(cuobjdump, "--list-elf", library) + output(cuobjdump, "--list-ptx", library)
    number = len(list((root / "csrc/cuda").glob("*.cu")))
    for code in ("sm_80.cubin", "sm_90.cubin", "sm_90.ptx"):
        assert listed.count(code) == number, listed
