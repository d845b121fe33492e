"""The CUDA kernels of whole sequences, compiled for the CPU and run there: see `cuda_on_cpu.h`."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


def build(compiler: str, folder: Path) -> ctypes.CDLL:
    """Compile the kernels into a library in `folder` and load it."""
    library = folder / "cuda_emulation_tokens.so"
    # The runtime's checks of jumps know nothing of stacks other than the thread's own.
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"]
    folders = [f"-I{FOLDER / 'include'}", f"-I{FOLDER}", f"-I{FOLDER.parents[2]}"]
    subprocess.run([compiler, *flags, *folders, str(FOLDER / "tokens.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


class TokenEmulation:
    """The operators, with the signatures of `torch.ops.qm_spec`; outputs begin as NaN, or far out of range.

    Attributes:
        seed: decides the order in which the emulated threads go on.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.seed = 0

    def attention_entropy(self, tokens: Tensor, causal: bool) -> Tensor:
        """See `qm_spec.ops.attention_entropy`."""
        entropy = _empty(tokens.shape[:2], torch.float32)
        self._call("attention_entropy", tokens, *tokens.shape, causal, entropy)
        return entropy

    def cosine_similarity(self, tokens: Tensor) -> Tensor:
        """See `qm_spec.ops.cosine_similarity`."""
        similarity = _empty((*tokens.shape[:2], tokens.shape[1]), tokens.dtype)
        self._call("cosine_similarity", tokens, *tokens.shape, similarity)
        return similarity

    def gumbel_softmax(
        self, logits: Tensor, temperature: float, noise: float, seed: int, offset: int
    ) -> tuple[Tensor, Tensor]:
        """See `qm_spec.ops.gumbel_softmax`."""
        probabilities, perturbed = _empty(logits.shape, logits.dtype), _empty(logits.shape, torch.float32)
        self._call("gumbel_softmax", logits, *logits.shape, temperature, noise, seed, offset, probabilities, perturbed)
        return probabilities, perturbed

    def saliency_merge(
        self, tokens: Tensor, mass: Tensor, cluster: Tensor, num_slots: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `qm_spec.ops.saliency_merge`."""
        merged = _empty((len(tokens), num_slots, tokens.shape[2]), tokens.dtype)
        sizes, masses = (_empty(merged.shape[:2], torch.float32) for _ in range(2))
        self._call("saliency_merge", tokens, *tokens.shape, mass, cluster, num_slots, merged, sizes, masses)
        return merged, sizes, masses

    def weighted_kmeans_assign(
        self, points: Tensor, centres: Tensor, mask: Tensor, live: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `qm_spec.ops.weighted_kmeans_assign`."""
        cluster, distance = _empty(mask.shape, torch.int64), _empty(mask.shape, torch.float32)
        rest = [centres, centres.shape[1], mask, live, cluster, distance]
        self._call("weighted_kmeans_assign", points, *points.shape, *rest)
        return cluster, distance

    def weighted_kmeans_update(
        self, points: Tensor, mass: Tensor, cluster: Tensor, distance: Tensor, live: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `qm_spec.ops.weighted_kmeans_update`."""
        repaired = _empty(cluster.shape, torch.int64)
        centres = _empty((len(points), live.shape[1], points.shape[2]), torch.float32)
        rest = [mass, cluster, distance, live, live.shape[1], repaired, centres]
        self._call("weighted_kmeans_update", points, *points.shape, *rest)
        return repaired, centres

    def _call(self, name: str, tokens: Tensor, *arguments: Any) -> None:
        function = getattr(self._library, name)
        function.restype = ctypes.c_char_p
        # What the host side calls `contiguous` keeps its memory until the call is over.
        held = [x.contiguous() if isinstance(x, Tensor) else x for x in (tokens, *arguments)]
        error = function(TYPES[tokens.dtype], ctypes.c_uint64(self.seed), *map(_converted, held))
        if error is not None:
            raise RuntimeError(error.decode())


def _empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan") if dtype.is_floating_point else -(1 << 62), dtype=dtype)


def _converted(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, bool):
        return ctypes.c_bool(argument)
    return ctypes.c_double(argument) if isinstance(argument, float) else ctypes.c_int64(argument)
