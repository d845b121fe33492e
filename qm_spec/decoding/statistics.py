"""What a call of the speculative decoder did: counts, and seconds from a clock."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import TypedDict

import torch
from torch import Tensor


class DecodingStats(TypedDict):
    """Counts and seconds of one `generate` call.

    A token counts as accepted when it was drafted and stands in the output, so that
    `generated_tokens = first tokens (one per row) + accepted_tokens + tokens of the target's own`.

    Attributes:
        generated_tokens: new tokens of all rows, the EOS included, padding not.
        steps: passes of the target after the prompt's.
        drafts: verifications of a row with at least one drafted token.
        drafted_tokens: tokens drafted.
        accepted_tokens: of them, those that stand in the output.
        acceptance_rate: accepted / drafted, 0..1; NaN where nothing was drafted.
        acceptance_length: `1 + accepted / drafts`, tokens per verification as vLLM counts them; NaN
            where nothing was drafted.
        drafted_per_position: drafts that had a first, second... token.
        accepted_per_position: of them, those that stand in the output.
        prefill_s: prompt and first token.
        draft_s: the drafter, reading what was verified included.
        verify_s: the target's passes and the choice of tokens.
        decode_s: all after the first token.
        elapsed_s: `prefill_s + decode_s`; the timing of plain steps is not in it.
        tokens_per_s: `generated_tokens / elapsed_s`.
        plain_step_s: a step without speculation, see `avg_speedup`; NaN where none was timed.
        avg_speedup: `plain_step_s * (tokens of the longest row - 1) / decode_s`: how much longer the
            same target would have decoded the batch one token per step. Below 1 speculation was
            slower. NaN where nothing was decoded or `measure_speedup` is False.
    """

    generated_tokens: int
    steps: int
    drafts: int
    drafted_tokens: int
    accepted_tokens: int
    acceptance_rate: float
    acceptance_length: float
    drafted_per_position: list[int]
    accepted_per_position: list[int]
    prefill_s: float
    draft_s: float
    verify_s: float
    decode_s: float
    elapsed_s: float
    tokens_per_s: float
    plain_step_s: float
    avg_speedup: float


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


class Stopwatch:
    """Seconds between laps, with the device's queue emptied at each.

    Args:
        device: whose work is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lap()

    def lap(self) -> float:
        """Return the seconds since the last lap, and begin the next."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        elapsed, self.begin = now - getattr(self, "begin", now), now
        return elapsed


@dataclass
class Record:
    """The sums that one call adds up, step by step.

    Attributes:
        max_draft_len: K.
    """

    max_draft_len: int
    generated_tokens: int = 0
    longest_row: int = 0
    steps: int = 0
    prefill_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    plain_steps_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.drafted = torch.zeros(self.max_draft_len, dtype=torch.int64)
        self.accepted = torch.zeros(self.max_draft_len, dtype=torch.int64)

    def add_step(self, num_drafted: Tensor, num_accepted: Tensor) -> None:
        """Count one pass of the target: tokens drafted and kept in the output, `[B]` each."""
        self.steps += 1
        position = torch.arange(self.max_draft_len, device=num_drafted.device)
        self.drafted += (position < num_drafted.unsqueeze(1)).sum(0).cpu()
        self.accepted += (position < num_accepted.unsqueeze(1)).sum(0).cpu()

    def stats(self) -> DecodingStats:
        """Divide once, at the end."""
        drafted, accepted = int(self.drafted.sum()), int(self.accepted.sum())
        # Every draft has a first token.
        drafts = int(self.drafted[0])
        decode_s = self.draft_s + self.verify_s
        elapsed_s = self.prefill_s + decode_s
        plain_step_s = statistics.median(self.plain_steps_s) if self.plain_steps_s else float("nan")
        return DecodingStats(
            generated_tokens=self.generated_tokens,
            steps=self.steps,
            drafts=drafts,
            drafted_tokens=drafted,
            accepted_tokens=accepted,
            acceptance_rate=_share(accepted, drafted),
            acceptance_length=1 + _share(accepted, drafts),
            drafted_per_position=self.drafted.tolist(),
            accepted_per_position=self.accepted.tolist(),
            prefill_s=self.prefill_s,
            draft_s=self.draft_s,
            verify_s=self.verify_s,
            decode_s=decode_s,
            elapsed_s=elapsed_s,
            tokens_per_s=_share(self.generated_tokens, elapsed_s),
            plain_step_s=plain_step_s,
            avg_speedup=_share(plain_step_s * (self.longest_row - 1), decode_s),
        )
