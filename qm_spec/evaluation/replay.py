"""Acceptance of speculative decoding without decoding: drafts at all positions of a finished text at once.

A lossless engine writes the text that the target writes alone, whatever the drafter. So given that text, one
pass of the target has all states that drafting would ever start from, and a step's outcome is a comparison: a
drafted token is accepted as long as it is the text's. The walk over the positions that an engine would have
stopped at then gives its counts step by step, exactly, up to rounding at near ties.

The drafts are argmaxes, as vLLM drafts by default. Against them vLLM's sampler keeps a drafted token if and
only if it is the token that is emitted, so `replay` is exact for a sampled text, too. For drafts that are drawn
from the drafter's distribution see `expected_replay`.

Letters: N tokens of prompt and continuation, R rows, K drafted tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from qm_spec.drafter.rows import Drafter, DraftSequences, read_target
from qm_spec.evaluation.metrics import DraftCounts

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
        accepted: expected number of accepted tokens in all of them.
    """

    steps: float
    accepted: float

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


@torch.inference_mode()
def replay(
    drafter: Drafter, target: PreTrainedModel, prompt: Sequence[int], continuation: Sequence[int], num_drafts: int
) -> Replay:
    """Return what greedy drafts would do for a text that the target wrote itself.

    A step is replayed only where all K tokens that it would draft can be compared: C tokens of continuation hold
    the steps of an engine that is asked for C - K + 1 tokens.

    Args:
        drafter: `QuickMergePrior` or `Eagle3Drafter` of this target, in float32.
        target: a causal LM of transformers.
        prompt: token ids.
        continuation: what the target wrote, C token ids.
        num_drafts: K.

    Raises:
        ValueError: the prompt is empty, or the continuation is not longer than K.
    """
    positions, token_ids = _positions(target, prompt, continuation, num_drafts)
    sequences, _ = _read(drafter, target, token_ids)
    embed, head = target.get_input_embeddings(), target.get_output_embeddings()
    accepted = []
    for rows in _chunks(drafter, sequences, positions):
        drafts, next_ids = sequences.rows(rows), token_ids[:, rows[0] + 1]
        agreed = torch.ones_like(rows, dtype=torch.bool)
        count = torch.zeros_like(rows)
        for step in range(num_drafts):
            output = drafts.step(embed(next_ids).float())
            next_ids = head(output.to(head.weight.dtype)).argmax(-1)
            agreed &= next_ids == token_ids[:, rows[0] + 2 + step]
            count += agreed
        accepted += count[0].tolist()
    # The first token comes from the prompt's own pass; each step adds what it accepted and one token more.
    steps, position = [], 0
    while position < len(accepted):
        steps.append(accepted[position])
        position += accepted[position] + 1
    return Replay(tuple(steps), num_drafts)


@torch.inference_mode()
def expected_replay(
    drafter: Drafter,
    target: PreTrainedModel,
    prompt: Sequence[int],
    continuation: Sequence[int],
    num_drafts: int,
    temperature: float = 1.0,
) -> ExpectedReplay:
    """Return what drafts drawn from the drafter do on average for a text that the target sampled.

    A step emits token x with a draft accepted with probability min(p(x), q(x)), and in all with p(x). So, given the
    text, its next token was an accepted draft with probability min(1, q(x) / p(x)), and k tokens were with the
    product over them. From this follow the probabilities that a step begins at each position, and the two sums.
    They are exact for this text; over texts their average is an estimate, as far as the texts are a sample.

    Args:
        drafter: see `replay`.
        target: see `replay`.
        prompt: token ids.
        continuation: token ids sampled by the target at this temperature; steps as in `replay`.
        num_drafts: K.
        temperature: of target and drafter, above 0.

    Raises:
        ValueError: the temperature is not above 0, the prompt is empty, the continuation is not longer than K.

    Source: Leviathan et al. 2023, arXiv 2211.17192; conditioning on the text is ours.
    """
    if temperature <= 0:
        raise ValueError(
            f"expected_replay: temperature must be above 0, got {temperature}; use replay for greedy drafts"
        )
    positions, token_ids = _positions(target, prompt, continuation, num_drafts)
    # Of the tokens that drafts are compared with, x_{t+2} of the first row being the first.
    sequences, logits = _read(drafter, target, token_ids, len(continuation))
    embed, head = target.get_input_embeddings(), target.get_output_embeddings()
    first = len(prompt)
    log_p = torch.log_softmax(logits[0, :-1].float() / temperature, -1)
    log_p = log_p.gather(-1, token_ids[0, first + 1 :, None])[:, 0]
    chances = []
    for rows in _chunks(drafter, sequences, positions):
        drafts, ratio, row_chances = sequences.rows(rows), torch.ones(rows.shape[1], dtype=torch.float64), []
        for step in range(num_drafts):
            output = drafts.step(embed(token_ids[:, rows[0] + 1 + step]).float())
            log_q = torch.log_softmax(head(output.to(head.weight.dtype))[0].float() / temperature, -1)
            text = rows[0] + 2 + step
            log_q = log_q.gather(-1, token_ids[0, text, None])[:, 0]
            ratio = ratio * (log_q - log_p[text - first - 1]).clamp_max(0).double().exp().cpu()
            row_chances.append(ratio)
        chances.append(torch.stack(row_chances, -1))
    return _expected_walk(torch.cat(chances))


def _expected_walk(chances: Tensor) -> ExpectedReplay:
    """Sum over all walks; `chances` `[R, K]` hold the probability that at least k tokens are accepted at a row."""
    num_rows, num_drafts = chances.shape
    at_least = torch.cat([chances.new_ones(num_rows, 1), chances, chances.new_zeros(num_rows, 1)], -1)
    exactly = at_least[:, :-1] - at_least[:, 1:]
    begins = chances.new_zeros(num_rows + num_drafts + 1)
    begins[0] = 1
    for row in range(num_rows):
        begins[row + 1 : row + num_drafts + 2] += begins[row] * exactly[row]
    visited = begins[:num_rows]
    return ExpectedReplay(float(visited.sum()), float((visited * chances.sum(-1)).sum()))


def _positions(
    target: PreTrainedModel, prompt: Sequence[int], continuation: Sequence[int], num_drafts: int
) -> tuple[Tensor, Tensor]:
    """Return the positions of all rows `[1, R]` and the text `[1, N]`."""
    if not prompt or num_drafts < 1 or len(continuation) <= num_drafts:
        raise ValueError(
            f"replay: a prompt, K of at least 1 and a continuation of more than K tokens are needed, got "
            f"{len(prompt)} and {len(continuation)} tokens with K = {num_drafts}"
        )
    token_ids = torch.tensor([[*prompt, *continuation]], device=target.device)
    first = len(prompt) - 1
    positions = torch.arange(first, first + len(continuation) - num_drafts, device=target.device)
    return positions[None], token_ids


def _read(
    drafter: Drafter, target: PreTrainedModel, token_ids: Tensor, logits_to_keep: int = 1
) -> tuple[DraftSequences, Tensor]:
    layers = drafter.config.eagle_aux_hidden_state_layer_ids
    aux_states, logits = read_target(target, token_ids, layers, logits_to_keep=logits_to_keep)
    return drafter.read(aux_states, target.get_input_embeddings()(token_ids).float()), logits


def _chunks(drafter: Drafter, sequences: DraftSequences, positions: Tensor) -> tuple[Tensor, ...]:
    """Cut the rows so that their scores fit into memory."""
    scores_per_row = drafter.config.num_attention_heads * sequences.num_entries
    return positions.split(max(1, _MAX_SCORES // scores_per_row), dim=1)
