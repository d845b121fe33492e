"""Acceptance over the length of the context, drafters side by side on the same texts.

For each domain and length the target continues some prompts; every drafter is then replayed on these texts
(`replay.py`), which gives the acceptance that a lossless engine would count, on average where drafts are drawn.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from qm_spec.bench.acceptance.replay import (
    ExpectedReplay,
    ReadText,
    accepted_everywhere,
    chances_everywhere,
    expected_walk,
    read_text,
    write_continuations,
)
from qm_spec.bench.acceptance.suffix_drafts import lookup_drafts
from qm_spec.bench.results.bootstrap import Estimate, Resamples
from qm_spec.bench.workloads.long_documents import DocumentWriter
from qm_spec.drafter.suffix_index import SURE_LENGTH
from qm_spec.training.data import find_files, read_documents

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qm_spec.drafter.anchors import Drafter

DOMAINS = ("novels", "quotations", "records", "code")
LOOKUP = "lookup"
# A quoted passage, and how much of it stands in the prompt when it is quoted again; tokens.
_PASSAGE, _QUOTED = 160, 24
_INTRODUCTION = '\n\nAs it was written before: "'


class PromptWriter:
    """Writes prompts of exact lengths in tokens, which end alike whatever their length.

    So lengths differ by what stands before, and by nothing else.

    Args:
        tokenizer: the target's.
        text: files or folders of prose that nothing was trained on.
        longest: tokens of the longest prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: Sequence[Path], longest: int) -> None:
        self._tokenizer, self._longest = tokenizer, longest
        documents = list(read_documents(find_files(text)))
        self._prose = [self._tokens(document) for document in documents]
        self._documents = DocumentWriter(tokenizer, documents)
        self._code: list[list[int]] = []

    def _tokens(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _cut(self, texts: Sequence[list[int]], rng: Random, what: str) -> list[int]:
        long_enough = [text for text in texts if len(text) > self._longest]
        if not long_enough:
            raise ValueError(
                f"long_context: no text of {what} has {self._longest} tokens, the longest {max(map(len, texts))}; "
                "pass longer text or lower the lengths"
            )
        text = rng.choice(long_enough)
        start = rng.randrange(len(text) - self._longest)
        return text[start : start + self._longest]

    def write(self, domain: str, length: int, seed: int) -> list[int]:
        """Return `length` token ids, the same ones for the same arguments.

        novels: prose as it stands. quotations: prose with a passage of another place in the middle, which is quoted
        again at the end; the prompt ends some tokens into the quotation. records: facts about invented people, told
        and looked up again. code: a file of Python's standard library.

        Raises:
            ValueError: the domain is unknown, no text is long enough, or the length is above the longest.
        """
        if length > self._longest:
            raise ValueError(f"long_context: prompts have at most {self._longest} tokens, got {length}")
        rng = Random(f"{domain} {seed}")
        if domain == "novels":
            return self._cut(self._prose, rng, "prose")[-length:]
        if domain == "records":
            return list(self._documents.write("records", self._longest, seed))[-length:]
        if domain == "code":
            if not self._code:
                folder = Path(sysconfig.get_paths()["stdlib"])
                self._code = [self._tokens(file.read_text(errors="replace")) for file in sorted(folder.glob("*.py"))]
            return self._cut(self._code, rng, "code")[-length:]
        if domain == "quotations":
            passage = self._cut(self._prose, rng, "prose")[:_PASSAGE]
            around = self._cut(self._prose, rng, "prose")
            end = [*self._tokens(_INTRODUCTION), *passage[:_QUOTED]]
            middle = (length - len(end) - len(passage)) // 2
            if middle < 0:
                raise ValueError(f"long_context: quotations need {len(end) + len(passage)} tokens, got {length}")
            before = around[len(around) - (length - len(end) - len(passage)) :]
            return before[:middle] + passage + before[middle:] + end
        raise ValueError(f"long_context: domains are {', '.join(DOMAINS)}, got {domain!r}")


@dataclass(frozen=True)
class LongContextRow:
    """One drafter at one length of one domain.

    Attributes:
        domain: of `DOMAINS`.
        context: tokens of each prompt.
        drafter: its name.
        acceptance_length: tokens per step, the target's own one included, with a 95 % interval over prompts.
        accepted_per_position: share of steps that keep the draft at each position.
        tokens, steps: of each prompt, what it is over; expected numbers where drafts are drawn.
        copied: share of the continuation that goes on with the quoted passage; quotations only.
    """

    domain: str
    context: int
    drafter: str
    acceptance_length: Estimate
    accepted_per_position: tuple[float, ...]
    tokens: tuple[float, ...]
    steps: tuple[float, ...]
    copied: float | None

    def over(self, other: LongContextRow, seed: int = 0) -> Estimate:
        """Estimate how many times as long as another row's its acceptance length is, prompt by prompt.

        Args:
            other: of the same prompts: another drafter, or another length of the context.
            seed: of the resamples.
        """
        columns = {"a": self.tokens, "b": self.steps, "c": other.tokens, "d": other.steps}
        resamples = Resamples({name: np.array(column) for name, column in columns.items()}, seed)
        estimate = resamples.ratio({"a": 1, "b": -1, "c": -1, "d": 1})
        assert estimate is not None
        return estimate


@dataclass(frozen=True)
class AcceptanceSettings:
    """What is replayed.

    Args:
        lengths: tokens of the prompts.
        num_prompts: of each domain and length.
        num_tokens: that the target writes behind each.
        num_drafts: K.
        num_looked_up: the most tokens that lookup drafts; K when None.
        domains: of `DOMAINS`.
        temperature: of the target's writing and of the drafts, which are drawn unless it is 0; then both are greedy.
        seed: of prompts and sampling.
    """

    lengths: Sequence[int]
    num_prompts: int
    num_tokens: int
    num_drafts: int
    num_looked_up: int | None = None
    domains: Sequence[str] = DOMAINS
    temperature: float = 0.0
    seed: int = 0


def measure_acceptance(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drafters: Mapping[str, Drafter],
    text: Sequence[Path],
    settings: AcceptanceSettings,
    on_progress: Callable[[str, int], None] | None = None,
) -> Iterator[list[LongContextRow]]:
    """Yield the rows of each domain and length: every drafter, suffix lookup, and the hybrids of the two.

    A hybrid takes the lookup's drafts where it found at least `SURE_LENGTH` tokens again, and the drafter's
    elsewhere.

    Args:
        target: a causal LM of transformers, float32.
        tokenizer: its own.
        drafters: by name.
        text: prose that nothing was trained on.
        settings: the prompts and the drafts.
        on_progress: called with domain and length after each prompt.
    """
    num_drafts, temperature, seed = settings.num_drafts, settings.temperature, settings.seed
    writer = PromptWriter(tokenizer, text, max(settings.lengths))
    layers = {name: tuple(drafter.config.eagle_aux_hidden_state_layer_ids) for name, drafter in drafters.items()}
    for domain in settings.domains:
        for length in settings.lengths:
            replays: dict[str, list[ExpectedReplay]] = {}
            copied = []
            for number in range(settings.num_prompts):
                prompt = writer.write(domain, length, seed + number)
                (continuation,) = write_continuations(
                    target, [prompt], settings.num_tokens, temperature=temperature, seed=seed + number
                )
                if domain == "quotations":
                    copied.append(_share_copied(prompt, continuation))
                read = _read(target, prompt, continuation, set(layers.values()))
                chances = {
                    name: _chances(drafter, read[layers[name]], num_drafts, temperature)
                    for name, drafter in drafters.items()
                }
                for name, some in with_lookup(
                    chances, [*prompt, *continuation], len(prompt), settings.num_looked_up or num_drafts
                ).items():
                    replays.setdefault(name, []).append(expected_walk(some))
                if on_progress is not None:
                    on_progress(domain, length)
            share = float(np.mean(copied)) if copied else None
            yield [_row(domain, length, name, found, share, seed) for name, found in replays.items()]


def _read(
    target: PreTrainedModel, prompt: list[int], continuation: list[int], wanted: set[tuple[int, ...]]
) -> dict[tuple[int, ...], ReadText]:
    """Read a text once for drafters that read different layers."""
    layers = sorted({layer for some in wanted for layer in some})
    read = read_text(target, prompt, continuation, layers)
    states = dict(zip(layers, read.aux_states.chunk(len(layers), -1), strict=True))
    return {
        some: replace(read, layers=some, aux_states=torch.cat([states[layer] for layer in some], -1)) for some in wanted
    }


def _share_copied(prompt: list[int], continuation: list[int]) -> float:
    """Share of the continuation, up to the passage's length, that is the passage's own."""
    quoted = prompt[-_QUOTED:]
    start = next(i for i in range(len(prompt)) if prompt[i : i + _QUOTED] == quoted) + _QUOTED
    passage = prompt[start : start + min(len(continuation), _PASSAGE - _QUOTED)]
    return float(np.mean([a == b for a, b in zip(passage, continuation, strict=False)]))


def _chances(drafter: Drafter, text: ReadText, num_drafts: int, temperature: float) -> Tensor:
    """Return the chance that at least 1..K drafts are kept at each position: `[T, K]`, of 0 and 1 for greedy ones."""
    if temperature > 0:
        return chances_everywhere(drafter, text, num_drafts, temperature)
    return _at_least(accepted_everywhere(drafter, text, num_drafts), num_drafts)


def _at_least(counts: Sequence[int], num_drafts: int) -> Tensor:
    return (torch.tensor(counts).unsqueeze(-1) > torch.arange(num_drafts)).double()


def with_lookup(
    chances: Mapping[str, Tensor], token_ids: Sequence[int], num_prompt: int, num_looked_up: int
) -> dict[str, Tensor]:
    """Add suffix lookup, and its hybrids with the drafters, to the chances that drafts are kept.

    Args:
        chances: `[T, K]` of each drafter, by name; see `chances_everywhere`.
        token_ids: prompt and continuation.
        num_prompt: tokens of the prompt.
        num_looked_up: L, the most tokens to look up, at least K; where that is more, `Lookup.likely` says how many.

    Returns:
        `[T - L + K, L]`, of drafters as of lookup: at the positions where L tokens can be compared.
    """
    num_drafts = next(iter(chances.values())).shape[1]
    more = num_looked_up - num_drafts
    chances = {name: pad(some[: len(some) - more], (0, more)) for name, some in chances.items()}
    found = lookup_drafts(token_ids, num_prompt - 1, len(next(iter(chances.values()))), num_looked_up)
    counts = []
    for row, lookup in enumerate(found):
        drafts = lookup.drafts[: max(num_drafts, len(lookup.likely))]
        expected = token_ids[num_prompt + 1 + row :]
        count = 0
        while count < len(drafts) and drafts[count] == expected[count]:
            count += 1
        counts.append(count)
    matched = _at_least(counts, num_looked_up)
    sure = torch.tensor([lookup.length >= SURE_LENGTH for lookup in found]).unsqueeze(-1)
    hybrids = {f"{name}+{LOOKUP}": torch.where(sure, matched, some) for name, some in chances.items()}
    return {**chances, LOOKUP: matched, **hybrids}


def acceptance_length(tokens: Sequence[float], steps: Sequence[float], seed: int = 0) -> Estimate:
    """Estimate tokens per step over prompts.

    Args:
        tokens: of each prompt, the target's own ones included.
        steps: of each prompt.
        seed: of the resamples.
    """
    estimate = Resamples({"tokens": np.array(tokens), "steps": np.array(steps)}, seed).ratio({"tokens": 1, "steps": -1})
    assert estimate is not None
    return estimate


def _row(
    domain: str, length: int, name: str, replays: list[ExpectedReplay], copied: float | None, seed: int
) -> LongContextRow:
    steps = tuple(replay.steps for replay in replays)
    tokens = tuple(replay.steps + replay.accepted for replay in replays)
    kept = (sum(some) for some in zip(*(replay.kept for replay in replays), strict=True))
    return LongContextRow(
        domain,
        length,
        name,
        acceptance_length(tokens, steps, seed),
        tuple(number / sum(steps) for number in kept),
        tokens,
        steps,
        copied,
    )
