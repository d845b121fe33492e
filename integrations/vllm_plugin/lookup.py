"""Drafts by suffix lookup in a request's own tokens, in place of the prior's where a suffix is found again.

A drafter's `lookup_length` says how long the suffix must be. `QM_SPEC_LOOKUP` overrides it for one engine:

    0       no lookup
    2..8    tokens
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from qm_spec.drafter.past_responses import PastResponses
from qm_spec.drafter.prior_config import QuickMergeConfig, check_lookup_length
from qm_spec.drafter.suffix_index import MOST_LIKELY, NO_MATCH, Lookup, SuffixIndex
from qm_spec.integrations.vllm_plugin.step import DraftRequest, DraftStep

logger = logging.getLogger("vllm.plugins.qm_spec")

VARIABLE = "QM_SPEC_LOOKUP"


def lookup_length(config: QuickMergeConfig) -> int:
    """Return the shortest suffix to look up, in tokens, 0 for none: `QM_SPEC_LOOKUP`, else the drafter's own.

    Raises:
        ValueError: the variable is neither 0 nor in 2..8.
    """
    given = os.environ.get(VARIABLE)
    if given is None:
        return config.lookup_length
    return check_lookup_length(VARIABLE, int(given) if given.isdecimal() else given)


def most_drafts(config: QuickMergeConfig) -> int:
    """Return how many tokens a step may draft where lookup may draft more than the prior.

    Raises:
        ValueError: see `lookup_length`.
    """
    looked_up = min(MOST_LIKELY, config.merge.max_speculative_tokens) if lookup_length(config) else 0
    return max(config.num_speculative_tokens, looked_up)


@cache
def warn_without_lookup() -> None:
    """Say once that lookup was asked for where it is not done: in vLLM's own draft loop of the V1 runner."""
    logger.warning(
        "qm_spec: %s or lookup_length asks for suffix lookup, which there is not here; there is with the V2 runner "
        "(VLLM_USE_V2_MODEL_RUNNER=1), and with V1 on one rank, on a GPU with compiled kernels",
        VARIABLE,
    )


def look_up(step: DraftStep, min_length: int, responses: PastResponses | None = None) -> list[Lookup]:
    """Add what the target has read in this step to the requests' indices and look their newest tokens up.

    Values are read on the host: that is free on a CPU; a GPU's step is waited for.

    Args:
        step: of known requests.
        min_length: shortest suffix that counts, in tokens; 0 where lookup is off.
        responses: answers of other requests, for those whose own text holds no match.

    Returns:
        One for each request; none at all where lookup is off or the requests are not known.
    """
    if not min_length or not step.requests:
        return []
    token_ids, newest, rejected = step.token_ids.tolist(), step.next_token_ids.tolist(), step.num_rejected.tolist()
    starts, lengths = step.query_start_loc.tolist(), step.seq_lens.tolist()
    found = []
    for row, request in enumerate(step.requests):
        start, end = starts[row : row + 2]
        index = _read(request, min_length, lengths[row] - (end - start), token_ids[start : end - rejected[row]])
        # Otherwise it lacks tokens that have not arrived.
        complete = len(index) == lengths[row] - rejected[row]
        lookup = index.look_up(newest[row], step.num_drafts) if complete else NO_MATCH
        if complete and not lookup.length and responses is not None and request.group is not None:
            lookup = responses.look_up(request.group, index.suffix(newest[row]), step.num_drafts)
        found.append(lookup)
    return found


def _read(request: DraftRequest, min_length: int, first: int, token_ids: list[int]) -> SuffixIndex:
    """Bring a request's index up to the verified tokens of this step, which stand at `first`."""
    index = request.index
    if index is None:
        index = request.index = SuffixIndex(min_length)
    if len(index) < first:
        # A prefix from the cache, or steps that drafted nothing.
        skipped = request.token_ids(len(index), first)
        if skipped is None:
            return index
        index.read(skipped)
    if len(index) > first:
        # A preempted request is read again, and what it had sampled last may have been taken back.
        kept = index.token_ids[:first]
        index = request.index = SuffixIndex(min_length)
        index.read(kept)
    index.read(token_ids)
    return index


def draft_widths(found: Sequence[Lookup], num_requests: int, num_drafts: int) -> list[int]:
    """Return how many tokens to draft for each request where nothing decides about it.

    Args:
        found: one per request, of as many tokens as a step may draft; none at all where lookup is off.
        num_requests: B.
        num_drafts: K, of the prior; what is looked up may be more.
    """
    return [max(num_drafts, len(lookup.likely)) for lookup in found] or [num_drafts] * num_requests


def join_drafts(
    found: Sequence[Lookup], drafted: Tensor, probs: Tensor | None, widths: Sequence[int]
) -> tuple[Tensor | list[list[int]], Tensor | None]:
    """Put what was looked up in the place of the prior's drafts.

    Args:
        found: one per row; none at all where lookup is off.
        drafted: `[B, K]` int64.
        probs: `[B, K, V]` distributions that the drafts were drawn from, or None.
        widths: tokens of each row, at most K without a lookup; 0 drafts nothing for it.

    Returns:
        Drafts, a tensor `[B, W]` where all rows are W wide, else a list for each row; and distributions `[B, W, V]` for
        the widest row, in which a looked-up token has all.
    """
    rows = [row for row, lookup in enumerate(found) if lookup.length]
    if rows:
        width = max(widths)
        places, more = torch.tensor(rows, device=drafted.device), width - drafted.shape[1]
        copied = drafted.new_tensor([found[row].drafts[:width] for row in rows])
        drafted = pad(drafted, (0, more)).index_copy(0, places, copied)
        if probs is not None:
            sure = probs.new_zeros(*copied.shape, probs.shape[-1]).scatter_(-1, copied.unsqueeze(-1), 1.0)
            probs = pad(probs, (0, 0, 0, more)).index_copy(0, places, sure)
    if len(set(widths)) == 1:
        return drafted, probs
    return [row[:width] for row, width in zip(drafted.tolist(), widths, strict=True)], probs
