"""Acceptance of speculative decoding without decoding: drafts at all positions of a finished text at once.

A lossless engine writes the text that the target writes alone, whatever the drafter. So given that text, one
pass of the target has all states that drafting would ever start from, and a step's outcome is a comparison: a
drafted token is accepted as long as it is the text's. The walk over the positions that an engine would have
stopped at then gives its counts step by step, exactly, up to rounding at near ties.

`replay` is for drafts that are argmaxes. Against them vLLM's sampler keeps a drafted token if and only if it is the
token that is emitted, so it is exact for a sampled text, too. For drafts that are drawn from the drafter's distribution
see `expected_replay`.

Letters: N tokens of prompt and continuation, C of the continuation, T rows, K drafted tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from qm_spec.bench.engine.metrics import DraftCounts
from qm_spec.drafter.anchors import DraftAnchors, Drafter, engine_steps, read_target
from qm_spec.drafter.head import draft_head

# Scores held at a time, over heads, rows and entries: 16 MiB in float32, in a few copies.
_MAX_SCORES = 1 << 22


@dataclass(frozen=True)
class Replay:
    """What decoding one text with drafts would have done.

    Attributes:
        accepted: tokens accepted in each step, 0..K; the target's own token of a step is not counted.
        num_drafts: K.
    """

    accepted: tuple[int, ...]
    num_drafts: int

    @property
    def counts(self) -> DraftCounts:
        """The sums that vLLM counts; add them over texts."""
        return DraftCounts(
            drafts=len(self.accepted),
            draft_tokens=len(self.accepted) * self.num_drafts,
            accepted_tokens=sum(self.accepted),
            accepted_per_position=tuple(sum(n > k for n in self.accepted) for k in range(self.num_drafts)),
        )


@dataclass(frozen=True)
class ExpectedReplay:
    """What decoding one text with drafts drawn at random does on average.

    Attributes:
        steps: expected number of steps.
        kept: expected number of them that keep the draft at each position, K numbers.
    """

    steps: float
    kept: tuple[float, ...]

    @property
    def accepted(self) -> float:
        """Expected number of accepted tokens in all steps."""
        return sum(self.kept)

    @property
    def acceptance_length(self) -> float:
        """Tokens per step, the target's own one included; sum both numbers over texts, divide once."""
        return 1 + self.accepted / self.steps


@torch.inference_mode()
def write_continuations(
    target: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    temperature: float = 0.0,
    batch_size: int = 8,
    seed: int = 0,
) -> list[list[int]]:
    """Let the target continue each prompt; the end of a text does not stop it, as with vLLM's `ignore_eos`.

    Prompts of one length are decoded together, others apart, so nothing is padded.

    Args:
        target: a causal LM of transformers.
        prompts: token ids; none may be empty.
        num_tokens: of each continuation.
        temperature: 0 is greedy.
        batch_size: prompts decoded together; each holds a key/value cache.
        seed: of sampling.

    Returns:
        The token ids of each continuation, in the order of the prompts.
    """
    generator = torch.Generator(target.device).manual_seed(seed)
    continuations: list[list[int]] = [[] for _ in prompts]
    for numbers in _batches_of_one_length(prompts, batch_size):
        ids = torch.tensor([list(prompts[number]) for number in numbers], device=target.device)
        cache, written = DynamicCache(), []
        for _ in range(num_tokens):
            logits = target(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            if temperature:
                probabilities = torch.softmax(logits.float() / temperature, -1)
                ids = torch.multinomial(probabilities, 1, generator=generator)
            else:
                ids = logits.argmax(-1, keepdim=True)
            written.append(ids)
        for number, row in zip(numbers, torch.cat(written, 1).tolist(), strict=True):
            continuations[number] = row
    return continuations


def _batches_of_one_length(prompts: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    by_length: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(number)
    for numbers in by_length.values():
        for start in range(0, len(numbers), batch_size):
            yield numbers[start : start + batch_size]


@dataclass(frozen=True)
class ReadText:
    """A text as the target has read it, for any number of drafters; see `read_text`.

    Attributes:
        target: lends its embedding and head to the drafters.
        token_ids: `[1, N]` int64, prompt and continuation.
        num_prompt: tokens of the prompt.
        layers: of the states.
        aux_states: `[1, N, 3 D]` float32.
        logits: `[C, V]` at the C tokens of the continuation.
    """

    target: PreTrainedModel
    token_ids: Tensor
    num_prompt: int
    layers: tuple[int, ...]
    aux_states: Tensor
    logits: Tensor


@torch.inference_mode()
def read_text(
    target: PreTrainedModel, prompt: Sequence[int], continuation: Sequence[int], layers: Sequence[int]
) -> ReadText:
    """Run the target over a text that it wrote itself: the one costly part of a replay.

    Args:
        target: a causal LM of transformers.
        prompt: token ids.
        continuation: what the target wrote, token ids.
        layers: `eagle_aux_hidden_state_layer_ids` of the drafters.

    Raises:
        ValueError: the prompt or the continuation is empty.
    """
    if not (prompt and continuation):
        raise ValueError(
            f"read_text: neither prompt nor continuation may be empty, got {len(prompt)} and {len(continuation)} tokens"
        )
    token_ids = torch.tensor([[*prompt, *continuation]], device=target.device)
    aux_states, logits = read_target(target, token_ids, layers, logits_to_keep=len(continuation))
    return ReadText(target, token_ids, len(prompt), tuple(layers), aux_states, logits[0])


@torch.inference_mode()
def accepted_everywhere(drafter: Drafter, text: ReadText, num_drafts: int) -> list[int]:
    """Return how many greedy drafts, 0..K, would be accepted at each position of a text.

    Args:
        drafter: `QuickMergePrior` or `Eagle3Drafter` of this target, in float32.
        text: decoded greedily, or sampled.
        num_drafts: K.

    Returns:
        One count per position from the prompt's last token on, as far as K tokens can be compared.

    Raises:
        ValueError: K is below 1 or not below C, or the drafter reads other layers.
    """
    accepted, head = [], draft_head(drafter, text.target)
    for rows, drafts in _chunks(drafter, text, num_drafts):
        next_ids = text.token_ids[:, rows + 1]
        agreed = torch.ones_like(next_ids, dtype=torch.bool)
        count = torch.zeros_like(next_ids)
        for step in range(num_drafts):
            next_ids = head.best_tokens(_draft(text, drafts, next_ids))
            agreed &= next_ids == text.token_ids[:, rows + 2 + step]
            count += agreed
        accepted += count[0].tolist()
    return accepted


def walk(accepted: Sequence[int], num_drafts: int) -> Replay:
    """Return the steps of an engine that would accept `accepted[i]` tokens at position i."""
    return Replay(tuple(engine_steps(accepted)), num_drafts)


def replay(drafter: Drafter, text: ReadText, num_drafts: int) -> Replay:
    """Return what greedy drafts would do for a text.

    A step is replayed only where all K tokens that it would draft can be compared: C tokens of continuation hold
    the steps of an engine that is asked for C - K + 1 tokens.

    Args:
        drafter, text, num_drafts: see `accepted_everywhere`.

    Raises:
        ValueError: see `accepted_everywhere`.
    """
    return walk(accepted_everywhere(drafter, text, num_drafts), num_drafts)


@torch.inference_mode()
def expected_replay(drafter: Drafter, text: ReadText, num_drafts: int, temperature: float = 1.0) -> ExpectedReplay:
    """Return what drafts drawn from the drafter do on average for a text that the target sampled.

    The sums are exact for this text; over texts their average is an estimate, as far as the texts are a sample.

    Args:
        drafter, text, num_drafts, temperature: see `chances_everywhere`.

    Raises:
        ValueError: see `chances_everywhere`.
    """
    return expected_walk(chances_everywhere(drafter, text, num_drafts, temperature))


@torch.inference_mode()
def chances_everywhere(drafter: Drafter, text: ReadText, num_drafts: int, temperature: float) -> Tensor:
    """Return the chance that at least 1..K drafts, drawn from the drafter, are accepted at each position of a text.

    A step emits token x with a draft accepted with probability min(p(x), q(x)), and in all with p(x). So, given the
    text, its next token was an accepted draft with probability min(1, q(x) / p(x)), and k tokens were with the
    product over them.

    Args:
        drafter: see `accepted_everywhere`.
        text: sampled by the target at this temperature.
        num_drafts: K.
        temperature: of target and drafter, above 0.

    Returns:
        `[T, K]` float64 on the CPU, a row per position as in `accepted_everywhere`.

    Raises:
        ValueError: the temperature is not above 0, or as in `accepted_everywhere`.

    Source: Leviathan et al. 2023, arXiv 2211.17192; conditioning on the text is ours.
    """
    if temperature <= 0:
        raise ValueError(
            f"chances_everywhere: temperature must be above 0, got {temperature}; use replay for greedy drafts"
        )
    # p of x_{t+2}, the first token that the first row's drafts are compared with, and of those behind it.
    compared = text.token_ids[0, text.num_prompt + 1 :]
    log_p = _log_probability(text.logits[:-1], compared, temperature)
    chances, head = [], draft_head(drafter, text.target)
    for rows, drafts in _chunks(drafter, text, num_drafts):
        log_chance, row_chances = log_p.new_zeros(len(rows)), []
        for step in range(num_drafts):
            logits = head.vocabulary_logits(_draft(text, drafts, text.token_ids[:, rows + 1 + step]))[0]
            place = rows + 1 + step - text.num_prompt
            log_q = _log_probability(logits, compared[place], temperature)
            log_chance = log_chance + (log_q - log_p[place]).clamp_max(0)
            row_chances.append(log_chance.exp())
        chances.append(torch.stack(row_chances, -1))
    return torch.cat(chances).cpu()


def expected_walk(chances: Tensor) -> ExpectedReplay:
    """Return the sums over all walks of an engine that begins at the first position.

    Args:
        chances: `[T, K]`, as of `chances_everywhere`; of 0 and 1 alone the walk is the one of `walk`.
    """
    num_rows, num_drafts = chances.shape
    at_least = torch.cat([chances.new_ones(num_rows, 1), chances, chances.new_zeros(num_rows, 1)], -1)
    exactly = at_least[:, :-1] - at_least[:, 1:]
    begins = chances.new_zeros(num_rows + num_drafts + 1)
    begins[0] = 1
    for row in range(num_rows):
        begins[row + 1 : row + num_drafts + 2] += begins[row] * exactly[row]
    visited = begins[:num_rows]
    return ExpectedReplay(float(visited.sum()), tuple((visited @ chances).tolist()))


def _draft(text: ReadText, drafts: DraftAnchors, token_ids: Tensor) -> Tensor:
    """Feed anchors their next tokens `[1, T]`; return the head's input `[1, T, D]`."""
    return drafts.step(text.target.get_input_embeddings()(token_ids).float())


def _log_probability(logits: Tensor, token_ids: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities `[T]`, float64, of tokens `[T]` under logits `[T, V]`."""
    log_probabilities = torch.log_softmax(logits.float() / temperature, -1)
    return log_probabilities.gather(-1, token_ids.unsqueeze(-1))[:, 0].double()


def _chunks(drafter: Drafter, text: ReadText, num_drafts: int) -> Iterator[tuple[Tensor, DraftAnchors]]:
    """Yield positions `[T]` to draft from, from the prompt's last token on, and the anchors there.

    All scores of a chunk are held at once.
    """
    num_rows = len(text.logits) - num_drafts
    if num_drafts < 1 or num_rows < 1:
        raise ValueError(
            f"replay: K must be in 1..{len(text.logits) - 1} for a continuation of {len(text.logits)} tokens, "
            f"got {num_drafts}"
        )
    layers = tuple(drafter.config.eagle_aux_hidden_state_layer_ids)
    if layers != text.layers:
        raise ValueError(f"replay: the drafter reads layers {layers}, the text was read for {text.layers}")
    sequences = drafter.read(text.aux_states, text.target.get_input_embeddings()(text.token_ids).float())
    size = max(1, _MAX_SCORES // (drafter.config.num_attention_heads * sequences.num_entries))
    first = text.num_prompt - 1
    for rows in torch.arange(first, first + num_rows, device=text.token_ids.device).split(size):
        yield rows, sequences.anchors(rows[None])
