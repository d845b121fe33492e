"""How many drafted tokens a target keeps: recorded acceptance by position, or numbers typed in."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

from qm_spec.discovery.files import read_json


@dataclass(frozen=True)
class Acceptance:
    """Share of the drafts whose token at each position was kept.

    Args:
        per_position: 0..1, first position first, never rising; vLLM's own convention.
        context_tokens: of the prompts that it was measured on; None where it was typed in.
        draft_share: share of the decode steps that carried a draft.

    Raises:
        ValueError: a share is out of range or rises.
    """

    per_position: tuple[float, ...]
    context_tokens: int | None = None
    draft_share: float = 1.0

    def __post_init__(self) -> None:
        shares = self.per_position
        in_range = shares and all(0 <= share <= 1 for share in shares)
        if not in_range or any(later > sooner for sooner, later in itertools.pairwise(shares)):
            raise ValueError(
                "acceptance: shares per position must lie in 0..1 and never rise (a token counts only if all before "
                f"it were kept), got {list(shares)}"
            )
        if not 0 <= self.draft_share <= 1:
            raise ValueError(f"acceptance: draft_share must lie in 0..1, got {self.draft_share}")

    def tokens_per_step(self, num_speculative_tokens: int) -> float:
        """Return the expected tokens of a request's step: one, and of K drafted tokens those that are kept.

        Raises:
            ValueError: K is beyond the known positions.
        """
        if not 0 <= num_speculative_tokens <= len(self.per_position):
            raise ValueError(
                f"acceptance: known for K = 0..{len(self.per_position)}, got {num_speculative_tokens}; "
                "record a run with more speculative tokens, or type more shares in"
            )
        return 1 + self.draft_share * sum(self.per_position[:num_speculative_tokens])


@dataclass(frozen=True)
class AcceptanceByContext:
    """Acceptance at one or several context lengths.

    Args:
        source: where it comes from.
        measured: in rising order of context.
    """

    source: str
    measured: tuple[Acceptance, ...]

    def at(self, context: int) -> Acceptance:
        """Return the acceptance measured nearest to a context length, by ratio; nothing is extrapolated."""

        def distance(acceptance: Acceptance) -> float:
            return abs(math.log(max(1, acceptance.context_tokens or 1) / max(1, context)))

        return min(self.measured, key=distance)

    def covers(self, context: int) -> bool:
        """Whether a context length lies within those that were measured; typed numbers hold everywhere."""
        known = [one.context_tokens for one in self.measured if one.context_tokens is not None]
        return not known or min(known) <= context <= max(known)

    @property
    def max_speculative_tokens(self) -> int:
        """The largest K whose acceptance is known at every length."""
        return min(len(one.per_position) for one in self.measured)


def parse_acceptance(text: str, method: str) -> AcceptanceByContext:
    """Read a `results.json`, its folder, or shares such as "0.78,0.61,0.40".

    Args:
        text: as typed.
        method: whose runs are taken of a results file.

    Raises:
        FileNotFoundError: it is neither a file nor numbers.
        ValueError: the shares are not valid, or the file has no run of the method.
    """
    path = Path(text)
    if path.is_dir():
        path = path / "results.json"
    if path.is_file():
        return read_acceptance(path, method)
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise FileNotFoundError(
            f"acceptance: {text} is neither a results.json, nor a folder with one, nor shares such as 0.78,0.61,0.40"
        ) from error
    return AcceptanceByContext("typed in", (Acceptance(shares),))


def read_acceptance(file: Path, method: str) -> AcceptanceByContext:
    """Return what a method's runs in a results file accepted, the deepest draft where a length has several.

    Raises:
        ValueError: the file has no run of the method with a draft.
    """
    runs = read_json(file).get("runs", [])
    found: dict[int, Acceptance] = {}
    for run in runs:
        if run["method"] != method or not run["num_drafts"]:
            continue
        context, shares = run["context_tokens"], tuple(run["acceptance_per_position"])
        if context not in found or len(found[context].per_position) < len(shares):
            # A request's first token comes from its prompt, so its first step cannot carry a draft.
            steps = run["num_steps"] - run["num_prompts"]
            found[context] = Acceptance(shares, context, min(1.0, run["num_drafts"] / steps) if steps > 0 else 1.0)
    if not found:
        named = sorted({run["method"] for run in runs if run["num_drafts"]})
        raise ValueError(
            f"acceptance: {file} has no run of {method} that drafted; it has {', '.join(named) or 'none of any method'}"
        )
    return AcceptanceByContext(str(file), tuple(found[context] for context in sorted(found)))
