"""Verification of drafts that were drawn, on a CPU.

vLLM draws a number for each token of the vocabulary and each request there, and a token in place of every draft. Both
are needed at the first rejected draft of a request only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def verify_drawn(
    draft_token_ids: Tensor,
    num_draft_tokens: Sequence[int],
    most_drafts: int,
    draft_probs: Tensor | None,
    target_logits: Tensor,
    bonus_token_ids: Tensor,
    temperature: Tensor,
) -> Tensor:
    """Keep drafts of B requests by rejection sampling; what is written is distributed as the target's own.

    A draft x of distribution q is kept with probability min(1, p(x) / q(x)). Behind the kept ones follows a sample of
    norm(max(p - q, 0)) where one was rejected, the bonus token where none was. Greedy requests keep what is the
    target's best token.

    Args:
        draft_token_ids: `[n]`, request by request; negative ones are always rejected.
        num_draft_tokens: of each request; they add up to n.
        most_drafts: of one request.
        draft_probs: `[n, V]` float32, q; None where drafts were certain.
        target_logits: `[n, V]` float32, over the temperature, of the positions of the drafts.
        bonus_token_ids: `[B, 1]`, behind all drafts of each request.
        temperature: `[B]`, 0 for greedy requests.

    Returns:
        `[B, most_drafts + 1]` int32, -1 behind the last token of each request.

    Source: Leviathan et al. 2023, arXiv 2211.17192, Algorithm 1.
    """
    counts = torch.tensor(num_draft_tokens)
    greedy = (temperature == 0).repeat_interleave(counts)
    drafts = draft_token_ids.long()
    valid, places = drafts >= 0, drafts.clamp_min(0).unsqueeze(1)
    probs = target_logits.softmax(-1, dtype=torch.float32)
    wanted = probs.gather(1, places).squeeze(1)
    proposed = torch.ones_like(wanted) if draft_probs is None else draft_probs.gather(1, places).squeeze(1)
    # Strictly less, so that a token of p = 0 is rejected by u = 0 too.
    kept = (torch.rand(len(drafts), dtype=torch.float64) * proposed < wanted) & (proposed > 0)
    if greedy.any():
        kept = torch.where(greedy, target_logits.argmax(-1) == drafts, kept)
    verdicts = iter((kept & valid).tolist())
    output = bonus_token_ids.new_full((len(counts), most_drafts + 1), -1, dtype=torch.int32)
    rejecting, rejected, first = [], [], 0
    for request, count in enumerate(num_draft_tokens):
        own = [next(verdicts) for _ in range(count)]
        length = own.index(False) if False in own else count
        output[request, :length] = draft_token_ids[first : first + length]
        if length < count:
            rejecting.append((request, length))
            rejected.append(first + length)
        else:
            output[request, length] = bonus_token_ids[request, 0]
        first += count
    if rejected:
        rows = torch.tensor(rejected)
        weights = probs[rows]
        if draft_probs is None:
            weights.scatter_(1, places[rows], weights.gather(1, places[rows]) * ~valid[rows].unsqueeze(1))
        else:
            weights = (weights - draft_probs[rows]).clamp_min_(0)
        # p = q leaves no residual; nothing is rejected then but by rounding.
        weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, probs[rows])
        token_ids = _draw(weights)
        if greedy.any():
            token_ids = torch.where(greedy[rows], target_logits[rows].argmax(-1), token_ids)
        requests, columns = torch.tensor(rejecting).T
        output[requests, columns] = token_ids.int()
    return output


def _draw(weights: Tensor) -> Tensor:
    """Return a token of each row `[r, V]`, by inverting its distribution; never one of weight 0."""
    shares = weights.cumsum(-1, dtype=torch.float64)
    total = shares[:, -1:]
    # Rounding may lift u * total to total, which lies behind the last token.
    place = torch.minimum(torch.rand_like(total) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(shares, place, right=True).squeeze(1)
