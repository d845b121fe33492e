"""The speculative decoder: draft, verify in one pass of the target, keep what stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from qm_spec.decoding.bare_target import BareRun, BareTarget
from qm_spec.decoding.cached_target import CachedRun, CachedTarget
from qm_spec.decoding.output import Ending, Output
from qm_spec.decoding.prompt import Prompt
from qm_spec.decoding.rejection import GreedyRule, Rule, SamplingRule
from qm_spec.decoding.statistics import DecodingStats, Record, Stopwatch

DEFAULT_DRAFT_LEN = 4
# Plain steps that are timed at the beginning and at the end of a call, after one that is not.
PLAIN_STEPS = 2


class DraftRun(Protocol):
    """A drafter's state for the rows of one call."""

    def remember(self, token_ids: Tensor, states: Tensor, counts: Tensor) -> None:
        """Take over the first `counts` `[B]` of tokens `[B, n]` and of the target's states `[B, n, A D]`."""
        ...

    def draft(self, next_ids: Tensor, num_drafts: int, sample: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `[B, K]` tokens after `next_ids` `[B]`, each by one call of `sample` on logits `[B, V]`."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keep only these rows `[n]`."""
        ...


class Drafter(Protocol):
    """What proposes tokens to the target."""

    @property
    def module(self) -> nn.Module:
        """What may be trained and saved."""
        ...

    @property
    def max_draft_len(self) -> int | None:
        """The deepest draft it can make, or None."""
        ...

    def start(self, batch: int, capacity: int, hidden_states: Tensor | None) -> DraftRun:
        """Begin a call with at most `capacity` tokens per row."""
        ...


class SpeculativeDecoder:
    """Decodes as the target alone would, in fewer passes of it.

    Each step drafts up to K tokens, verifies them in one pass of the target, keeps the accepted ones
    and adds one token of the target's own. Rows of a batch accept, and end, each for itself.

    Args:
        target: the model that decides.
        drafter: the model that proposes.
        max_draft_len: K, at least 1.
        temperature: 0 decodes greedily; above 0 both models sample at it.

    Raises:
        TypeError: K is not an integer.
        ValueError: K or the temperature is out of range.

    Source: Leviathan et al. 2023, arXiv 2211.17192, for the verification; `quickmergepp` for the call.
    """

    def __init__(
        self,
        target: CachedTarget | BareTarget,
        drafter: Drafter,
        max_draft_len: int = DEFAULT_DRAFT_LEN,
        temperature: float = 1.0,
    ) -> None:
        _check_depth(max_draft_len, drafter.max_draft_len)
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"create_speculative_decoder: temperature must be 0 (greedy) or above, got {temperature}")
        self.target = target
        self.max_draft_len = max_draft_len
        self.temperature = temperature
        self._drafter = drafter

    @property
    def drafter(self) -> nn.Module:
        """The drafter's module, to be trained or saved."""
        return self._drafter.module

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        hidden_states: Tensor | None = None,
        max_new_tokens: int = 50,
        *,
        attention_mask: Tensor | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        seed: int | Sequence[int] | None = None,
        measure_speedup: bool = True,
    ) -> tuple[Tensor, DecodingStats]:
        """Return prompts with their continuations, and what it took to write them.

        At temperature 0 the tokens are those of plain greedy decoding (in float32; in half precision
        near ties may flip, as they do in a batch of another size). Above 0 they are distributed as
        plain sampling from `softmax(logits / temperature)`. Of a model's generation config only the
        EOS and padding tokens are applied, not top-k, penalties and the like.

        Args:
            input_ids: `[B, T]` int64, T at least 1.
            hidden_states: `[B, S, D]` encoder states, or `[L, B, S, D]` of several layers, for a bare
                module and its draft model; transformers models have states of their own.
            max_new_tokens: exact, but for rows that end by an EOS token.
            attention_mask: `[B, T]`, 0 at padding, on either side; None takes all tokens for real.
            eos_token_id: one or several tokens that end a row; None takes those of a transformers
                model's generation config, `()` none at all.
            pad_token_id: fills rows that ended; None takes the model's, else the first EOS token.
            seed: of sampling, one number, or one for each row: a row with its seed writes the same
                in any batch. None takes a seed from torch's global generator.
            measure_speedup: time plain steps of the target before and after, for `avg_speedup`. It
                costs five of them.

        Returns:
            `[B, T + n]` int64 on the device of `input_ids`: the input as given and n new tokens, n
            those of the longest row; and `DecodingStats`.

        Raises:
            TypeError: ids are not integers, or a bare module needs encoder states and has none.
            ValueError: shapes, ids or numbers out of range, or a bare module that is not causal.
        """
        prompt = Prompt.check(input_ids, attention_mask, self.target.vocab_size, self.target.device)
        ending = Ending.choose(self.target.module, eos_token_id, pad_token_id)
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
            raise ValueError(f"generate: max_new_tokens must be an integer of at least 0, got {max_new_tokens!r}")
        memory = self._check_states(hidden_states, len(input_ids))
        rule = self._rule(seed, len(input_ids))
        record = Record(self.max_draft_len)
        if max_new_tokens == 0 or len(input_ids) == 0:
            return input_ids.clone(), record.stats()
        with _evaluation(self.target.module), _evaluation(self.drafter):
            new_ids = self._decode(prompt, memory, ending, rule, max_new_tokens, record, measure_speedup)
        return torch.cat([input_ids, new_ids.to(input_ids.device, input_ids.dtype)], 1), record.stats()

    def _decode(
        self,
        prompt: Prompt,
        memory: Tensor | None,
        ending: Ending,
        rule: Rule,
        max_new_tokens: int,
        record: Record,
        measure: bool,
    ) -> Tensor:
        batch, capacity = len(prompt.lengths), prompt.token_ids.shape[1] + max_new_tokens
        device = self.target.device
        watch = Stopwatch(device)
        target = self.target.start(batch, capacity, memory)
        draft = self._drafter.start(batch, capacity, memory)
        logits, states = target.read(prompt.token_ids, prompt.lengths - 1)
        target.keep(prompt.lengths)
        draft.remember(prompt.token_ids, states, prompt.lengths)
        next_ids = rule.first(logits[:, 0])
        output = Output(batch, max_new_tokens, ending, device)
        rows = torch.arange(batch, device=device)
        output.add(rows, next_ids.unsqueeze(1), torch.ones_like(rows))
        record.prefill_s = watch.lap()

        going = output.going(rows)
        if measure and bool(going.any()):
            self._time_plain_steps(target, next_ids, record, warm_up=True)
            watch.lap()
        while True:
            if not bool(going.all()):
                kept = going.nonzero().squeeze(1)
                if len(kept) == 0:
                    break
                rows, next_ids = rows[kept], next_ids[kept]
                for one in (target, draft, rule):
                    one.select(kept)
            # One token of each step is the target's own.
            num_drafted = (output.remaining[rows] - 1).clamp_max(self.max_draft_len)
            depth = int(num_drafted.max())
            rule.begin(num_drafted)
            draft_ids = draft.draft(next_ids, depth, rule.draft) if depth else next_ids.new_empty(len(rows), 0)
            record.draft_s += watch.lap()

            read = torch.cat([next_ids.unsqueeze(1), draft_ids], 1)
            logits, states = target.read(read)
            accepted, next_ids = rule.verify(draft_ids, num_drafted, logits)
            target.keep(accepted + 1)
            new_ids = torch.cat([draft_ids, next_ids.unsqueeze(1)], 1).scatter(
                1, accepted.unsqueeze(1), next_ids.unsqueeze(1)
            )
            written = output.add(rows, new_ids, accepted + 1)
            record.add_step(num_drafted, torch.minimum(accepted, written))
            going = output.going(rows)
            record.verify_s += watch.lap()

            draft.remember(read, states, accepted + 1)
            record.draft_s += watch.lap()
        if measure and record.steps:
            # The last step once more: what stands in the cache is not needed any longer.
            target.keep(torch.full_like(next_ids, -1))
            self._time_plain_steps(target, next_ids, record)
        record.generated_tokens = int(output.lengths.sum())
        record.longest_row = int(output.lengths.max())
        return output.token_ids[:, : record.longest_row]

    def _time_plain_steps(
        self, target: CachedRun | BareRun, next_ids: Tensor, record: Record, warm_up: bool = False
    ) -> None:
        """Run the target's next token as a decoder without speculation would, and take it back."""
        watch = Stopwatch(self.target.device)
        for number in range(PLAIN_STEPS + warm_up):
            logits, _ = target.read(next_ids.unsqueeze(1), states=False)
            logits[:, -1].argmax(-1)
            target.keep(torch.zeros_like(next_ids))
            elapsed = watch.lap()
            if number >= warm_up:
                record.plain_steps_s.append(elapsed)

    def _rule(self, seed: int | Sequence[int] | None, batch: int) -> Rule:
        if self.temperature == 0:
            return GreedyRule()
        if seed is None or isinstance(seed, int):
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            seeds = torch.randint(2**63 - 1, (batch,), generator=generator).tolist()
        else:
            seeds = list(seed)
            if len(seeds) != batch:
                raise ValueError(f"generate: seed must be one number, or one for each of {batch} rows, got {seeds}")
        return SamplingRule(self.temperature, seeds, self.target.device)

    def _check_states(self, hidden_states: Tensor | None, batch: int) -> Tensor | None:
        if hidden_states is None or isinstance(self.target, CachedTarget):
            return hidden_states
        dim = self.target.dim
        if not isinstance(hidden_states, Tensor) or not hidden_states.is_floating_point():
            raise TypeError(f"generate: hidden_states must be a tensor of floats, got {type(hidden_states).__name__}")
        shape = list(hidden_states.shape)
        if len(shape) not in (3, 4) or shape[-3] != batch or shape[-1] != dim or shape[-2] < 1 or shape[0] < 1:
            raise ValueError(
                f"generate: hidden_states must be [B, S, D] or [L, B, S, D] with B = {batch} and D = {dim}, got {shape}"
            )
        return hidden_states.to(self.target.device)


def _check_depth(depth: int, limit: int | None) -> None:
    if isinstance(depth, bool) or not isinstance(depth, int):
        raise TypeError(f"create_speculative_decoder: max_draft_len must be an integer, got {depth!r}")
    if depth < 1 or (limit is not None and depth > limit):
        allowed = "at least 1" if limit is None else f"in 1..{limit} for this drafter's window"
        raise ValueError(f"create_speculative_decoder: max_draft_len must be {allowed}, got {depth}")


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    """Run a module without dropout, and give every part of it its mode back."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
