"""`results.json`: what was measured, where, and with what."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qm_spec.evaluation.metrics import compare_outputs
from qm_spec.evaluation.shards import ShardResult, ShardSpec

SCHEMA_VERSION = 1


def run_record(
    method: str,
    shard: ShardSpec,
    result: ShardResult,
    reference: ShardResult | None,
    *,
    target: str,
    draft: str | None,
    context_cut: bool,
) -> dict[str, Any]:
    """Return one entry of `runs`: the counts and times of the pass of median wall time.

    Args:
        reference: the same shard decoded without speculation; None where that failed.
        context_cut: whether every prompt was cut to the same number of tokens; `context_tokens` is the
            median length otherwise.
    """
    measured = result.median_pass
    counts = measured.counts
    speculative = shard.engine.speculative_config
    greedy = shard.temperature == 0
    speedup = difference = None
    if reference is not None:
        speedup = measured.output_tokens_per_s / reference.median_pass.output_tokens_per_s
        if greedy:
            difference = compare_outputs(measured.outputs, reference.median_pass.outputs)
    return {
        "method": method,
        "target": target,
        "draft": draft,
        "dtype": result.dtype,
        "temperature": shard.temperature,
        "concurrency": shard.concurrency,
        "context_tokens": int(statistics.median(len(prompt.token_ids) for prompt in shard.prompts)),
        "context_cut": context_cut,
        "num_speculative_tokens": speculative["num_speculative_tokens"] if speculative else 0,
        "num_prompts": len(shard.prompts),
        "max_tokens": shard.max_tokens,
        "num_output_tokens": measured.num_output_tokens,
        "num_steps": measured.num_steps,
        "num_drafts": counts.drafts,
        "num_draft_tokens": counts.draft_tokens,
        "num_accepted_tokens": counts.accepted_tokens,
        "acceptance_rate": counts.acceptance_rate,
        "acceptance_length": counts.acceptance_length,
        "acceptance_per_position": counts.acceptance_per_position,
        "tokens_per_step": measured.num_output_tokens / measured.num_steps,
        "output_tokens_per_s": measured.output_tokens_per_s,
        "output_tokens_per_s_per_pass": [one.output_tokens_per_s for one in result.passes],
        "speedup": speedup,
        "ttft_ms_p50": _median_ms(request.ttft_s for request in measured.requests),
        "tpot_ms_p50": _median_ms(request.tpot_s for request in measured.requests),
        "lossless": difference.num_prompts == 0 if difference else None,
        "num_prompts_different": difference.num_prompts if difference else None,
        "first_difference": difference.first_position if difference else None,
        "repeats_identical": result.repeats_identical if greedy else None,
    }


def _median_ms(seconds: Iterable[float | None]) -> float | None:
    known = [value for value in seconds if value is not None]
    return 1000 * statistics.median(known) if known else None


def write_results(folder: Path, results: dict[str, Any]) -> Path:
    """Write `folder/results.json` so that a reader sees the whole old file or the whole new one."""
    file, partial = folder / "results.json", folder / "results.json.partial"
    with partial.open("w", encoding="utf-8") as stream:
        json.dump(results, stream, indent=1)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)
    return file
