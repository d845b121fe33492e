"""Switching drafting off, for one request: `qm_spec` among its extra arguments.

    "off" or 0  nothing is drafted for it
    1..K        at most so many tokens a step

They are `SamplingParams(extra_args={"qm_spec": "off"})` offline and `"vllm_xargs": {"qm_spec": "off"}` over HTTP. vLLM
takes any value, and an error in its engine would end all requests, so what makes no sense is ignored with a warning.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from qm_spec.drafter.suffix_index import NO_MATCH, Lookup
from qm_spec.integrations.vllm_plugin.step import DraftRequest

logger = logging.getLogger("vllm.plugins.qm_spec")


class Switch:
    """What an engine may draft, as its operator and its requests want it.

    Args:
        most: K, tokens of one draft.

    Attributes:
        on: whether anything is drafted at all.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.on = True
        self._warned = False

    def most_tokens(self, asked: object) -> int:
        """Return how many tokens a step may draft for a request.

        Args:
            asked: what the request says; None for nothing.
        """
        if asked is None:
            return sys.maxsize
        if asked == "off":
            return 0
        if isinstance(asked, int) and not isinstance(asked, bool) and 0 <= asked <= self.most:
            return asked
        if not self._warned:
            # Once, as requests could fill the log.
            self._warned = True
            logger.warning(
                "qm_spec: a request's extra argument qm_spec must be 'off' or a number of tokens in 0..%d, got %.80r; "
                "it is ignored, as others like it will be",
                self.most,
                asked,
            )
        return sys.maxsize


def limit_drafts(
    requests: Sequence[DraftRequest], widths: Sequence[int], found: Sequence[Lookup]
) -> tuple[Sequence[int], Sequence[Lookup]]:
    """Return how many tokens to draft for each request, and the lookups to draft from, as the requests want it.

    Args:
        requests: B of them.
        widths: tokens of each so far.
        found: one for each; none at all where lookup is off.
    """
    widths = [min(width, request.most_drafts) for request, width in zip(requests, widths, strict=True)]
    if found:
        found = [lookup if width else NO_MATCH for lookup, width in zip(found, widths, strict=True)]
    return widths, found
