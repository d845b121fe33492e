"""Run the same requests on several vLLM engines, one after the other in one process: its start is paid once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from qm_spec.bench.environment import engine_environment

PROGRAM = """
import gc, json, sys, traceback
job = json.load(open(sys.argv[1]))
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest
import vllm.v1.core.kv_cache_utils as cache
made = []
group = cache.get_kv_cache_groups
cache.get_kv_cache_groups = lambda *arguments: made.append(group(*arguments)) or made[-1]


def serve(llm, request):
    outputs = llm.generate(
        request["prompts"],
        SamplingParams(**{"ignore_eos": True, **request["sampling"]}),
        use_tqdm=False,
        lora_request=LoRARequest("adapter", 1, request["adapter"]) if "adapter" in request else None,
        priority=request.get("priority"),
    )
    if "prompt_logprobs" in request["sampling"]:
        return [
            [max(top.logprob for top in tops.values()) - tops[token].logprob if tops else 0
             for token, tops in zip(output.prompt_token_ids, output.prompt_logprobs)]
            for output in outputs
        ]
    return [list(output.outputs[0].token_ids) for output in outputs]


results = []
for engine in job["engines"]:
    results.append(result := {"error": None, "groups": 0, "answers": [], "counters": {}})
    try:
        made.clear()
        llm = LLM(enforce_eager=True, disable_log_stats=False, **{"dtype": "float32", **engine})
        result["groups"] = len(made[-1]) if made else 0
        result["answers"] = [serve(llm, request) for request in job["requests"]]
        for metric in llm.get_metrics():
            if isinstance(getattr(metric, "value", None), int | float):
                name = metric.name.removeprefix("vllm:").removeprefix("spec_decode_num_")
                result["counters"][name] = result["counters"].get(name, 0) + metric.value
        llm.llm_engine.engine_core.shutdown()
        del llm
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    json.dump(results, open(sys.argv[2], "w"))
    if result["error"]:
        break  # what is left of an engine that did not start stands in the way of the next
    gc.collect()
    cleanup_dist_env_and_memory()
"""


def run_engines(
    folder: Path, engines: list[dict[str, Any]], requests: list[dict[str, Any]], **environment: str
) -> list[dict[str, Any]]:
    """Return what each engine answered, or the error that ended it.

    Args:
        folder: for the files that are exchanged; the process's output is left there in `log`.
        engines: arguments of `vllm.LLM`; eager and in float32 unless they say otherwise.
        requests: dicts of `prompts` and `sampling`, and if wanted `adapter` (a folder) and `priority`.
        environment: variables of the process.

    Returns:
        For each engine, up to one with an error, a dict of `error`, `groups` of its KV cache, `counters`, and
        `answers`: for each request the token ids behind each prompt, or, with `prompt_logprobs`, for each
        token of a prompt how far its log-probability is below the most likely token's.
    """
    job, result, log = folder / "job.json", folder / "result.json", folder / "log"
    job.write_text(json.dumps({"engines": engines, "requests": requests}))
    with log.open("w") as stream:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(job), str(result)],
            env={**engine_environment("cpu"), "VLLM_CPU_KVCACHE_SPACE": "1", **environment},
            stdout=stream,
            stderr=subprocess.STDOUT,
            timeout=1800,
        )
    assert done.returncode == 0, log.read_text()[-4000:]
    results: list[dict[str, Any]] = json.loads(result.read_text())
    return results
