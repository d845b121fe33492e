"""Recall: where the text of a row stood before, and the loss by which attention learns to look there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from qm_spec.drafter.rows import PriorRows, PriorSequences

# Tokens that must agree for a place to count. One repeats by chance everywhere, more are rare.
SUFFIX = 2
# Nats that a row can lose: where attention cannot get to, nothing is to be learned.
MOST_NATS = 20.0


def earlier_places(token_ids: Tensor, rows: Tensor, fed: Tensor) -> Tensor:
    """Find the tokens that a row should look at: they and the one before them are the row's newest, as is what follows.

    Args:
        token_ids: `[B, N]` int64.
        rows: `[B, T]` int64, the newest verified position of each row.
        fed: `[B, T]` int64, the position of its newest token, drafted or not; another follows it.

    Returns:
        `[B, T, N]` bool, true at verified positions only.
    """
    place = torch.arange(token_ids.shape[1], device=token_ids.device)
    found = place <= rows.unsqueeze(-1)
    # What follows the last token is not known: nothing is like it.
    text = F.pad(token_ids, (0, 1), value=-1)
    for back in range(-1, SUFFIX):
        own = text.gather(1, fed - back)
        found &= token_ids.roll(back, 1).unsqueeze(1) == own.unsqueeze(-1)
    # Rolling wraps around.
    return found & (place >= SUFFIX - 1)


def recall_loss(sequences: PriorSequences, drafts: PriorRows, token_ids: Tensor) -> Tensor:
    """Return how little the global heads attend to the entries that hold what a row should look at, in nats.

    It is `-log` of the share of the attention to the memory that these entries get, averaged over the heads and over
    the rows that have such entries, times the square root of the share of these rows.

    Args:
        sequences: read.
        drafts: rows of them, as they are after a step.
        token_ids: `[B, N]` int64 of the text that rows are fed with.
    """
    layer, memory = sequences.layer, sequences.memory
    wanted = earlier_places(token_ids, drafts.positions, drafts.positions + drafts.num_steps)
    has_place = wanted.any(-1)
    if not has_place.any():
        return sequences.states.new_zeros(())
    held = memory.holding(sequences.levels, layer.num_kv_heads - 1, drafts.positions, wanted)
    heads = slice(-layer.num_global_heads, None)
    query, keys = drafts.query[:, :, heads].transpose(1, 2), memory.entries.keys[:, -1:]
    scores = query @ keys.mT * layer.head_dim**-0.5 + drafts.row_bias[:, heads]
    shares = scores.log_softmax(-1).masked_fill(~held.unsqueeze(1), float("-inf")).logsumexp(-1)
    nats = -shares.clamp_min(-MOST_NATS).mean(1)[has_place].mean()
    return nats * has_place.float().mean().sqrt()
