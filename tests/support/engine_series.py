"""Run requests on several vLLM engines, one after the other in one process, and return all that comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.offline_engine import run_offline

# An engine in eager mode starts in two seconds where another one has run before it. Compiled ones need a process each:
# what is left of the engine before is collected while torch traces, and the process ends.
SERIES = """
import json, sys
job = json.load(open(sys.argv[1]))
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

COUNTED = ("spec_decode", "preemptions", "prefix_cache")


def sampling(settings):
    settings = dict(settings)
    if "structured_outputs" in settings:
        settings["structured_outputs"] = StructuredOutputsParams(**settings["structured_outputs"])
    kind = RequestOutputKind[settings.pop("output_kind", "FINAL_ONLY")]
    # It reads the keys of `logit_bias`, which JSON has made texts.
    return SamplingParams.from_optional(output_kind=kind, **settings)


def values(logprobs):
    # Of each position, by token.
    return None if logprobs is None else [
        None if position is None else {token: entry.logprob for token, entry in position.items()}
        for position in logprobs
    ]


def told(output):
    return {
        "prompt_logprobs": values(output.prompt_logprobs),
        "outputs": [
            {
                "index": one.index,
                "token_ids": list(one.token_ids),
                "text": one.text,
                "logprobs": values(one.logprobs),
                "finish_reason": one.finish_reason,
                "stop_reason": one.stop_reason,
            }
            for one in output.outputs
        ],
    }


def run(engine, name, batch):
    requests = batch["requests"]
    arrivals = batch.get("arrivals") or [0] * len(requests)
    aborts = {int(number): step for number, step in batch.get("aborts", {}).items()}
    answers, refused, step = [[] for _ in requests], [None] * len(requests), 0
    while step <= max(arrivals) or engine.has_unfinished_requests():
        for number, (prompt, settings) in enumerate(requests):
            if arrivals[number] == step:
                prompt = {"prompt_token_ids": prompt} if isinstance(prompt, list) else prompt
                try:
                    engine.add_request(f"{name}.{number}", prompt, sampling(settings))
                except VLLMValidationError as error:
                    refused[number] = str(error)
            if aborts.get(number) == step:
                engine.abort_request([f"{name}.{number}"])
        for output in engine.step():
            answers[int(output.request_id.rpartition(".")[2])].append(told(output))
        step += 1
    return {"answers": answers, "refused": refused}


def start(settings, batches):
    llm = LLM(**{"dtype": "float32", "enforce_eager": True, "disable_log_stats": False, **settings})
    engine = llm.llm_engine
    cache = llm.llm_engine.vllm_config.cache_config
    result = {"num_blocks": cache.num_gpu_blocks, "block_size": cache.block_size, "batches": []}
    pool = engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    for number, batch in enumerate(batches):
        done = run(engine, str(number), batch)
        metrics = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
        done["counters"] = {k: v for k, v in metrics.items() if any(name in k for name in COUNTED)}
        # What a request held may be given back with the next schedule.
        engine.step()
        done["pages_lost"] = free - pool.get_num_free_blocks()
        result["batches"].append(done)
    engine.engine_core.shutdown()
    return result


results = {}
for one in job["requests"]:
    try:
        results[one["name"]] = start(one["engine"], one["batches"])
    except (ValueError, VLLMValidationError) as error:
        results[one["name"]] = {"error": str(error)}
    cleanup_dist_env_and_memory()
json.dump(results, open(sys.argv[2], "w"))
"""


def run_series(folder: Path, engines: dict[str, dict[str, Any]], batches: Any, common: dict[str, Any]) -> Any:
    """Return by engine its pages, and of each batch the answers, vLLM's counters so far and the pages not given back.

    Args:
        folder: for the files that are exchanged.
        engines: by name, what `vllm.LLM` is given beside `common`; its `batches`, where there are some, are its own.
        batches: those of every other engine: dicts of `requests`, pairs of a prompt (text or token ids) and sampling
            settings. `arrivals` says at which step each comes, `aborts` by its number when one is aborted.
        common: arguments of all engines.

    Each answer is a list of what vLLM handed out, one where it is not streamed. An engine that does not start has its
    `error` alone.
    """
    jobs = [
        {
            "name": name,
            "engine": {**common, **{key: value for key, value in engine.items() if key != "batches"}},
            "batches": engine.get("batches", batches),
        }
        for name, engine in engines.items()
    ]
    return run_offline(folder, {}, jobs, SERIES)


def texts(batch: Any) -> list[list[list[int]]]:
    """Return the token ids of each request's outputs, where they are not streamed."""
    return [[output["token_ids"] for output in answer[-1]["outputs"]] for answer in batch["answers"] if answer]
