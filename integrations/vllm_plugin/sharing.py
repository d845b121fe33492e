"""Copies from other requests' answers: off, unless the operator gives them memory and the requests name a group.

`QM_SPEC_RESPONSES` is the memory in MiB. A request names its group by `qm_spec_share` among its extra arguments:
`SamplingParams(extra_args={"qm_spec_share": "reports"})` offline, `"vllm_xargs": {"qm_spec_share": "reports"}` over
HTTP. How many drafts are accepted, so how fast an answer comes, then tells something of the group's other answers.
vLLM does not tell its workers a request's `cache_salt`; that is why nothing is shared without a name.
"""

from __future__ import annotations

import os

from qm_spec.drafter.past_responses import PastResponses
from qm_spec.integrations.vllm_plugin.step import DraftRequest

VARIABLE = "QM_SPEC_RESPONSES"
# A longer name is none.
MOST_CHARACTERS = 64


def response_bytes() -> int:
    """Return the memory of answers, in bytes, 0 for none.

    Raises:
        ValueError: the variable is no number of MiB.
    """
    given = os.environ.get(VARIABLE, "0")
    if not given.isdecimal():
        raise ValueError(f"{VARIABLE} must be a number of MiB, 0 for none, got {given!r}")
    return int(given) << 20


def make_responses(lookup_length: int) -> PastResponses | None:
    """Return an empty store of answers, None where the operator gives it no memory or lookup is off."""
    most_bytes = response_bytes()
    return PastResponses(lookup_length, most_bytes) if most_bytes and lookup_length else None


def group_of(request: DraftRequest) -> str | None:
    """Return whose answers a request shares, None for nobody's: a group's name and its LoRA adapter's."""
    name = request.shares
    if not isinstance(name, str) or not 0 < len(name) <= MOST_CHARACTERS:
        return None
    return f"{request.adapter}/{name}"
