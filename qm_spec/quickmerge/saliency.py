"""Saliency: how much each token deserves a place of its own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qm_spec.ops.attention_entropy import attention_entropy
from qm_spec.ops.blocks import over_rows
from qm_spec.ops.masked_attention_entropy import masked_attention_entropy
from qm_spec.quickmerge.inputs import check_choice, check_tokens, full_mask

NORMALISATIONS = ("fraction", "minmax")
ENTROPY_SALIENCIES = ("entropy", "inverse_entropy")
SALIENCIES = (*ENTROPY_SALIENCIES, "learned", "norm")


def minmax(scores: Tensor, token_mask: Tensor) -> Tensor:
    """Scale the scores of each sequence's tokens to 0..1; 0.5 where all are alike, 0 at padding.

    A z-score before it, as in `quickmergepp`, changes nothing: min-max undoes every affine map.

    Args:
        scores: `[B, N]` float32.
        token_mask: `[B, N]` bool.
    """
    low = scores.masked_fill(~token_mask, float("inf")).amin(-1, keepdim=True)
    high = scores.masked_fill(~token_mask, float("-inf")).amax(-1, keepdim=True)
    spread = high - low
    # Relative to the scores: entropies of 1e-7 rank tokens well, rounding of large ones does not.
    alike = spread <= 1e-5 * torch.maximum(low.abs(), high.abs())
    scaled = (scores - low) / spread.masked_fill(alike, 1.0)
    return torch.where(alike, 0.5, scaled).masked_fill(~token_mask, 0.0)


def attend(states: Tensor, token_mask: Tensor | None, causal: bool) -> Tensor:
    """Return `softmax(H H^T / sqrt(D)) H`: each token's mean of what it attends to.

    Args:
        states: `[B, N, D]` float32, finite also at padding.
        token_mask: `[B, N]` bool, True = token; padding attends to itself as well. None = no padding.
        causal: a token attends to itself and earlier ones only.

    Returns:
        `[B, N, D]`.
    """
    # As one head, because the fused kernels want a dimension of heads.
    if token_mask is None:
        heads = states.unsqueeze(1)
        return F.scaled_dot_product_attention(heads, heads, heads, is_causal=causal).squeeze(1)

    def block(rows: slice, states: Tensor, token_mask: Tensor) -> Tensor:
        own = torch.ones(rows.stop - rows.start, states.shape[1], dtype=torch.bool, device=states.device)
        allowed = token_mask.unsqueeze(1)
        if causal:
            allowed = allowed & own.tril(rows.start)
        # A row without any column would be NaN.
        allowed = allowed | own.tril(rows.start).triu(rows.start)
        heads = states.unsqueeze(1)
        return F.scaled_dot_product_attention(heads[:, :, rows], heads, heads, attn_mask=allowed.unsqueeze(1)).squeeze(
            1
        )

    return over_rows(block, states, token_mask, num_columns=states.shape[1])


class EntropyAwareSaliency(nn.Module):
    """Saliency by attention entropy, averaged over layers.

    Per layer `A = softmax(H H^T / sqrt(D))`, `H_i = -sum_j A_ij log A_ij`, scaled to 0..1.

    Given `[L, B, N, D]`, the layers are those of the model that made them. Given `[B, N, D]`, there
    are `num_layers` of them: the tokens, then the tokens after each pass of the same attention
    (`H <- A H`), so that later layers see a token with what it attends to.

    Args:
        embedding_dim: D.
        num_layers: L of an input without a layer dimension, at least 1.
        direction: `entropy` = high entropy is salient (the `quickmerge` README and the paper's
            formula), `inverse_entropy` = low entropy is (the `quickmergepp` code); the two
            references disagree, and the formula of the README is the default.
        causal: tokens attend to themselves and earlier ones only.
        normalisation: `minmax` per sequence (paper), or `fraction` of the largest entropy possible
            for that token, log of the tokens it may attend to (0.5 where that is one token). Only
            `fraction` keeps a causal saliency free of later tokens; in exchange its values lie
            close together where all tokens attend alike.

    Raises:
        ValueError: a setting is out of range.

    Source: QuickMerge++, arXiv 2508.13204, `s_i = 1/L sum_l Normalize(H_i^(l))`. The layers made from
    `[B, N, D]`, for which neither README has a rule, and `fraction` are ours.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_layers: int = 12,
        *,
        direction: str = "entropy",
        causal: bool = False,
        normalisation: str = "minmax",
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"EntropyAwareSaliency: num_layers must be at least 1, got {num_layers}")
        check_choice("EntropyAwareSaliency", "direction", direction, tuple(ENTROPY_SALIENCIES))
        check_choice("EntropyAwareSaliency", "normalisation", normalisation, NORMALISATIONS)
        self.embedding_dim = embedding_dim
        self.num_layers = num_layers
        self.direction = direction
        self.causal = causal
        self.normalisation = normalisation

    def forward(self, tokens: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Return the saliency of each token; higher = keep.

        Args:
            tokens: `[B, N, D]` or `[L, B, N, D]`, any float dtype.
            token_mask: `[B, N]` bool, True = token.

        Returns:
            `[B, N]` float32 in 0..1, 0 at padding; differentiable.

        Raises:
            TypeError: tokens are not floats.
            ValueError: shapes that do not fit.
        """
        first = tokens[0] if tokens.ndim == 4 and len(tokens) else tokens
        check_tokens("EntropyAwareSaliency", first, self.embedding_dim)
        mask = full_mask("EntropyAwareSaliency", first, token_mask)
        columns = None if token_mask is None else mask
        layers = tokens if tokens.ndim == 4 else self._layers(tokens, mask, columns)
        # Autocast would compute the scores in half precision, and ties would decide what is salient.
        with torch.autocast(first.device.type, enabled=False):
            saliencies = [self._layer_saliency(layer, mask, columns) for layer in layers]
        saliency = torch.stack(saliencies).mean(0)
        if self.direction == "inverse_entropy":
            saliency = 1 - saliency
        return saliency.masked_fill(~mask, 0.0)

    def _layers(self, tokens: Tensor, mask: Tensor, columns: Tensor | None) -> Iterator[Tensor]:
        # Padding may hold NaN, and a weight of 0 would not silence that.
        states = tokens.float().masked_fill(~mask.unsqueeze(-1), 0.0)
        yield states
        for _ in range(self.num_layers - 1):
            states = attend(states, columns, self.causal)
            yield states

    def _layer_saliency(self, states: Tensor, mask: Tensor, columns: Tensor | None) -> Tensor:
        if columns is None and not self.causal:
            entropy = attention_entropy(states)
        else:
            clean = states.masked_fill(~mask.unsqueeze(-1), 0.0)
            allowed = None if columns is None else columns.unsqueeze(1)
            entropy = masked_attention_entropy(clean, allowed, self.causal)
        if self.normalisation == "minmax":
            return minmax(entropy, mask)
        largest = (mask.cumsum(-1) if self.causal else mask.sum(-1, keepdim=True)).float().log()
        return torch.where(largest > 0, entropy / largest.clamp_min(0.5), 0.5)


class NormSaliency(nn.Module):
    """Saliency by the token's Euclidean norm, scaled to 0..1 per sequence.

    Args:
        embedding_dim: D.

    Source: the abstract of QuickMerge++ ("attention norm magnitude"); neither README selects by it.
    """

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim

    def forward(self, tokens: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Return the saliency `[B, N]` float32 in 0..1 of `[B, N, D]` or `[L, B, N, D]`; higher = keep.

        Several layers are averaged. Raises TypeError or ValueError as `EntropyAwareSaliency` does.
        """
        layers = tokens if tokens.ndim == 4 else tokens.unsqueeze(0)
        check_tokens("NormSaliency", layers[0], self.embedding_dim)
        mask = full_mask("NormSaliency", layers[0], token_mask)
        layers = layers.float().masked_fill(~mask.unsqueeze(-1), 0.0)
        return torch.stack([minmax(layer.norm(dim=-1), mask) for layer in layers]).mean(0)


class LearnedSaliency(nn.Module):
    """Saliency by a trained linear score, `sigmoid(w x + b)`.

    Args:
        embedding_dim: D.
    """

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.score = nn.Linear(embedding_dim, 1)

    def forward(self, tokens: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Return the saliency `[B, N]` float32 in 0..1 of `[B, N, D]` or the last of `[L, B, N, D]`.

        Higher = keep; 0 at padding. Raises TypeError or ValueError as `EntropyAwareSaliency` does.
        """
        states = tokens[-1] if tokens.ndim == 4 else tokens
        check_tokens("LearnedSaliency", states, self.embedding_dim)
        mask = full_mask("LearnedSaliency", states, token_mask)
        states = states.masked_fill(~mask.unsqueeze(-1), 0.0)
        score = self.score(states.to(self.score.weight.dtype)).squeeze(-1).float()
        return torch.sigmoid(score).masked_fill(~mask, 0.0)


def make_saliency(
    name: str, embedding_dim: int, num_layers: int, causal: bool, normalisation: str = "minmax"
) -> nn.Module:
    """Make the saliency of that name, one of `SALIENCIES`; the last three are for those by entropy.

    Raises:
        ValueError: the name is unknown.
    """
    check_choice("make_saliency", "saliency", name, SALIENCIES)
    check_choice("make_saliency", "normalisation", normalisation, NORMALISATIONS)
    if name == "norm":
        return NormSaliency(embedding_dim)
    if name == "learned":
        return LearnedSaliency(embedding_dim)
    return EntropyAwareSaliency(embedding_dim, num_layers, direction=name, causal=causal, normalisation=normalisation)
