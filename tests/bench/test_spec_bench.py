"""`benchmarks/spec.py`: its command line, its engine processes (played by a script), and vLLM itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.tiny_pair import edit_json, write_drafter, write_target

from qm_spec.bench.engine.process import EngineError, engine_events
from qm_spec.bench.engine.shards import EngineSpec, ShardResult, ShardSpec, TokenPrompt
from qm_spec.bench.engine.store import ShardStore
from qm_spec.bench.environment import engine_environment
from qm_spec.bench.methods import METHODS, find_method
from qm_spec.bench.runs.benchmark import Benchmark
from qm_spec.bench.settings import BenchmarkSettings
from qm_spec.cli.evaluate import run_with_progress

ROOT = Path(__file__).resolve().parents[2]
SPEC = ROOT / "benchmarks" / "spec.py"
NOVELS_TARGET = ROOT / "qm_spec" / "zoo" / "novels" / "target"


@pytest.fixture
def target(tmp_path) -> Path:
    """A target with a tokenizer that knows words, and no weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # No token ends a text: outputs count through small ids.
    folder = write_target(tmp_path / "target", eos_token_id=None)
    words = Tokenizer(models.WordLevel({"?": 0, "a": 1, "b": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    return folder


@pytest.fixture
def settings(target, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": word, "text": f"{word} " * 20}) + "\n" for word in "ab"))

    def make(**changes) -> BenchmarkSettings:
        fields = {"methods": ("none", "ngram"), "prompts": str(prompts), "max_tokens": 5, "repeats": 2}
        return BenchmarkSettings(target=target, out=tmp_path / "out", **{**fields, **changes})

    return make


def quiet(*event) -> None:
    """Report no progress."""


def written(settings: BenchmarkSettings) -> dict:
    return json.loads((settings.out / "results.json").read_text())


def is_running(pid: int) -> bool:
    """Say whether a process is there and not merely waiting to be collected by its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_results_hold_every_method_and_setting(settings, engine_command):
    asked = settings(methods=("ngram",), context_lengths=(8, 16))
    benchmark = Benchmark(asked)
    assert any("none runs as well" in note for note in benchmark.notes)
    states = []
    benchmark.run(lambda *event: states.append(event), engine_command)
    results = written(asked)
    assert results == benchmark.results
    assert results["schema_version"] == 3
    assert [(run["method"], run["context_tokens"]) for run in results["runs"]] == [
        ("none", 8),
        ("none", 16),
        ("ngram", 8),
        ("ngram", 16),
    ]
    for run in results["runs"]:
        assert (run["num_prompts"], run["num_output_tokens"], run["dtype"]) == (2, 10, "float32")
        assert run["lossless"] is True
        assert run["speedup"] == {"none": 1.0, "ngram": 2.0}[run["method"]]
    assert results["runs"][2]["acceptance_length"] == 2.0
    assert {"versions", "cpu_model", "cpu_cores", "device", "dtype"} <= results["environment"].keys()
    assert {"commit", "seed", "prompts_sha256"} <= results["provenance"].keys()
    assert results["provenance"]["prompt_ids"] == ["a", "b"]
    assert results["failures"] == []
    for name in ("acceptance.png", "speedup.png"):
        assert (asked.out / name).read_bytes().startswith(b"\x89PNG")
    # Two settings of two passes of two prompts.
    assert states[:2] == [("none", "waiting", 0, 8), ("ngram", "waiting", 0, 8)]
    assert ("ngram", "pass 2 of 2 at 16 tokens of context", 7, 8) in states
    assert {("none", "done", 8, 8), ("ngram", "done", 8, 8)} <= set(states)


def test_sampled_ngram_on_a_cpu_is_said_to_be_wrong_and_a_baseline_of_ours_is_not(settings, target, tmp_path):
    def warned(**changes):
        return any("55005" in note for note in Benchmark(settings(**changes)).notes)

    assert warned(temperature=1.0)
    assert not warned() and not warned(temperature=1.0, methods=("none",))
    another = write_drafter(tmp_path / "another", target)
    assert not warned(temperature=1.0, methods=("none",), baselines={"another": another})


def test_whole_prompts_report_their_median_length(settings, engine_command):
    run = Benchmark(settings(methods=("none",))).run(quiet, engine_command)["runs"][0]
    assert (run["context_tokens"], run["context_cut"]) == (20, False)


@pytest.mark.parametrize(
    ("fault", "error", "tail"),
    [
        ("crash", "engine ended with exit code 1 with 0 of 3 parts measured", "no such layer"),
        ("kill", "engine was ended by SIGKILL with 0 of 3", "engine of ngram"),
    ],
)
def test_a_dead_engine_is_reported_and_the_others_go_on(settings, target, engine_command, faults, fault, error, tail):
    write_drafter(target / "qm_spec", target)
    faults(ngram=fault)
    asked = settings(methods=("none", "ngram", "qm_spec"))
    benchmark = Benchmark(asked)
    benchmark.run(quiet, engine_command)
    results = written(asked)
    assert [run["method"] for run in results["runs"]] == ["none", "qm_spec"]
    assert [failure["method"] for failure in results["failures"]] == ["ngram"]
    assert results["failures"][0]["error"].startswith(error)
    (note,) = benchmark.notes
    assert str(asked.out / "logs" / "ngram.log") in note
    assert tail in note


def test_settings_measured_before_a_crash_are_kept(settings, engine_command, faults):
    faults(ngram="crash later")
    asked = settings(context_lengths=(8, 16))
    Benchmark(asked).run(quiet, engine_command)
    results = written(asked)
    assert [(run["method"], run["context_tokens"], run["num_passes"]) for run in results["runs"]][2:] == [
        ("ngram", 8, 1)
    ]
    assert "3 of 6 parts measured" in results["failures"][0]["error"]


def test_without_a_reference_there_is_no_comparison(settings, engine_command, faults):
    faults(none="crash")
    asked = settings()
    Benchmark(asked).run(quiet, engine_command)
    (run,) = written(asked)["runs"]
    assert (run["method"], run["speedup"], run["lossless"]) == ("ngram", None, None)


def test_other_tokens_than_the_reference_are_not_lossless(settings, engine_command, faults):
    faults(ngram="differ")
    run = Benchmark(settings()).run(quiet, engine_command)["runs"][1]
    assert (run["lossless"], run["num_prompts_different"], run["first_difference"]) == (False, 2, 0)


def test_repeats_that_differ_are_reported(settings, engine_command, faults):
    faults(ngram="flaky")
    benchmark = Benchmark(settings())
    runs = benchmark.run(quiet, engine_command)["runs"]
    assert [run["repeats_identical"] for run in runs] == [True, False]
    (note,) = benchmark.notes
    assert note.startswith("ngram at 20 tokens of context, concurrency 1, temperature 0 put out different tokens")


def test_passes_of_different_speed_are_reported(settings, engine_command, faults):
    faults(ngram="slow first process")
    benchmark = Benchmark(settings())
    benchmark.run(quiet, engine_command)
    (note,) = benchmark.notes
    assert note.startswith("ngram at 20 tokens of context, concurrency 1, temperature 0: speed-up 0.20 to 2.00 from")


def test_an_interruption_ends_the_engine_and_keeps_the_results(settings, engine_command, faults, starts):
    faults(ngram="hang")
    asked = settings()

    def interrupt(method, state, done, total):
        # The first of two prompts is decoded by both, the second by plain decoding alone.
        if method == "ngram" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Benchmark(asked).run(interrupt, engine_command)
    assert [(run["method"], run["num_prompts"]) for run in written(asked)["runs"]] == [("none", 1), ("ngram", 1)]
    assert (asked.out / "speedup.png").exists()
    assert len(starts()) == 2 and not any(is_running(int(start[1])) for start in starts())


def test_helpers_of_a_dead_engine_are_ended(tmp_path):
    spec = ShardSpec(EngineSpec("t", None, "float32", 8, 1, True, 0), (TokenPrompt("a", (1,)),), 1, 0.0, 1, 0, 1)
    script = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid)"
    log = tmp_path / "engine.log"
    with pytest.raises(EngineError, match=r"exit code 0 with 0 of 1 parts measured; its log is .*engine.log"):
        list(engine_events([spec], tmp_path, log, os.environ, (sys.executable, "-c", script)))
    pid = int(log.read_text())
    # The signal has been sent; the system may take a moment to act on it.
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(pid)


def test_drafter_methods_ask_for_the_drafter_with_and_without_far_memory(settings, target, engine_command):
    drafter = write_drafter(target / "qm_spec", target)
    asked = settings(methods=("none", "qm_spec", "qm_spec-window"))
    Benchmark(asked).run(quiet, engine_command)
    runs = written(asked)["runs"]
    assert [run["method"] for run in runs] == ["none", "qm_spec", "qm_spec-window"]
    # As many tokens as the engine counts, since no number was asked for, and the drafter that was asked for rather than
    # the temporary copy.
    assert [run["num_speculative_tokens"] for run in runs] == [0, 2, 2]
    assert [run["draft"] for run in runs] == [None, str(drafter), str(drafter)]
    models = []
    for method in ("qm_spec", "qm_spec-window"):
        log = (asked.out / "logs" / f"{method}.log").read_text()
        models.append(json.loads(log[log.index("{") :].splitlines()[0])["model"])
    assert models[0] == str(drafter)
    assert models[1] != str(drafter)
    assert not Path(models[1]).exists()


def test_a_drafter_that_does_not_fit_is_refused_before_any_engine(settings, target, tmp_path):
    with pytest.raises(FileNotFoundError, match="no drafter for the target"):
        Benchmark(settings(methods=("qm_spec",)))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Benchmark(settings(methods=("qm_spec",), draft=str(tmp_path / "nowhere")))
    drafter = write_drafter(tmp_path / "drafter", target)
    with pytest.raises(ValueError, match=r"num_speculative_tokens must be in 1\.\.23"):
        Benchmark(settings(methods=("qm_spec-window",), draft=str(drafter), num_speculative_tokens=24))
    edit_json(drafter / "config.json", target_fingerprint="0" * 16)
    with pytest.raises(ValueError, match="was trained for the target with fingerprint 0000"):
        Benchmark(settings(methods=("qm_spec",), draft=str(drafter)))
    # Where no method drafts with it, nobody asks for it.
    Benchmark(settings(draft=str(tmp_path / "nowhere")))


def test_a_prompt_beyond_the_models_length_is_refused(settings):
    with pytest.raises(ValueError, match=r"fit the target's 256 tokens, got 20 \+ 240 in prompt a"):
        Benchmark(settings(max_tokens=240))
    with pytest.raises(ValueError, match="must have 21 tokens, got 20 in prompt a"):
        Benchmark(settings(context_lengths=(21,)))


def test_an_engine_has_room_for_what_it_is_asked(settings):
    ngram = find_method("ngram")
    ((shard, _),) = Benchmark(settings(concurrency=3, num_speculative_tokens=6))._shards(ngram, 6)
    assert (shard.engine.max_num_seqs, shard.engine.max_model_len) == (3, 20 + 5 + 6 + 1)
    assert (shard.engine.dtype, shard.engine.enforce_eager) == ("float32", True)
    ((shard, _),) = Benchmark(settings(max_tokens=236))._shards(ngram, None)
    assert shard.engine.max_model_len == 256


# The command line


def spec_bench(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SPEC), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_help_imports_nothing_heavy(tmp_path):
    code = (
        f"import runpy, sys\nsys.argv = ['spec.py', '--help']\n"
        f"try:\n    runpy.run_path({str(SPEC)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "print(sorted({'torch', 'transformers', 'vllm', 'matplotlib'} & sys.modules.keys()))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"
    for option in ("--target", "--context-lengths", "--num-speculative-tokens", "Examples:"):
        assert option in found.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--methods", "none,medusa"],
            f"methods: must be some of {', '.join(sorted(METHODS))}, got medusa",
        ),
        (["--target", "nowhere"], "target: nowhere is not a folder with a config.json"),
        (["--prompts", "gone.jsonl"], "workload: must be one of books, builtin, documents"),
        (["--prompts", "bad.jsonl"], "bad.jsonl:2 must be a JSON object"),
        (["--num-speculative-tokens", 0], "num_speculative_tokens: must be at least 1, got 0"),
        (["--temperature", -1], "temperature: must be 0 (greedy) or above, got -1.0"),
        (["--concurrency", 0], "concurrency: must be at least 1, got 0"),
        (["concurrency=1,8"], "sweep: concurrency=1,8 must stand behind --sweep"),
        (["--ray-address", "auto"], "ray: the address auto must come with --ray N"),
        (["--ray", -1], "ray: num_actors must be at least 1, got -1"),
        (
            ["--context-lengths", "256,many"],
            "context_lengths: must be integers like 1,2,8 or 1..8, got '256,many'",
        ),
    ],
)
def test_bad_input_ends_with_one_sentence(target, tmp_path, arguments, message):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{oops\n')
    found = spec_bench("--target", target, "--methods", "none", "--out", "out", *arguments, cwd=tmp_path)
    assert found.returncode == 2
    assert found.stdout == ""
    assert found.stderr.splitlines()[-1].startswith(f"error: {message}")
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("told", "code"), [({}, 0), ({"ngram": "crash"}, 1)])
def test_the_table_is_all_that_goes_to_stdout(settings, engine_command, faults, monkeypatch, capsys, told, code):
    faults(**told)
    monkeypatch.setattr(Benchmark.run, "__defaults__", (engine_command,))
    assert run_with_progress(Benchmark(settings())) == code
    output, messages = capsys.readouterr()
    rows = output.splitlines()
    assert all(row.startswith("| ") for row in rows)
    assert len(rows) == 4 - len(told)
    assert ("none: starting the engine" in messages and "8 of 8 requests after" in messages) or told
    assert ("no such layer" in messages) == bool(told)


def test_an_interrupted_benchmark_says_where_the_results_are(settings, engine_command, faults, monkeypatch, capsys):
    faults(ngram="hang")
    monkeypatch.setattr(Benchmark.run, "__defaults__", (engine_command,))
    asked = settings()
    benchmark = Benchmark(asked)
    save, saved = ShardStore.save, []

    def save_then_interrupt(*arguments):
        save(*arguments)
        saved.append(1)
        # Both methods have decoded the first prompt.
        if len(saved) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ShardStore, "save", save_then_interrupt)
    # A shell starts background jobs with the signal ignored, and the hanging engine would hang the test.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run_with_progress(benchmark) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    output, messages = capsys.readouterr()
    assert len(output.splitlines()) == 4
    assert f"interrupted; what was measured is in {asked.out / 'results.json'}" in messages


@pytest.mark.vllm
def test_vllm_measures_a_real_model(shared, tmp_path):
    found = spec_bench(
        "--target", shared("models/stories260K"),
        "--methods", "none,ngram",
        "--num-prompts", 2,
        "--max-tokens", 48,
        "--context-lengths", 192,
        "--concurrency", 2,
        "--repeats", 2,
        "--num-speculative-tokens", 3,
        "--out", tmp_path / "out",
        cwd=tmp_path,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    plain, ngram = results["runs"]
    assert (plain["method"], ngram["method"]) == ("none", "ngram")
    for run in (plain, ngram):
        assert (run["context_tokens"], run["num_prompts"], run["num_output_tokens"]) == (192, 2, 96)
        assert (run["dtype"], run["lossless"], run["repeats_identical"]) == ("float32", True, True)
        assert len(run["output_tokens_per_s_per_pass"]) == 2
        assert min(run["ttft_ms_p50"], run["tpot_ms_p50"], run["output_tokens_per_s"]) > 0
    # Without speculation every step yields one token and nothing is drafted.
    assert (plain["num_steps"], plain["num_drafts"], plain["acceptance_length"]) == (96, 0, None)
    # This model repeats itself, so n-grams of its own output are found again.
    assert ngram["num_drafts"] > 0
    assert ngram["num_draft_tokens"] <= 3 * ngram["num_drafts"]
    assert ngram["acceptance_rate"] == ngram["num_accepted_tokens"] / ngram["num_draft_tokens"]
    assert ngram["acceptance_length"] == 1 + ngram["num_accepted_tokens"] / ngram["num_drafts"]
    assert sum(ngram["acceptance_per_position"]) == pytest.approx(ngram["num_accepted_tokens"] / ngram["num_drafts"])
    # Every accepted token saves a step, but for those past an output's end.
    saved = ngram["num_output_tokens"] - ngram["num_steps"]
    assert saved <= ngram["num_accepted_tokens"] <= saved + 2 * 3
    assert "Traceback" not in (tmp_path / "out" / "logs" / "ngram.log").read_text()


@pytest.mark.vllm
def test_a_prompt_that_is_read_in_pieces_is_sampled_from(tmp_path):
    # A step of vLLM on a CPU reads 4096 tokens. Requests at a temperature have seeds here, and with a seed its own
    # engine ends behind the first piece.
    target = tmp_path / "target"
    shutil.copytree(NOVELS_TARGET, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    engine = EngineSpec(str(target), None, "float32", 4352, 1, True, 0)
    prompt = TokenPrompt("a", tuple(range(1000, 1420)) * 10)
    spec = ShardSpec(engine, (prompt,), 4, 1.0, 1, 0, 2, warm_up=False)
    events = engine_events([spec], tmp_path, tmp_path / "engine.log", engine_environment("cpu"))
    (found,) = [event["result"] for event in events if event["event"] == "result"]
    first, second = (one.requests[0].token_ids for one in ShardResult.from_json(found).passes)
    assert len(first) == 4 and first == second
