"""Time of `draft_tokens`: the shipped pair and a prior of a larger target, by requests, against step by step PyTorch.

Its rows divided by K are the cost of a draft step. The reference beside them is what runs with
QM_SPEC_BACKEND=reference.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from cases import Case
from draft_cases import PriorSizes, make_case
from kernels import program

from qm_spec.ops.draft_tokens import draft_tokens_reference

# The shipped pair of long contexts.
RECALL = PriorSizes(320, 10, 2, 32, 768, 4096)
LARGE = PriorSizes(2048, 16, 4, 128, 8192, 32000)


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


def _arguments(sizes: Drafting, dtype: torch.dtype) -> tuple[Any, ...]:
    return make_case([sizes.num_tokens] * sizes.num_requests, sizes.prior, dtype).arguments(sizes.num_drafts)


CASE = Case(
    "draft_tokens",
    _arguments,
    draft_tokens_reference,
    flops=lambda sizes: 2 * sizes.num_requests * sizes.num_drafts * sizes.prior.num_weights,
    # The weights of every step: a step needs the one before.
    moved_bytes=lambda sizes, dtype: sizes.num_drafts * sizes.prior.num_weights * dtype.itemsize,
)

PLAN = [
    *((CASE, Drafting(1, num_drafts), torch.float32) for num_drafts in (1, 4, 8)),
    *((CASE, Drafting(num_requests), torch.float32) for num_requests in (4, 16, 64)),
    *((CASE, Drafting(1, num_tokens=num_tokens, prior=RECALL), torch.float32) for num_tokens in (1024, 8192, 65536)),
    *((CASE, Drafting(num_requests), torch.bfloat16) for num_requests in (1, 8, 16)),
    *((CASE, Drafting(num_requests, prior=LARGE), torch.float32) for num_requests in (1, 16)),
    *((CASE, Drafting(num_requests, prior=LARGE), torch.bfloat16) for num_requests in (1, 4, 8, 16)),
]

if __name__ == "__main__":
    program(["draft_tokens"])
