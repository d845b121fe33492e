"""`cosine_similarity`: how alike every two tokens of a set are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

torch.library.define("qm_spec::cosine_similarity", "(Tensor tokens) -> Tensor")

# As in torch.nn.functional.normalize: a row of zeros is like nothing, itself included.
_LEAST_NORM = 1e-12


def cosine_similarity_reference(tokens: Tensor) -> Tensor:
    """Compute `cosine_similarity` of `[B, N, D]` in plain PyTorch."""
    unit = torch.nn.functional.normalize(tokens.float(), dim=-1, eps=_LEAST_NORM)
    return (unit @ unit.mT).to(tokens.dtype)


torch.library.impl("qm_spec::cosine_similarity", "default", cosine_similarity_reference)


@torch.library.register_fake("qm_spec::cosine_similarity")
def _cosine_similarity_fake(tokens: Tensor) -> Tensor:
    return tokens.new_empty(tokens.shape[0], tokens.shape[1], tokens.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    (tokens,) = ctx.saved_tensors
    x = tokens.float()
    norm = x.norm(dim=-1, keepdim=True).clamp_min(_LEAST_NORM)
    unit = x / norm
    grad_unit = (grad + grad.mT).float() @ unit
    # Along the token itself nothing changes but its length.
    return ((grad_unit - unit * (grad_unit * unit).sum(-1, keepdim=True)) / norm).to(tokens.dtype)


torch.library.register_autograd("qm_spec::cosine_similarity", _backward, setup_context=_setup_context)


def cosine_similarity(tokens: Tensor) -> Tensor:
    """Return the cosine similarity of every two tokens: `C_ij = x_i x_j / (|x_i| |x_j|)`.

    Args:
        tokens: `[..., N, D]`, any float dtype.

    Returns:
        `[..., N, N]` in the tokens' dtype (computed in float32), -1..1 but for rounding; the compiled
        kernels' is symmetric bit by bit. A token of zeros gets 0. Differentiable.

    Raises:
        TypeError: tokens are not floats.
        ValueError: tokens have fewer than two dimensions.

    Source: the `quickmerge` README, "pairwise cosine similarity between tokens".
    """
    if tokens.ndim < 2:
        raise ValueError(f"cosine_similarity: tokens must be [..., N, D], got {list(tokens.shape)}")
    if not tokens.is_floating_point():
        raise TypeError(f"cosine_similarity: tokens must be floats, got {tokens.dtype}")
    *batch, num_tokens, dim = tokens.shape
    similarity = torch.ops.qm_spec.cosine_similarity(tokens.reshape(torch.Size(batch).numel(), num_tokens, dim))
    return similarity.view(*batch, num_tokens, num_tokens)
