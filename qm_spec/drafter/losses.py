"""What a drafter is trained on: the target's distribution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def distillation_loss(draft_logits: Tensor, target_log_probs: Tensor) -> Tensor:
    """Return the KL divergence from the target's distribution to the draft's, in nats, summed over rows.

    The gradient is the difference of the two distributions, so it is made in the forward pass, where both are at hand.

    Args:
        draft_logits: `[n, V]`, any float dtype.
        target_log_probs: `[n, V]` float32, normalised; no gradient is sent there.
    """
    return _Distillation.apply(draft_logits, target_log_probs)  # type: ignore[no-untyped-call]


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, draft_logits: Tensor, target_log_probs: Tensor) -> Tensor:
        log_probs = torch.log_softmax(draft_logits, -1, dtype=torch.float32)
        target_probs = target_log_probs.exp()
        loss = torch.dot(target_probs.flatten(), (target_log_probs - log_probs).flatten())
        ctx.save_for_backward(log_probs.exp_().sub_(target_probs).to(draft_logits.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * gradient, None
