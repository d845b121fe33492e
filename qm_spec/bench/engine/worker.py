"""Measure shards on a vLLM engine; run as a module, it is the process of one method's engine.

`python -m qm_spec.bench.engine.worker JOB.json EVENTS.jsonl` reads a list of shards that share one engine
and appends one JSON object per line: `{"event": "ready"}`, then per shard
`{"event": "progress", "shard", "done", "total", "num_tokens"}` for every finished request and
`{"event": "result", "shard", "result"}`. Before each shard it waits for a line on its standard input, or its end.
vLLM is imported here and only by the functions that run it.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from qm_spec.bench.engine.metrics import DraftCounts
from qm_spec.bench.engine.process import end_with_parent
from qm_spec.bench.engine.shards import (
    EngineSpec,
    PassResult,
    RequestResult,
    ShardResult,
    ShardSpec,
    TokenPrompt,
)

# Takes the finished requests of a shard, all of them, and the output tokens of the finished ones.
OnProgress = Callable[[int, int, int], None]
# Long enough for every shape of the measured part to have been met once.
WARM_UP_TOKENS = 32


class StepEngine(Protocol):
    """The part of `vllm.v1.engine.llm_engine.LLMEngine` that a pass uses."""

    def add_request(self, request_id: str, prompt: Any, params: Any) -> Any:
        """Queue a request."""
        ...

    def step(self) -> Sequence[Any]:
        """Run the model once and return the `RequestOutput`s that it changed."""
        ...


@dataclass
class _Flight:
    """A request that the engine is working on; times are the clock's seconds, `arrival_s` those of the pass."""

    prompt: TokenPrompt
    started: float
    arrival_s: float
    first_token: float = 0.0
    last_token: float = 0.0
    num_steps: int = 0
    token_ids: list[int] = field(default_factory=list)

    def observe(self, token_ids: Sequence[int], now: float) -> None:
        """Take the output so far; a step that brought no token (a prefill chunk) is not counted."""
        if len(token_ids) == len(self.token_ids):
            return
        if not self.num_steps:
            self.first_token = now
        self.num_steps += 1
        self.last_token = now
        self.token_ids = list(token_ids)

    def result(self, output: Any) -> RequestResult:
        further = len(self.token_ids) - 1
        return RequestResult(
            prompt_id=self.prompt.prompt_id,
            token_ids=tuple(self.token_ids),
            num_steps=self.num_steps,
            ttft_s=self.first_token - self.started,
            tpot_s=(self.last_token - self.first_token) / further if further else None,
            counts=request_counts(output),
            arrival_s=self.arrival_s,
            finish_reason=getattr(output, "finish_reason", None),
        )


def run_requests(
    engine: StepEngine,
    prompts: Sequence[TokenPrompt],
    sampling: Callable[[int], Any],
    concurrency: int,
    *,
    on_finished: Callable[[RequestResult], None] = lambda result: None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[float, tuple[RequestResult, ...]]:
    """Decode `prompts` with `concurrency` of them in flight; a finished one makes room for the next.

    A prompt with a time of arrival is handed in no sooner, and its waiting for room counts as its own.

    Args:
        sampling: the sampling parameters of prompt number i.
        on_finished: called with each finished request.

    Returns:
        Wall seconds, and the results in the order of `prompts`.
    """
    waiting = deque(sorted(range(len(prompts)), key=lambda number: prompts[number].arrival_s or 0.0))
    flights: dict[str, _Flight] = {}
    results: dict[int, RequestResult] = {}
    begin = clock()
    while waiting or flights:
        while waiting and len(flights) < concurrency:
            now, due = clock(), prompts[waiting[0]].arrival_s
            started = now if due is None else begin + due
            if started > now:
                if flights:
                    break
                sleep(started - now)
            number = waiting.popleft()
            flights[str(number)] = _Flight(prompts[number], started, started - begin)
            prompt = {"prompt_token_ids": list(prompts[number].token_ids)}
            engine.add_request(str(number), prompt, sampling(number))
        outputs = engine.step()
        now = clock()
        for output in outputs:
            flights[output.request_id].observe(output.outputs[0].token_ids, now)
            if output.finished:
                result = flights.pop(output.request_id).result(output.outputs[0])
                results[int(output.request_id)] = result
                on_finished(result)
    return clock() - begin, tuple(results[number] for number in range(len(prompts)))


def open_engine(spec: EngineSpec) -> Any:
    """Start a vLLM engine in this process and return its `vllm.LLM`."""
    from vllm import LLM
    from vllm.platforms import current_platform

    from qm_spec.integrations.vllm_plugin import compat
    from qm_spec.integrations.vllm_plugin.patches.cpu_seeds import CPU_SEEDS

    if current_platform.is_cpu():
        # Sampled requests have seeds here, and vLLM's own engine ends at one with a long prompt.
        compat.apply(CPU_SEEDS)
    return LLM(
        model=spec.target,
        dtype=spec.dtype,
        max_model_len=spec.max_model_len,
        max_num_seqs=spec.max_num_seqs,
        enforce_eager=spec.enforce_eager,
        seed=spec.seed,
        speculative_config=spec.speculative_config,
        # Every prompt is decoded several times and must be computed each time.
        enable_prefix_caching=False,
        # The counters are part of the statistics.
        disable_log_stats=False,
        **_memory(spec),
        per_request_spec_decode_metrics="summary" if spec.speculative_config else "none",
    )


def _memory(spec: EngineSpec) -> dict[str, Any]:
    """Return vLLM's settings of memory, those that are left to it not among them."""
    settings = {"kv_cache_memory_bytes": spec.kv_cache_bytes, "gpu_memory_utilization": spec.gpu_memory_share}
    return {name: value for name, value in settings.items() if value is not None}


def read_counts(llm: Any) -> DraftCounts:
    """Return vLLM's speculation counters since the engine started; zeros where it does not speculate."""
    values: dict[str, Any] = {}
    for metric in llm.get_metrics():
        if metric.name.startswith("vllm:spec_decode_"):
            # The count per position is vLLM's only vector among its scalar counters.
            value = metric.values if hasattr(metric, "values") else metric.value
            values[metric.name.removeprefix("vllm:spec_decode_")] = value
    return DraftCounts(
        drafts=values.get("num_drafts", 0),
        draft_tokens=values.get("num_draft_tokens", 0),
        accepted_tokens=values.get("num_accepted_tokens", 0),
        accepted_per_position=tuple(values.get("num_accepted_tokens_per_pos", ())),
    )


def request_counts(output: Any) -> DraftCounts:
    """Return vLLM's speculation counts of one finished output; zeros where it does not speculate."""
    metrics = getattr(output, "spec_decode_metrics", None)
    if metrics is None:
        return DraftCounts()
    # histogram[j]: drafts of which exactly j tokens were kept.
    histogram = metrics.histogram
    kept = tuple(sum(histogram[position:]) for position in range(1, len(histogram)))
    return DraftCounts(sum(histogram), metrics.num_draft_tokens, sum(kept), kept)


def evaluate_shard(
    spec: ShardSpec, llm: Any = None, on_progress: OnProgress = lambda done, total, num_tokens: None
) -> ShardResult:
    """Measure one shard: a warm-up, then `spec.repeats` passes over its prompts.

    Args:
        llm: a running `vllm.LLM` for `spec.engine`; None starts one.
        on_progress: see `OnProgress`; it hears of the measured passes.
    """
    from vllm import SamplingParams

    llm = open_engine(spec.engine) if llm is None else llm
    total = spec.repeats * len(spec.prompts)
    done = num_tokens = 0

    def finished(result: RequestResult) -> None:
        nonlocal done, num_tokens
        done += 1
        num_tokens += len(result.token_ids)
        on_progress(done, total, num_tokens)

    def sampling(max_tokens: int) -> Callable[[int], Any]:
        return lambda number: SamplingParams(
            temperature=spec.temperature,
            max_tokens=max_tokens,
            # Greedy decoding draws nothing, and a seed there would only cost a generator per request.
            seed=spec.seed + number if spec.temperature else None,
            ignore_eos=not spec.stop_at_eos,
            detokenize=False,
        )

    if spec.warm_up:
        # The longest ones: no prompt after them is the first of its size.
        longest = sorted(spec.prompts, key=lambda prompt: len(prompt.token_ids), reverse=True)[: spec.concurrency]
        first = [replace(prompt, arrival_s=None) for prompt in longest]
        run_requests(llm.llm_engine, first, sampling(min(WARM_UP_TOKENS, spec.max_tokens)), spec.concurrency)
    passes = []
    for _ in range(spec.repeats):
        before = read_counts(llm)
        elapsed_s, requests = run_requests(
            llm.llm_engine, spec.prompts, sampling(spec.max_tokens), spec.concurrency, on_finished=finished
        )
        passes.append(PassResult(elapsed_s, read_counts(llm) - before, requests))
    model = llm.llm_engine.model_config
    device = llm.llm_engine.vllm_config.device_config.device_type
    return ShardResult(str(device), str(model.dtype).removeprefix("torch."), tuple(passes))


def main(
    job: Path,
    events: Path,
    open_engine: Callable[[EngineSpec], Any] = open_engine,
    evaluate_shard: Callable[[ShardSpec, Any, OnProgress], ShardResult] = evaluate_shard,
) -> None:
    """Run the shards that `job` lists on one engine and append what happens to `events`."""
    shards = [ShardSpec.from_json(fields) for fields in json.loads(job.read_text())]
    with events.open("a", buffering=1) as stream:

        def emit(**event: Any) -> None:
            stream.write(json.dumps(event) + "\n")

        engine = open_engine(shards[0].engine)
        emit(event="ready")
        for number, shard in enumerate(shards):
            sys.stdin.readline()

            def progress(done: int, total: int, num_tokens: int, number: int = number) -> None:
                emit(event="progress", shard=number, done=done, total=total, num_tokens=num_tokens)

            result = evaluate_shard(shard, engine, progress)
            emit(event="result", shard=number, result=result.to_json())


if __name__ == "__main__":
    end_with_parent()
    main(Path(sys.argv[1]), Path(sys.argv[2]))
