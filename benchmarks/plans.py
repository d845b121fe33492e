"""What is measured of each operator: its case, at which sizes, in which dtype."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from cases import CASES, Case, Sizes
from draft_cases import PriorSizes, make_case, make_states_case
from paged_cases import PagedSizes, append_case, attention_case, merge_again_case, merge_case

from qm_spec.ops.append_states import append_states_reference
from qm_spec.ops.draft_tokens import draft_tokens_reference

Plan = tuple[Case, Any, torch.dtype]

_WIDE = PriorSizes(320, 10, 2, 32, 768, 4096)
_SMOLLM2 = PriorSizes(576, 9, 3, 64, 1536, 49152, 8192)
_LARGE = PriorSizes(2048, 16, 4, 128, 8192, 32000)
# Lengths are compared within one column, all warm or all cold: a request of 4k tokens stays in the caches while slow
# alternatives run beside it, one of 128k does not.
_CONTEXTS = [1 << power for power in (10, 12, 14, 16, 17)]


@dataclass(frozen=True)
class Drafting:
    """B requests of N tokens that draft K tokens each."""

    num_requests: int
    num_drafts: int = 4
    num_tokens: int = 256
    prior: PriorSizes = field(default_factory=PriorSizes)

    def __str__(self) -> str:
        prior = f"D{self.prior.hidden} V{self.prior.vocabulary}"
        return f"B{self.num_requests} K{self.num_drafts} N{self.num_tokens} {prior}"


# A row divided by K is the cost of a draft step; the reference runs step by step with QM_SPEC_BACKEND=reference.
_DRAFT = Case(
    "draft_tokens",
    lambda sizes, dtype: make_case([sizes.num_tokens] * sizes.num_requests, sizes.prior, dtype).arguments(
        sizes.num_drafts
    ),
    draft_tokens_reference,
    flops=lambda sizes: 2 * sizes.num_requests * sizes.num_drafts * sizes.prior.num_weights,
    # The weights of every step: a step needs the one before.
    moved_bytes=lambda sizes, dtype: sizes.num_drafts * sizes.prior.num_weights * dtype.itemsize,
)


@dataclass(frozen=True)
class Reading:
    """A step of T tokens."""

    num_tokens: int
    prior: PriorSizes = field(default_factory=PriorSizes)

    def __str__(self) -> str:
        return f"T{self.num_tokens} D{self.prior.hidden}"


_READ = Case(
    "append_states_",
    lambda sizes, dtype: make_states_case(sizes.num_tokens, sizes.prior, dtype).arguments(),
    append_states_reference,
    # Each weight once.
    moved_bytes=lambda sizes, dtype: sizes.prior.reading_weights * dtype.itemsize,
)


def _plans(names: str, *sizes: tuple[Sizes, torch.dtype]) -> list[Plan]:
    return [(CASES[name], size, dtype) for name in names.split() for size, dtype in sizes]


_LONG, _BATCH = Sizes(1, 2048, 512, 256), Sizes(8, 256, 128, 64)

# By the operators' names; an assignment and an update are one iteration of k-means.
PLANS: dict[str, list[Plan]] = {
    "append_kv": [
        (append_case(), PagedSizes(num_tokens, page_size=page_size), dtype)
        for num_tokens, page_size, dtype in (
            (8, 128, torch.bfloat16),
            (4096, 128, torch.bfloat16),
            (65536, 128, torch.bfloat16),
            (65536, 16, torch.bfloat16),
            (65536, 128, torch.float32),
        )
    ],
    "append_states": [
        (_READ, Reading(num_tokens, prior), dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for prior in (PriorSizes(), _SMOLLM2)
        for num_tokens in (1, 7, 64)
    ],
    "attention_entropy": _plans(
        "attention_entropy",
        (Sizes(1, 2048, 512, 1), torch.float32),
        (Sizes(1, 2048, 512, 1), torch.bfloat16),
        (Sizes(4, 2048, 64, 1), torch.float32),
        (Sizes(4, 256, 128, 1), torch.float32),
        (Sizes(512, 16, 64, 1), torch.float32),
    ),
    "cosine_similarity": _plans(
        "cosine_similarity",
        (Sizes(1, 2048, 512, 1), torch.float32),
        (Sizes(1, 2048, 512, 1), torch.bfloat16),
        (Sizes(4, 256, 128, 1), torch.float32),
    ),
    "draft_tokens": [
        *((_DRAFT, Drafting(1, num_drafts), torch.float32) for num_drafts in (1, 4, 8)),
        *((_DRAFT, Drafting(num_requests), torch.float32) for num_requests in (4, 16, 64)),
        *((_DRAFT, Drafting(1, num_tokens=tokens, prior=_WIDE), torch.float32) for tokens in (1024, 8192, 65536)),
        *((_DRAFT, Drafting(num_requests), torch.bfloat16) for num_requests in (1, 8, 16)),
        *((_DRAFT, Drafting(num_requests, prior=_LARGE), torch.float32) for num_requests in (1, 16)),
        *((_DRAFT, Drafting(num_requests, prior=_LARGE), torch.bfloat16) for num_requests in (1, 4, 8, 16)),
    ],
    "gumbel_softmax": _plans(
        "gumbel_softmax",
        (Sizes(1, 2048, 512, 1), torch.float32),
        (Sizes(1, 2048, 512, 1), torch.bfloat16),
        (Sizes(1, 8, 2048, 1), torch.float32),
    ),
    # A raw prefill to all its levels, and a decode step where nothing is due.
    "merge_groups": [
        *((merge_case(), PagedSizes(num_tokens), torch.bfloat16) for num_tokens in (4096, 65536)),
        (merge_case(), PagedSizes(65536), torch.float32),
        *((merge_again_case(), PagedSizes(num_tokens), torch.bfloat16) for num_tokens in (1024, 16384, 131072)),
    ],
    "merged_attention": [
        *((attention_case("sdpa"), PagedSizes(num_tokens), torch.bfloat16) for num_tokens in _CONTEXTS),
        *((attention_case("paged"), PagedSizes(num_tokens, num_rows=5), torch.bfloat16) for num_tokens in _CONTEXTS),
        (attention_case("sdpa"), PagedSizes(1 << 17), torch.float32),
    ],
    "saliency_merge": _plans(
        "saliency_merge",
        (_LONG, torch.float32),
        (_LONG, torch.bfloat16),
        (_BATCH, torch.float32),
        (Sizes(1, 2048, 512, 1), torch.float32),
    ),
    "weighted_kmeans": _plans(
        "weighted_kmeans_assign weighted_kmeans_update",
        (_LONG, torch.float32),
        (_LONG, torch.bfloat16),
        (_BATCH, torch.float32),
    ),
}
