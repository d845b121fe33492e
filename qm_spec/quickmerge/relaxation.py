"""A gradient for the choice of salient tokens, which by itself is discrete."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qm_spec.ops.blocks import over_rows
from qm_spec.quickmerge.inputs import full_mask
from qm_spec.quickmerge.merging import MergedTokens

# Of the soft assignment, in units of cosine similarity.
TEMPERATURE = 0.1
# A token not chosen may count this much more than the best chosen one (as a logarithm), and no more.
MAX_ADVANTAGE = 3.0


def relaxed_unmerge(
    tokens: Tensor, merged: MergedTokens, token_mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Return what `merged.unmerge()` does, with a gradient to `merged.mask`: what choosing a token would change.

    The gradient is that of a soft assignment, `r_i = sum_j a_ij y_j`, `a_ij ~ mask_j exp(cos(x_i, x_j) / t)`:
    a salient token j offers its merged token as y_j, any other one itself. Without it the saliency
    only learns how tokens weigh within a group, and the selection would not improve.

    Args:
        tokens: `[B, N, D]`.
        merged: of the tokens.
        token_mask: `[B, N]` bool, True = token.
        causal: a token is rebuilt from salient ones at or after its position only.

    Returns:
        `[B, N, D]` float32; the gradient to the merged tokens is that of `merged.unmerge()`.

    Source: ours; the straight-through gradient of the mask is the READMEs' Gumbel-softmax.
    """
    mask = full_mask("relaxed_unmerge", tokens, token_mask)
    rebuilt = merged.unmerge(merged.tokens.float())
    clean = tokens.detach().float().masked_fill(~mask.unsqueeze(-1), 0.0)
    chosen = merged.mask.detach() > 0
    offered = torch.where(chosen.unsqueeze(-1), rebuilt.detach(), clean)
    unit = F.normalize(clean, dim=-1)

    def block(rows: slice, unit: Tensor, offered: Tensor, gate: Tensor) -> Tensor:
        score = (unit[:, rows] @ unit.mT / TEMPERATURE).masked_fill_(~mask.unsqueeze(1), float("-inf"))
        if causal:
            earlier = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).tril(rows.start - 1)
            score.masked_fill_(earlier, float("-inf"))
        best = score.masked_fill(~chosen.unsqueeze(1), -1 / TEMPERATURE).amax(-1, keepdim=True)
        weight = (score - best).clamp_max(MAX_ADVANTAGE).exp() * gate.unsqueeze(1)
        return (weight @ offered) / weight.sum(-1, keepdim=True).clamp_min(1e-9)

    soft = over_rows(block, unit, offered, merged.mask, num_columns=tokens.shape[1])
    return rebuilt + (soft - soft.detach())
