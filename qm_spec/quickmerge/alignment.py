"""Bidirectional autoregressive alignment: merged tokens should predict each other in order."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qm_spec.quickmerge.ar_prior import AutoregressivePrior
from qm_spec.quickmerge.inputs import check_tokens, full_mask


class BidirectionalARAlignment(nn.Module):
    """The prior and its loss in both directions, `L_AR = L_forward + L_backward`.

    One prior reads the sequence and the flipped sequence, as in both references.

    Args:
        embedding_dim: D.
        num_layers: of the prior.
        num_heads: of the prior.

    Source: QuickMerge++, arXiv 2508.13204; mean squared error from the `quickmergepp` README.
    """

    def __init__(self, embedding_dim: int, num_layers: int = 6, num_heads: int = 8) -> None:
        super().__init__()
        self.prior = AutoregressivePrior(embedding_dim, num_layers, num_heads)

    def compute_alignment_loss(self, tokens: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Return the forward plus the backward mean squared error of the next token; lower = better.

        Args:
            tokens: `[B, N, D]`, any float dtype.
            token_mask: `[B, N]` bool, True = token.

        Returns:
            float32 scalar, at least 0, with gradients to tokens and prior; 0 where no sequence has
            two tokens.

        Raises:
            TypeError: tokens are not floats.
            ValueError: shapes that do not fit.
        """
        check_tokens("BidirectionalARAlignment", tokens, self.prior.embedding_dim)
        mask = full_mask("BidirectionalARAlignment", tokens, token_mask)
        count = mask.sum(-1, keepdim=True)
        # Tokens to the front: there a causal prior needs no mask against padding.
        order = (~mask).byte().argsort(dim=-1, stable=True)
        position = torch.arange(tokens.shape[1], device=tokens.device)
        backward = order.gather(1, torch.where(position < count, count - 1 - position, position))
        padding = (position >= count).unsqueeze(-1)
        both = [
            tokens.gather(1, index.unsqueeze(-1).expand_as(tokens)).masked_fill(padding, 0.0)
            for index in (order, backward)
        ]
        return self._next_token_error(both[0], count) + self._next_token_error(both[1], count)

    def _next_token_error(self, tokens: Tensor, count: Tensor) -> Tensor:
        error = (self.prior(tokens)[:, :-1].float() - tokens[:, 1:].float()).square().mean(-1)
        predicted = torch.arange(1, tokens.shape[1], device=tokens.device) < count
        return error.masked_fill(~predicted, 0.0).sum() / predicted.sum().clamp_min(1)
