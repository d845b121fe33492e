"""Made-up results files for tests of what reads them; no number in here was measured."""

import zlib

import numpy as np

from qm_spec.bench.engine.metrics import DraftCounts
from qm_spec.bench.results.file import RequestRow

K = 4
OUTPUT_TOKENS = 64


def made_up_rows(
    method="none",
    *,
    num_prompts=40,
    seconds_per_step=0.01,
    keep=0.6,
    concurrency=1,
    context_tokens=256,
    noise=0.02,
    seed=0,
    categories=(None,),
):
    """Make up requests: prompts differ much among themselves, by `seed` alone; `noise` differs from call to call."""
    kind = repr((method, seconds_per_step, keep, concurrency, context_tokens, noise))
    clock = np.random.default_rng(zlib.crc32(kind.encode()))
    rows = []
    for number in range(num_prompts):
        prompt = np.random.default_rng((seed, number))
        hard = prompt.uniform(0.6, 1.4)
        accepted = [0] * K
        drafts = 0
        left = OUTPUT_TOKENS - 1
        if method.startswith("none"):
            steps = OUTPUT_TOKENS
        else:
            while left > 0:
                drafts += 1
                kept = 0
                while kept < K and prompt.uniform() < min(0.95, keep / hard):
                    accepted[kept] += 1
                    kept += 1
                left -= kept + 1
            steps = 1 + drafts
        jitter = float(np.exp(clock.normal(0, noise)))
        ttft = 2 * seconds_per_step * hard * jitter
        decoding = (steps - 1) * seconds_per_step * hard * (1.15 if drafts else 1) * jitter
        rows.append(
            RequestRow(
                prompt_id=str(number),
                category=categories[number % len(categories)],
                context_tokens=context_tokens,
                output_tokens=OUTPUT_TOKENS,
                num_steps=steps,
                num_drafts=drafts,
                num_draft_tokens=K * drafts,
                num_accepted_tokens=sum(accepted),
                accepted_per_position=tuple(accepted) if drafts else (),
                ttft_s=ttft,
                tpot_s=decoding / (OUTPUT_TOKENS - 1),
                latency_s=ttft + decoding,
            )
        )
    return rows


def made_up_run(method, rows, plain=None, *, concurrency=1, temperature=0.0, context_cut=True, num_prompts=None):
    """Make the record of a run from its requests."""
    counts = DraftCounts(
        sum(row.num_drafts for row in rows),
        sum(row.num_draft_tokens for row in rows),
        sum(row.num_accepted_tokens for row in rows),
        tuple(
            sum(column) for column in zip(*(row.accepted_per_position for row in rows if row.num_drafts), strict=True)
        ),
    )
    tokens, steps = sum(row.output_tokens for row in rows), sum(row.num_steps for row in rows)
    speed = concurrency * tokens / sum(row.latency_s for row in rows)
    reference = (
        concurrency * sum(row.output_tokens for row in plain) / sum(row.latency_s for row in plain) if plain else None
    )
    return {
        "method": method,
        "target": "made/up",
        "draft": None,
        "dtype": "float32",
        "temperature": temperature,
        "concurrency": concurrency,
        "context_tokens": rows[0].context_tokens,
        "context_cut": context_cut,
        "num_speculative_tokens": K if counts.drafts else 0,
        "num_prompts": num_prompts or len(rows),
        "num_passes": 2,
        "max_tokens": OUTPUT_TOKENS,
        "num_output_tokens": tokens,
        "num_steps": steps,
        "num_drafts": counts.drafts,
        "num_draft_tokens": counts.draft_tokens,
        "num_accepted_tokens": counts.accepted_tokens,
        "acceptance_rate": counts.acceptance_rate,
        "acceptance_length": counts.acceptance_length,
        "acceptance_per_position": counts.acceptance_per_position,
        "tokens_per_step": tokens / steps,
        "output_tokens_per_s": speed,
        "output_tokens_per_s_per_pass": [speed, speed],
        "speedup": speed / reference if reference else None,
        "ttft_ms_p50": 1000 * float(np.median([row.ttft_s for row in rows])),
        "tpot_ms_p50": 1000 * float(np.median([row.tpot_s for row in rows])),
        "lossless": True,
        "num_prompts_different": 0,
        "first_difference": None,
        "repeats_identical": True,
        "requests": [row.to_json() for row in rows],
    }


def made_up_results(*runs, prompts="made-up.jsonl", failures=()):
    """Make a results file of version 2."""
    return {
        "schema_version": 2,
        "environment": {
            "versions": {"python": "3.11", "qm_spec": "0.0", "torch": "0.0", "vllm": "0.0"},
            "platform": "Nowhere none",
            "cpu_model": "Made-up <processor>",
            "cpu_cores": 2,
            "device": "cpu",
            "dtype": "float32",
            "operators": "compiled",
        },
        "command": "qm-spec eval --made-up",
        "provenance": {"commit": "0" * 40, "seed": 0, "prompts": prompts, "prompts_sha256": "0" * 64, "repeats": 2},
        "runs": list(runs),
        "failures": list(failures),
    }
