"""Samples of requests with seeds that do not depend on what is drafted, on a CPU.

vLLM's sampler there takes one number of a request's generator for each token and adds noise to the logits that this
number fixes (Gumbel-max). Verification does the same here: at each position it samples the target's token by the number
of that position, and a draft is accepted if it is that token (drafter-invariant speculative decoding, Daliri et al.
2024, arXiv 2408.07978). So a request has the sample of plain decoding with the same seed, in any batch and whatever is
drafted. Drafts are sampled with the same noise, so they are accepted nearly as often as by rejection sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor


class Numbered(dict[int, torch.Generator]):
    """Generators by row that have passed the numbers of the drafts on.

    Attributes:
        numbers: `[k]` int64 by row, of its k drafts.
    """

    def __init__(self, generators: dict[int, torch.Generator], numbers: dict[int, Tensor]) -> None:
        super().__init__(generators)
        self.numbers = numbers


def supported() -> bool:
    """Tell whether this vLLM samples by such numbers."""
    return hasattr(torch.ops._C, "fused_gumbel_argmax")


def draw_numbers(generator: torch.Generator, count: int) -> Tensor:
    """Take the numbers of so many tokens, as vLLM's sampler does: `[count]` int64."""
    return torch.randint(0, 2**31, (count,), generator=generator)


def next_numbers(generator: torch.Generator, count: int) -> Tensor:
    """Return the numbers of the next tokens, `[count]` int64, and leave the generator as it is."""
    state = generator.get_state()
    numbers = draw_numbers(generator, count)
    generator.set_state(state)
    return numbers


def sample(logits: Tensor, numbers: Tensor) -> Tensor:
    """Sample the tokens that these numbers fix.

    Args:
        logits: `[n, V]`, over the temperature. V is the target's vocabulary: noise goes by token id.
        numbers: `[n]` int64.

    Returns:
        `[n]` int64 token ids.
    """
    token_ids: Tensor = torch.ops._C.fused_gumbel_argmax(logits.float().contiguous(), numbers.contiguous())
    return token_ids


def with_numbers(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return `RejectionSampler.forward` in which each token of a seeded request takes the number of its position."""

    @wraps(original)
    def forward(self: Any, metadata: Any, draft_probs: Tensor | None, logits: Tensor, sampling_metadata: Any) -> Any:
        counts = metadata.num_draft_tokens
        drafted = {row: one for row, one in sampling_metadata.generators.items() if counts[row]}
        if not drafted or logits.device.type != "cpu" or self.use_fp64_gumbel or self.synthetic_mode:
            return original(self, metadata, draft_probs, logits, sampling_metadata)
        states = {row: generator.get_state() for row, generator in drafted.items()}
        # The token behind the drafts takes the number after theirs.
        numbers = {row: draw_numbers(generator, counts[row]) for row, generator in drafted.items()}
        numbered = replace(sampling_metadata, generators=Numbered(sampling_metadata.generators, numbers))
        output = original(self, metadata, draft_probs, logits, numbered)
        num_sampled = (output.sampled_token_ids >= 0).sum(-1).tolist()
        for row, generator in drafted.items():
            generator.set_state(states[row])
            draw_numbers(generator, num_sampled[row])
        return output

    return forward


def with_numbered_rows(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `rejection_sample` that verifies the drafts of numbered requests by their numbers."""

    @wraps(original)
    def rejection_sample(
        draft_token_ids: Tensor,
        num_draft_tokens: list[int],
        max_spec_len: int,
        cu_num_draft_tokens: Tensor,
        draft_probs: Tensor | None,
        target_logits: Tensor,
        bonus_token_ids: Tensor,
        sampling_metadata: Any,
        *settings: Any,
        **named: Any,
    ) -> Tensor:
        def verify(sampling: Any) -> Tensor:
            return original(
                draft_token_ids,
                num_draft_tokens,
                max_spec_len,
                cu_num_draft_tokens,
                draft_probs,
                target_logits,
                bonus_token_ids,
                sampling,
                *settings,
                **named,
            )

        generators = sampling_metadata.generators
        if not isinstance(generators, Numbered):
            return verify(sampling_metadata)
        if all(count == 0 or row in generators.numbers for row, count in enumerate(num_draft_tokens)):
            output = bonus_token_ids.new_full((len(num_draft_tokens), max_spec_len + 1), -1, dtype=torch.int32)
            output[:, :1] = bonus_token_ids
        else:
            output = verify(replace(sampling_metadata, generators={}))
        ends, drafts = cu_num_draft_tokens.tolist(), draft_token_ids.tolist()
        going, position = list(generators.numbers), 0
        for row in going:
            output[row] = -1
        # A position at a time: most requests need only the first ones.
        while going:
            places = [ends[row] - num_draft_tokens[row] + position for row in going]
            numbers = torch.stack([generators.numbers[row][position] for row in going])
            sampled = sample(target_logits[places], numbers)
            output[going, position] = sampled.int()
            accepted = [
                row for row, place, token in zip(going, places, sampled.tolist(), strict=True) if drafts[place] == token
            ]
            position += 1
            going = [row for row in accepted if num_draft_tokens[row] > position]
            for row in accepted:
                if num_draft_tokens[row] == position:
                    output[row, position] = bonus_token_ids[row, 0]
        return output

    return rejection_sample
