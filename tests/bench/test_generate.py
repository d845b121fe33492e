"""`qm-spec generate` with engines of a script: order, errors in place, resume, actors."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from support.sudden_death import run_until, stamps, wait_for_end
from typer.testing import CliRunner

from qm_spec.bench.engine.ray_runner import RayRunner
from qm_spec.bench.runs.generate import Generation
from qm_spec.bench.settings import GenerationSettings, RaySettings
from qm_spec.cli import app

WORDS = "abcde"


@pytest.fixture
def settings(benchmark_settings, tmp_path):
    """40 rows, of which 5 has no prompt, 6 no token and 7 too many; three shards of the others."""
    target = benchmark_settings().target
    rows = [{"id": f"row {i}", "text": f"{WORDS[i % 5]} x"} for i in range(40)]
    rows[5] = {"id": "row 5", "question": "nothing that is read"}
    rows[6] = {"id": "row 6", "text": " "}
    rows[7] = {"text": "a " * 255}
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**changes) -> GenerationSettings:
        fields = {"method": "ngram", "max_tokens": 2, "concurrency": 1}
        return GenerationSettings(target=target, input=file, output=tmp_path / "out.jsonl", **{**fields, **changes})

    return make


def quiet(*event) -> None:
    """Report no progress."""


def written(settings: GenerationSettings) -> list[dict]:
    return [json.loads(line) for line in settings.output.read_text().splitlines()]


def test_answers_stand_in_the_order_of_the_rows_and_errors_in_their_places(settings, engine_command):
    asked = settings()
    generation = Generation(asked)
    seen = []
    generation.run(lambda *event: seen.append(event), engine_command)
    rows = written(asked)
    # A row without an id gets the number of its line.
    assert [row["id"] for row in rows] == [f"row {i}" if i != 7 else "8" for i in range(40)]
    assert [i for i, row in enumerate(rows) if "error" in row] == [5, 6, 7]
    assert generation.num_errors == 3
    assert "must have a 'text' or 'prompt'" in rows[5]["error"]
    assert "must fit the target's 256 tokens, got 255 + 2" in rows[7]["error"]
    # The engine answers with the prompt's first token and the next one.
    assert rows[8] == {
        "id": "row 8", "text": "d e", "finish_reason": "length", "num_prompt_tokens": 2, "num_output_tokens": 2,
        "num_steps": 2, "num_drafts": 4, "num_accepted_tokens": 4, "acceptance_rate": 0.5, "acceptance_length": 2.0,
    }  # fmt: skip
    assert [row["text"][0] for row in rows if "text" in row] == [WORDS[i % 5] for i in range(40) if i not in (5, 6, 7)]
    assert seen[-1] == (40, 40)
    assert sorted(file.name for file in asked.output.parent.glob("out*")) == ["out.jsonl"]


def test_an_interrupted_run_goes_on_where_it_was(settings, engine_command, starts):
    asked = settings()
    calls = []

    def interrupt(done, total):
        calls.append(done)
        # Of three shards of 12 or 13 rows two are finished; the errors count as done.
        if done >= 3 + 12 + 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Generation(asked).run(interrupt, engine_command)
    assert not asked.output.exists()
    Generation(settings(resume=True)).run(quiet, engine_command)
    first, second = starts()
    assert first[3] == "0"
    # Rows are counted from 0; the first two shards are not generated again.
    assert int(second[3]) > 24
    resumed = asked.output.read_text()
    Generation(asked).run(quiet, engine_command)
    assert asked.output.read_text() == resumed
    assert starts()[2][3] == "0"


@pytest.mark.parametrize("seed", range(2))
def test_a_run_killed_again_and_again_generates_no_finished_shard_again(seed, settings, engine_command, starts, turns):
    """At random file operations; behind the last one the output is whole, and before it there is none."""
    asked, chance = settings(resume=True), random.Random(seed)
    whole = replace(asked, output=asked.output.with_name("whole.jsonl"))
    Generation(whole).run(quiet, engine_command)
    expected, kept, num_killed = whole.output.read_text(), {}, 0
    parts = asked.output.with_name("out.jsonl.parts")
    for _ in range(3):
        before = len(starts())
        num_killed += run_until(
            chance.randint(1, 12), asked.output, lambda: Generation(asked).run(quiet, engine_command)
        )
        wait_for_end([int(start[1]) for start in starts()[before:]])
        now = stamps(parts / "shards", "*.json")
        assert kept.items() <= now.items() or asked.output.exists(), "finished shards stay as they are"
        kept = now
        assert not asked.output.exists() or asked.output.read_text() == expected
    before = len(turns())
    Generation(asked).run(quiet, engine_command)
    assert num_killed > 1 and kept, "or nothing could be generated again"
    assert len(turns()) - before == 3 - len(kept)
    assert asked.output.read_text() == expected and not parts.exists()


def test_rows_of_a_dead_engine_get_its_error_and_resume_generates_them(settings, engine_command, faults):
    faults(ngram="crash")
    asked = settings()
    generation = Generation(asked)
    generation.run(quiet, engine_command)
    assert generation.num_errors == 40
    assert written(asked)[0]["error"].startswith("engine ended with exit code 1 with 0 of 3 parts measured")
    faults()
    Generation(settings(resume=True)).run(quiet, engine_command)
    assert sum("error" in row for row in written(asked)) == 3


def test_actors_take_contiguous_rows_and_leave_the_order(settings, engine_command, monkeypatch):
    jobs = []

    class OneAfterTheOther(RayRunner):
        """Runs the jobs here, from the last to the first."""

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def run_jobs(self, given, logs, on_event, command):
            from qm_spec.bench.engine.jobs import run_jobs

            jobs.extend(given)
            for number in reversed(range(len(given))):
                run_jobs([given[number]], logs, lambda _, event, number=number: on_event(number, event), command)

    asked = settings()
    Generation(asked).run(quiet, engine_command)
    plain = asked.output.read_text()
    monkeypatch.setattr("qm_spec.bench.runs.generate.RayRunner", OneAfterTheOther)
    Generation(settings(ray=RaySettings(2))).run(quiet, engine_command)
    assert asked.output.read_text() == plain
    assert [len(job.shards) for job in jobs] == [1, 2]
    places = [int(prompt.prompt_id) for job in jobs for shard in job.shards for prompt in shard.prompts]
    assert places == sorted(places)
    # Whoever generates it, row i samples with seed + i of those that can be answered.
    assert [shard.seed for job in jobs for shard in job.shards] == [0, 12, 24]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "qm_spec-window"},
            "method: must be one of ngram, .*, qm_spec, .*, got qm_spec-window",
        ),
        ({"max_tokens": 0}, "max_tokens: must be at least 1, got 0"),
        ({"concurrency": 0}, "concurrency: must be at least 1"),
        ({"temperature": -1.0}, r"temperature: must be 0 \(greedy\) or above"),
        ({"dtype": "int4"}, "dtype: must be one of auto, bfloat16"),
    ],
)
def test_settings_out_of_range(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_a_line_that_is_no_json_is_refused_before_an_engine(settings):
    asked = settings()
    asked.input.write_text('{"text": "a"}\n{oops\n')
    with pytest.raises(ValueError, match=r"in.jsonl:2 must be a JSON object"):
        Generation(asked)


def test_the_command_reports_errors_by_its_exit_code(settings, engine_command, monkeypatch):
    monkeypatch.setattr(Generation.run, "__defaults__", (engine_command,))
    asked = settings()
    words = ["generate", "--target", asked.target, "--input", asked.input, "--output", asked.output]
    found = CliRunner().invoke(app, [*map(str, words), "--method", "ngram", "--max-tokens", "2"])
    assert found.exit_code == 1, found.output
    assert re.search("40 rows, 3 of them with an error", found.output)
    assert Path(asked.output).exists()
