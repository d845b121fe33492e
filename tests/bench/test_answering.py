"""`qm-spec data` with engines of a script, and its engine of transformers: what is answered, left out and resumed."""

from __future__ import annotations

import errno
import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from support.sudden_death import run_until, stamps, wait_for_end
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from qm_spec.bench.engine.shards import EngineSpec, ShardSpec, TokenPrompt
from qm_spec.bench.engine.transformers_worker import SeededNoise, answer_shard, open_target
from qm_spec.bench.runs import answering as answering_module
from qm_spec.bench.runs.answering import Answering, AnswerSettings, _Meter
from qm_spec.bench.settings import RaySettings
from qm_spec.cli import app
from qm_spec.cli.data import describe
from qm_spec.data.answers import read_answers
from qm_spec.data.json_lines import read_rows
from qm_spec.discovery import target_fingerprint

CHAT = "{% for one in messages %}{{ one.content }} {% endfor %}{% if add_generation_prompt %}e{% endif %}"
WORDS = "abcd"


@pytest.fixture
def settings(benchmark_settings, tmp_path, monkeypatch):
    """Thirty prompts of different tokens in shards of at most eight; the target's words are a to e and ?."""
    monkeypatch.setattr(answering_module, "SHARD_SIZE", 8)
    target = benchmark_settings().target
    tokenizer = PreTrainedTokenizerFast.from_pretrained(target)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(target)
    texts = [f"{first} {second} {'e ' * (number % 3)}" for number in range(2) for first in WORDS for second in WORDS]
    rows = [{"id": f"row {number}", "prompt": text, "category": "code"} for number, text in enumerate(texts[:30])]
    file = write(tmp_path / "in.jsonl", *rows)

    def make(*more, **changes) -> AnswerSettings:
        fields = {"max_tokens": 2, "concurrency": 2, "prompts": (file, *more), "out": tmp_path / "data"}
        return AnswerSettings(target, **{**fields, **changes})

    return make


def write(file: Path, *rows) -> Path:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def quiet(progress) -> None:
    """Report nothing."""


def written(out: Path) -> list[dict]:
    return [row for file in sorted(out.glob("answers-*.jsonl.xz")) for _, row in read_rows(file)]


def record(out: Path) -> dict:
    return json.loads((out / "provenance.json").read_text())["stages"][-1]


# What is asked and what is written


def test_each_prompt_is_answered_through_the_chat_template_and_stored_as_token_ids(settings, engine_command):
    asked = settings()
    Answering(asked).run(quiet, engine_command)
    rows = {row["id"]: row for row in written(asked.out)}
    assert sorted(rows) == sorted(f"row {number}" for number in range(30))
    # "a b" and the template's e; the engine answers with the prompt's first token and the next one.
    row = rows["row 1"]
    assert (row["prompt_token_ids"], row["output_token_ids"], row["category"]) == ([0, 1, 4], [0, 1], "code")
    assert sorted(row) == [
        *("category", "finish_reason", "id", "output_token_ids", "prompt_token_ids", "seed", "temperature")
    ]
    assert len(list(read_answers([asked.out], vocab_size=6, fingerprint=target_fingerprint(asked.target)))) == 30
    assert not (asked.out / "logs").exists()


def test_greedy_and_sampled_prompts_are_told_by_their_hash_and_stand_in_shards_of_their_own(settings, engine_command):
    asked = settings()
    Answering(asked).run(quiet, engine_command)
    by_file = [
        {row["temperature"] for _, row in read_rows(file)} for file in sorted(asked.out.glob("answers-*.jsonl.xz"))
    ]
    assert all(len(temperatures) == 1 for temperatures in by_file)
    # In turns, so that what an interrupted run leaves holds both.
    assert {*by_file[0], *by_file[1]} == {0.0, 1.0}
    temperatures = {tuple(row["prompt_token_ids"]): row["temperature"] for row in written(asked.out)}
    assert 5 < Counter(temperatures.values())[0.0] < 25
    # Another file with half of them, in another order: each is answered as before.
    half = write(asked.prompts[0].with_name("half.jsonl"), *asked.prompts[0].read_text().splitlines()[29:15:-1])
    again = settings(prompts=(half,), out=asked.out.with_name("again"))
    Answering(again).run(quiet, engine_command)
    assert len(written(again.out)) == 14
    assert all(temperatures[tuple(row["prompt_token_ids"])] == row["temperature"] for row in written(again.out))


def test_a_sampled_answer_carries_the_seed_of_its_request_and_a_greedy_one_none(settings, engine_command):
    asked = settings(seed=5, temperature=0.7)
    Answering(asked).run(quiet, engine_command)
    rows = written(asked.out)
    assert {row["temperature"] for row in rows} == {0.0, 0.7}
    assert all(row["seed"] is None for row in rows if row["temperature"] == 0)
    seeds = [row["seed"] for row in rows if row["temperature"]]
    assert sorted(seeds) == list(range(5, 5 + len(seeds)))


@pytest.mark.parametrize(("share", "temperatures"), [(1.0, {0.0}), (0.0, {1.0})])
def test_all_may_be_greedy_or_sampled(settings, engine_command, share, temperatures):
    asked = settings(greedy_share=share)
    Answering(asked).run(quiet, engine_command)
    assert {row["temperature"] for row in written(asked.out)} == temperatures


def test_the_record_says_how_the_answers_were_made(settings, engine_command):
    asked = settings()
    returned = Answering(asked).run(quiet, engine_command)
    found = record(asked.out)
    assert found == returned
    assert found["target_fingerprint"] == target_fingerprint(asked.target)
    assert [(one["file"], len(one["sha256"])) for one in found["inputs"]] == [("in.jsonl", 64)]
    assert {"command", "commit", "versions", "seed", "engine"} <= set(found)
    assert found["num_answers"] == found["num_prompts"] == 30
    assert found["num_answer_tokens"] == 60
    assert found["finished_shards"] == found["num_shards"] == len(list(asked.out.glob("answers-*")))


# What is left out


def test_prompts_are_answered_once_and_what_cannot_be_answered_is_named(settings, engine_command, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "forgotten"}]},
        {"prompt": "a " * 254},
        {"messages": [{"role": "assistant", "content": "alone"}]},
        {"id": "empty", "prompt": "? a"},
    ]
    more = write(tmp_path / "more.jsonl", *rows)
    asked = settings(more)
    answering = Answering(asked)
    assert (answering.num_prompts, answering.num_duplicates) == (31, 1)
    assert answering.skipped == [
        f"{more}:2: prompt and max_tokens must fit the target's 256 tokens, got 255 + 2",
        f"{more}:3: the conversation must have a turn that asks, got none",
    ]
    found = answering.run(quiet, engine_command)
    # An answer of special tokens alone is none.
    assert found["empty_answers"] == ["empty"]
    assert (found["num_answers"], found["num_duplicates"], found["skipped"]) == (30, 1, answering.skipped)


def test_what_the_chat_template_refuses_is_named(settings, tmp_path):
    (settings().target / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}" + CHAT
    )
    more = write(tmp_path / "m.jsonl", {"messages": [{"role": r, "content": "a"} for r in ("system", "user")]})
    (message,) = Answering(settings(more)).skipped
    assert message.startswith(f"{more}:1: the chat template") and "no system, please" in message


@pytest.mark.parametrize(
    ("line", "message"), [("{oops", "must be a JSON object"), ({"question": "?"}, "must have a 'text' or 'prompt'")]
)
def test_a_bad_line_is_fatal_or_left_out_by_its_number(settings, tmp_path, line, message):
    more = write(tmp_path / "more.jsonl", {"prompt": "c"}, line)
    with pytest.raises(ValueError, match=rf"more.jsonl:2 {message}"):
        Answering(settings(more))
    answering = Answering(settings(more, skip_bad_lines=True))
    assert answering.num_prompts == 31
    assert [f"{more}:2 {message}" in one for one in answering.skipped] == [True]


def test_no_prompt_left_is_an_error_that_says_why(settings, tmp_path):
    file = write(tmp_path / "long.jsonl", {"prompt": "a " * 300})
    with pytest.raises(ValueError, match=r"at least one must be left to answer, got none: .*long.jsonl:1: prompt and"):
        Answering(settings(prompts=(file,)))


def test_a_target_without_a_chat_template_is_refused_with_the_way_out(settings, engine_command):
    asked = settings()
    for file in asked.target.glob("chat_template*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"must have a chat template.*chat_template.jinja, or pass --plain-text"):
        Answering(asked)
    plain = settings(plain_text=True)
    Answering(plain).run(quiet, engine_command)
    assert [0, 1] in [row["prompt_token_ids"] for row in written(plain.out)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: must be at least 1, got 0"),
        ({"concurrency": 0}, "concurrency: must be at least 1"),
        ({"temperature": 0.0}, "temperature: must be above 0, got 0.0; answer all greedily with greedy_share 1"),
        ({"greedy_share": 1.5}, r"greedy_share: must be in 0\.\.1, got 1.5"),
        ({"dtype": "int4"}, "dtype: must be one of auto, bfloat16"),
    ],
)
def test_settings_out_of_range(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


# What happens on the way


def test_an_interrupted_run_goes_on_where_it_was(settings, engine_command, starts):
    asked = settings()

    def interrupt(progress):
        if progress.done >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Answering(asked).run(interrupt, engine_command)
    left = written(asked.out)
    assert 0 < len(left) < 30
    assert record(asked.out)["num_answers"] == len(left)
    with pytest.raises(ValueError, match="holds answers; go on with them by --resume"):
        Answering(asked)
    seen = []
    # Another number of requests in flight may go on.
    Answering(settings(resume=True, concurrency=4)).run(seen.append, engine_command)
    assert seen[0].done == len(left)
    assert (seen[-1].done, seen[-1].total) == (30, 30)
    assert len(starts()) == 2 and starts()[1][3] not in [row["id"] for row in left]
    whole = settings(out=asked.out.with_name("whole"))
    Answering(whole).run(quiet, engine_command)
    assert written(asked.out) == written(whole.out)
    assert len(json.loads((asked.out / "provenance.json").read_text())["stages"]) == 2


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"max_tokens": 3}, "max_tokens"), ({"temperature": 0.5}, "temperature"), ({"seed": 1}, "seed")],
)
def test_a_data_set_goes_on_with_its_own_settings_only(settings, engine_command, changes, name):
    asked = settings()
    Answering(asked).run(quiet, engine_command)
    with pytest.raises(ValueError, match=f"was begun with {name} .*give the same settings and prompts"):
        Answering(settings(resume=True, **changes))
    with asked.prompts[0].open("a") as stream:
        stream.write('{"prompt": "d d d d"}\n')
    with pytest.raises(ValueError, match="was begun with inputs"):
        Answering(settings(resume=True))


def test_a_folder_of_something_else_is_not_written_to(settings):
    asked = settings()
    asked.out.mkdir()
    (asked.out / "thesis.tex").touch()
    with pytest.raises(ValueError, match="must be empty or a data set, got a folder of other files"):
        Answering(settings(resume=True))


def test_a_disk_that_fills_up_leaves_the_finished_shards_and_the_record(settings, engine_command, monkeypatch):
    asked = settings()
    synced = []

    def fsync(number):
        if "answers-" in os.readlink(f"/proc/self/fd/{number}"):
            synced.append(number)
        if len(synced) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=r"could not be written \(No space left on device\); the 1 finished shards of 4"):
        Answering(asked).run(quiet, engine_command)
    assert [file.name for file in asked.out.glob("answers*")] == ["answers-00000.jsonl.xz"]
    Answering(settings(resume=True)).run(quiet, engine_command)
    assert len(written(asked.out)) == 30


@pytest.mark.parametrize("seed", range(2))
def test_a_run_killed_again_and_again_loses_no_finished_shard(seed, settings, engine_command, starts):
    """At random file operations: before the record, between a shard's rows and its name, behind the last shard."""
    asked, chance = settings(resume=True), random.Random(seed)
    whole = settings(out=asked.out.with_name("whole"))
    Answering(whole).run(quiet, engine_command)
    kept, num_killed = {}, 0
    for _ in range(3):
        before = len(starts())
        num_killed += run_until(chance.randint(1, 12), asked.out, lambda: Answering(asked).run(quiet, engine_command))
        wait_for_end([int(start[1]) for start in starts()[before:]])
        now = stamps(asked.out, "answers-*.xz")
        assert kept.items() <= now.items(), "finished shards stay as they are"
        kept = now
    Answering(asked).run(quiet, engine_command)
    assert num_killed > 1
    assert kept.items() <= stamps(asked.out, "answers-*.xz").items()
    assert written(asked.out) == written(whole.out)
    assert record(asked.out)["num_answers"] == 30


@pytest.mark.parametrize("moment", range(1, 7))
def test_a_run_killed_before_its_first_shard_is_begun_again(moment, settings, engine_command):
    """What is left then, an empty folder or half a record, is nobody else's."""
    asked = settings(resume=True)
    assert run_until(moment, asked.out, lambda: Answering(asked).run(quiet, engine_command))
    Answering(asked)


def test_an_engine_killed_at_random_costs_its_shard_alone(settings, engine_command, faults, turns):
    asked, chance = settings(resume=True), random.Random(0)
    whole = settings(out=asked.out.with_name("whole"))
    Answering(whole).run(quiet, engine_command)
    for _ in range(2):
        faults(none=f"kill at {chance.randint(2, 8)}")
        answering = Answering(asked)
        answering.run(quiet, engine_command)
        assert all("SIGKILL" in failure for failure in answering.failures)
    faults()
    Answering(asked).run(quiet, engine_command)
    assert written(asked.out) == written(whole.out)
    assert len(turns()) <= 2 * 4 + 2


def test_the_shards_of_a_dead_engine_are_reported_and_resumed(settings, engine_command, faults):
    faults(none="crash at 3")
    asked = settings()
    answering = Answering(asked)
    found = answering.run(quiet, engine_command)
    assert found["finished_shards"] < found["num_shards"]
    assert "engine ended with exit code 1" in answering.failures[0]
    assert (asked.out / "logs" / "engine.0.log").exists()
    faults()
    assert Answering(settings(resume=True)).run(quiet, engine_command)["num_answers"] == 30


def test_actors_share_the_shards_and_write_what_one_engine_writes(settings, engine_command, monkeypatch):
    jobs = []

    class HereAndInTurn(answering_module.RayRunner):
        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def run_jobs(self, given, logs, on_event, command):
            jobs.extend(given)
            answering_module.run_jobs(given, logs, on_event, command)

    monkeypatch.setattr(answering_module, "RayRunner", HereAndInTurn)
    one, two = settings(), settings(out=settings().out.with_name("two"), ray=RaySettings(2))
    Answering(one).run(quiet, engine_command)
    Answering(two).run(quiet, engine_command)
    assert len(jobs) == 2
    assert written(one.out) == written(two.out)


def test_progress_counts_tokens_and_time_from_the_moment_that_an_engine_is_ready():
    times = iter([100.0, 110.0])
    meter = _Meter(earlier=10, total=50, clock=lambda: next(times))
    assert describe(meter.read()) == "10 of 50 answers, 0 tokens/s"
    meter.start()
    meter.done[0], meter.tokens[0] = 8, 500
    found = meter.read()
    assert (found.done, found.tokens_per_s, found.left_s) == (18, 50.0, 40.0)
    assert describe(found) == "18 of 50 answers, 50 tokens/s, 0 min 40 s left"


def test_the_command_says_what_is_left_out_and_what_was_saved(settings, engine_command, monkeypatch, tmp_path):
    monkeypatch.setattr(answering_module, "ENGINE_COMMAND", engine_command)
    monkeypatch.setattr(answering_module, "TRANSFORMERS_COMMAND", engine_command)
    more = write(tmp_path / "more.jsonl", "{oops", {"prompt": "a b"}, {"prompt": "? b"})
    asked = settings()
    words = ["data", "--target", asked.target, "--out", asked.out, "--max-tokens", 2, "--skip-bad-lines"]
    found = CliRunner().invoke(app, [*map(str, words), "--prompts", str(asked.prompts[0]), str(more)])
    assert found.exit_code == 0, found.output
    assert "left out 1 prompts that stand there more than once" in found.output
    assert f"note: left out 1 rows:\n  {more}:1 must be a JSON object" in found.output
    assert "note: left out 1 empty answers:\n  more.jsonl:3" in found.output
    # Without a terminal, plain lines.
    assert "31 of 31 answers, " in found.output
    assert "30 answers, 60 tokens" in found.output.splitlines()[-1]


# Through transformers


@pytest.fixture
def model():
    """Twelve tokens; some answers end by token 3 and some do not."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=12, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, eos_token_id=3, bos_token_id=None, pad_token_id=None,
        initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def shard(temperature: float, concurrency: int) -> ShardSpec:
    engine = EngineSpec("target", None, "float32", 64, concurrency, True, 0)
    prompts = tuple(TokenPrompt(str(number), tuple(range(4, 5 + number))) for number in (3, 0, 5, 1, 6))
    return ShardSpec(engine, prompts, 12, temperature, concurrency, 7, 1, stop_at_eos=True, warm_up=False)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_do_not_depend_on_the_batch(model, temperature):
    heard = []
    batched = answer_shard(shard(temperature, 3), model, lambda *event: heard.append(event)).passes[0]
    single = answer_shard(shard(temperature, 1), model, lambda *event: None).passes[0]
    assert batched.outputs == single.outputs
    assert [one.prompt_id for one in batched.requests] == ["3", "0", "5", "1", "6"]
    assert [event[:2] for event in heard] == [(3, 5), (5, 5)]
    assert heard[-1][2] == batched.num_output_tokens


def test_greedy_answers_are_the_targets_own_and_end_with_the_end_token(model):
    asked = shard(0.0, 5)
    reasons = set()
    found = answer_shard(asked, model, lambda *event: None).passes[0].requests
    for prompt, request in zip(asked.prompts, found, strict=True):
        answer = request.token_ids
        # The whole sequence at once, without a batch and its padding.
        likely = model(torch.tensor([prompt.token_ids + answer])).logits[0].argmax(-1).tolist()
        assert list(answer) == likely[len(prompt.token_ids) - 1 : -1]
        assert 3 not in answer[:-1]
        assert (request.finish_reason, len(answer) < 12) == (("stop", True) if answer[-1] == 3 else ("length", False))
        reasons.add(request.finish_reason)
    assert reasons == {"stop", "length"}, "the model must show both; choose another seed"


def test_the_argmax_of_noisy_logits_is_a_sample():
    """With 20000 samples a share strays by more than 0.015, over four deviations, about once in 20000 runs."""
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    generator = torch.Generator().manual_seed(0)
    noise = SeededNoise(0.5, [generator] * 20000)
    chosen = noise(torch.empty(0), logits.expand(20000, 4)).argmax(-1)
    shares = torch.bincount(chosen, minlength=4) / 20000
    torch.testing.assert_close(shares, (logits[0] / 0.5).softmax(-1), atol=0.015, rtol=0)


@pytest.mark.vllm
def test_vllm_answers_as_transformers_does_and_says_why_it_ended(tmp_path, root, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    target = root / "qm_spec" / "zoo" / "novels" / "target"
    texts = ("It was a dark and", "The captain looked at the", "My dear Miss", "He had never been")
    file = write(tmp_path / "novels.jsonl", *({"text": text} for text in texts))
    asked = AnswerSettings(
        target, (file,), tmp_path / "answers", 12, greedy_share=1.0, concurrency=4, dtype="float32", plain_text=True
    )
    answering = Answering(asked)
    answering.run(quiet)
    rows = written(asked.out)
    (greedy,) = answering._shards
    expected = answer_shard(greedy, open_target(greedy.engine), lambda *event: None).passes[0].requests
    assert [tuple(row["output_token_ids"]) for row in rows] == [one.token_ids for one in expected]
    assert [row["finish_reason"] for row in rows] == [one.finish_reason for one in expected]
