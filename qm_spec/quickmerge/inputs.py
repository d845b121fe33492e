"""Checks of tokens and masks that every module of the compressor shares."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tokens(caller: str, tokens: Tensor, embedding_dim: int | None = None) -> None:
    """Refuse what is not `[B, N, D]` of floats with N at least 1.

    Raises:
        TypeError: not a tensor of floats.
        ValueError: wrong dimensions, or no tokens.
    """
    if not isinstance(tokens, Tensor) or not tokens.is_floating_point():
        given = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"{caller}: tokens must be a tensor of floats, got {given}")
    if tokens.ndim != 3 or tokens.shape[1] < 1 or embedding_dim not in (None, tokens.shape[2]):
        wanted = "D" if embedding_dim is None else embedding_dim
        raise ValueError(
            f"{caller}: tokens must be [B, N, {wanted}] with N at least 1, got {list(tokens.shape)}; "
            "add the batch dimension with tokens.unsqueeze(0)"
        )


def full_mask(caller: str, tokens: Tensor, token_mask: Tensor | None) -> Tensor:
    """Return the mask of real tokens as bool, all True where none is given.

    Args:
        caller: for the message.
        tokens: `[B, N]` or `[B, N, D]`.
        token_mask: `[B, N]` bool or 0/1 integers, or None.

    Raises:
        ValueError: the mask's shape is not `[B, N]`.
    """
    if token_mask is None:
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if token_mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"{caller}: token_mask must be {list(tokens.shape[:2])} (True = token, False = padding), "
            f"got {list(token_mask.shape)}"
        )
    return token_mask.to(tokens.device).bool()


def check_choice(caller: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a name that is not among the choices.

    Raises:
        ValueError: it is not.
    """
    if value not in choices:
        raise ValueError(f"{caller}: {name} must be one of {sorted(choices)}, got {value!r}")
