"""An engine without a model, for tests of what starts engines: output token i of a prompt is its first token plus i.

Plain decoding takes twice as long as any other method. `FAULTS.json` beside this script's copy says how an engine
misbehaves, by method:

- "crash", "kill": as soon as it is ready; "crash later": before its fourth shard; "crash at 3": at a prompt that
  begins with token 3; "crash second process": where it has been started before
- "kill at N": by SIGKILL at its N-th moment, of four for each shard: before and behind measuring it, in the middle of
  telling its result, and behind that
- "hang": in its third shard, or the last of fewer; "wait": before its second shard, until the file `go` is there
- "differ": other tokens; "flaky": other tokens in each process; "slow first process": ten times slower

and under "all": "slow start", ten times slower in the first six shards of all engines together. Each start leaves a
line "METHOD PID PARENT FIRST-PROMPT" in `starts`, each measured shard "METHOD PROMPT,... PID" in `turns`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from qm_spec.bench.engine.metrics import DraftCounts
from qm_spec.bench.engine.process import end_with_parent
from qm_spec.bench.engine.shards import PassResult, RequestResult, ShardResult, ShardSpec

FOLDER = Path(__file__).parent
SLOW = 10


def lines(name):
    file = FOLDER / name
    return file.read_text().splitlines() if file.exists() else []


def method_of(shard):
    """Tell n-gram lookups, which differ in their number alone, and drafters, which differ in their folder."""
    config = shard.engine.speculative_config
    if config is None:
        return "none"
    return "ngram-16" if config.get("num_speculative_tokens") == 16 else config["method"]


def request(prompt, spec, drafts, shift, pace):
    """Accept half of what is drafted; the number of drafts differs from prompt to prompt."""
    counts = DraftCounts(drafts, 2 * drafts, drafts, (drafts, 0) if drafts else ())
    token_ids = tuple(shift + prompt.token_ids[0] + i for i in range(spec.max_tokens))
    return RequestResult(prompt.prompt_id, token_ids, spec.max_tokens, 0.01 * pace, 0.002 * pace, counts, 0.0)


def decode(spec, method, shift=0, pace=1):
    drafts = 0 if method == "none" else 1
    pace *= 2 if method == "none" else 1
    requests = tuple(request(one, spec, drafts * (1 + one.token_ids[0]), shift, pace) for one in spec.prompts)
    counts = sum((one.counts for one in requests), DraftCounts())
    return PassResult(1.0 * pace * len(requests), counts, requests)


def main() -> None:
    end_with_parent()
    shards = [ShardSpec.from_json(fields) for fields in json.loads(Path(sys.argv[1]).read_text())]
    method = method_of(shards[0])
    faults = FOLDER / "FAULTS.json"
    faults = json.loads(faults.read_text()) if faults.exists() else {}
    fault = faults.get(method)
    num_starts = sum(line.split()[0] == method for line in lines("starts"))
    with (FOLDER / "starts").open("a") as starts:
        starts.write(f"{method} {os.getpid()} {os.getppid()} {shards[0].prompts[0].prompt_id}\n")
    moments = int(fault.removeprefix("kill at ")) if fault and fault.startswith("kill at ") else 0

    def moment():
        nonlocal moments
        moments -= 1
        return not moments

    print("engine of", method, json.dumps(shards[0].engine.speculative_config), flush=True)
    with open(sys.argv[2], "a", buffering=1) as events:

        def emit(**event):
            print(json.dumps(event), file=events)

        emit(event="ready")

        def die_at_a_moment():
            if moment():
                os.kill(os.getpid(), signal.SIGKILL)

        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "crash" or (fault == "crash second process" and num_starts):
            raise SystemExit("no such layer")
        for number, shard in enumerate(shards):
            sys.stdin.readline()
            die_at_a_moment()
            if fault == "crash at 3" and shard.repeats and any(one.token_ids[0] == 3 for one in shard.prompts):
                raise SystemExit("no such layer")
            if fault == "crash later" and number == 3:
                raise SystemExit("out of memory")
            while fault == "wait" and number and not (FOLDER / "go").exists():
                time.sleep(0.02)
            pace = SLOW if fault == "slow first process" and not num_starts else 1
            if shard.repeats:
                if faults.get("all") == "slow start" and len(lines("turns")) < 6:
                    pace = SLOW
                with (FOLDER / "turns").open("a") as turns:
                    turns.write(f"{method} {','.join(one.prompt_id for one in shard.prompts)} {os.getpid()}\n")
                emit(event="progress", shard=number, done=1, total=len(shard.prompts), num_tokens=shard.max_tokens)
            if fault == "hang" and number == min(2, len(shards) - 1):
                time.sleep(600)
            shift = {"differ": 7, "flaky": 1000 * num_starts}.get(fault, 0)
            result = ShardResult("cpu", shard.engine.dtype, (decode(shard, method, shift, pace),) * shard.repeats)
            die_at_a_moment()
            if moment():
                half = json.dumps({"event": "result", "shard": number, "result": result.to_json()})
                events.write(half[: len(half) // 2])
                events.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            emit(event="result", shard=number, result=result.to_json())
            die_at_a_moment()


if __name__ == "__main__":
    main()
