"""`masked_attention_entropy`: attention entropy where not every token may attend to every other."""

from __future__ import annotations

from torch import Tensor

from qm_spec.ops.attention_entropy import RowEntropy


def masked_attention_entropy(tokens: Tensor, allowed: Tensor | None = None, causal: bool = False) -> Tensor:
    """Return the entropy of each token's self-attention over the tokens it may attend to, in nats.

    The memory grows with N and not with its square, but for an `allowed` that has N rows.

    Args:
        tokens: `[..., N, D]`, any float dtype, finite also where nothing may attend.
        allowed: `[..., N, N]` bool, True where row i may attend to column j, or `[..., 1, N]` for the
            same columns in every row; None allows all.
        causal: a token attends to itself and earlier ones only.

    Returns:
        `[..., N]` float32, between 0 and the log of the tokens allowed; 0 where a row may attend to
        nothing; differentiable once.

    Source: QuickMerge++, arXiv 2508.13204, saliency estimation; the mask is ours.
    """
    num_tokens = tokens.shape[-2]
    if allowed is not None:
        allowed = allowed.expand(*allowed.shape[:-2], num_tokens, num_tokens)
    return RowEntropy.apply(tokens.float(), allowed, causal)  # type: ignore[no-untyped-call]
