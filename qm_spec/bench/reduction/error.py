"""How well the tokens can be rebuilt from the reduced ones."""

from __future__ import annotations

import torch
from torch import Tensor

from qm_spec.quickmerge import MergedTokens


def rebuild_error(tokens: Tensor, merged: MergedTokens) -> Tensor:
    """Return `||X - unmerge(X~)||^2 / ||X||^2` of each sequence; lower = better.

    A dropped token is rebuilt as 0, so the error of a pruning method is its share of dropped energy.

    Args:
        tokens: `[B, N, D]`, X.
        merged: of these tokens.

    Returns:
        `[B]` float32, at least 0.

    Source: the fidelity of QuickMerge++, arXiv 2508.13204.
    """
    return _relative_error(tokens, merged.unmerge())


def nearest_error(tokens: Tensor, merged: MergedTokens) -> Tensor:
    """Return the same with every token rebuilt from the reduced token nearest to it (Euclidean).

    Merging and pruning are on a par here: what counts is whether something like the token is still there.

    Args:
        tokens: `[B, N, D]`.
        merged: of these tokens.

    Returns:
        `[B]` float32, at least 0.
    """
    nearest = torch.cdist(tokens.float(), merged.tokens.float()).argmin(-1)
    return _relative_error(tokens, merged.tokens.gather(1, nearest.unsqueeze(-1).expand_as(tokens)))


def _relative_error(tokens: Tensor, rebuilt: Tensor) -> Tensor:
    exact = tokens.float()
    return (exact - rebuilt.float()).square().sum((1, 2)) / exact.square().sum((1, 2)).clamp_min(1e-12)
