"""What a drafter is trained on: the target's distribution."""

from __future__ import annotations

import torch
from torch import Tensor


def distillation_loss(draft_logits: Tensor, target_logits: Tensor) -> Tensor:
    """Return the mean KL divergence from the target's distribution to the draft's, in nats.

    Args:
        draft_logits: `[..., V]`.
        target_logits: `[..., V]`, no gradient is sent there.
    """
    target = torch.log_softmax(target_logits.detach().float(), dim=-1)
    draft = torch.log_softmax(draft_logits.float(), dim=-1)
    return (target.exp() * (target - draft)).sum(-1).mean()
