"""Acceptance over the context: prompts, lookup, hybrids, rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from qm_spec.bench.acceptance.by_length import (
    LOOKUP,
    AcceptanceSettings,
    LongContextRow,
    PromptWriter,
    measure_acceptance,
)
from qm_spec.bench.acceptance.replay import expected_replay, read_text, replay, write_continuations
from qm_spec.bench.acceptance.suffix_drafts import lookup_drafts
from qm_spec.bench.results.bootstrap import Estimate
from qm_spec.drafter.prior import QuickMergePrior

ROOT = Path(__file__).parents[2]
NOVELS = ROOT / "qm_spec" / "zoo" / "novels"
PROSE = [NOVELS / "prompts.jsonl"]


def test_lookup_takes_the_longest_suffix_and_the_latest_place() -> None:
    #            0  1  2  3  4  5  6  7  8  9
    token_ids = [1, 2, 3, 9, 2, 3, 8, 1, 2, 3]
    (found,) = lookup_drafts(token_ids, 8, 1, 4)
    assert (found.length, found.drafts) == (3, (9, 2, 3, 8))
    (found,) = lookup_drafts([7, *token_ids[1:7], 5, 2, 3], 8, 1, 2)
    assert (found.length, found.drafts) == (2, (8, 5))


def test_lookup_sees_nothing_behind_its_row() -> None:
    token_ids = [4, 5, 6, 7, 4, 5, 6, 7]
    rows = lookup_drafts(token_ids, 3, 4, 4)
    assert [row.length for row in rows] == [0, 2, 3, 4]
    assert rows[1].drafts == (6, 7, 4, 5)
    assert lookup_drafts([1, 1, 2], 0, 1, 3, min_length=1)[0].drafts == (1, 1, 1), "2 is not known there"


def test_lookup_refuses_lengths_out_of_order() -> None:
    with pytest.raises(ValueError, match="got 3 and 2"):
        lookup_drafts([1, 2, 3], 0, 1, 1, min_length=3, max_length=2)


@pytest.fixture(scope="module")
def pair():
    tokenizer = AutoTokenizer.from_pretrained(NOVELS / "target")
    target = AutoModelForCausalLM.from_pretrained(NOVELS / "target", dtype="float32").eval()
    return target, tokenizer, QuickMergePrior.from_pretrained(NOVELS / "drafter", dtype="float32").eval()


@pytest.mark.parametrize("domain", ["novels", "quotations", "records", "code"])
def test_prompts_have_the_wanted_length_and_are_reproducible(pair, domain: str) -> None:
    writer = PromptWriter(pair[1], PROSE, 400)
    prompt = writer.write(domain, 300, 1)
    assert len(prompt) == 300
    assert prompt == writer.write(domain, 300, 1)
    assert prompt != writer.write(domain, 300, 2)
    assert writer.write(domain, 400, 1)[-60:] == prompt[-60:], "lengths differ by what stands before"
    with pytest.raises(ValueError, match="at most 400 tokens, got 401"):
        writer.write(domain, 401, 1)


def test_a_quoted_passage_stands_in_the_middle(pair) -> None:
    prompt = PromptWriter(pair[1], PROSE, 600).write("quotations", 600, 0)
    quoted = prompt[-24:]
    places = [start for start in range(600 - 24) if prompt[start : start + 24] == quoted]
    assert places and 200 < places[0] < 300


def test_too_little_text_is_named(pair) -> None:
    with pytest.raises(ValueError, match="no text of prose has 100000 tokens"):
        PromptWriter(pair[1], PROSE, 100_000).write("novels", 100_000, 0)


def test_rows_are_sums_of_replays(pair) -> None:
    target, tokenizer, drafter = pair
    (rows,) = measure_acceptance(
        target, tokenizer, {"ours": drafter}, PROSE, AcceptanceSettings([64], 2, 16, num_drafts=3, domains=["novels"])
    )
    by_name = {row.drafter: row for row in rows}
    assert set(by_name) == {"ours", LOOKUP, f"ours+{LOOKUP}"}
    writer = PromptWriter(tokenizer, PROSE, 64)
    steps = tokens = 0
    for seed in range(2):
        prompt = writer.write("novels", 64, seed)
        (continuation,) = write_continuations(target, [prompt], 16)
        layers = drafter.config.eagle_aux_hidden_state_layer_ids
        found = replay(drafter, read_text(target, prompt, continuation, layers), 3)
        steps += len(found.accepted)
        tokens += len(found.accepted) + sum(found.accepted)
    assert sum(by_name["ours"].steps) == steps
    assert by_name["ours"].acceptance_length.value == pytest.approx(tokens / steps)


def test_rows_of_sampled_texts_expect_drafts_that_are_drawn(pair) -> None:
    target, tokenizer, drafter = pair
    (rows,) = measure_acceptance(
        target,
        tokenizer,
        {"ours": drafter},
        PROSE,
        AcceptanceSettings([64], 2, 24, num_drafts=3, domains=["novels"], temperature=0.8),
    )
    by_name = {row.drafter: row for row in rows}
    writer, steps, accepted = PromptWriter(tokenizer, PROSE, 64), 0.0, 0.0
    for seed in range(2):
        prompt = writer.write("novels", 64, seed)
        (continuation,) = write_continuations(target, [prompt], 24, temperature=0.8, seed=seed)
        read = read_text(target, prompt, continuation, drafter.config.eagle_aux_hidden_state_layer_ids)
        expected = expected_replay(drafter, read, 3, 0.8)
        steps, accepted = steps + expected.steps, accepted + expected.accepted
    assert by_name["ours"].acceptance_length.value == pytest.approx(1 + accepted / steps)
    # Lookup is sure of what it drafts: where it drafts, tokens are kept or not.
    assert all(number == round(number) for number in by_name[LOOKUP].steps)


def test_rows_are_compared_prompt_by_prompt() -> None:
    def row(name: str, tokens: tuple[int, ...], steps: tuple[int, ...]) -> LongContextRow:
        return LongContextRow("novels", 64, name, Estimate(0.0), (), tokens, steps, None)

    steps = (10, 12, 9, 11, 10, 13)
    ours, theirs = row("a", tuple(4 * n for n in steps), steps), row("b", tuple(2 * n for n in steps), steps)
    ratio = ours.over(theirs)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2, 2, 2))
    uneven = row("c", (40, 12, 36, 11, 40, 13), steps)
    assert uneven.over(theirs).low < uneven.over(theirs).value < uneven.over(theirs).high


def test_seeds_are_pooled_by_name() -> None:
    import long_context

    def row(name: str, tokens: int) -> LongContextRow:
        return LongContextRow("novels", 64, name, Estimate(0.0), (), (tokens, 2 * tokens), (1, 2), None)

    rows = [row("a", 4), row("b-x", 9), row("a-1", 6), row("a+lookup", 3), row("a-1+lookup", 5)]
    pooled = long_context.pool_seeds(rows)
    assert [(r.drafter, r.tokens, r.steps) for r in pooled] == [
        ("a", (10, 20), (2, 4)),
        ("b-x", (9, 18), (1, 2)),
        ("a+lookup", (8, 16), (2, 4)),
    ]
    # A drafter of one seed is left as it is.
    assert [r.acceptance_length.value for r in pooled] == [5, 0, 4]


def test_another_setting_of_the_memory_is_what_the_drafter_reads_with() -> None:
    import long_context

    drafters = long_context.load_drafters(
        [f"ours={NOVELS / 'drafter'}"], ["near=schedule:0", "all=window:4096"], NOVELS / "target"
    )
    states, embeddings = torch.randn(1, 1024, 3 * 192), torch.zeros(1, 1024, 192)
    visible = {}
    for name, drafter in drafters.items():
        rows = drafter.read(states, embeddings).anchors(torch.tensor([[1023]]))
        visible[name] = int(rows.bias.isfinite()[0, 0, 0].sum())
    assert visible == {"ours": 320, "near": 128, "all": 1024}
    seeds = [f"{name}={NOVELS / 'drafter'}" for name in ("ours", "other", "ours-1")]
    named = long_context.load_drafters(seeds, ["near=schedule:0"], NOVELS / "target")
    assert list(named) == ["ours", "other", "ours-1", "near", "near-1"]
    with pytest.raises(ValueError, match="NAME=KEY:VALUE"):
        long_context.load_drafters([f"ours={NOVELS / 'drafter'}"], ["near"], NOVELS / "target")


def test_the_plot_shows_what_is_asked_for() -> None:
    import long_context

    assert long_context.chosen_to_draw(["ours", "eagle3"], None) == ["ours", "eagle3", "lookup", "ours+lookup"]
    wanted = ["ours+lookup", "eagle3+lookup"]
    assert long_context.chosen_to_draw(["ours", "eagle3"], wanted) == wanted
    with pytest.raises(ValueError, match=r"--draw: expected some of ours, .*eagle3\+lookup, got eagle"):
        long_context.chosen_to_draw(["ours", "eagle3"], ["ours", "eagle"])


def test_speed_is_measured_by_the_shared_harness_on_prompts_of_all_domains(tmp_path: Path, monkeypatch) -> None:
    import long_context

    from qm_spec.cli import evaluate as command

    asked = []
    monkeypatch.setattr(command, "run_with_progress", lambda benchmark: asked.append(benchmark) or 0)
    both = [f"{name}={NOVELS / 'drafter'}" for name in ("qm_spec", "other")]
    with pytest.raises(typer.Exit) as ended:
        long_context.main(drafter=both, speed="novels,code", lengths="40,60", num_prompts=2, repeats=2, out=tmp_path)
    assert ended.value.exit_code == 0
    (benchmark,) = asked
    methods = ["none", "ngram", "ngram-16", "qm_spec", "other"]
    assert [one.name for one in benchmark.methods] == methods
    lengths = [[len(prompt.token_ids) for prompt in prompts] for prompts in benchmark.shard_prompts]
    assert lengths == [[40] * 4, [60] * 4]
    # In turn, so that what disturbs a part of the measurement disturbs all domains.
    assert [prompt.category for prompt in benchmark.shard_prompts[0]] == 2 * ["novels", "code"]
    depths = {
        one.method: (one.shard.engine.speculative_config or {}).get("num_speculative_tokens")
        for one in benchmark._measurements
    }
    assert [depths[name] for name in methods] == [None, 4, 16, None, None]
    with pytest.raises(typer.Exit):
        long_context.main(speed="novels", lengths="40", num_prompts=1, ngram=False, out=tmp_path)
    assert [one.name for one in asked[1].methods] == ["none", "qm_spec"]


def test_speed_refuses_what_it_would_ignore(tmp_path: Path, capsys) -> None:
    import long_context

    with pytest.raises(typer.Exit):
        long_context.main(speed="novels", temperature=1.0, merge=["near=schedule:0"], out=tmp_path)
    assert "without --merge, --temperature" in capsys.readouterr().err


def test_the_headline_needs_no_arguments_but_where_to_write(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "long_context.py", "--out", tmp_path]
    small = ["--domains", "novels", "--lengths", "40", "--num-prompts", "1", "--num-tokens", "8"]
    subprocess.run([*command, *small], check=True, capture_output=True, timeout=300)
    record = json.loads((tmp_path / "long_context.json").read_text())
    names = {row["drafter"] for row in record["rows"]}
    assert names == {"qm_spec", "lookup", "qm_spec+lookup"}
    assert record["entries_attended"]["qm_spec"] == [40]
    assert (tmp_path / "long_context.png").stat().st_size > 0
    assert "### novels" in (tmp_path / "long_context.md").read_text()
