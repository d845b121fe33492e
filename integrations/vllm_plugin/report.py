"""What an engine says of its drafting while it runs: a line every few seconds, and a warning where it cannot pay."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from qm_spec.integrations.vllm_plugin.counters import Counters
from qm_spec.integrations.vllm_plugin.metrics import MetricsFile

logger = logging.getLogger("vllm.plugins.qm_spec")

# Tokens that the target accepts of one draft. The shipped drafters have 1.2 on greedy text and, at their worst, 0.2 to
# 0.3: at temperature 1 with drafts that are not drawn (docs/results/long-context.md). A drafter below this does not
# fit, and pays nowhere that was measured: on a CPU drafting and verifying cost nearly half a step
# (docs/results/profile-step.md).
LEAST_ACCEPTED = 0.15
# Reports in a row, and drafts in them, before that is said: a minute, so that no single odd batch does it, and enough
# drafts to tell 0.15 from 0.2 (a draft's accepted tokens deviate by about 0.5 there, so their mean by 0.016).
LEAST_REPORTS, LEAST_DRAFTS = 6, 1000


class AcceptanceWatch:
    """Warns once, of a drafter whose drafts are hardly ever accepted.

    Args:
        drafter: its name, for the message.
    """

    def __init__(self, drafter: str) -> None:
        self.drafter = drafter
        self._warned = False
        self._forget()

    def _forget(self) -> None:
        self._reports = self._drafts = self._accepted = 0

    def observe(self, num_drafts: int, num_accepted: int) -> None:
        """Note the prior's verified drafts of one report, and the tokens accepted of them."""
        if self._warned or not num_drafts:
            return
        if num_accepted >= LEAST_ACCEPTED * num_drafts:
            self._forget()
            return
        self._reports += 1
        self._drafts += num_drafts
        self._accepted += num_accepted
        if self._reports < LEAST_REPORTS or self._drafts < LEAST_DRAFTS:
            return
        self._warned = True
        logger.warning(
            "qm_spec: the target hardly accepts what %s drafts: %.2f tokens a draft in the last %d drafts, and below "
            "%.2f drafting costs more than it brings. Outputs are right, decoding is slower than without. The usual "
            "cause is a drafter of another fine-tune of this model: train one on this target's answers (qm-spec data, "
            "then qm-spec train), or serve without it. Texts unlike its training and high temperatures do it too. "
            "collective_rpc('qm_spec_drafting', args=('off',)) stops drafting until then",
            self.drafter,
            self._accepted / self._drafts,
            self._drafts,
            LEAST_ACCEPTED,
        )


class Report:
    """Tells a log and `/metrics` how far an engine's counters are.

    Args:
        counters: of the engine.
        drafter: its name.
        logs: whether there is a line every `interval_s`; the warning there is in any case.
        file: for `/metrics`, if any.
        interval_s: between two lines, while steps run.
        clock: seconds.
    """

    def __init__(
        self,
        counters: Counters,
        drafter: str,
        *,
        logs: bool = False,
        file: MetricsFile | None = None,
        interval_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counters, self.logs, self.file = counters, logs, file
        self.interval_s, self._clock = interval_s, clock
        self._watch = AcceptanceWatch(drafter)
        self._began: float | None = None
        self._before = Counters()

    def end_step(self) -> None:
        """Tell what is due after a step."""
        if self.file is not None:
            self.file.write(self.counters)
        now = self._clock()
        if self._began is None:
            self._began = now
        if now - self._began < self.interval_s:
            return
        recent = self.counters.since(self._before)
        if self.logs:
            logger.info("qm_spec: in %.0f s: %s", now - self._began, recent.describe())
        self._watch.observe(recent["drafts", "prior"], recent["accepted_tokens", "prior"])
        self._began, self._before = now, Counters(self.counters)
