"""Verification on a CPU: by the numbers of positions where there are seeds (`seeds.py`), else by `verification.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from qm_spec.integrations.vllm_plugin.compat import Patch
from qm_spec.integrations.vllm_plugin.seeds import draw_numbers, sample
from qm_spec.integrations.vllm_plugin.verification import verify_drawn


class Numbered(dict[int, torch.Generator]):
    """Generators by row that have passed the numbers of the drafts on.

    Attributes:
        numbers: `[k]` int64 by row, of its k drafts.
    """

    def __init__(self, generators: dict[int, torch.Generator], numbers: dict[int, Tensor]) -> None:
        super().__init__(generators)
        self.numbers = numbers


def with_numbers(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return `RejectionSampler.forward` in which each token of a seeded request takes the number of its position."""

    @wraps(original)
    def forward(self: Any, metadata: Any, draft_probs: Tensor | None, logits: Tensor, sampling_metadata: Any) -> Any:
        counts = metadata.num_draft_tokens
        drafted = {row: one for row, one in sampling_metadata.generators.items() if counts[row]}
        # In 0.33 FLy accepts drafts that the target's sample is not.
        accepts_others = getattr(self, "fly_window_size", None) is not None
        elsewhere = logits.device.type != "cpu" or self.use_fp64_gumbel
        if not drafted or elsewhere or self.synthetic_mode or accepts_others:
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
    """Return `rejection_sample` that verifies numbered requests by their numbers, and others faster than vLLM."""

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
            # Seeds without numbers, modes of vLLM's own and other devices are left to vLLM.
            usual = not (sampling.generators or any(settings) or any(named.values()))
            if usual and not sampling.all_greedy and target_logits.device.type == "cpu":
                return verify_drawn(
                    draft_token_ids,
                    num_draft_tokens,
                    max_spec_len,
                    draft_probs,
                    target_logits,
                    bonus_token_ids,
                    sampling.temperature,
                )
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


SEED_NUMBERS = Patch(
    target="vllm.v1.sample.rejection_sampler:RejectionSampler.forward",
    parameters=("self", "metadata", "draft_probs", "logits", "sampling_metadata"),
    replacement=with_numbers,
    why="a request with a seed has the same sample whatever is drafted for it, so drafts may follow the load",
    how="gives each token of a seeded request the number of its position, as plain decoding does; on a CPU, applied "
    "when our model is built",
    upstream="none",
    delete_when="vLLM's verification keeps a seed's sample whatever is drafted",
)


SEEDED_ROWS = Patch(
    target="vllm.v1.sample.rejection_sampler:rejection_sample",
    parameters=(
        "draft_token_ids",
        "num_draft_tokens",
        "max_spec_len",
        "cu_num_draft_tokens",
        "draft_probs",
        "target_logits",
        "bonus_token_ids",
        "sampling_metadata",
        "synthetic_mode",
        "synthetic_conditional_rates",
        "use_fp64_gumbel",
    ),
    replacement=with_numbered_rows,
    why="a request with a seed has the same sample whatever is drafted for it, so drafts may follow the load; others "
    "are verified in a fraction of the time",
    how="samples the target's tokens of seeded requests by those numbers and accepts the drafts that equal them; "
    "draws for other sampled requests only where a draft is rejected; on a CPU, applied when our model is built",
    upstream="none",
    delete_when="with SEED_NUMBERS",
    # In 0.33.
    later=("fly_window_size", "fly_entropy_threshold", "fly_entropy_top_k"),
)
