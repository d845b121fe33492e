"""The parts of a measurement that need no engine: counts, prompts, the request loop, records, table."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sys
import tarfile
from collections import deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qm_spec.bench.engine.metrics import DraftCounts, OutputDifference, compare_outputs
from qm_spec.bench.engine.shards import (
    EngineSpec,
    PassResult,
    RequestResult,
    ShardResult,
    ShardSpec,
    TokenPrompt,
)
from qm_spec.bench.engine.worker import read_counts, run_requests
from qm_spec.bench.environment import available_cores, cpu_engine_environment, engine_environment
from qm_spec.bench.methods import METHODS, find_method, without_far_memory
from qm_spec.bench.results.file import write_results
from qm_spec.bench.results.records import run_record
from qm_spec.bench.results.table import format_table
from qm_spec.bench.results.turns import Turn
from qm_spec.bench.settings import BenchmarkSettings
from qm_spec.bench.workloads.prompts import BUILTIN_FILE, cut_prompts, read_prompts, tokenize_prompts
from qm_spec.config import ARCHITECTURE

ROOT = Path(__file__).resolve().parents[2]

COUNTS = DraftCounts(drafts=10, draft_tokens=40, accepted_tokens=15, accepted_per_position=(8, 4, 2, 1))


def prompt(name: str, length: int = 4) -> TokenPrompt:
    return TokenPrompt(name, tuple(range(length)))


def shard_spec(**changes) -> ShardSpec:
    engine = EngineSpec("target", None, "float32", 64, 1, True, 0)
    spec = ShardSpec(engine, (prompt("a"), prompt("b")), 3, 0.0, 1, 0, 1)
    return replace(spec, **changes)


def one_pass(elapsed_s: float, *outputs: tuple[int, ...], counts: DraftCounts = COUNTS) -> PassResult:
    requests = tuple(RequestResult(str(i), ids, len(ids), 0.5, 0.25) for i, ids in enumerate(outputs))
    return PassResult(elapsed_s, counts, requests)


# Counts


def test_acceptance_numbers_follow_from_the_counters():
    assert COUNTS.acceptance_rate == 15 / 40
    assert COUNTS.acceptance_length == 1 + 15 / 10
    # By drafts, not by drafted tokens: vLLM's own convention.
    assert COUNTS.acceptance_per_position == [0.8, 0.4, 0.2, 0.1]


def test_nothing_drafted_has_no_acceptance():
    nothing = DraftCounts()
    assert (nothing.acceptance_rate, nothing.acceptance_length) == (None, None)
    assert nothing.acceptance_per_position == []


counts = st.builds(
    DraftCounts,
    drafts=st.integers(0, 99),
    draft_tokens=st.integers(0, 99),
    accepted_tokens=st.integers(0, 99),
    accepted_per_position=st.lists(st.integers(0, 99), max_size=5).map(tuple),
)


@given(before=counts, during=counts)
def test_the_difference_of_two_readings_is_what_happened_between(before, during):
    found = before + during - before
    assert found.drafts == during.drafts
    assert found.accepted_tokens == during.accepted_tokens
    length = len(during.accepted_per_position)
    # vLLM has no vector before the first draft, so lengths differ between readings.
    assert found.accepted_per_position[:length] == during.accepted_per_position
    assert not any(found.accepted_per_position[length:])


def test_counters_are_read_by_their_vllm_names():
    def metric(name, **value):
        return SimpleNamespace(name=f"vllm:{name}", **value)

    llm = SimpleNamespace(
        get_metrics=lambda: [
            metric("num_requests_running", value=3.0),
            metric("spec_decode_num_drafts", value=10),
            metric("spec_decode_num_draft_tokens", value=40),
            metric("spec_decode_num_accepted_tokens", value=15),
            metric("spec_decode_num_accepted_tokens_per_pos", values=[8, 4, 2, 1]),
        ]
    )
    assert read_counts(llm) == COUNTS
    assert read_counts(SimpleNamespace(get_metrics=list)) == DraftCounts()


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ([(1, 2), (3, 4)], OutputDifference(0, None)),
        ([(1, 9), (3, 4)], OutputDifference(1, 1)),
        ([(1, 9), (9, 4)], OutputDifference(2, 0)),
        # An output that stops early differs where it stops.
        ([(1,), (3, 4)], OutputDifference(1, 1)),
    ],
)
def test_outputs_are_compared_token_by_token(outputs, expected):
    assert compare_outputs(outputs, [(1, 2), (3, 4)]) == expected


def test_outputs_of_different_prompts_are_not_compared():
    with pytest.raises(ValueError, match="same prompts, got 1 and 2"):
        compare_outputs([(1,)], [(1,), (2,)])


# Shards


def test_shards_survive_json():
    spec = shard_spec(engine=replace(shard_spec().engine, speculative_config={"method": "ngram"}))
    assert ShardSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    result = ShardResult("cpu", "float32", (one_pass(1.5, (1, 2), (3,)),))
    assert ShardResult.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_the_median_pass_is_reported():
    passes = tuple((one_pass(elapsed, (1,)), None) for elapsed in (3.0, 1.0, 2.0))
    assert Turn((prompt("a"),), passes).median_pass.elapsed_s == 2.0
    assert Turn((prompt("a"),), passes[:2]).median_pass.elapsed_s == 1.0


# The request loop


class FakeEngine:
    """Yields per step one of each request's scripted chunks of tokens; a step takes a second."""

    def __init__(self, chunks: dict[str, list[list[int]]]) -> None:
        self.chunks = {name: deque(parts) for name, parts in chunks.items()}
        self.outputs: dict[str, list[int]] = {}
        self.most_in_flight = 0
        self.now = 100.0

    def add_request(self, request_id, prompt, params):
        self.outputs[request_id] = []
        self.most_in_flight = max(self.most_in_flight, len(self.outputs))

    def step(self):
        self.now += 1.0
        found = []
        for request_id in list(self.outputs):
            self.outputs[request_id] += self.chunks[request_id].popleft()
            finished = not self.chunks[request_id]
            output = SimpleNamespace(token_ids=list(self.outputs[request_id]))
            found.append(SimpleNamespace(request_id=request_id, outputs=[output], finished=finished))
            if finished:
                del self.outputs[request_id]
        return found


def test_times_and_steps_of_a_request():
    # A prefill chunk without a token, the first token, a step with three, a last one.
    engine = FakeEngine({"0": [[], [5], [6, 7, 8], [9]]})
    elapsed, (result,) = run_requests(engine, [prompt("a")], lambda number: None, 1, clock=lambda: engine.now)
    assert elapsed == 4.0
    assert result == RequestResult("a", (5, 6, 7, 8, 9), num_steps=3, ttft_s=2.0, tpot_s=2.0 / 4, arrival_s=0.0)
    assert result.latency_s == 4.0


def test_a_single_token_has_no_time_per_further_token():
    engine = FakeEngine({"0": [[5]]})
    _, (result,) = run_requests(engine, [prompt("a")], lambda number: None, 1, clock=lambda: engine.now)
    assert result.tpot_s is None


@pytest.mark.parametrize("concurrency", [1, 2, 5])
def test_concurrency_requests_are_in_flight_and_results_keep_the_order(concurrency):
    # The first takes longest, so the others overtake it.
    engine = FakeEngine({"0": [[1], [1], [1], [1]], "1": [[2]], "2": [[3], [3]]})
    finished = []
    elapsed, results = run_requests(
        engine,
        [prompt(name) for name in "abc"],
        lambda number: None,
        concurrency,
        on_finished=finished.append,
        clock=lambda: engine.now,
    )
    assert engine.most_in_flight == min(concurrency, 3)
    assert [result.prompt_id for result in results] == ["a", "b", "c"]
    assert [result.token_ids for result in results] == [(1, 1, 1, 1), (2,), (3, 3)]
    assert len(finished) == 3
    assert elapsed == {1: 7.0, 2: 4.0, 5: 4.0}[concurrency]
    if concurrency == 2:
        # Handed in only when "b" had made room, so its wait before that is not its own.
        assert results[2].ttft_s == 1.0


# Prompts


def write_rows(file: Path, *lines: str) -> Path:
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return file


def test_rows_may_hold_text_prompt_or_messages(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    file = write_rows(
        tmp_path / "p.jsonl",
        '{"id": "x", "text": "one"}',
        "",
        '{"question_id": 7, "prompt": "two"}',
        json.dumps({"messages": messages}),
    )
    found = read_prompts(file)
    assert [one.prompt_id for one in found] == ["x", "7", "4"]
    assert [one.text for one in found] == ["one", "two", None]
    assert found[2].messages == tuple(messages)
    assert read_prompts(file, 2) == found[:2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "p.jsonl:2 must be a JSON object, got '{oops'"),
        ("[1]", "p.jsonl:2 must be a JSON object, got list"),
        ('{"question": "?"}', r"p.jsonl:2 must have a 'text' or 'prompt'.*got only \['question'\]"),
        ('{"text": ""}', "p.jsonl:2 must have"),
        ('{"messages": [{"role": "user"}]}', "p.jsonl:2 must have"),
    ],
)
def test_a_malformed_row_is_named_by_its_line(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        read_prompts(write_rows(tmp_path / "p.jsonl", '{"text": "fine"}', line))


def test_more_prompts_than_the_file_has(tmp_path):
    file = write_rows(tmp_path / "p.jsonl", '{"text": "one"}')
    with pytest.raises(ValueError, match="at least 2 prompts, got 1"):
        read_prompts(file, 2)
    with pytest.raises(ValueError, match="at least 1 prompts, got 0"):
        read_prompts(write_rows(tmp_path / "empty.jsonl"))


class WordTokenizer:
    """A token per word behind one beginning-of-text token; its template writes that one itself."""

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [1] * add_special_tokens + [len(word) for word in text.split()]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        return " ".join(["B", *(message["content"] for message in messages), "ANSWER"])


def test_messages_go_through_the_chat_template(tmp_path):
    rows = read_prompts(
        write_rows(tmp_path / "p.jsonl", '{"messages": [{"role": "user", "content": "abc de"}]}', '{"text": "ab"}')
    )
    found = tokenize_prompts(rows, WordTokenizer("template"))
    assert [one.token_ids for one in found] == [(1, 3, 2, 6), (1, 2)]
    with pytest.raises(ValueError, match="prompts: 1 has messages, but the target's tokenizer has no chat template"):
        tokenize_prompts(rows, WordTokenizer())


def test_prompts_are_cut_to_exactly_the_length():
    found = cut_prompts([prompt("a", 5), prompt("b", 9)], 5)
    assert [one.token_ids for one in found] == [tuple(range(5))] * 2
    assert cut_prompts([prompt("a", 5)], None) == (prompt("a", 5),)
    with pytest.raises(ValueError, match="must have 6 tokens, got 5 in prompt a"):
        cut_prompts([prompt("b", 9), prompt("a", 5)], 6)


def test_the_builtin_prompts_are_distinct_running_text():
    rows = [json.loads(line) for line in BUILTIN_FILE.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 32
    assert len({row["id"] for row in rows}) == 32
    assert all(sorted(row) == ["id", "source", "text"] for row in rows)
    assert min(len(row["text"].split()) for row in rows) >= 2000
    # The default takes the first 8: every novel is among them.
    assert len({row["source"].partition(":")[0] for row in rows[:8]}) == 6
    assert BUILTIN_FILE.stat().st_size <= 400_000


def load_make_prompts():
    spec = importlib.util.spec_from_file_location("make_prompts", ROOT / "benchmarks" / "make_prompts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_excerpts_do_not_overlap_and_begin_and_end_with_sentences():
    make_prompts = load_make_prompts()
    text = "He came home late, and was tired.\nShe did not wait; why should she?\n" * 2000
    found = list(make_prompts.excerpts(text, 3, random.Random(1)))
    assert [begin for begin, _ in found] == sorted(begin for begin, _ in found)
    ends = [begin + len(excerpt) for begin, excerpt in found]
    assert all(end <= begin for end, (begin, _) in zip(ends, found[1:], strict=False))
    for begin, excerpt in found:
        assert text[begin : begin + len(excerpt)] == excerpt
        assert excerpt.startswith(("He came", "She did"))
        assert excerpt.endswith(("tired.", "she?"))
        assert len(excerpt) <= make_prompts.EXCERPT_CHARACTERS
    with pytest.raises(ValueError, match="characters per excerpt or more"):
        list(make_prompts.excerpts(text, 12, random.Random(1)))


def test_the_builtin_prompts_are_what_the_script_makes(tmp_path, shared):
    with tarfile.open(shared("corpus/english-novels.tar.xz")) as tar:
        members = [one for one in tar.getmembers() if one.name.startswith("valid/") and one.isfile()]
        tar.extractall(tmp_path, members, filter="data")
    rows = load_make_prompts().make_prompts(sorted((tmp_path / "valid").glob("*.txt")), seed=0)
    assert rows == [json.loads(line) for line in BUILTIN_FILE.read_text(encoding="utf-8").splitlines()]


# Methods


def test_what_each_method_asks_of_vllm(tmp_path):
    def asked(method, depth):
        return find_method(method).speculative_config(depth, tmp_path)

    assert asked("none", 3) is asked("none-again", 3) is None
    assert asked("ngram", 3) == {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    # Each method has a number of its own where none is asked for.
    assert [asked(method, None)["num_speculative_tokens"] for method in ("ngram", "ngram-16")] == [4, 16]
    assert asked("suffix", None) == {"method": "suffix"}
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [ARCHITECTURE]}))
    ours = [one.name for one in METHODS.values() if one.name.startswith("qm_spec")]
    # A folder of ours may stand as a baseline, too.
    for method in (*ours, "eagle3"):
        found = asked(method, 3)
        assert (found["method"], found["model"], found["num_speculative_tokens"]) == ("eagle3", str(tmp_path), 3)
        # The plug-in chooses, as for a user who names no number.
        assert "num_speculative_tokens" not in asked(method, None)
    assert find_method("qm_spec-lookup").engine_environment("cpu")["QM_SPEC_LOOKUP"] == "4"
    assert find_method("qm_spec-prior").engine_environment("cpu")["QM_SPEC_LOOKUP"] == "0"
    own = find_method("qm_spec").engine_environment("cpu")
    assert own.get("QM_SPEC_LOOKUP") == os.environ.get("QM_SPEC_LOOKUP")


def test_eagle3_drafts_as_many_tokens_as_its_config_says(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLMEagle3"], "num_speculative_tokens": 5}')
    method = find_method("eagle3-window")
    assert method.speculative_config(None, tmp_path) == {
        "method": "eagle3",
        "model": str(tmp_path),
        "num_speculative_tokens": 5,
    }
    assert method.speculative_config(2, tmp_path)["num_speculative_tokens"] == 2
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="must name num_speculative_tokens, names none"):
        method.speculative_config(None, tmp_path)


def test_the_window_drafter_differs_in_its_schedule_alone(tmp_path):
    drafter = tmp_path / "drafter"
    drafter.mkdir()
    config = {"architectures": ["X"], "quickmerge": {"window": 128, "schedule": [8, 4, 2, 1]}}
    (drafter / "config.json").write_text(json.dumps(config))
    (drafter / "model.safetensors").write_bytes(b"weights")
    windowed = without_far_memory(drafter, tmp_path / "windowed")
    assert (windowed / "model.safetensors").read_bytes() == b"weights"
    assert (windowed / "model.safetensors").is_symlink()
    assert json.loads((windowed / "config.json").read_text()) == {
        "architectures": ["X"],
        "quickmerge": {"window": 128, "schedule": [0]},
    }
    assert json.loads((drafter / "config.json").read_text()) == config


# Records and table


def record(method="qm_spec", ours=None, plain=None, **changes):
    """Make the record of one turn of two prompts, beside plain decoding where it is given."""
    spec = shard_spec(**changes)
    turn = Turn(spec.prompts, ((ours or one_pass(2.0, (1, 2, 3), (4, 5, 6)), plain),))
    return run_record(method, spec, [turn], target="t", draft=None, dtype="float32", context_cut=True)


def test_a_record_has_the_issue_fields_and_consistent_numbers():
    plain = one_pass(4.0, (1, 2, 3), (4, 5, 6), counts=DraftCounts())
    run = record(plain=plain)
    assert {
        "method", "target", "draft", "temperature", "concurrency", "context_tokens", "num_prompts",
        "num_output_tokens", "num_drafts", "num_draft_tokens", "num_accepted_tokens", "acceptance_rate",
        "acceptance_length", "acceptance_per_position", "output_tokens_per_s", "speedup", "ttft_ms_p50",
        "tpot_ms_p50", "lossless",
    } <= run.keys()  # fmt: skip
    assert run["num_output_tokens"] == 6
    assert run["output_tokens_per_s"] == 3.0
    assert run["speedup"] == 2.0
    assert (run["ttft_ms_p50"], run["tpot_ms_p50"]) == (500.0, 250.0)
    assert run["lossless"] is True
    assert run["context_tokens"] == 4


def test_a_record_counts_prompts_that_differ():
    plain = one_pass(4.0, (1, 2, 3), (4, 5, 9))
    run = record(plain=plain)
    assert (run["lossless"], run["num_prompts_different"], run["first_difference"]) == (False, 1, 2)
    assert "no: 1 of 2 prompts, first at token 2" in format_table([run])


def test_sampling_has_no_lossless_and_a_missing_reference_no_speedup():
    plain = one_pass(4.0, (7, 7, 7), (7, 7, 7))
    sampled = record(plain=plain, temperature=0.7)
    assert (sampled["lossless"], sampled["repeats_identical"], sampled["speedup"]) == (None, None, 2.0)
    alone = record()
    assert (alone["lossless"], alone["speedup"]) == (None, None)


def test_the_table_is_aligned_markdown():
    plain = one_pass(4.0, (1, 2, 3), (4, 5, 6), counts=DraftCounts())
    lines = format_table([record("none", plain, plain), record(plain=plain)]).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert dict(zip(cells[0], cells[2], strict=True)) == {
        "method": "none", "context": "4", "tokens/s": "1.5", "speedup": "1.00", "95% interval": "-",
        "decode only": "1.00", "accept length": "-", "tokens/step": "1.00",
        "TTFT ms": "500.0", "TPOT ms": "250.0", "lossless": "yes",
    }  # fmt: skip
    assert dict(zip(cells[0], cells[3], strict=True))["accept length"] == "2.50"


def test_results_replace_the_old_file_whole(tmp_path):
    write_results(tmp_path, {"runs": [1]})
    with pytest.raises(TypeError):
        write_results(tmp_path, {"runs": [object()]})
    assert json.loads((tmp_path / "results.json").read_text()) == {"runs": [1]}


# Settings and environment


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"methods": ("none", "medusa")},
            f"methods: must be some of {', '.join(sorted(METHODS))}, got medusa",
        ),
        ({"methods": ()}, "got none at all"),
        ({"methods": ("ngram", "ngram")}, "each may be named once"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens: must be at least 1, got 0"),
        ({"concurrency": 0}, "concurrency: must be at least 1, got 0"),
        ({"max_tokens": 0}, "max_tokens: must be at least 1, got 0"),
        ({"num_prompts": 0}, "num_prompts: must be at least 1, got 0"),
        ({"num_prompts": 2, "per_category": 3}, "per_category: must come without num_prompts, got 3 and 2"),
        ({"engines_at_once": 1}, "engines_at_once: must be at least 2"),
        ({"methods": ("eagle3",)}, "eagle3 needs its drafter's folder; pass --baseline eagle3=DIR"),
        ({"baselines": {"ngram": Path("x")}}, "baseline: must not have the name of another method, got ngram"),
        ({"repeats": 0}, "repeats: must be at least 1, got 0"),
        ({"temperature": -0.5}, "temperature: must be 0 .greedy. or above, got -0.5"),
        ({"temperature": float("nan")}, "temperature: must be"),
        ({"seed": -1}, "seed: must be 0 or above"),
        ({"context_lengths": (256, 256)}, "context_lengths: must be different"),
        ({"context_lengths": (0,)}, "context_lengths: must be different numbers of tokens from 1"),
        ({"context_lengths": ()}, "context_lengths: must be"),
        ({"dtype": "int8"}, "dtype: must be one of auto, bfloat16"),
    ],
)
def test_settings_out_of_range(target, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkSettings(target=target, out=tmp_path / "out", **changes)


def test_settings_of_missing_files(target, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"target: .*nowhere is not a folder with a config.json"):
        BenchmarkSettings(target=tmp_path / "nowhere", out=tmp_path)
    with pytest.raises(ValueError, match=r"out: .*config.json is a file"):
        BenchmarkSettings(target=target, out=target / "config.json")


def test_the_reference_runs_first_and_is_added(target, tmp_path):
    asked = BenchmarkSettings(target=target, out=tmp_path, methods=("ngram", "none"))
    assert (asked.ordered_methods, asked.adds_reference) == (("none", "ngram"), False)
    added = BenchmarkSettings(target=target, out=tmp_path, methods=("ngram",))
    assert (added.ordered_methods, added.adds_reference) == (("none", "ngram"), True)


def test_a_baseline_that_is_given_is_run(target, tmp_path):
    asked = BenchmarkSettings(target=target, out=tmp_path, methods=("none",), baselines={"theirs": tmp_path})
    assert asked.ordered_methods == ("none", "theirs")


def test_a_method_whose_module_is_not_installed_is_refused(target, tmp_path, monkeypatch):
    monkeypatch.setattr("qm_spec.bench.methods.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="suffix needs arctic-inference; pip install arctic-inference, or leave suffix"
    ):
        BenchmarkSettings(target=target, out=tmp_path, methods=("none", "suffix"))


def test_prompts_of_a_file_stay_whole_unless_lengths_are_given(target, tmp_path):
    file = write_rows(tmp_path / "p.jsonl", '{"text": "one"}')
    assert BenchmarkSettings(target=target, out=tmp_path).prompt_lengths == (256,)
    own = BenchmarkSettings(target=target, out=tmp_path, prompts=str(file))
    assert own.prompt_lengths == (None,)
    assert replace(own, context_lengths=(8, 16)).prompt_lengths == (8, 16)


def test_cpu_settings_of_the_user_stay(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    monkeypatch.setenv("LD_PRELOAD", "/lib/other.so")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = cpu_engine_environment()
    assert found["VLLM_CPU_KVCACHE_SPACE"] == "7"
    assert found["OMP_NUM_THREADS"] == str(available_cores())
    assert found["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert found["LD_PRELOAD"].endswith("/lib/other.so")


def test_intel_openmp_is_preloaded_once_where_it_is_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert "LD_PRELOAD" not in cpu_engine_environment()
    library = tmp_path / "lib" / "libiomp5.so"
    library.parent.mkdir()
    library.touch()
    assert cpu_engine_environment()["LD_PRELOAD"] == str(library)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    assert cpu_engine_environment()["LD_PRELOAD"] == str(library)
    # vLLM ends where GNU's runtime is loaded beside it.
    monkeypatch.setenv("LD_PRELOAD", "/torch/lib/libgomp-a34.so.1:/lib/other.so")
    assert cpu_engine_environment()["LD_PRELOAD"] == f"{library}:/lib/other.so"


def test_a_gpu_engine_gets_no_cpu_settings(monkeypatch):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert engine_environment("cuda") == dict(os.environ)
    assert engine_environment("cpu")["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_an_engine_as_served_has_processes_of_its_own_and_the_cache_that_it_asks_for(monkeypatch):
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    served = engine_environment("cpu", as_served=True)
    assert served["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1" and "VLLM_CPU_KVCACHE_SPACE" not in served
    # What the user sets stays.
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert engine_environment("cpu", as_served=True)["VLLM_CPU_KVCACHE_SPACE"] == "1"
