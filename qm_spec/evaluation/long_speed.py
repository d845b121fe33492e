"""Speed over the length of the context, in vLLM: plain decoding, n-gram lookup and drafters on the same prompts."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qm_spec.evaluation.environment import default_device
from qm_spec.evaluation.methods import method_environment, speculative_config
from qm_spec.evaluation.metrics import compare_outputs
from qm_spec.evaluation.process import run_engine
from qm_spec.evaluation.settings import REFERENCE_METHOD
from qm_spec.evaluation.shards import EngineSpec, ShardResult, ShardSpec, TokenPrompt

NGRAM = "ngram"


@dataclass(frozen=True)
class LongSpeedRow:
    """One method at one length.

    Attributes:
        context: tokens of each prompt.
        method: "none", "ngram" or a drafter's name.
        tokens_per_s: output tokens by wall time, prefill included; median of the passes.
        speedup: over "none".
        decode_speedup: of the time per token after the first.
        ttft_ms: median time to the first token.
        ttft_overhead_ms: over that of "none".
        acceptance_length: None where nothing was drafted.
        identical: whether every output is that of "none".
    """

    context: int
    method: str
    tokens_per_s: float
    speedup: float
    decode_speedup: float
    ttft_ms: float
    ttft_overhead_ms: float
    acceptance_length: float | None
    identical: bool


def measure_speed(
    target: Path,
    drafters: Mapping[str, Path],
    prompts: Mapping[int, Sequence[Sequence[int]]],
    log_dir: Path,
    *,
    num_tokens: int,
    num_drafts: int,
    repeats: int = 3,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] = lambda method, done, total: None,
) -> Iterator[list[LongSpeedRow]]:
    """Yield the rows of each method, "none" and "ngram" first; every method has an engine of its own.

    Args:
        target: folder of the target, decoded greedily in float32.
        drafters: folders by name, ours or EAGLE-3 in vLLM's format.
        prompts: token ids of the prompts, by their length.
        log_dir: takes the engines' logs.
        num_tokens: of each output.
        num_drafts: K.
        repeats: measured passes.
        seed: of the engine.
        on_progress: called with method, finished and expected requests.

    Raises:
        EngineError: an engine failed.
    """
    device = default_device()
    reference: list[ShardResult] = []
    for method in (REFERENCE_METHOD, NGRAM, *drafters):
        folder = drafters.get(method)
        config: dict[str, Any] | None = speculative_config(method, num_drafts, None) if folder is None else {
            "method": "eagle3",
            "model": str(folder),
            "num_speculative_tokens": num_drafts,
        }  # fmt: skip
        engine = EngineSpec(
            target=str(target),
            speculative_config=config,
            dtype="float32",
            max_model_len=max(prompts) + num_tokens + num_drafts + 1,
            max_num_seqs=1,
            enforce_eager=device == "cpu",
            seed=seed,
        )
        shards = [
            ShardSpec(
                engine=engine,
                prompts=tuple(TokenPrompt(f"{length}-{i}", tuple(ids)) for i, ids in enumerate(some)),
                max_tokens=num_tokens,
                temperature=0.0,
                concurrency=1,
                seed=seed,
                repeats=repeats,
            )
            for length, some in prompts.items()
        ]
        results: list[ShardResult] = []
        total = repeats * sum(map(len, prompts.values()))

        def listen(
            event: dict[str, Any], results: list[ShardResult] = results, method: str = method, total: int = total
        ) -> None:
            if event["event"] == "result":
                results.append(ShardResult.from_json(event["result"]))
                on_progress(method, total * len(results) // len(prompts), total)

        with tempfile.TemporaryDirectory(prefix="qm_spec-") as work:
            run_engine(shards, Path(work), log_dir / f"{method}.log", method_environment(method, device), listen)
        reference = reference or results
        yield [
            _row(length, method, result, plain)
            for length, result, plain in zip(prompts, results, reference, strict=True)
        ]


def _row(context: int, method: str, result: ShardResult, plain: ShardResult) -> LongSpeedRow:
    ours, theirs = result.median_pass, plain.median_pass
    ttft, plain_ttft = _first_token_ms(result), _first_token_ms(plain)
    return LongSpeedRow(
        context=context,
        method=method,
        tokens_per_s=ours.output_tokens_per_s,
        speedup=ours.output_tokens_per_s / theirs.output_tokens_per_s,
        decode_speedup=_decode_s(plain) / _decode_s(result),
        ttft_ms=ttft,
        ttft_overhead_ms=ttft - plain_ttft,
        acceptance_length=ours.counts.acceptance_length,
        identical=compare_outputs(ours.outputs, theirs.outputs).num_prompts == 0,
    )


def _first_token_ms(result: ShardResult) -> float:
    return 1000 * statistics.median(request.ttft_s for one in result.passes for request in one.requests)


def _decode_s(result: ShardResult) -> float:
    """Seconds per token after the first, median over requests and passes."""
    return statistics.median(request.tpot_s or 0.0 for one in result.passes for request in one.requests)
