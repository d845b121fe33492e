"""Run requests on a vLLM engine in a process of its own."""

import json
import subprocess
import sys

from qm_spec.bench.environment import engine_environment

# Run in a process of its own: an engine leaves threads and global state behind.
OFFLINE = """
import json, sys
job = json.load(open(sys.argv[1]))
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
llm = LLM(dtype="float32", enforce_eager=True, disable_log_stats=False, **job["engine"])
answers, errors, counters = [], [], []
for request in job["requests"]:
    sampling = SamplingParams(ignore_eos=True, **request["sampling"])
    try:
        outputs = llm.generate(request["prompts"], sampling, use_tqdm=False)
        answers.append([list(output.outputs[0].token_ids) for output in outputs])
        errors.append(None)
    except VLLMValidationError as error:
        answers.append(None)
        errors.append(str(error))
    counters.append({m.name: getattr(m, "value", None) for m in llm.get_metrics() if "spec_decode" in m.name})
json.dump({"answers": answers, "errors": errors, "counters": counters}, open(sys.argv[2], "w"))
"""


def run_offline(folder, engine, requests, program=OFFLINE):
    """Return the token ids, the error and vLLM's counters so far of each request.

    Args:
        folder: for the files that are exchanged.
        engine: arguments of `vllm.LLM`.
        requests: dicts of `prompts` (texts, or dicts of `prompt_token_ids`) and `sampling` parameters.
        program: what the process runs.
    """
    job, result = folder / "job.json", folder / "result.json"
    job.write_text(json.dumps({"engine": engine, "requests": requests}))
    done = subprocess.run(
        [sys.executable, "-c", program, str(job), str(result)],
        env=engine_environment("cpu"),
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(result.read_text())
