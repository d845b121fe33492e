"""What a call has written so far, and when a row ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Ending:
    """The tokens that end a row, and the one that fills it from there.

    Attributes:
        eos_ids: none, one or several.
        pad_id: filler.
    """

    eos_ids: tuple[int, ...]
    pad_id: int

    @classmethod
    def choose(cls, target: nn.Module, eos_token_id: int | Sequence[int] | None, pad_token_id: int | None) -> Ending:
        """Take what the caller names, else what the target's generation config does; a bare module has none."""
        config = getattr(target, "generation_config", None)
        eos = getattr(config, "eos_token_id", None) if eos_token_id is None else eos_token_id
        pad = getattr(config, "pad_token_id", None) if pad_token_id is None else pad_token_id
        eos_ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        if pad is None:
            pad = eos_ids[0] if eos_ids else 0
        return cls(eos_ids, pad)


class Output:
    """New tokens of B rows.

    Args:
        batch: B.
        max_new_tokens: of each row.
        ending: what ends a row before.
        device: of the tokens.
    """

    def __init__(self, batch: int, max_new_tokens: int, ending: Ending, device: torch.device) -> None:
        self.token_ids = torch.full((batch, max_new_tokens), ending.pad_id, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.remaining = torch.full_like(self.lengths, max_new_tokens)
        self.eos_ids = torch.tensor(ending.eos_ids, dtype=torch.int64, device=device)

    def add(self, rows: Tensor, new_ids: Tensor, counts: Tensor) -> Tensor:
        """Write tokens behind each row's own, up to and with the first EOS.

        Args:
            rows: `[R]` int64, which rows.
            new_ids: `[R, n]` int64.
            counts: `[R]` int64, 1..n; the first so many are new tokens. They do not exceed `remaining`.

        Returns:
            `[R]` int64, tokens written.
        """
        column = torch.arange(new_ids.shape[1], device=new_ids.device)
        ends = torch.isin(new_ids, self.eos_ids) & (column < counts.unsqueeze(1))
        ended = ends.any(1)
        counts = torch.where(ended, ends.int().argmax(1) + 1, counts)
        row, place = (column < counts.unsqueeze(1)).nonzero(as_tuple=True)
        self.token_ids[rows[row], self.lengths[rows[row]] + place] = new_ids[row, place]
        self.lengths[rows] += counts
        self.remaining[rows] = torch.where(ended, 0, self.remaining[rows] - counts)
        return counts

    def going(self, rows: Tensor) -> Tensor:
        """Say which of these rows `[R]` have not ended: `[R]` bool."""
        return self.remaining[rows] > 0
