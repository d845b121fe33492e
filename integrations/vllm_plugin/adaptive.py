"""Drafts as many tokens as pay, by the engine's own times and acceptance.

`QM_SPEC_ADAPT` says whether:

    1       on a CPU, which is the default; on a GPU, whose steps the host does not wait for, every step drafts
    0       every step drafts
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from qm_spec.drafter.controller import Candidate, Controller
from qm_spec.drafter.suffix_index import Lookup

logger = logging.getLogger("vllm.plugins.qm_spec")

VARIABLE = "QM_SPEC_ADAPT"
# Temperatures below sample greedily; vLLM's own bound.
_LEAST_TEMPERATURE = 1e-5
_NOTHING = Lookup((), 0)


def adapts() -> bool:
    """Return what `QM_SPEC_ADAPT` says.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    given = os.environ.get(VARIABLE, "1")
    if given not in ("0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 or 1, got {given!r}; 0 drafts in every step")
    return given == "1"


def begin_step(
    proposer: Any, next_token_ids: Tensor, common_attn_metadata: Any, num_rejected_tokens: Tensor | None
) -> Controller | None:
    """Note the step that has ended; return what decides about the next, None where every step drafts.

    Args:
        proposer: vLLM's EAGLE proposer with our model.
        next_token_ids: `[B]`, the token after each request's last verified one.
        common_attn_metadata: where each request's rows begin.
        num_rejected_tokens: `[B]` of these rows, or None.
    """
    requests = getattr(proposer, "_qm_spec_states", None)
    if requests is None or not proposer.model.adapts or proposer.device.type != "cpu":
        return None
    if not hasattr(proposer, "_qm_spec_controller"):
        proposer._qm_spec_controller = Controller(
            proposer.model.num_drafts,
            proposer.model.most_drafts if proposer.model.lookup_length else 0,
            report=partial(logger.info, "qm_spec: %s"),
        )
    controller: Controller = proposer._qm_spec_controller
    rows = common_attn_metadata.query_start_loc.diff()
    verified = rows if num_rejected_tokens is None else rows - num_rejected_tokens
    controller.begin(requests, rows.tolist(), verified.tolist(), next_token_ids.tolist())
    return controller


def plan_step(
    controller: Controller,
    proposer: Any,
    num_drafts: int,
    found: Sequence[Lookup],
    common_attn_metadata: Any,
    num_rejected_tokens: Tensor | None,
    sampling_metadata: Any,
) -> tuple[Sequence[int], Sequence[Lookup]]:
    """Return how many tokens to draft for each request, and of what was found the lookups to draft from.

    Args:
        controller: after `begin`.
        proposer: vLLM's EAGLE proposer with our model.
        num_drafts: the most tokens of a request.
        found: one for each request; none at all where lookup is off.
        common_attn_metadata: tokens of each request, with the rejected ones.
        num_rejected_tokens: `[B]`, or None.
        sampling_metadata: temperatures.
    """
    requests = proposer._qm_spec_states
    num_tokens = common_attn_metadata.seq_lens.tolist()
    rejected = [0] * len(requests) if num_rejected_tokens is None else num_rejected_tokens.tolist()
    greedy = sampling_metadata.all_greedy
    temperatures = [0.0] * len(requests) if greedy else sampling_metadata.temperature.tolist()
    lookups = found or [_NOTHING] * len(requests)
    candidates = [
        Candidate(
            request,
            min(num_drafts, _num_useful(request, length - wrong)),
            lookup.drafts[:num_drafts],
            lookup.length,
            temperature >= _LEAST_TEMPERATURE,
        )
        for request, length, wrong, lookup, temperature in zip(
            requests, num_tokens, rejected, lookups, temperatures[: len(requests)], strict=True
        )
    ]
    plan = controller.plan(candidates, sum(num_tokens))
    if found:
        found = [lookup if copies else _NOTHING for lookup, copies in zip(found, plan.copies, strict=True)]
    return plan.widths, found


def _num_useful(request: Any, num_computed: int) -> int:
    """Return how many drafts a request can still use: none while its prompt is read, and none of its last token.

    Args:
        request: vLLM's state of it.
        num_computed: its verified tokens in the cache; one more has been sampled.
    """
    num_written, most = num_computed + 1 - request.num_prompt_tokens, request.sampling_params.max_tokens
    if num_written < 1:
        return 0
    return sys.maxsize if most is None else max(most - num_written - 1, 0)
