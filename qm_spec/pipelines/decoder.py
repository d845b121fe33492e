"""Speculative decoding of a causal model by a QuickMerge++ drafter, for transformers models and bare modules."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qm_spec.drafter.prior import QuickMergePrior
from qm_spec.pipelines.bare_target import BareRun, BareTarget
from qm_spec.pipelines.cached_target import CachedRun, CachedTarget, check_model, unapplied_settings
from qm_spec.pipelines.memory_drafter import MemoryDrafter, MemoryDraftModel
from qm_spec.pipelines.output import Ending, Output
from qm_spec.pipelines.prior_drafter import PriorDrafter, load_prior
from qm_spec.pipelines.prompt import Prompt
from qm_spec.pipelines.rejection import GreedyRule, Rule, SamplingRule
from qm_spec.pipelines.statistics import DecodingStats, Record, Stopwatch

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


def create_speculative_decoder(
    target_model: nn.Module,
    vocab_size: int | None = None,
    dim: int | None = None,
    quickmerge_dim: int | None = None,
    k_max: int = 32,
    max_draft_len: int | None = None,
    temperature: float = 1.0,
    *,
    drafter: str | PathLike[str] | nn.Module | None = None,
    seed: int = 0,
) -> SpeculativeDecoder:
    """Return a decoder whose output is the target's own, drafted from a QuickMerge++ memory.

    Two kinds of target:

    - A causal LM of transformers. It is decoded with its key/value cache. The drafter is a
      `QuickMergePrior`, which reads the target's hidden states: the one given, else the target's own
      (as vLLM's plug-in finds it), else an untrained one, with a warning.
    - Any other module that returns logits `[B, T, V]` from token ids `[B, T]`, causal and without a
      cache: each step runs it on the whole prefix. The drafter is a `MemoryDraftModel`, which reads
      compressed encoder states and the tokens. It is untrained unless one is given.

    An untrained drafter changes no token, it only makes decoding slower; `decoder.drafter` is the
    module to train.

    Args:
        target_model: the model that decides; not changed.
        vocab_size: V; needed for a bare module, checked for a transformers model.
        dim: D; width of a bare module's encoder states (default `quickmerge_dim`), checked against a
            transformers model's hidden size.
        quickmerge_dim: width of merged tokens of an untrained drafter; 64 for a bare module, and as
            wide as the target's keys for a transformers model.
        k_max: merged tokens that the draft model of a bare module reads; a prior has a merging
            schedule in its place.
        max_draft_len: K, tokens drafted per step; None takes a trained drafter's own, else 4.
        temperature: 0 decodes greedily; above 0 both models sample at it.
        drafter: a drafter folder, a `QuickMergePrior` or, for a bare module, a `MemoryDraftModel`.
        seed: of an untrained drafter's weights.

    Raises:
        FileNotFoundError: the drafter's folder or one of its files is missing.
        TypeError: the target is no module, or the drafter is not of its kind.
        ValueError: sizes do not fit, the drafter is another target's, or the target cannot be
            decoded speculatively.

    Source: the `quickmergepp` README, speculative decoding.
    """
    if not isinstance(target_model, nn.Module):
        raise TypeError(
            f"create_speculative_decoder: target_model must be an nn.Module, got {type(target_model).__name__}; "
            "load a transformers model with AutoModelForCausalLM.from_pretrained"
        )
    if isinstance(target_model, PreTrainedModel):
        check_model(target_model)
        _check_stated(target_model, vocab_size, dim)
        if isinstance(drafter, nn.Module) and not isinstance(drafter, QuickMergePrior):
            raise TypeError(
                "create_speculative_decoder: the drafter of a transformers model must be a folder or a "
                f"QuickMergePrior, got {type(drafter).__name__}"
            )
        ignored = unapplied_settings(target_model, temperature > 0)
        if ignored:
            warnings.warn(
                f"create_speculative_decoder: the target's generation config asks for {ignored}, which is not applied; "
                "tokens follow the model's logits and the temperature alone",
                stacklevel=2,
            )
        prior = load_prior(target_model, drafter, quickmerge_dim, seed)
        depth = prior.config.num_speculative_tokens if max_draft_len is None else max_draft_len
        target = CachedTarget(target_model, prior.config.eagle_aux_hidden_state_layer_ids)
        return SpeculativeDecoder(target, PriorDrafter(prior, target_model), depth, temperature)

    if drafter is None:
        if vocab_size is None:
            raise TypeError("create_speculative_decoder: vocab_size must be given for a target without a config")
        width = 64 if quickmerge_dim is None else quickmerge_dim
        warnings.warn(
            "create_speculative_decoder: drafting with an untrained model, which is right but slow; train "
            "decoder.drafter on token ids that the target writes, and pass it as drafter=MODEL",
            stacklevel=2,
        )
        drafter = MemoryDraftModel(vocab_size, width if dim is None else dim, width, k_max, seed=seed)
    elif not isinstance(drafter, MemoryDraftModel):
        raise TypeError(
            "create_speculative_decoder: the drafter of a bare module must be a MemoryDraftModel, "
            f"got {type(drafter).__name__}; a drafter folder serves a transformers model"
        )
    elif vocab_size not in (None, drafter.vocab_size) or dim not in (None, drafter.dim):
        raise ValueError(
            f"create_speculative_decoder: the drafter has vocab_size {drafter.vocab_size} and dim {drafter.dim}, "
            f"got {vocab_size} and {dim}; leave them out"
        )
    bare = BareTarget(target_model, drafter.vocab_size, drafter.dim)
    depth = DEFAULT_DRAFT_LEN if max_draft_len is None else max_draft_len
    return SpeculativeDecoder(bare, MemoryDrafter(drafter, bare.device), depth, temperature)


def _check_stated(model: PreTrainedModel, vocab_size: int | None, dim: int | None) -> None:
    sizes = model.config.get_text_config()
    # A head may be padded beyond the vocabulary.
    vocabularies = {sizes.vocab_size, model.get_output_embeddings().weight.shape[0]}
    if vocab_size not in (None, *vocabularies) or dim not in (None, sizes.hidden_size):
        raise ValueError(
            f"create_speculative_decoder: vocab_size and dim must be the target's {sizes.vocab_size} and "
            f"{sizes.hidden_size}, got {vocab_size} and {dim}; leave them out"
        )


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
