"""Drafts only in steps where they pay, by the engine's own times.

`QM_SPEC_ADAPT` says whether:

    1       on a CPU, which is the default; on a GPU, whose steps the host does not wait for, every step drafts
    0       every step drafts
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from qm_spec.drafter.payoff import Payoff

VARIABLE = "QM_SPEC_ADAPT"


def adapts() -> bool:
    """Return what `QM_SPEC_ADAPT` says.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    given = os.environ.get(VARIABLE, "1")
    if given not in ("0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 or 1, got {given!r}; 0 drafts in every step")
    return given == "1"


def begin_step(proposer: Any, common_attn_metadata: Any, num_rejected_tokens: Tensor | None) -> Payoff | None:
    """Note the step that has ended; return what decides about the next, None where every step drafts.

    Args:
        proposer: vLLM's EAGLE proposer with our model.
        common_attn_metadata: where each request's rows begin.
        num_rejected_tokens: `[B]` of these rows, or None.
    """
    requests = getattr(proposer, "_qm_spec_states", None)
    if requests is None or not proposer.model.adapts or proposer.device.type != "cpu":
        return None
    if not hasattr(proposer, "_qm_spec_payoff"):
        proposer._qm_spec_payoff = Payoff()
    payoff: Payoff = proposer._qm_spec_payoff
    rows = common_attn_metadata.query_start_loc.diff()
    kept = rows if num_rejected_tokens is None else rows - num_rejected_tokens
    payoff.begin(requests, rows.tolist(), kept.tolist())
    return payoff
