"""The operator `qm_spec::attention_entropy`, which the compiled kernels implement."""

from __future__ import annotations

import torch
from torch import Tensor

torch.library.define("qm_spec::attention_entropy", "(Tensor tokens, bool causal) -> Tensor")


def attention_entropy_reference(tokens: Tensor, causal: bool) -> Tensor:
    """Compute the entropy `[B, N]` float32 of the self-attention of `[B, N, D]` in plain PyTorch."""
    x = tokens.float()
    scores = x @ x.mT * x.shape[-1] ** -0.5
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        # Far below what counts in float32; -inf would meet a weight of 0.
        scores = scores.masked_fill(later, torch.finfo(scores.dtype).min / 2)
    log_attention = torch.log_softmax(scores, dim=-1)
    return -(log_attention.exp() * log_attention).sum(-1)


torch.library.impl("qm_spec::attention_entropy", "default", attention_entropy_reference)


@torch.library.register_fake("qm_spec::attention_entropy")
def _attention_entropy_fake(tokens: Tensor, causal: bool) -> Tensor:
    return tokens.new_empty(tokens.shape[:2], dtype=torch.float32)
