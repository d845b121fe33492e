"""The exact distributions that a target's samples have under a request's settings, and how a sample fits them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qm_spec.drafter.head import draft_head


def exact_distributions(logits: Tensor, prompt: list[int], text: list[int], settings: dict[str, Any]) -> Tensor:
    """Return `[C - 1, V]` float64: how the target samples each token of a text but the first, given those before it.

    Args:
        logits: `[C, V]` of the target at the text's tokens, each for the token behind it.
        prompt: token ids.
        text: token ids that were sampled.
        settings: sampling settings as vLLM's, with `bad_words_token_ids` for `bad_words`; `stop_token_ids` are masked
            before `min_tokens`.
    """
    rows = []
    for place, raw in enumerate(logits[:-1], 1):
        row, before = raw.double(), text[:place]
        for word in settings.get("bad_words_token_ids", ()):
            if before[len(before) - len(word) + 1 :] == word[:-1] and len(before) >= len(word) - 1:
                row[word[-1]] = -torch.inf
        if place < settings.get("min_tokens", 0):
            row[settings["stop_token_ids"]] = -torch.inf
        seen = torch.tensor(sorted({*prompt, *before}))
        penalty = settings.get("repetition_penalty", 1.0)
        row[seen] = torch.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
        counts = torch.bincount(torch.tensor(before, dtype=torch.long), minlength=len(row))
        row = row - settings.get("frequency_penalty", 0.0) * counts
        row = (row - settings.get("presence_penalty", 0.0) * (counts > 0)) / settings["temperature"]
        if "top_k" in settings:
            row[row < row.topk(settings["top_k"]).values[-1]] = -torch.inf
        probs = row.softmax(-1)
        if "top_p" in settings:
            ordered, tokens = probs.sort(descending=True)
            # The most likely tokens up to and with the one that reaches `top_p`.
            probs[tokens[ordered.cumsum(0) - ordered >= settings["top_p"]]] = 0.0
            probs /= probs.sum()
        rows.append(probs)
    return torch.stack(rows)


def places(probs: Tensor, favour: Tensor, text: list[int], chance: torch.Generator) -> Tensor:
    """Return `[n]` where in its distribution each token lies, drawn within its own share; uniform for a right sample.

    That is so whatever was written before, and whatever the order of the tokens in the distribution: `favour`,
    `[n, V]`, says which come first.
    """
    order = favour.sort(dim=-1, descending=True, stable=True).indices
    shares = probs.gather(1, order)
    # Where each token stands in the order; equal ones stand as their ids do.
    at = (order == torch.tensor(text).unsqueeze(-1)).int().argmax(-1, keepdim=True)
    own = shares.gather(1, at)[:, 0]
    ends = shares.cumsum(-1).gather(1, at)[:, 0]
    return ends - torch.rand(len(text), generator=chance) * own


@torch.no_grad()
def first_drafts(pair: Any, text: Any) -> Tensor:
    """Return the distributions `[C - 1, V]` that the drafter has for the tokens behind a text's first one.

    Args:
        pair: with `target` and `drafter`.
        text: a replay's, of C tokens behind its prompt.
    """
    embeddings = pair.target.get_input_embeddings()(text.token_ids).float()
    rows = torch.arange(text.num_prompt - 1, text.token_ids.shape[1] - 2)
    drafts = pair.drafter.read(text.aux_states, embeddings).anchors(rows[None])
    logits = draft_head(pair.drafter, pair.target).vocabulary_logits(drafts.step(embeddings[:, rows + 1]))[0]
    return logits.double().softmax(-1)
