"""Speed over the length of the context: engines (played by a script) take turns, and what is made of their times."""

from __future__ import annotations

import sys

import pytest

from qm_spec.evaluation.long_speed import measure_speed
from qm_spec.evaluation.process import EngineError
from qm_spec.evaluation.statistics import Estimate

# "none" takes 1 s a token and 4 s for the first; "ngram" half of it, in its first process ten times as much; "slow" has
# other tokens and takes 8 s for the first. Each shard leaves a line in `turns`.
ENGINE = """
import json, os, sys
from pathlib import Path
from qm_spec.evaluation.metrics import DraftCounts
from qm_spec.evaluation.shards import PassResult, RequestResult, ShardResult, ShardSpec

shards = [ShardSpec.from_json(fields) for fields in json.loads(Path(sys.argv[1]).read_text())]
config = shards[0].engine.speculative_config
method = "none" if config is None else config.get("model", config["method"])
if method == "ngram" and config["num_speculative_tokens"] == 16:
    method = "ngram-16"
events = open(sys.argv[2], "a", buffering=1)
emit = lambda **event: print(json.dumps(event), file=events)
emit(event="ready")
is_first = method == "ngram" and not Path("started").exists()
if is_first:
    Path("started").touch()
for number, shard in enumerate(shards):
    sys.stdin.readline()
    (prompt,) = shard.prompts
    if method == "broken" and number:
        raise SystemExit("no such layer")
    with open("turns", "a") as turns:
        print(method, prompt.prompt_id, os.getpid(), os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"], file=turns)
    first, further = {"none": (4.0, 1.0), "ngram": (2.0, 0.5)}.get(method.removesuffix("-16"), (8.0, 1.0))
    if is_first:
        further *= 10
    start = prompt.token_ids[0] + (method == "slow")
    counts = DraftCounts() if method == "none" else DraftCounts(2, 8, 3, (2, 1, 0, 0))
    request = RequestResult(prompt.prompt_id, tuple(range(start, start + 5)), 5, first, further, counts, 0.0)
    result = ShardResult("cpu", "float32", (PassResult(first + 4 * further, counts, (request,)),))
    emit(event="result", shard=number, result=result.to_json())
"""


@pytest.fixture
def measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def measure(drafters, prompts, repeats=3, ngram=True):
        return measure_speed(
            tmp_path / "target",
            {name: name for name in drafters},
            prompts,
            tmp_path,
            num_tokens=5,
            num_drafts=4,
            ngram=ngram,
            repeats=repeats,
            rest_s=0,
            command=(sys.executable, "-c", ENGINE),
        )

    return measure


def test_methods_decode_each_prompt_in_turn(measured, tmp_path):
    assert len(list(measured(["slow"], {1: [[3], [5]], 2: [[3, 4]]}, repeats=2))) == 2
    lines = [line.split() for line in (tmp_path / "turns").read_text().splitlines()]
    turns = [line[:2] for line in lines]
    forwards = ["none", "ngram", "ngram-16", "slow"]
    backwards = forwards[::-1]
    # The first prompt of a length is its warm-up, too.
    expected = [("1-0", backwards), ("1-0", forwards), ("1-1", backwards), ("2-0", backwards), ("2-0", forwards)]
    assert turns == 2 * [[method, prompt] for prompt, methods in expected for method in methods]
    processes = [line[2] for line in lines]
    assert len(set(processes)) == 8 and set(processes[:20]).isdisjoint(processes[20:])
    # As `vllm serve` runs them.
    assert {line[3] for line in lines} == {"1"}


def test_rows_are_medians_of_passes_and_ratios_on_the_same_prompts(measured):
    # The engine of "ngram" is slow in its first pass.
    *_, (none, ngram, _, slow) = measured(["slow"], {1: [[number] for number in range(5)]})
    assert (none.context, none.method, none.acceptance_length, none.identical) == (1, "none", None, True)
    assert none.tokens_per_s == pytest.approx(5 / 8)
    assert (none.ttft_ms, none.ttft_overhead_ms) == (4000, 0)
    assert (none.ttft_s, none.latency_s) == (15 * (4.0,), 15 * (8.0,))
    assert (ngram.speedup.value, ngram.speedup.low, ngram.speedup.high) == pytest.approx((2, 2, 2))
    assert (ngram.ttft_overhead_ms, ngram.identical) == (-2000, True)
    assert ngram.over(slow, repeats=3).value == pytest.approx(12 / 4)
    assert slow.delay_ms(none, repeats=3) == Estimate(4000)
    assert ngram.delay_share(slow, none, repeats=3).value == pytest.approx(-0.5)
    assert slow.delay_share(ngram, none, repeats=3) is None
    # Each draft gives one token more than it keeps.
    assert ngram.acceptance_length == pytest.approx(2.5)
    assert (slow.speedup.value, slow.decode_speedup.value) == pytest.approx((8 / 12, 1))
    assert (slow.ttft_overhead_ms, slow.identical) == (4000, False)


def test_ngram_lookup_can_be_left_out(measured):
    ((none, slow),) = measured(["slow"], {1: [[3]]}, repeats=1, ngram=False)
    assert (none.method, slow.method) == ("none", "slow")


def test_an_engine_that_fails_ends_the_others(measured, tmp_path):
    with pytest.raises(EngineError, match=r"exit code 1 with 1 of 2 settings measured; its log is .*broken.log"):
        list(measured(["broken"], {1: [[3]]}))
