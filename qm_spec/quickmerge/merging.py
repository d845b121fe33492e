"""Merging: one token per group, weighted by saliency mass, and the way back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qm_spec.ops import saliency_merge
from qm_spec.quickmerge.budget import fixed_budget
from qm_spec.quickmerge.grouping import GROUPINGS, Grouping, group_by_cosine, group_by_kmeans
from qm_spec.quickmerge.inputs import check_choice, check_tokens, full_mask
from qm_spec.quickmerge.selection import TokenSelection


@dataclass(frozen=True)
class MergedTokens:
    """Merged tokens in the order of their places, and where every token went.

    Attributes:
        tokens: `[B, K, D]` in the input's dtype; 0 in empty slots.
        live: `[B, K]` bool, slots that are used, the first ones of each sequence.
        size: `[B, K]` float32, tokens merged into each; they sum to the sequence's tokens.
        mass: `[B, K]` float32, summed mass.
        place: `[B, K]` int64, position in the sequence, rising; N in empty slots.
        cluster: `[B, N]` int64, slot of each token; -1 at padding.
        mask: `[B, N]` float32, 1 at tokens drawn as salient; see `Selection.mask`.
    """

    tokens: Tensor
    live: Tensor
    size: Tensor
    mass: Tensor
    place: Tensor
    cluster: Tensor
    mask: Tensor

    @property
    def log_size(self) -> Tensor:
        """`[B, K]` float32 to add to attention scores, so that n merged tokens weigh like n; -inf if empty.

        Source: ToMe, arXiv 2210.09461, proportional attention.
        """
        return self.size.log()

    def unmerge(self, values: Tensor | None = None) -> Tensor:
        """Return `[B, N, D]`: each token's merged token, 0 at padding.

        Args:
            values: `[B, K, D']` to spread instead of the merged tokens, such as a model's output for them.

        Raises:
            ValueError: values are not `[B, K, ...]`.
        """
        values = self.tokens if values is None else values
        if values.ndim != 3 or values.shape[:2] != self.live.shape:
            raise ValueError(f"unmerge: values must be {[*self.live.shape, 'D']}, got {list(values.shape)}")
        return unmerge(values, self.cluster)


def unmerge(merged: Tensor, cluster: Tensor) -> Tensor:
    """Return `[B, N, D]`: the row of `merged` `[B, K, D]` that `cluster` `[B, N]` names; 0 where that is -1."""
    index = cluster.clamp_min(0).unsqueeze(-1).expand(-1, -1, merged.shape[-1])
    return merged.gather(1, index).masked_fill((cluster < 0).unsqueeze(-1), 0.0)


def merge_groups(tokens: Tensor, mass: Tensor, grouping: Grouping) -> tuple[Tensor, Tensor, Tensor]:
    """Average each group weighted by mass: `x_k = sum_{j in G_k} m_j x_j / sum_{j in G_k} m_j`.

    Args:
        tokens: `[B, N, D]`.
        mass: `[B, N]` float32, positive at tokens.
        grouping: of the tokens.

    Returns:
        tokens `[B, K, D]` in the input's dtype (computed in float32), sizes `[B, K]` and summed
        masses `[B, K]` float32; 0 in empty slots. Differentiable in tokens and mass.

    Source: QuickMerge++, arXiv 2508.13204.
    """
    return saliency_merge(tokens, mass, grouping.cluster, grouping.live.shape[1])


class DifferentiableTokenMerging(nn.Module):
    """Merge N tokens into K, differentiable in tokens and saliency.

    In training mode salient tokens are drawn with Gumbel noise; in eval mode the result is a
    function of the input alone.

    Args:
        temperature: tau of the selection, above 0.
        epsilon: mass of a token that is not selected at all, above 0 and below 1.
        grouping: `cosine` (the `quickmerge` README; the default, because merged tokens then stand
            at salient ones and one pass is enough) or `kmeans` (the `quickmergepp` README).
        causal: no merged token holds a token later than its place; see `group_by_cosine` and
            `group_by_kmeans`. Which tokens are salient may still depend on the whole sequence.
        noise: see `TokenSelection`.

    Raises:
        ValueError: a setting is out of range.

    Source: QuickMerge++, arXiv 2508.13204.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        epsilon: float = 0.01,
        *,
        grouping: str = "cosine",
        causal: bool = False,
        noise: float = 0.1,
    ) -> None:
        super().__init__()
        check_choice("DifferentiableTokenMerging", "grouping", grouping, GROUPINGS)
        self.grouping = grouping
        self.causal = causal
        # k-means finds a causal place for every cluster without it.
        keep_last = causal and grouping == "cosine"
        self.selection = TokenSelection(temperature, epsilon, noise, keep_last)

    def forward(
        self, tokens: Tensor, saliency: Tensor, K: int, token_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the merged tokens and the mask of the salient ones.

        Args:
            tokens: `[B, N, D]`, any float dtype.
            saliency: `[B, N]`, 0..1, higher = keep.
            K: tokens kept per sequence, at least 1; above N all stay as they are.
            token_mask: `[B, N]` bool, True = token.

        Returns:
            merged `[B, min(K, N), D]` and mask `[B, N]` float32, 1 at salient tokens
            (straight-through gradient).

        Raises:
            TypeError: K is not an integer, or tokens are not floats.
            ValueError: K is below 1, or shapes do not fit.
        """
        mask = full_mask("DifferentiableTokenMerging", tokens, token_mask)
        merged = self.merge(tokens, saliency, fixed_budget(K, mask), mask, num_slots=K)
        return merged.tokens, merged.mask

    def merge(
        self,
        tokens: Tensor,
        saliency: Tensor,
        budget: Tensor,
        token_mask: Tensor | None = None,
        num_slots: int | None = None,
        sample: bool | None = None,
    ) -> MergedTokens:
        """Merge each sequence to its own budget, and return all there is to know about it.

        Args:
            tokens: `[B, N, D]`, any float dtype.
            saliency: `[B, N]`, 0..1, higher = keep.
            budget: `[B]` int64, see `qm_spec.quickmerge.budget`; above a sequence's tokens all stay.
            token_mask: `[B, N]` bool, True = token.
            num_slots: K of the result, at most N of them are made; None takes the largest budget.
            sample: draw with noise; None does so in training mode only.

        Raises:
            TypeError: tokens are not floats.
            ValueError: shapes that do not fit.
        """
        check_tokens("DifferentiableTokenMerging", tokens)
        if saliency.shape != tokens.shape[:2]:
            raise ValueError(
                f"DifferentiableTokenMerging: saliency must be {list(tokens.shape[:2])}, got {list(saliency.shape)}"
            )
        mask = full_mask("DifferentiableTokenMerging", tokens, token_mask)
        budget = torch.minimum(budget, mask.sum(-1))
        group = group_by_kmeans if self.grouping == "kmeans" else group_by_cosine
        # Autocast would round the products to half precision, and a token of its own would not stay as it is.
        with torch.autocast(tokens.device.type, enabled=False):
            selection = self.selection(saliency, budget, mask, num_slots, sample)
            grouping = group(tokens, selection, mask, self.causal)
            merged, size, mass = merge_groups(tokens, selection.mass, grouping)
        return MergedTokens(merged, grouping.live, size, mass, grouping.place, grouping.cluster, selection.mask)
