"""The prompts of one call: checked, and moved to the front of their rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """Token ids of B rows, padding behind them.

    Attributes:
        token_ids: `[B, T]` int64, T the longest row's length.
        lengths: `[B]` int64, at least 1.
    """

    token_ids: Tensor
    lengths: Tensor

    @classmethod
    def check(cls, input_ids: Tensor, attention_mask: Tensor | None, vocab_size: int, device: torch.device) -> Prompt:
        """Pack token ids `[B, T]`, those whose mask is not 0, on `device`.

        Raises:
            TypeError: ids are not integers.
            ValueError: wrong shapes, a row without tokens, an id outside the vocabulary.
        """
        if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
            given = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
            raise TypeError(f"generate: input_ids must be a tensor of int64 or int32, got {given}")
        if input_ids.ndim != 2 or input_ids.shape[1] == 0:
            raise ValueError(
                f"generate: input_ids must be [B, T] with T at least 1, got {list(input_ids.shape)}; "
                "add the batch dimension with input_ids.unsqueeze(0), and a BOS token to an empty prompt"
            )
        token_ids = input_ids.to(device, torch.int64)
        if attention_mask is None:
            real = torch.ones_like(token_ids, dtype=torch.bool)
        elif attention_mask.shape == input_ids.shape:
            real = attention_mask.to(device).bool()
        else:
            raise ValueError(
                f"generate: attention_mask must be {list(input_ids.shape)} like input_ids, "
                f"got {list(attention_mask.shape)}"
            )
        lengths = real.sum(1)
        if not bool((lengths > 0).all()):
            empty = (lengths == 0).nonzero().flatten().tolist()
            raise ValueError(f"generate: attention_mask must leave every row a token, got none in rows {empty}")
        token_ids = token_ids.masked_fill(~real, 0)
        if token_ids.numel() and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < vocab_size:
            raise ValueError(
                f"generate: input_ids must be in 0..{vocab_size - 1}, "
                f"got {int(token_ids.min())}..{int(token_ids.max())}"
            )
        # Real tokens to the front, in their order.
        order = (~real).byte().argsort(dim=1, stable=True)
        longest = int(lengths.max()) if len(lengths) else 0
        return cls(token_ids.gather(1, order)[:, :longest], lengths)
