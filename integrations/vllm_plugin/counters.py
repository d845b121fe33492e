"""What drafting has done in one engine, in numbers that only grow."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

SOURCES = ("prior", "lookup")


class Metric(NamedTuple):
    """One counted quantity, with a number for each kind of it.

    Attributes:
        name: in `Counters`, and behind `qm_spec:` on `/metrics`.
        label: what tells the kinds apart; empty where there is one.
        kinds: all of them.
        help: what is counted.
    """

    name: str
    label: str
    kinds: tuple[str, ...]
    help: str


METRICS = (
    Metric("steps", "drafting", ("plain", *SOURCES), "Steps of the target, by what drafted behind them."),
    Metric("drafts", "source", SOURCES, "Drafts that the target has verified, one for each request and step."),
    Metric("draft_tokens", "source", SOURCES, "Draft tokens that the target has verified."),
    Metric("accepted_tokens", "source", SOURCES, "Draft tokens that the target has accepted."),
    Metric("graph_replays", "", ("",), "Draft loops that ran as a CUDA graph."),
    Metric("failed_steps", "", ("",), "Steps without drafts because drafting has failed."),
)


class Counters(Counter[tuple[str, str]]):
    """Numbers by the name and the kind of a metric, 0 where nothing was counted."""

    def note_drafts(self, source: str, num_drafts: int, num_tokens: int, num_accepted: int) -> None:
        """Count drafts that have been verified.

        Args:
            source: `prior` or `lookup`.
            num_drafts: requests and steps.
            num_tokens: of these drafts.
            num_accepted: of these tokens.
        """
        self["drafts", source] += num_drafts
        self["draft_tokens", source] += num_tokens
        self["accepted_tokens", source] += num_accepted

    def by_name(self) -> dict[str, Any]:
        """Return each metric's number, by kind where it has several: what JSON can hold."""
        return {
            metric.name: {kind: self[metric.name, kind] for kind in metric.kinds}
            if metric.label
            else self[metric.name, ""]
            for metric in METRICS
        }

    def since(self, earlier: Counters) -> Counters:
        """Return what has been counted after `earlier`, a copy of these counters."""
        return Counters({key: count - earlier[key] for key, count in self.items()})

    def describe(self) -> str:
        """Return these numbers as one line of text, for a log."""
        parts = [self._describe(source) for source in SOURCES if self["drafts", source]] or ["no drafts verified"]
        steps = ", ".join(f"{self['steps', kind]} {kind}" for kind in METRICS[0].kinds)
        parts.append(f"steps by what drafted: {steps}")
        for name, text in (("graph_replays", "graph replays"), ("failed_steps", "steps where drafting has failed")):
            if self[name, ""]:
                parts.append(f"{self[name, '']} {text}")
        return "; ".join(parts)

    def _describe(self, source: str) -> str:
        drafts, accepted = self["drafts", source], self["accepted_tokens", source]
        return (
            f"{source}: mean acceptance length {1 + accepted / drafts:.2f}, {accepted} of "
            f"{self['draft_tokens', source]} tokens accepted, drafts {drafts}"
        )


class DeviceCounts:
    """Drafts whose verdict is on a device, counted without waiting for it.

    Args:
        device: of the verdicts.
    """

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        # By source: drafts, their tokens, and how many of these were accepted.
        self._noted = torch.zeros((len(SOURCES), 3), dtype=torch.int64, device=device)
        self._arriving = torch.zeros((len(SOURCES), 3), dtype=torch.int64, pin_memory=on_gpu)
        self._told = torch.zeros((len(SOURCES), 3), dtype=torch.int64)
        self._copied = torch.cuda.Event() if on_gpu else None
        self._waits = False

    def note(self, num_tokens: Tensor, num_rejected: Tensor, copied: Tensor) -> None:
        """Add the drafts of one step.

        Args:
            num_tokens: `[B]`, of each request's draft, 0 where it had none.
            num_rejected: `[B]`, of these.
            copied: `[B]` bool, whether lookup made the draft.
        """
        numbers = torch.stack([num_tokens > 0, num_tokens, num_tokens - num_rejected])
        by_source = torch.stack([~copied, copied])
        self._noted += (by_source.unsqueeze(1) * numbers).sum(-1)

    def take(self) -> dict[str, list[int]]:
        """Return drafts, tokens and accepted tokens by source, of the steps whose verdict has arrived since last."""
        taken = torch.zeros_like(self._told)
        if self._waits and (self._copied is None or self._copied.query()):
            taken = self._arriving - self._told
            self._told.copy_(self._arriving)
            self._waits = False
        if not self._waits:
            self._arriving.copy_(self._noted, non_blocking=True)
            if self._copied is not None:
                self._copied.record()
            self._waits = True
        return dict(zip(SOURCES, taken.tolist(), strict=True))
