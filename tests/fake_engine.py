"""An engine without a model, for tests of what starts engines: output token i of a prompt is its first token plus i.

`FAULTS.json` beside this script's copy says how it misbehaves, by method: "crash", "hang", or "wait", which lasts until
the file `go` is there. Each start leaves a line "METHOD PID PARENT FIRST-PROMPT" in `starts`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from qm_spec.evaluation.metrics import DraftCounts
from qm_spec.evaluation.process import end_with_parent
from qm_spec.evaluation.shards import PassResult, RequestResult, ShardResult, ShardSpec

FOLDER = Path(__file__).parent


def request(prompt, spec, drafts):
    """Accept half of what is drafted; the number of drafts differs from prompt to prompt."""
    counts = DraftCounts(drafts, 2 * drafts, drafts, (drafts, 0) if drafts else ())
    token_ids = tuple(prompt.token_ids[0] + i for i in range(spec.max_tokens))
    return RequestResult(prompt.prompt_id, token_ids, spec.max_tokens, 0.01, 0.002, counts, 0.0)


def decode(spec, method):
    drafts = 0 if method == "none" else 1
    requests = tuple(request(one, spec, drafts * (1 + one.token_ids[0])) for one in spec.prompts)
    counts = sum((one.counts for one in requests), DraftCounts())
    elapsed_s = (2.0 if method == "none" else 1.0) * len(requests)
    return PassResult(elapsed_s, counts, requests)


def main() -> None:
    end_with_parent()
    shards = [ShardSpec.from_json(fields) for fields in json.loads(Path(sys.argv[1]).read_text())]
    method = (shards[0].engine.speculative_config or {"method": "none"})["method"]
    faults = FOLDER / "FAULTS.json"
    fault = json.loads(faults.read_text()).get(method) if faults.exists() else None
    with (FOLDER / "starts").open("a") as starts:
        starts.write(f"{method} {os.getpid()} {os.getppid()} {shards[0].prompts[0].prompt_id}\n")
    with open(sys.argv[2], "a", buffering=1) as events:

        def emit(**event):
            print(json.dumps(event), file=events)

        emit(event="ready")
        for number, shard in enumerate(shards):
            if fault == "crash" or (fault == "crash at 3" and any(one.token_ids[0] == 3 for one in shard.prompts)):
                raise SystemExit("no such layer")
            if fault == "hang":
                time.sleep(600)
            while fault == "wait" and number and not (FOLDER / "go").exists():
                time.sleep(0.02)
            emit(event="progress", shard=number, done=1, total=len(shard.prompts), num_tokens=shard.max_tokens)
            result = ShardResult("cpu", shard.engine.dtype, (decode(shard, method),) * shard.repeats)
            emit(event="result", shard=number, result=result.to_json())


if __name__ == "__main__":
    main()
