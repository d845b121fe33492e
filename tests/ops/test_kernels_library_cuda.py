"""The CUDA kernels of the library's operators: their source, run on the CPU by an emulation, and on a GPU if any."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, Case, Sizes
from support.cuda_emulation.tokens import TokenEmulation, build
from support.library_exact import check, exact_assign, tensors
from torch import Tensor

from qm_spec.ops import backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# One token; a tile and a tail; two sequences, several tiles, more terms than stand in shared memory at a time.
SIZES = [Sizes(2, 1, 3, 1), Sizes(1, 67, 9, 70), Sizes(2, 131, 37, 5)]


class Gpu:
    """The registered operators on the GPU, for tensors of the CPU."""

    def __getattr__(self, name: str) -> Any:
        def run(*arguments: Any) -> tuple[Tensor, ...]:
            moved = (x.cuda() if isinstance(x, Tensor) else x for x in arguments)
            return tuple(x.cpu() for x in tensors(getattr(torch.ops.qm_spec, name)(*moved)))

        return run


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> TokenEmulation:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("the emulation is compiled, and there is no C++ compiler (Debian: apt-get install g++)")
    return TokenEmulation(build(compiler, tmp_path_factory.mktemp("cuda_emulation_tokens")))


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest) -> TokenEmulation | Gpu:
    torch.manual_seed(0)
    if request.param == "emulated":
        return request.getfixturevalue("emulation")
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA GPU")
    if backend.backend("cuda") != "compiled":
        pytest.skip("the CUDA kernels were not built: see csrc/README.md")
    return Gpu()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """Each operator."""
    return CASES[request.param]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_twice_pytorchs_own_error(kernels, case: Case, dtype: torch.dtype, sizes: Sizes) -> None:
    arguments = case.arguments(sizes, dtype)
    check(case, arguments, getattr(kernels, case.name)(*arguments))


@pytest.mark.parametrize("sizes", [Sizes(2, 0, 4, 3), Sizes(0, 5, 4, 3), Sizes(2, 5, 4, 0)], ids=str)
def test_empty_inputs_give_empty_or_zero_outputs(kernels, case: Case, sizes: Sizes) -> None:
    arguments = case.arguments(sizes, torch.float32)
    found, wanted = tensors(getattr(kernels, case.name)(*arguments)), tensors(case.reference(*arguments))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_the_order_of_threads_changes_nothing(emulation: TokenEmulation, case: Case) -> None:
    torch.manual_seed(1)
    arguments = case.arguments(Sizes(2, 70, 20, 9), torch.float32)
    results = []
    for emulation.seed in range(4):
        results.append(tensors(getattr(emulation, case.name)(*arguments)))
    for result in results[1:]:
        for found, wanted in zip(result, results[0], strict=True):
            assert torch.equal(found, wanted)


def test_causal_entropy(kernels) -> None:
    tokens = torch.randn(2, 130, 11)
    case = CASES["attention_entropy"]
    check(case, (tokens, True), kernels.attention_entropy(tokens, True))


def test_the_noise_is_that_of_the_cpu(kernels) -> None:
    logits = torch.zeros(7, 13)
    # Both seeds use all 64 bits. Noise is a smooth function of its random integers: another integer would show.
    for seed, offset in ((-(1 << 61) - 5, 3), (12345, (1 << 62) + 9)):
        (_, found), (_, wanted) = (
            run(logits, 1.0, 1.0, seed, offset) for run in (kernels.gumbel_softmax, torch.ops.qm_spec.gumbel_softmax)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_similarity_is_symmetric(kernels) -> None:
    tokens = torch.randn(2, 133, 10)
    tokens[:, 4] = 0
    similarity = tensors(kernels.cosine_similarity(tokens))[0]
    assert torch.equal(similarity, similarity.mT) and similarity[:, 4].eq(0).all()


def test_ties_between_centres_go_to_the_first_live_one_wherever_it_stands(kernels) -> None:
    points = torch.randint(-3, 4, (1, 90, 6)).float()
    centres = points[:, :10].repeat(1, 15, 1)
    mask, live = torch.ones(1, 90, dtype=torch.bool), torch.ones(1, 150, dtype=torch.bool)
    live[:, :3] = False
    wanted, exact = exact_assign(points.double(), centres.double(), mask, live)
    cluster, distance = kernels.weighted_kmeans_assign(points, centres, mask, live)
    assert torch.equal(cluster, wanted) and torch.equal(distance.double(), exact)


@pytest.mark.parametrize(
    "name", ["attention_entropy", "cosine_similarity", "gumbel_softmax", "saliency_merge", "weighted_kmeans"]
)
def test_nvcc_compiles_the_kernels_for_every_architecture_without_a_warning(
    root: Path, tmp_path: Path, name: str
) -> None:
    nvcc = shutil.which(f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc; set CUDA_HOME to the folder of the CUDA toolkit")
    architectures = ["compute_80,code=sm_80", "compute_90,code=sm_90", "compute_90,code=compute_90"]
    command = [nvcc, "-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL", f"-I{root}", "-isystem"]
    command += [f"{torch.__path__[0]}/include", *(f"-gencode=arch={a}" for a in architectures)]
    command += ["-Werror=all-warnings", "--fatbin", f"{root}/csrc/cuda/{name}.cu", "-o", f"{tmp_path}/kernels.fatbin"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
