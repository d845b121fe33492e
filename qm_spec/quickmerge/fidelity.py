"""Fidelity: how much of the tokens the merged ones still hold."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qm_spec.ops.masked_attention_entropy import masked_attention_entropy
from qm_spec.quickmerge.inputs import check_tokens, full_mask
from qm_spec.quickmerge.merging import unmerge


class NormBasedFidelityConstraint(nn.Module):
    """Penalise merged tokens from which the sequence cannot be rebuilt well enough.

    `L_fid = max(0, ||X - unmerge(X~)||^2 / ||X||_F^2 - (1 - gamma)^2)`, averaged over sequences.
    The paper's bound is `(1 - gamma)^2 ||X||_F^2`; dividing by `||X||_F^2` makes the loss
    independent of the tokens' scale and length.

    Args:
        gamma: share of the norm mass to keep, 0..1; higher = stricter. At 1 every error counts.

    Raises:
        ValueError: gamma is out of range.

    Source: QuickMerge++, arXiv 2508.13204. There gamma is measured (`norm_mass_retained`); the
    `quickmerge` README gives it as a setting, which is taken here.
    """

    def __init__(self, gamma: float = 0.8) -> None:
        super().__init__()
        if not 0 <= gamma <= 1:
            raise ValueError(f"NormBasedFidelityConstraint: gamma must be in 0..1, got {gamma}")
        self.gamma = gamma

    def compute_fidelity_loss(
        self,
        tokens: Tensor,
        merged: Tensor,
        cluster: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss; 0 where every sequence is rebuilt within the bound, lower = better.

        Args:
            tokens: `[B, N, D]`, X.
            merged: `[B, K, D]`, X~.
            cluster: `[B, N]` int64, the slot of each token, -1 at padding (`MergedTokens.cluster`).
                Without it a token is rebuilt from the merged token nearest to it.
            token_mask: `[B, N]` bool, True = token; padding is also known from `cluster`.

        Returns:
            float32 scalar, at least 0, with gradients to both.

        Raises:
            TypeError: tokens are not floats.
            ValueError: shapes that do not fit.
        """
        check_tokens("NormBasedFidelityConstraint", tokens)
        check_tokens("NormBasedFidelityConstraint", merged, tokens.shape[-1])
        if len(merged) != len(tokens):
            raise ValueError(
                f"NormBasedFidelityConstraint: merged must have the tokens' batch of {len(tokens)}, got {len(merged)}"
            )
        mask = full_mask("NormBasedFidelityConstraint", tokens, token_mask)
        if cluster is None:
            with torch.no_grad():
                clean = tokens.float().masked_fill(~mask.unsqueeze(-1), 0.0)
                cluster = torch.cdist(clean, merged.float()).argmin(-1)
        elif cluster.shape != mask.shape:
            raise ValueError(
                f"NormBasedFidelityConstraint: cluster must be {list(mask.shape)}, got {list(cluster.shape)}"
            )
        return self.loss_of_rebuilt(tokens, unmerge(merged.float(), cluster), mask & (cluster >= 0))

    def loss_of_rebuilt(self, tokens: Tensor, rebuilt: Tensor, token_mask: Tensor) -> Tensor:
        """Return the loss of tokens `[B, N, D]` that were rebuilt as `[B, N, D]`; see `compute_fidelity_loss`."""
        padding = ~token_mask.unsqueeze(-1)
        exact = tokens.float().masked_fill(padding, 0.0)
        rebuilt = rebuilt.float().masked_fill(padding, 0.0)
        error = (exact - rebuilt).square().sum((1, 2)) / exact.square().sum((1, 2)).clamp_min(1e-12)
        return (error - (1 - self.gamma) ** 2).relu().mean()


def norm_mass_retained(tokens: Tensor, keep: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Return the paper's measured gamma: the norms of the K largest tokens over those of all.

    Args:
        tokens: `[B, N, D]`.
        keep: `[B]` int64, K of each sequence.
        token_mask: `[B, N]` bool, True = token.

    Returns:
        `[B]` float32, 0..1.

    Raises:
        TypeError: tokens are not floats.
        ValueError: shapes that do not fit.
    """
    check_tokens("norm_mass_retained", tokens)
    if keep.shape != tokens.shape[:1]:
        raise ValueError(f"norm_mass_retained: keep must be [{len(tokens)}], got {list(keep.shape)}")
    mask = full_mask("norm_mass_retained", tokens, token_mask)
    norms = tokens.float().masked_fill(~mask.unsqueeze(-1), 0.0).norm(dim=-1).sort(dim=-1, descending=True).values
    kept = torch.arange(tokens.shape[1], device=tokens.device) < keep.unsqueeze(-1)
    return (norms * kept).sum(-1) / norms.sum(-1).clamp_min(1e-12)


def normalised_entropy_drop(
    tokens: Tensor,
    merged: Tensor,
    token_mask: Tensor | None = None,
    live: Tensor | None = None,
    delta: float = 1e-6,
) -> Tensor:
    """Return `(H_in - H_out) / (H_in + delta)`, H the mean attention entropy of a sequence's tokens.

    Args:
        tokens: `[B, N, D]`, before.
        merged: `[B, K, D]`, after.
        token_mask: `[B, N]` bool, True = token.
        live: `[B, K]` bool, slots in use.
        delta: keeps the ratio finite where nothing attends widely.

    Returns:
        `[B]` float32, at most 1; higher = more of the entropy is gone; differentiable.

    Raises:
        TypeError: tokens are not floats.
        ValueError: shapes that do not fit.
    """
    before, after = _mean_entropy(tokens, token_mask), _mean_entropy(merged, live)
    return (before - after) / (before + delta)


def _mean_entropy(tokens: Tensor, token_mask: Tensor | None) -> Tensor:
    check_tokens("normalised_entropy_drop", tokens)
    mask = full_mask("normalised_entropy_drop", tokens, token_mask)
    entropy = masked_attention_entropy(tokens.masked_fill(~mask.unsqueeze(-1), 0.0), mask.unsqueeze(1))
    return (entropy * mask).sum(-1) / mask.sum(-1).clamp_min(1)
