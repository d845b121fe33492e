"""The record of one method under one setting, as `results.json` lists it under `runs`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from functools import reduce
from operator import add
from typing import Any

from qm_spec.bench.engine.metrics import DraftCounts
from qm_spec.bench.engine.shards import RequestResult, ShardSpec, TokenPrompt
from qm_spec.bench.results import turns as paired
from qm_spec.bench.results.bootstrap import Estimate
from qm_spec.bench.results.file import RequestRow
from qm_spec.bench.results.turns import Turn


def run_record(
    method: str,
    shard: ShardSpec,
    turns: Sequence[Turn],
    *,
    target: str,
    draft: str | None,
    dtype: str,
    context_cut: bool,
) -> dict[str, Any]:
    """Return one entry of `runs`: counts and times of every turn's median pass, and comparisons within turns.

    Args:
        shard: the setting.
        turns: at least one.
        draft: the drafter's folder, None for methods without.
        dtype: of the target in the engine.
        context_cut: whether every prompt was cut to the same number of tokens; `context_tokens` is the median length
            otherwise.
    """
    medians = [turn.median_pass for turn in turns]
    prompts = [prompt for turn in turns for prompt in turn.prompts]
    requests = [request for one in medians for request in one.requests]
    counts = reduce(add, (one.counts for one in medians))
    greedy = shard.temperature == 0
    compared = any(turn.compared for turn in turns)
    differences = (
        [one for turn in turns if turn.compared for one in turn.differences()] if greedy and compared else None
    )
    num_tokens, num_steps = sum(one.num_output_tokens for one in medians), sum(one.num_steps for one in medians)
    work = [paired.after_first_token(one) for one in requests]
    decoding_s = sum(seconds for _, seconds in work)
    ratios = [ratio for turn in turns for ratio in turn.request_speedups()]
    pace = paired.pace_ms(turns)
    return {
        "method": method,
        "target": target,
        "draft": draft,
        "dtype": dtype,
        "temperature": shard.temperature,
        "concurrency": shard.concurrency,
        "context_tokens": int(statistics.median(len(prompt.token_ids) for prompt in prompts)),
        "context_cut": context_cut,
        "num_speculative_tokens": _depth(shard, counts),
        "num_prompts": len(prompts),
        "num_passes": max(len(turn.passes) for turn in turns),
        "max_tokens": shard.max_tokens,
        "num_output_tokens": num_tokens,
        "num_steps": num_steps,
        **_acceptance(counts),
        "tokens_per_step": num_tokens / num_steps,
        "output_tokens_per_s": num_tokens / sum(one.elapsed_s for one in medians),
        "output_tokens_per_s_per_pass": _tokens_per_s_per_pass(turns),
        "decode_tokens_per_s": sum(tokens for tokens, _ in work) / decoding_s if decoding_s else None,
        **_estimate("speedup", paired.speedup(turns)),
        "speedup_per_pass": paired.speedup_per_pass(turns) if compared else [],
        **_estimate("decode_speedup", paired.request_speedup(turns, paired.after_first_token)),
        "ttft_ms_p50": _median_ms(request.ttft_s for request in requests),
        "ttft_delay_ms": paired.first_token_delay_ms(turns),
        "tpot_ms_p50": _median_ms(request.tpot_s for request in requests),
        "tpot_ms_p10": pace[0] if pace else None,
        "tpot_ms_p90": pace[1] if pace else None,
        "lossless": not any(one.num_prompts for one in differences) if differences is not None else None,
        "num_prompts_different": sum(one.num_prompts > 0 for one in differences) if differences is not None else None,
        "first_difference": min(
            (one.first_position for one in differences or () if one.first_position is not None), default=None
        ),
        "repeats_identical": all(_is_repeated(turn) for turn in turns) if greedy else None,
        "categories": _categories(turns, greedy),
        "requests": [
            request_row(prompt, request, ratio).to_json()
            for prompt, request, ratio in zip(prompts, requests, ratios, strict=True)
        ],
    }


def _depth(shard: ShardSpec, counts: DraftCounts) -> int:
    """Return K; where it was left to the engine, the most that it counts, 0 without speculation."""
    asked = (shard.engine.speculative_config or {}).get("num_speculative_tokens")
    return len(counts.accepted_per_position) if asked is None else int(asked)


def _acceptance(counts: DraftCounts) -> dict[str, Any]:
    return {
        "num_drafts": counts.drafts,
        "num_draft_tokens": counts.draft_tokens,
        "num_accepted_tokens": counts.accepted_tokens,
        "acceptance_rate": counts.acceptance_rate,
        "acceptance_length": counts.acceptance_length,
        "acceptance_per_position": counts.acceptance_per_position,
    }


def _estimate(name: str, found: Estimate | None) -> dict[str, float | None]:
    return {
        name: found.value if found else None,
        f"{name}_low": found.low if found else None,
        f"{name}_high": found.high if found else None,
    }


def _tokens_per_s_per_pass(turns: Sequence[Turn]) -> list[float]:
    found = []
    for number in range(max(len(turn.passes) for turn in turns)):
        some = [turn.passes[number][0] for turn in turns if number < len(turn.passes)]
        found.append(sum(one.num_output_tokens for one in some) / sum(one.elapsed_s for one in some))
    return found


def _is_repeated(turn: Turn) -> bool:
    return all(ours.outputs == turn.passes[0][0].outputs for ours, _ in turn.passes)


def _categories(turns: Sequence[Turn], greedy: bool) -> list[dict[str, Any]]:
    """Return what each category's requests show, none where there is but one category."""
    names = dict.fromkeys(prompt.category for turn in turns for prompt in turn.prompts if prompt.category is not None)
    return [_category(name, turns, greedy) for name in names] if len(names) > 1 else []


def _category(name: str, turns: Sequence[Turn], greedy: bool) -> dict[str, Any]:
    requests = [
        request
        for turn in turns
        for prompt, request in zip(turn.prompts, turn.median_pass.requests, strict=True)
        if prompt.category == name
    ]
    different = [
        one.num_prompts > 0
        for turn in turns
        if turn.compared
        for prompt, one in zip(turn.prompts, turn.differences(), strict=True)
        if prompt.category == name
    ]
    counts = reduce(add, (request.counts for request in requests))
    return {
        "category": name,
        "num_prompts": len(requests),
        "acceptance_length": counts.acceptance_length,
        "tokens_per_step": sum(len(one.token_ids) for one in requests) / sum(one.num_steps for one in requests),
        **_estimate("speedup", paired.request_speedup(turns, category=name)),
        "num_prompts_different": sum(different) if greedy and different else None,
    }


def request_row(prompt: TokenPrompt, request: RequestResult, speedup: float | None) -> RequestRow:
    """Return a request as `results.json` lists it."""
    return RequestRow(
        prompt_id=prompt.prompt_id,
        category=prompt.category,
        context_tokens=len(prompt.token_ids),
        output_tokens=len(request.token_ids),
        num_steps=request.num_steps,
        num_drafts=request.counts.drafts,
        num_draft_tokens=request.counts.draft_tokens,
        num_accepted_tokens=request.counts.accepted_tokens,
        accepted_per_position=request.counts.accepted_per_position,
        ttft_s=request.ttft_s,
        tpot_s=request.tpot_s,
        latency_s=request.latency_s,
        arrival_s=request.arrival_s,
        speedup=speedup,
    )


def _median_ms(seconds: Iterable[float | None]) -> float | None:
    known = [value for value in seconds if value is not None]
    return 1000 * statistics.median(known) if known else None
