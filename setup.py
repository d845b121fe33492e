"""Packages of the distribution and its kernels; everything else about it stands in pyproject.toml.

QM_SPEC_BUILD: auto (default) builds the CPU kernels where torch and a compiler are and goes on without them, with
    a warning; required makes that an error; none leaves them out.
QM_SPEC_CUDA=1: build the CUDA kernels, with the nvcc of CUDA_HOME (default: /usr/local/cuda); what is missing is
    an error. Neither a GPU nor a torch with CUDA is needed.
CXX, CXXFLAGS, LDFLAGS, TORCH_CUDA_ARCH_LIST and MAX_JOBS mean what they mean elsewhere.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distributions
from pathlib import Path

from packaging.version import Version
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = Version("2.10")
# The stable ABI of that version: what is built against a newer torch runs with it too.
COMMON_FLAGS = ["-O3", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "-I."]
CPU_FLAGS = [
    "-fPIC",
    "-fvisibility=hidden",
    "-fopenmp-simd",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
]
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi"]
CUDA_FLAGS = ["-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA"]
# Code for the A100 and the H100, and PTX, which later GPUs compile for themselves.
CUDA_ARCHITECTURES = "8.0 9.0+PTX"
# The runtime is linked in, for under a torch for another CUDA there is none to find. Its symbols are hidden in there.
CUDA_RUNTIME = ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
# Every torch has libtorch, whose dependency on libtorch_cuda, where there is one, finds what the kernels call of it.
# So they link beside a torch without CUDA; the linker would leave out a library that has nothing they call.
CUDA_TORCH = ["-Wl,--no-as-needed", "-ltorch"]


def find_torch() -> Path:
    """Return the folder of torch in the environment that this interpreter belongs to.

    An isolated build hides that environment's packages, but only headers and libraries are needed here.
    """
    folders = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for found in distributions(name="torch", path=folders):
        if Version(found.version) < OLDEST_TORCH:
            raise CompileError(f"torch {found.version} is older than {OLDEST_TORCH}; install a newer one")
        return Path(str(found.locate_file("torch")))
    raise CompileError("torch is not installed; install it, then this package once more")


def find_program(name: str, way_out: str) -> str:
    """Return the program's path."""
    found = shutil.which(name)
    if found is None:
        raise CompileError(f"there is no {name}; {way_out}")
    return found


def cuda_architectures() -> list[str]:
    """Return nvcc's options for the architectures asked for, such as `8.0 9.0+PTX`."""
    options = []
    for name in os.environ.get("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES).replace(";", " ").split():
        number = name.removesuffix("+PTX").replace(".", "")
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def run(command: list[str]) -> None:
    """Run a compiler."""
    print(shlex.join(command), flush=True)
    ran = subprocess.run(command, cwd=ROOT, check=False)
    if ran.returncode:
        raise CompileError(f"{Path(command[0]).name} failed with status {ran.returncode}, see above")


class BuildKernels(build_ext):
    """Compiles the sources of a module, several at a time, and links them; Python's headers are not needed."""

    def build_extension(self, ext: Extension) -> None:
        """Build one module; setuptools turns an error into a warning where the module is optional."""
        torch = find_torch()
        compiler = find_program(os.environ.get("CXX", "c++"), "install a C++ compiler (Debian: apt-get install g++)")
        own = shlex.split(os.environ.get("CXXFLAGS", ""))
        link = [f"-L{torch / 'lib'}", "-ltorch_cpu", *own, *shlex.split(os.environ.get("LDFLAGS", ""))]
        compile_one = [compiler, *COMMON_FLAGS, *CPU_FLAGS, *WARNINGS, *own]
        if ext.name.endswith("_cuda"):
            home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
            nvcc = find_program(f"{home}/bin/nvcc", "set CUDA_HOME to the folder of the CUDA toolkit")
            compile_one = [nvcc, "-ccbin", compiler, *COMMON_FLAGS, *CUDA_FLAGS, *cuda_architectures()]
            link += [f"-L{home}/lib64", *CUDA_RUNTIME, *CUDA_TORCH]

        def compiled(source: str) -> str:
            target = Path(self.build_temp, source).with_suffix(".o")
            target.parent.mkdir(parents=True, exist_ok=True)
            include = ["-isystem", str(torch / "include")]
            run([*compile_one, *include, "-c", source, "-o", str(target.resolve())])
            return str(target.resolve())

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "0")) or os.cpu_count()) as pool:
            objects = list(pool.map(compiled, ext.sources))
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        module.parent.mkdir(parents=True, exist_ok=True)
        run([compiler, "-shared", *objects, *link, "-o", str(module)])


def kernels() -> list[Extension]:
    """Return the modules to build."""
    choice = os.environ.get("QM_SPEC_BUILD", "auto")
    if choice not in ("auto", "none", "required"):
        raise SystemExit(f"qm_spec: QM_SPEC_BUILD must be auto, none or required, got {choice!r}")
    folders = {}
    if choice != "none":
        folders["qm_spec._C"] = "csrc/cpu/*.cpp"
    if os.environ.get("QM_SPEC_CUDA") == "1":
        folders["qm_spec._C_cuda"] = "csrc/cuda/*.cu"
    return [
        Extension(
            name,
            sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)),
            optional=choice == "auto" and name == "qm_spec._C",
            py_limited_api=True,
        )
        for name, pattern in folders.items()
    ]


setup(
    # `qm_spec/integrations` links to `integrations/`, which is installed under that name.
    packages=find_packages(include=["qm_spec", "qm_spec.*"]),
    ext_modules=kernels(),
    cmdclass={"build_ext": BuildKernels},
    # The modules do not use Python's ABI, so one wheel fits every version.
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
