"""Speed over the length of the context, in vLLM: plain decoding, n-gram lookup and drafters on the same prompts.

Every method has an engine of its own, and all of them run at once: each prompt is decoded by one after the other before
the next prompt, so that a machine whose speed drifts changes all methods alike. Each pass has new engines, since where
a process finds its memory changes its speed by some per cent for as long as it lives. Engines run as `vllm serve` runs
them, in processes of their own, so that times are those of users.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qm_spec.discovery import is_drafter, vllm_settings
from qm_spec.drafter.suffix_index import MOST_LIKELY
from qm_spec.evaluation.environment import AS_SERVED, default_device
from qm_spec.evaluation.methods import method_environment, speculative_config
from qm_spec.evaluation.metrics import DraftCounts, compare_outputs
from qm_spec.evaluation.process import ENGINE_COMMAND, engine_events
from qm_spec.evaluation.settings import REFERENCE_METHOD
from qm_spec.evaluation.shards import EngineSpec, RequestResult, ShardResult, ShardSpec, TokenPrompt
from qm_spec.evaluation.statistics import Estimate, Floats, Resamples

NGRAM = "ngram"
# The same with as many tokens as ours looks up.
LONG_NGRAM = f"{NGRAM}-{MOST_LIKELY}"
# Threads of an engine that has just ended wait for more work this long, and longer, at full speed.
REST_S = 1.2


@dataclass(frozen=True)
class LongSpeedRow:
    """One method at one length.

    Attributes:
        context: tokens of each prompt.
        method: "none", "ngram", "ngram-16" or a drafter's name.
        tokens_per_s: output tokens by wall time, prefill included; of every prompt its median pass.
        speedup: over "none", with an interval over prompts.
        decode_speedup: the same of the time after the first token.
        ttft_ms: median time to the first token.
        ttft_overhead_ms: over that of "none", median of the differences on the same prompt in the same pass.
        acceptance_length: None where nothing was drafted.
        identical: whether every output is that of "none".
        ttft_s, latency_s: of each request, pass by pass, in each the prompts in turn.
    """

    context: int
    method: str
    tokens_per_s: float
    speedup: Estimate
    decode_speedup: Estimate
    ttft_ms: float
    ttft_overhead_ms: float
    acceptance_length: float | None
    identical: bool
    ttft_s: tuple[float, ...]
    latency_s: tuple[float, ...]

    def over(self, other: LongSpeedRow, repeats: int) -> Estimate:
        """Estimate how many times as fast as another method it is, prompt by prompt, of every prompt the median pass.

        Args:
            other: of the same prompts.
            repeats: passes that both rows are of.
        """
        return _times_as_fast(_medians(self.latency_s, repeats), _medians(other.latency_s, repeats))

    def delay_ms(self, plain: LongSpeedRow, repeats: int) -> Estimate:
        """Estimate how much later its first tokens come than those of "none": of every pass the median, then the mean.

        The interval is over passes, which differ in their engines.
        """
        delays = self._delays_ms(plain, repeats)
        estimate = Resamples({"delay": delays, "passes": np.ones_like(delays)}).share("delay", "passes")
        # There is a pass.
        assert estimate is not None
        return estimate

    def delay_share(self, other: LongSpeedRow, plain: LongSpeedRow, repeats: int) -> Estimate | None:
        """Estimate `delay_ms` by that of another method; None where the other's first tokens are no later."""
        delays = {"ours": self._delays_ms(plain, repeats), "theirs": other._delays_ms(plain, repeats)}
        return Resamples(delays).share("ours", "theirs")

    def _delays_ms(self, plain: LongSpeedRow, repeats: int) -> Floats:
        """Of every pass the median over its prompts."""
        return 1000 * np.median(np.reshape(np.subtract(self.ttft_s, plain.ttft_s), (repeats, -1)), axis=1)


def measure_speed(
    target: Path,
    drafters: Mapping[str, Path],
    prompts: Mapping[int, Sequence[Sequence[int]]],
    log_dir: Path,
    *,
    num_tokens: int,
    num_drafts: int,
    ngram: bool = True,
    repeats: int = 3,
    seed: int = 0,
    rest_s: float = REST_S,
    on_progress: Callable[[int, str], None] = lambda context, method: None,
    command: Sequence[str] = ENGINE_COMMAND,
) -> Iterator[list[LongSpeedRow]]:
    """Yield the rows after each pass, of all passes so far: by length, "none" and the n-gram lookups first.

    Args:
        target: folder of the target, decoded greedily in float32.
        drafters: folders by name, EAGLE-3 in vLLM's format or ours, which draft as many tokens as they do for a user
            who names no number.
        prompts: token ids of the prompts, by their length; in each pass the first of a length is decoded once more,
            before any time is taken.
        log_dir: takes the engines' logs of the latest pass.
        num_tokens: of each output.
        num_drafts: K of EAGLE-3 and n-gram lookup; "ngram-16" has 16.
        ngram: whether the two n-gram lookups run.
        repeats: measured passes.
        seed: of the engine.
        rest_s: seconds before each prompt, in which the engine before it falls silent.
        on_progress: called with length and method for each decoded prompt.
        command: of the engines; see `engine_events`.

    Raises:
        EngineError: an engine failed.
    """
    device = default_device()
    configs: dict[str, dict[str, Any] | None] = {REFERENCE_METHOD: None}
    if ngram:
        configs[NGRAM] = speculative_config(NGRAM, num_drafts, None)
        configs[LONG_NGRAM] = speculative_config(NGRAM, MOST_LIKELY, None)
    for name, folder in drafters.items():
        eagle3 = {"method": "eagle3", "model": str(folder), "num_speculative_tokens": num_drafts}
        configs[name] = vllm_settings(folder, None) if is_drafter(folder) else eagle3
    methods = tuple(configs)
    specs = {
        method: EngineSpec(
            target=str(target),
            speculative_config=config,
            dtype="float32",
            max_model_len=max(prompts) + num_tokens + max(num_drafts, MOST_LIKELY) + 1,
            max_num_seqs=1,
            enforce_eager=device == "cpu",
            seed=seed,
        )
        for method, config in configs.items()
    }
    results: dict[tuple[int, str], list[RequestResult]] = {
        (length, method): [] for length in prompts for method in methods
    }
    for _ in range(repeats):
        with ExitStack() as stack:
            engines: dict[str, _Engine] = {}
            for method, spec in specs.items():
                work = stack.enter_context(tempfile.TemporaryDirectory(prefix="qm_spec-"))
                log, environment = log_dir / f"{method}.log", {**method_environment(method, device), **AS_SERVED}
                events = engine_events(_shards(spec, prompts, num_tokens), Path(work), log, environment, command)
                engines[method] = _Engine(stack.enter_context(closing(events)))
                engines[method].wait_for("ready")
            for length, some in prompts.items():
                # The first is the warm-up.
                for number in range(1 + len(some)):
                    # In turn forwards and backwards: nobody always comes after the same one.
                    for method in methods if number % 2 else reversed(methods):
                        time.sleep(rest_s)
                        one = ShardResult.from_json(engines[method].wait_for("result")["result"])
                        if number:
                            results[length, method] += one.passes[0].requests
                            on_progress(length, method)
        yield [
            _row(length, method, some, results[length, REFERENCE_METHOD], len(prompts[length]))
            for (length, method), some in results.items()
        ]


@dataclass(frozen=True)
class _Engine:
    events: Generator[dict[str, Any]]

    def wait_for(self, kind: str) -> dict[str, Any]:
        """Let the engine go on to its next event of this kind."""
        return next(event for event in self.events if event["event"] == kind)


def _shards(engine: EngineSpec, prompts: Mapping[int, Sequence[Sequence[int]]], num_tokens: int) -> list[ShardSpec]:
    """One prompt each: of every length the first for warm-up, then all."""
    shards = []
    for length, some in prompts.items():
        for number in (0, *range(len(some))):
            prompt = TokenPrompt(f"{length}-{number}", tuple(some[number]))
            shards.append(ShardSpec(engine, (prompt,), num_tokens, 0.0, 1, engine.seed, 1, warm_up=False))
    return shards


def _row(
    context: int, method: str, ours: Sequence[RequestResult], plain: Sequence[RequestResult], num_prompts: int
) -> LongSpeedRow:
    """Make the row of what a method did with the prompts of one length: pass by pass, in each the prompts in turn."""
    repeats = len(ours) // num_prompts
    outputs = [one.token_ids for one in ours]
    latency_s = tuple(one.latency_s for one in ours)

    def times_as_fast(seconds: Callable[[RequestResult], float]) -> Estimate:
        mine, theirs = (_medians([seconds(one) for one in some], repeats) for some in (ours, plain))
        return _times_as_fast(mine, theirs)

    return LongSpeedRow(
        context=context,
        method=method,
        tokens_per_s=sum(map(len, outputs[:num_prompts])) / float(_medians(latency_s, repeats).sum()),
        speedup=times_as_fast(lambda one: one.latency_s),
        decode_speedup=times_as_fast(lambda one: one.latency_s - one.ttft_s),
        ttft_ms=1000 * statistics.median(one.ttft_s for one in ours),
        ttft_overhead_ms=1000
        * statistics.median(one.ttft_s - other.ttft_s for one, other in zip(ours, plain, strict=True)),
        acceptance_length=sum((one.counts for one in ours), DraftCounts()).acceptance_length,
        identical=compare_outputs(outputs, [one.token_ids for one in plain]).num_prompts == 0,
        ttft_s=tuple(one.ttft_s for one in ours),
        latency_s=latency_s,
    )


def _medians(values: Sequence[float], repeats: int) -> Floats:
    """Of every prompt the median of its passes."""
    return np.median(np.reshape(values, (repeats, -1)), axis=0)


def _times_as_fast(ours: Floats, theirs: Floats) -> Estimate:
    estimate = Resamples({"ours": ours, "theirs": theirs}).ratio({"theirs": 1, "ours": -1})
    # Times are positive.
    assert estimate is not None
    return estimate
