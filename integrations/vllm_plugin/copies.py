"""Copies by suffix lookup with the V2 runner: found on the device, and put in the place of the prior's drafts there."""

from __future__ import annotations

import torch
from torch import Tensor

from qm_spec.drafter.device_lookup import find_copies


class CopiedDrafts:
    """What lookup drafts for each row of the batch, where captured graphs read it.

    Args:
        max_num_reqs: R, rows of the largest batch, and places of requests' states.
        num_drafts: K, the most tokens of a request.
        device: of the engine.

    Attributes:
        token_ids: `[R, K]` int64 by row, 0 in rows that nothing is found for.
        lengths: `[R]` int64 by row, tokens of the suffix that was found again, else 0.
        by_place: `[R]` bool by the place of a request's state, whether its last drafts were copied.
    """

    def __init__(self, max_num_reqs: int, num_drafts: int, device: torch.device) -> None:
        self.token_ids = torch.zeros((max_num_reqs, num_drafts), dtype=torch.int64, device=device)
        self.lengths = torch.zeros(max_num_reqs, dtype=torch.int64, device=device)
        self.by_place = torch.zeros(max_num_reqs, dtype=torch.bool, device=device)

    def clear(self) -> None:
        """Copy for no row."""
        self.token_ids.zero_()
        self.lengths.zero_()

    def find(self, all_token_ids: Tensor, places: Tensor, num_tokens: Tensor, min_length: int) -> None:
        """Look up what to copy for a batch of B requests.

        Args:
            all_token_ids: `[R, L]` by place.
            places: `[B]` of the requests' states.
            num_tokens: `[B]`, tokens of each request, the newest sampled one included.
            min_length: shortest suffix that counts, in tokens.
        """
        self.clear()
        found = find_copies(all_token_ids, places, num_tokens, min_length, self.token_ids.shape[1])
        self.token_ids[: len(places)], self.lengths[: len(places)] = found
        self.by_place[places] = found.lengths > 0

    def over_tokens(self, token_ids: Tensor, number: int) -> Tensor:
        """Return drafts `[B]` of one step, copied where there is a match."""
        rows = len(token_ids)
        return torch.where(self.lengths[:rows] > 0, self.token_ids[:rows, number], token_ids)

    def over_logits(self, logits: Tensor, number: int) -> Tensor:
        """Return logits `[B, V]` of one step, certain of the copy where there is a match."""
        rows = len(logits)
        found, copied = (self.lengths[:rows] > 0).unsqueeze(1), self.token_ids[:rows, number].unsqueeze(1)
        certain = logits.gather(1, copied).masked_fill(found, 0.0)
        return logits.masked_fill(found, float("-inf")).scatter(1, copied, certain)

    def over_confidences(self, probs: Tensor) -> Tensor:
        """Return the chances `[B, K]` that each draft is accepted if those before it are, for copies by their match.

        Behind a match of n tokens about n more are right (docs/results/smollm2.md: 1.7 of 16 behind 2, 2.7 behind 3,
        4.1 behind 4, 8.4 behind 8), which is what a chance of n / (n + 1) at each gives.
        """
        lengths = self.lengths[: len(probs)].unsqueeze(1)
        return torch.where(lengths > 0, lengths / (lengths + 1), probs)
