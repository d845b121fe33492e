"""The compressor that the pipelines share: saliency and merging, without the prior's parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qm_spec.compression.sizes import compression_report
from qm_spec.quickmerge import DifferentiableTokenMerging, MergedTokens, fixed_budget
from qm_spec.quickmerge.inputs import check_tokens, full_mask
from qm_spec.quickmerge.saliency import make_saliency


class TokenCompressor(nn.Module):
    """Merge the tokens of a sequence to at most K; nothing is random, whatever the mode.

    It is `QuickMergePP` without prior and losses: apart from `learned`, no saliency has parameters,
    so a compressor for D = 4096 takes no memory.

    Args:
        embedding_dim: D.
        saliency: `inverse_entropy`, `entropy`, `norm` or `learned`.
        grouping: `kmeans` or `cosine`. The defaults of both are what `quickmergepp` does, whose README
            the pipelines are from; in `docs/results/pipelines.md` they move most outputs least.
        num_layers: passes of attention that the entropy is averaged over.
        causal: no merged token holds a token later than its place.
        temperature: tau of the selection.
        epsilon: mass of a token that is not selected at all.

    Raises:
        ValueError: a setting is out of range.

    Source: QuickMerge++, arXiv 2508.13204.
    """

    def __init__(
        self,
        embedding_dim: int,
        *,
        saliency: str = "inverse_entropy",
        grouping: str = "kmeans",
        num_layers: int = 1,
        causal: bool = False,
        temperature: float = 0.1,
        epsilon: float = 0.01,
    ) -> None:
        super().__init__()
        if embedding_dim < 1:
            raise ValueError(f"TokenCompressor: embedding_dim must be at least 1, got {embedding_dim}")
        self.embedding_dim = embedding_dim
        self.saliency = make_saliency(saliency, embedding_dim, num_layers, causal)
        self.merging = DifferentiableTokenMerging(temperature, epsilon, grouping=grouping, causal=causal)

    def forward(self, tokens: Tensor, keep: int, token_mask: Tensor | None = None) -> MergedTokens:
        """Merge to `min(keep, N)` tokens per sequence; differentiable in the tokens.

        Args:
            tokens: `[B, N, D]`, any float dtype.
            keep: K, at least 1.
            token_mask: `[B, N]` bool, True = token.

        Raises:
            TypeError: tokens are not floats, or K is not an integer.
            ValueError: K is below 1, or shapes do not fit.
        """
        check_tokens("TokenCompressor", tokens, self.embedding_dim)
        mask = full_mask("TokenCompressor", tokens, token_mask)
        saliency = self.saliency(tokens, token_mask)
        return self.merging.merge(tokens, saliency, fixed_budget(keep, mask), mask, keep, sample=False)


def compress_tokens(
    tokens: Tensor, keep: int, *, saliency: str = "inverse_entropy", grouping: str = "kmeans"
) -> MergedTokens:
    """Merge tokens of any dimension once; see `TokenCompressor`, whose parameters a `learned` saliency would need."""
    return TokenCompressor(tokens.shape[-1], saliency=saliency, grouping=grouping)(tokens, keep)


def merge_info(tokens: Tensor, merged: MergedTokens) -> dict[str, Any]:
    """Return what was saved (`compression_report`) and where every token went.

    Args:
        tokens: `[B, N, D]`, before.
        merged: after.

    Returns:
        the report, and `assignments` `[B, N]` int64, the merged token of each token, -1 at padding;
        `sizes` `[B, K]` float32, tokens in each; `places` `[B, K]` int64, rising; `mask` `[B, K]`
        bool, False at empty slots; `log_size` `[B, K]` float32, to add to attention scores so that
        a merged token weighs like all it holds.
    """
    before, after = (merged.cluster >= 0).sum(-1), merged.live.sum(-1)
    return {
        **compression_report([tokens], [merged.tokens], before, after),
        "assignments": merged.cluster,
        "sizes": merged.size,
        "places": merged.place,
        "mask": merged.live,
        "log_size": merged.log_size,
    }
