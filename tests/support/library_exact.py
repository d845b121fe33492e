"""The library's operators in float64, each spelled out, and the comparison with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import Case
from torch import Tensor

from qm_spec.ops.gumbel_softmax import philox


def tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def doubled(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments)


def exact_entropy(tokens: Tensor, causal: bool) -> Tensor:
    scores = tokens @ tokens.mT * tokens.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    attention = torch.softmax(scores, dim=-1)
    return -torch.special.xlogy(attention, attention).sum(-1)


def exact_gumbel(logits: Tensor, temperature: float, noise: float, seed: int, offset: int) -> tuple[Tensor, Tensor]:
    uniform = ((philox(logits.numel(), seed, offset) >> 9).double() + 0.5).view(logits.shape) * 2.0**-23
    perturbed = logits - noise * (-uniform.log()).log()
    return torch.softmax(perturbed / temperature, dim=-1), perturbed


def exact_similarity(tokens: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    return unit @ unit.mT


def exact_merge(tokens: Tensor, mass: Tensor, cluster: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    member = (cluster.unsqueeze(-1) == torch.arange(num_slots)).double()
    weight = member * mass.unsqueeze(-1)
    total = weight.sum(1)
    merged = weight.mT @ tokens / total.masked_fill(total == 0, 1.0).unsqueeze(-1)
    return merged, member.sum(1), total


def exact_assign(points: Tensor, centres: Tensor, mask: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    distance = (points.unsqueeze(2) - centres.unsqueeze(1)).square().sum(-1)
    nearest = distance.masked_fill(~live.unsqueeze(1), float("inf")).min(-1)
    closed = ~mask | ~live.any(-1, keepdim=True)
    return nearest.indices.masked_fill(closed, -1), nearest.values.masked_fill(closed, 0.0)


def exact_update(
    points: Tensor, mass: Tensor, cluster: Tensor, distance: Tensor, live: Tensor
) -> tuple[Tensor, Tensor]:
    # The repair spelled out, one token after the other.
    repaired = cluster.clone()
    for b in range(len(cluster)):
        nearest: dict[int, int] = {}
        for i in sorted(range(cluster.shape[1]), key=lambda i: (float(distance[b, i]), i)):
            nearest.setdefault(int(cluster[b, i]), i)
        spare = [i for i in range(cluster.shape[1]) if cluster[b, i] >= 0 and i not in nearest.values()]
        spare.sort(key=lambda i: (-float(mass[b, i].float() * distance[b, i].float()), i))
        empty = [k for k in range(live.shape[1]) if live[b, k] and k not in nearest]
        for k, i in zip(empty, spare, strict=False):
            repaired[b, i] = k
    return repaired, exact_merge(points, mass, repaired, live.shape[1])[0]


EXACT: dict[str, Callable[..., Any]] = {
    "attention_entropy": exact_entropy,
    "gumbel_softmax": exact_gumbel,
    "cosine_similarity": exact_similarity,
    "saliency_merge": exact_merge,
    "weighted_kmeans_assign": exact_assign,
    "weighted_kmeans_update": exact_update,
}


def check(case: Case, arguments: tuple[Any, ...], result: Any) -> None:
    """Compare a result with float64: integers exactly, floats with at most twice plain PyTorch's own error."""
    exact, plain = tensors(EXACT[case.name](*doubled(arguments))), tensors(case.reference(*arguments))
    fast = tensors(result)
    for i, (wanted, reference, found) in enumerate(zip(exact, plain, fast, strict=True)):
        assert found.shape == reference.shape and found.dtype == reference.dtype, f"output {i}"
        if not found.is_floating_point():
            assert torch.equal(found, wanted), f"output {i}"
            continue
        assert torch.isfinite(found).all(), f"output {i}: inf or nan"
        if found.numel():
            error = (found.double() - wanted).abs().max().item()
            allowed = 2 * (reference.double() - wanted).abs().max().item() + 1e-6
            assert error <= allowed, f"output {i}: {error:.1e} against {allowed:.1e}"
