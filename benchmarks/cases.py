"""Cases of the kernels: arguments, reference, the obvious alternative; shared by tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qm_spec.ops.attention_entropy import attention_entropy_reference
from qm_spec.ops.cosine_similarity import cosine_similarity_reference
from qm_spec.ops.gumbel_softmax import gumbel_softmax_reference
from qm_spec.ops.saliency_merge import saliency_merge_reference
from qm_spec.ops.weighted_kmeans import weighted_kmeans_assign_reference, weighted_kmeans_update_reference


@dataclass(frozen=True)
class Sizes:
    """B sequences of N tokens of D numbers, merged into K."""

    batch: int
    num_tokens: int
    dim: int
    num_slots: int

    def __str__(self) -> str:
        return f"B{self.batch} N{self.num_tokens} D{self.dim} K{self.num_slots}"


@dataclass(frozen=True)
class Case:
    """One operator, and what it is compared with.

    Attributes:
        name: of the operator.
        arguments: makes them for `(sizes, dtype)`, from torch's global generator, on the CPU.
        reference: the operator in plain PyTorch.
        alternative: what one would write without this package; None where that is the reference.
        alternative_name: in words.
        flops: of the products that the result is made of, each counted once; None where it is bound by memory.
        moved_bytes: the least that must be read and written, for `(sizes, dtype)`; None where that is all inputs
            and outputs.
        restore: takes the arguments and undoes what a call changes, before each call, untimed.
    """

    name: str
    arguments: Callable[[Any, torch.dtype], tuple[Any, ...]]
    reference: Callable[..., Any]
    alternative: Callable[..., Any] | None = None
    alternative_name: str = ""
    flops: Callable[[Any], int] | None = None
    moved_bytes: Callable[[Any, torch.dtype], int] | None = None
    restore: Callable[..., None] | None = None

    @property
    def operator(self) -> Callable[..., Any]:
        """The operator as the dispatcher runs it."""
        return getattr(torch.ops.qm_spec, self.name)


def _tokens(sizes: Sizes, dtype: torch.dtype) -> Tensor:
    return torch.randn(sizes.batch, sizes.num_tokens, sizes.dim).to(dtype)


def _entropy(causal: bool) -> Callable[[Sizes, torch.dtype], tuple[Any, ...]]:
    return lambda sizes, dtype: (_tokens(sizes, dtype), causal)


def _logits(sizes: Sizes, dtype: torch.dtype) -> tuple[Any, ...]:
    return torch.randn(sizes.batch * sizes.num_tokens, sizes.dim).to(dtype), 0.5, 1.0, 2**40 + 1, 3


def _merge(sizes: Sizes, dtype: torch.dtype) -> tuple[Any, ...]:
    shape = sizes.batch, sizes.num_tokens
    # Some padding, and slots that happen to stay empty.
    cluster = torch.randint(-1, sizes.num_slots, shape)
    return _tokens(sizes, dtype), torch.rand(shape) + 0.01, cluster, sizes.num_slots


def _assign(sizes: Sizes, dtype: torch.dtype) -> tuple[Any, ...]:
    centres = torch.randn(sizes.batch, sizes.num_slots, sizes.dim)
    mask, live = torch.rand(sizes.batch, sizes.num_tokens) > 0.1, torch.rand(sizes.batch, sizes.num_slots) > 0.1
    return _tokens(sizes, dtype), centres, mask, live


def _update(sizes: Sizes, dtype: torch.dtype) -> tuple[Any, ...]:
    tokens, mass, cluster, _ = _merge(sizes, dtype)
    # Half of the slots have no member before the repair.
    cluster = torch.where(cluster >= sizes.num_slots // 2, cluster // 2, cluster)
    live = torch.arange(sizes.num_slots).expand(sizes.batch, -1) < sizes.num_tokens
    return tokens, mass, cluster, torch.rand_like(mass), live.contiguous()


def _attention_entropy_by_distribution(tokens: Tensor, causal: bool) -> Tensor:
    scores = tokens @ tokens.mT * tokens.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    return torch.distributions.Categorical(logits=scores, validate_args=False).entropy()


def _similarity_by_norms(tokens: Tensor) -> Tensor:
    norm = tokens.norm(dim=-1)
    return tokens @ tokens.mT / (norm.unsqueeze(-1) * norm.unsqueeze(-2)).clamp_min(1e-12)


def _merge_by_index_add(tokens: Tensor, mass: Tensor, cluster: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, dim = tokens.shape
    # Padding goes to an extra slot.
    slot = torch.where(cluster < 0, num_slots, cluster) + torch.arange(batch).unsqueeze(1) * (num_slots + 1)
    slot = slot.flatten().to(tokens.device)
    rows = tokens.float().flatten(0, 1)
    total = rows.new_zeros(batch * (num_slots + 1)).index_add_(0, slot, mass.flatten())
    size = torch.zeros_like(total).index_add_(0, slot, torch.ones_like(mass.flatten()))
    merged = rows.new_zeros(len(total), dim).index_add_(0, slot, rows * mass.flatten().unsqueeze(-1))
    merged = merged / total.clamp_min(1e-30).unsqueeze(-1)
    merged, size, total = (x.unflatten(0, (batch, num_slots + 1))[:, :num_slots] for x in (merged, size, total))
    return merged.to(tokens.dtype), size, total


CASES = {
    case.name: case
    for case in (
        Case(
            "attention_entropy",
            _entropy(False),
            attention_entropy_reference,
            _attention_entropy_by_distribution,
            "Categorical.entropy",
            # Scores are symmetric.
            lambda sizes: sizes.batch * sizes.num_tokens**2 * sizes.dim,
        ),
        Case(
            "gumbel_softmax",
            _logits,
            gumbel_softmax_reference,
            lambda logits, temperature, *_: F.gumbel_softmax(logits, temperature),
            "F.gumbel_softmax",
        ),
        Case(
            "cosine_similarity",
            lambda sizes, dtype: (_tokens(sizes, dtype),),
            cosine_similarity_reference,
            _similarity_by_norms,
            "product, then norms",
            lambda sizes: sizes.batch * sizes.num_tokens**2 * sizes.dim,
        ),
        Case("saliency_merge", _merge, saliency_merge_reference, _merge_by_index_add, "index_add_"),
        Case(
            "weighted_kmeans_assign",
            _assign,
            weighted_kmeans_assign_reference,
            lambda points, centres, *_: torch.cdist(points.float(), centres).min(-1),
            "cdist, no masks",
            lambda sizes: 2 * sizes.batch * sizes.num_tokens * sizes.num_slots * sizes.dim,
        ),
        Case("weighted_kmeans_update", _update, weighted_kmeans_update_reference),
    )
}
