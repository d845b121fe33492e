"""Drafts as many tokens as pay, by the engine's own times and acceptance.

`QM_SPEC_ADAPT` says whether:

    1       on a CPU, which is the default; on a GPU, whose steps the host does not wait for, every step drafts
    0       every step drafts
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial

from qm_spec.drafter.controller import Candidate, Controller
from qm_spec.drafter.suffix_index import Lookup
from qm_spec.integrations.vllm_plugin.step import DraftStep
from qm_spec.ops.draft_tokens import LEAST_TEMPERATURE

logger = logging.getLogger("vllm.plugins.qm_spec")

VARIABLE = "QM_SPEC_ADAPT"
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


def make_controller(num_drafts: int, most_copies: int) -> Controller:
    """Return what decides for one engine, and reports to vLLM's log.

    Args:
        num_drafts: the most tokens that the prior drafts.
        most_copies: the most that lookup drafts, 0 where it is off.
    """
    return Controller(num_drafts, most_copies, report=partial(logger.info, "qm_spec: %s"))


def begin_step(controller: Controller, step: DraftStep) -> None:
    """Note the step that has ended, of known requests."""
    rows = step.query_start_loc.diff()
    verified = rows - step.num_rejected
    controller.begin(step.requests, rows.tolist(), verified.tolist(), step.next_token_ids.tolist())


def plan_step(
    controller: Controller, step: DraftStep, found: Sequence[Lookup]
) -> tuple[Sequence[int], Sequence[Lookup]]:
    """Return how many tokens to draft for each request, and of what was found the lookups to draft from.

    Args:
        controller: after `begin_step`.
        step: of known requests.
        found: one for each request; none at all where lookup is off.
    """
    requests = step.requests
    temperatures = [0.0] * len(requests) if step.temperature is None else step.temperature.tolist()
    lookups = found or [_NOTHING] * len(requests)
    candidates = [
        Candidate(
            request,
            min(step.num_drafts, request.num_useful(num_computed)),
            lookup.drafts[: step.num_drafts],
            lookup.length,
            temperature >= LEAST_TEMPERATURE,
        )
        for request, num_computed, lookup, temperature in zip(
            requests, step.num_verified.tolist(), lookups, temperatures, strict=True
        )
    ]
    plan = controller.plan(candidates, int(step.seq_lens.sum()))
    if found:
        found = [lookup if copies else _NOTHING for lookup, copies in zip(found, plan.copies, strict=True)]
    return plan.widths, found
