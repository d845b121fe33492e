"""What the prior is trained on besides the target's distribution: alignment and fidelity of merging."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qm_spec.ops.merge_entries import Merged


def distillation_loss(draft_logits: Tensor, target_logits: Tensor) -> Tensor:
    """Return the mean KL divergence from the target's distribution to the draft's, in nats.

    Args:
        draft_logits: `[..., V]`.
        target_logits: `[..., V]`, no gradient is sent there.
    """
    target = torch.log_softmax(target_logits.detach().float(), dim=-1)
    draft = torch.log_softmax(draft_logits.float(), dim=-1)
    return (target.exp() * (target - draft)).sum(-1).mean()


class AlignmentHeads(nn.Module):
    """Linear predictors of the next and of the previous merged token; used in training only.

    Args:
        size: width of a merged token.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.forward_head = nn.Linear(size, size)
        self.backward_head = nn.Linear(size, size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the bidirectional alignment loss of merged tokens `[B, N, size]`, relative to their variance.

        Source: QuickMerge++, `L_AR = L_forward + L_backward`, mean squared errors.
        """
        if tokens.shape[1] < 2:
            return tokens.new_zeros(())
        past, future = tokens[:, :-1], tokens[:, 1:]
        # Without the variance the loss could be lowered by shrinking the tokens.
        variance = tokens.detach().var().clamp_min(1e-6)
        forward = (self.forward_head(past) - future).square().mean()
        backward = (self.backward_head(future) - past).square().mean()
        return (forward + backward) / variance


def fidelity_loss(values: Tensor, levels: Sequence[Merged]) -> Tensor:
    """Return how much of the values is lost by merging, beyond what the norms allow, averaged over levels.

    Per level `relu(||X - unmerge(X~)||^2 / ||X||^2 - (1 - gamma)^2)`, where gamma is the share of the
    norm that the R largest tokens of each group hold.

    Args:
        values: `[B, G, N, d]`, raw.
        levels: of `merge_levels`.

    Source: QuickMerge++, norm-based fidelity constraint.
    """
    losses = []
    place: Tensor | None = None
    for level in levels:
        num_groups = level.cluster.shape[2]
        if place is not None and place.shape[2] > num_groups:
            # A span of two neighbours, of one entry each: every token of both is at that entry.
            place = place[:, :, : 2 * num_groups].unflatten(2, (-1, 2)).flatten(3)
        place = level.cluster if place is None else level.cluster.gather(-1, place)
        kept = level.values.shape[-2]
        if kept == 0:
            continue
        raw = values[:, :, : place.shape[2] * place.shape[3]].unflatten(2, place.shape[2:])
        restored = level.values.gather(-2, place.unsqueeze(-1).expand_as(raw))
        norms = raw.detach().norm(dim=-1)
        gamma = norms.topk(kept, dim=-1).values.sum(-1) / norms.sum(-1).clamp_min(1e-6)
        lost = (raw - restored).square().sum((-1, -2)) / raw.square().sum((-1, -2)).clamp_min(1e-6)
        losses.append(torch.relu(lost - (1 - gamma).square()).mean())
    return torch.stack(losses).mean() if losses else values.new_zeros(())
