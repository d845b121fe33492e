"""Token reduction methods, and a language model that reads a reduced context."""

import copy
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
typer = pytest.importorskip("typer")

from click.testing import Result  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from qm_spec.bench.reduction import (  # noqa: E402
    METHODS,
    bipartite_matching,
    cost,
    find_methods,
    language_report,
    nearest_error,
    rebuild_error,
)
from qm_spec.bench.reduction.language_model import (  # noqa: E402
    NONE,
    WHOLE,
    ReducedLanguageModel,
    Score,
    cut_windows,
    empty_context,
    run_name,
    score_continuation,
    score_window,
    tokens_kept,
)

ALL = list(METHODS)
MERGING = [name for name, method in METHODS.items() if method.merges]
PRUNING = [name for name, method in METHODS.items() if not method.merges]
DETERMINISTIC = [name for name in ALL if not name.startswith("random")]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs() -> dict[str, torch.Tensor]:
    duplicates = draw(2, 5, 8).repeat(1, 4, 1)
    return {
        "random": draw(2, 20, 8),
        "duplicates": duplicates,
        "all equal": torch.ones(2, 20, 8),
        "all zero": torch.zeros(2, 20, 8),
        "large": 1e4 * draw(2, 20, 8),
        "odd": draw(2, 19, 8),
        "one token": draw(2, 1, 8),
        "not contiguous": draw(2, 8, 20).mT,
        "layers": draw(3, 2, 20, 8),
    }


@pytest.mark.parametrize("kind", inputs())
@pytest.mark.parametrize("name", ALL)
def test_k_tokens_are_left_in_order_and_every_token_is_in_a_group_or_dropped(name: str, kind: str) -> None:
    tokens = inputs()[kind]
    last = tokens[-1] if tokens.ndim == 4 else tokens
    num_tokens = last.shape[1]
    for keep in (1, 2, 3, 7, num_tokens - 1, num_tokens, num_tokens + 5):
        if keep < 1:
            continue
        merged = METHODS[name].make(0)(tokens, keep)
        kept = min(keep, num_tokens)
        assert merged.tokens.shape == (2, kept, 8)
        assert torch.isfinite(merged.tokens).all()
        assert merged.live.all()
        assert (merged.place.diff(dim=-1) > 0).all(), "places must rise"
        assert ((merged.place >= 0) & (merged.place < num_tokens)).all()
        own = merged.cluster.gather(1, merged.place)
        assert torch.equal(own, torch.arange(kept).expand(2, -1)), "a place must be a member of its group"
        members = F.one_hot(merged.cluster + 1, kept + 1)[..., 1:].sum(1)
        assert torch.equal(members.float(), merged.size)
        assert merged.size.sum(-1).tolist() == [num_tokens if METHODS[name].merges else kept] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL)
def test_nothing_changes_where_every_token_is_kept(name: str, dtype: torch.dtype) -> None:
    tokens = draw(2, 12, 8).to(dtype)
    merged = METHODS[name].make(0)(tokens, 12)
    assert torch.equal(merged.tokens, tokens)
    assert torch.equal(merged.place, torch.arange(12).expand(2, -1))


@pytest.mark.parametrize("name", PRUNING)
def test_pruned_tokens_are_gone_and_kept_ones_untouched(name: str) -> None:
    tokens = draw(2, 20, 8)
    merged = METHODS[name].make(0)(tokens, 6)
    assert torch.equal(merged.tokens, tokens.gather(1, merged.place.unsqueeze(-1).expand(-1, -1, 8)))
    assert (merged.cluster == -1).sum(-1).tolist() == [14, 14]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_batch_of_two_is_two_batches(name: str) -> None:
    tokens = draw(2, 20, 8)
    both = METHODS[name].make(0)(tokens, 6)
    for row in range(2):
        alone = METHODS[name].make(0)(tokens[row : row + 1], 6)
        assert torch.equal(both.cluster[row], alone.cluster[0])
        torch.testing.assert_close(both.tokens[row], alone.tokens[0])


@pytest.mark.parametrize("name", [name for name in MERGING if not name.startswith("quickmerge")])
def test_merging_without_saliency_takes_plain_means(name: str) -> None:
    tokens = draw(2, 20, 8)
    merged = METHODS[name].make(0)(tokens, 6)
    for row in range(2):
        for slot in range(6):
            mean = tokens[row][merged.cluster[row] == slot].mean(0)
            torch.testing.assert_close(merged.tokens[row, slot], mean)


@pytest.mark.parametrize("name", ALL)
def test_what_cannot_be_reduced_is_refused(name: str) -> None:
    reduce = METHODS[name].make(0)
    with pytest.raises(ValueError, match="K must be at least 1, got 0"):
        reduce(draw(2, 5, 8), 0)
    with pytest.raises(TypeError, match="floats"):
        reduce(torch.ones(2, 5, 8, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match=r"\[B, N, D\]"):
        reduce(draw(5, 8), 2)


def test_an_unknown_method_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"quickmerge.*got nonsense"):
        find_methods(["tome", "nonsense"])


def slow_bipartite(tokens: torch.Tensor, keep: int) -> list[tuple[int, set[int]]]:
    """ToMe's matching as the paper writes it, one pair at a time: place and members of each token left."""
    groups = [(i, {i}) for i in range(len(tokens))]
    while len(groups) > keep:
        values = [tokens[sorted(members)].double().mean(0) for _, members in groups]
        edges = []
        for a in range(0, len(groups), 2):
            scores = [F.cosine_similarity(values[a], values[b], dim=0).item() for b in range(1, len(groups), 2)]
            best = max(range(len(scores)), key=lambda i: scores[i])
            edges.append((scores[best], a, 2 * best + 1))
        edges.sort(key=lambda edge: -edge[0])
        away = edges[: min(len(groups) - keep, len(groups) // 2)]
        for _, a, b in away:
            groups[b] = (groups[b][0], groups[b][1] | groups[a][1])
        gone = {a for _, a, _ in away}
        groups = [group for i, group in enumerate(groups) if i not in gone]
    return groups


@pytest.mark.parametrize("num_tokens", [2, 3, 9, 16])
@pytest.mark.parametrize("seed", [0, 1])
def test_bipartite_matching_is_that_of_the_paper(num_tokens: int, seed: int) -> None:
    tokens = draw(1, num_tokens, 4, seed=seed)
    for keep in range(1, num_tokens + 1):
        merged = bipartite_matching(tokens, keep)
        expected = slow_bipartite(tokens[0], keep)
        assert merged.place[0].tolist() == [place for place, _ in expected]
        for slot, (_, members) in enumerate(expected):
            assert set((merged.cluster[0] == slot).nonzero().flatten().tolist()) == members
            torch.testing.assert_close(merged.tokens[0, slot], tokens[0, sorted(members)].mean(0))


def test_uniform_pooling_takes_runs_of_neighbours() -> None:
    merged = METHODS["uniform"].make(0)(draw(1, 7, 2), 3)
    assert merged.cluster[0].tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert merged.place[0].tolist() == [2, 4, 6]


def test_window_keeps_the_first_four_and_the_newest() -> None:
    assert METHODS["window"].make(0)(draw(1, 100, 2), 10).place[0].tolist() == [0, 1, 2, 3, 94, 95, 96, 97, 98, 99]
    assert METHODS["window"].make(0)(draw(1, 100, 2), 3).place[0].tolist() == [0, 98, 99]


def test_topk_norm_prefers_the_earlier_of_equals() -> None:
    tokens = torch.tensor([[[1.0], [-3.0], [2.0], [3.0], [1.0]]])
    assert METHODS["topk-norm"].make(0)(tokens, 3).place[0].tolist() == [1, 2, 3]
    assert METHODS["topk-norm"].make(0)(torch.ones(1, 5, 1), 2).place[0].tolist() == [0, 1]


@pytest.mark.parametrize("name", ["quickmerge-recent", "uniform-recent"])
def test_recent_tokens_and_sinks_stay_as_they_are(name: str) -> None:
    tokens = draw(2, 100, 8)
    merged = METHODS[name].make(0)(tokens, 20)
    assert torch.equal(merged.tokens[:, :4], tokens[:, :4])
    assert torch.equal(merged.tokens[:, -6:], tokens[:, -6:])
    assert (merged.size[:, :4] == 1).all() and (merged.size[:, -6:] == 1).all()


def test_a_causal_merge_holds_nothing_later_than_its_place() -> None:
    for name in ("quickmerge-causal", "kmeans", "uniform"):
        merged = METHODS[name].make(0)(draw(2, 50, 8), 12)
        assert (merged.place.gather(1, merged.cluster) >= torch.arange(50)).all(), name


def test_random_draws_follow_the_seed() -> None:
    tokens = draw(1, 100, 4)
    first, second = METHODS["random"].make(3), METHODS["random"].make(3)
    places = first(tokens, 10).place
    assert torch.equal(places, second(tokens, 10).place)
    assert not torch.equal(places, first(tokens, 10).place), "the next call must draw anew"
    assert not torch.equal(places, METHODS["random"].make(4)(tokens, 10).place)


def test_errors_of_a_case_reckoned_by_hand() -> None:
    # Means 1.5 and 6 of (1, 2) and (4, 8): squared error 0.25 + 0.25 + 4 + 4 over 1 + 4 + 16 + 64.
    tokens = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]])
    merged = METHODS["uniform"].make(0)(tokens, 2)
    assert rebuild_error(tokens, merged).item() == pytest.approx(8.5 / 85)
    assert nearest_error(tokens, merged).item() == pytest.approx(8.5 / 85)
    # 4 and 8 are kept: 1 and 2 are lost, or rebuilt as 4.
    pruned = METHODS["topk-norm"].make(0)(tokens, 2)
    assert rebuild_error(tokens, pruned).item() == pytest.approx(5 / 85)
    assert nearest_error(tokens, pruned).item() == pytest.approx(13 / 85)


def make_model(seed: int = 0) -> "transformers.LlamaForCausalLM":
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> "transformers.LlamaForCausalLM":
    return make_model()


@pytest.fixture(scope="module")
def token_ids() -> torch.Tensor:
    return torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_without_reduction_the_logits_are_the_models_own(token_ids: torch.Tensor, depth: int) -> None:
    model = make_model().double()
    with torch.inference_mode():
        exact = model(token_ids).logits
    reduced = ReducedLanguageModel(model, depth)
    context, last = reduced.prefill(token_ids[:, :24], None, 24)
    torch.testing.assert_close(last, exact[:, 23], rtol=0, atol=1e-12)
    torch.testing.assert_close(reduced.extend(context, token_ids[:, 24:]), exact[:, 24:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_a_method_that_keeps_all_leaves_the_model_as_it_is(
    model: "transformers.LlamaForCausalLM", token_ids: torch.Tensor, name: str
) -> None:
    reduced = ReducedLanguageModel(model, 2)
    whole, last = reduced.prefill(token_ids[:, :24], None, 24)
    kept, kept_last = reduced.prefill(token_ids[:, :24], METHODS[name].make(0), 24)
    assert torch.equal(last, kept_last)
    assert torch.equal(reduced.extend(whole, token_ids[:, 24:]), reduced.extend(kept, token_ids[:, 24:]))


@pytest.mark.parametrize("name", ["quickmerge", "tome", "window"])
@pytest.mark.parametrize("depth", [0, 2])
def test_no_prediction_sees_a_later_token(
    model: "transformers.LlamaForCausalLM", token_ids: torch.Tensor, name: str, depth: int
) -> None:
    reduced = ReducedLanguageModel(model, depth)
    context, _ = reduced.prefill(token_ids[:, :24], METHODS[name].make(0), 8)
    before = reduced.extend(context.copy(), token_ids[:, 24:])
    changed = token_ids[:, 24:].clone()
    changed[:, 9] = (changed[:, 9] + 1) % 61
    after = reduced.extend(context.copy(), changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] != after[:, 9:]).any(-1).all(), "what follows must see the change"


@pytest.mark.parametrize("name", ["quickmerge", "window"])
def test_token_by_token_reads_as_all_at_once(token_ids: torch.Tensor, name: str) -> None:
    reduced = ReducedLanguageModel(make_model().double(), 1)
    context, _ = reduced.prefill(token_ids[:, :24], METHODS[name].make(0), 8)
    at_once = reduced.extend(context.copy(), token_ids[:, 24:])
    one_by_one = [reduced.extend(context, token_ids[:, i : i + 1]) for i in range(24, 40)]
    torch.testing.assert_close(torch.cat(one_by_one, 1), at_once, rtol=0, atol=1e-10)


def test_a_copied_context_is_left_alone(model: "transformers.LlamaForCausalLM", token_ids: torch.Tensor) -> None:
    reduced = ReducedLanguageModel(model, 1)
    context, _ = reduced.prefill(token_ids[:, :24], METHODS["tome"].make(0), 8)
    before = copy.deepcopy(context.cache)
    reduced.extend(context.copy(), token_ids[:, 24:])
    assert context.num_read == 0
    for old, new in zip(before.layers, context.cache.layers, strict=True):
        assert torch.equal(old.keys, new.keys)


def test_layers_above_the_reduction_hold_k_tokens(
    model: "transformers.LlamaForCausalLM", token_ids: torch.Tensor
) -> None:
    context, _ = ReducedLanguageModel(model, 1).prefill(token_ids[:, :24], METHODS["quickmerge"].make(0), 8)
    assert [layer.keys.shape[2] for layer in context.cache.layers] == [24, 8, 8, 8]
    # 2 sequences, 2 key/value heads of 8 float32, keys and values.
    assert context.kv_bytes == 2 * 2 * 8 * 4 * 2 * (24 + 3 * 8)


def test_proportional_attention_weighs_a_merged_token_like_its_members(token_ids: torch.Tensor) -> None:
    """Where all context tokens are the same, one merged token of size n acts like n of them.

    Rotary positions are taken out of the model, so that equal tokens have equal keys.
    """
    model = make_model().double()
    model.model.rotary_emb.inv_freq.zero_()
    same = torch.full((1, 12), 5)
    whole = ReducedLanguageModel(model, 0)
    exact = whole.extend(whole.prefill(same, None, 12)[0], token_ids[:1])
    for proportional, equal in ((True, True), (False, False)):
        reduced = ReducedLanguageModel(model, 0, proportional)
        context, _ = reduced.prefill(same, METHODS["uniform"].make(0), 3)
        assert torch.allclose(reduced.extend(context, token_ids[:1]), exact, atol=1e-5) == equal


def test_a_depth_without_layers_above_is_refused(model: "transformers.LlamaForCausalLM") -> None:
    for depth in (-1, 4):
        with pytest.raises(ValueError, match=r"depth must be in 0\.\.3"):
            ReducedLanguageModel(model, depth)


def test_scores_are_cross_entropy_and_hits(model: "transformers.LlamaForCausalLM", token_ids: torch.Tensor) -> None:
    logits = torch.zeros(1, 3, 61)
    logits[0, 0, 7] = 100.0
    score = score_continuation(logits, torch.tensor([[1, 7, 2]]))
    assert (score.correct, score.num_tokens) == (1, 2)
    assert score.nats == pytest.approx(math.log(61))

    reduced = ReducedLanguageModel(model, 1)
    scores = score_window(reduced, token_ids[0], 24, find_methods(["tome", "window"]), [1.5, 4.0])
    assert set(scores) == {WHOLE, NONE, "tome@1.5x", "tome@4x", "window@1.5x", "window@4x"}
    with torch.inference_mode():
        own = score_continuation(model(token_ids[:1]).logits[:, 24:], token_ids[:1, 24:])
        alone = score_continuation(model(token_ids[:1, 24:]).logits, token_ids[:1, 24:])
    assert scores[WHOLE].nats == pytest.approx(own.nats, rel=1e-5)
    assert scores[NONE].nats == pytest.approx(alone.nats, rel=1e-5)


def test_no_context_is_the_continuation_alone(model: "transformers.LlamaForCausalLM", token_ids: torch.Tensor) -> None:
    with torch.inference_mode():
        alone = model(token_ids).logits
    torch.testing.assert_close(ReducedLanguageModel(model, 2).extend(empty_context(), token_ids), alone)


@pytest.mark.parametrize(("num_tokens", "ratio", "kept"), [(512, 1.5, 341), (512, 3, 170), (512, 4, 128), (2, 4, 1)])
def test_no_more_tokens_are_kept_than_the_ratio_allows(num_tokens: int, ratio: float, kept: int) -> None:
    assert tokens_kept(num_tokens, ratio) == kept


def test_windows_stay_within_documents_and_more_of_them_begin_alike() -> None:
    documents = [list(range(10)), list(range(100, 125)), [7]]
    windows = cut_windows(documents, 5, 100)
    assert sorted(windows[:, 0].tolist()) == [0, 5, 100, 105, 110, 115, 120]
    assert (windows.diff(dim=-1) == 1).all()
    assert torch.equal(cut_windows(documents, 5, 3), windows[:3])
    with pytest.raises(ValueError, match="the longest has 25"):
        cut_windows(documents, 26, 1)


def scores_of(whole: float, reduced: float, none: float) -> dict[str, Score]:
    return {WHOLE: Score(whole, 5, 10), NONE: Score(none, 1, 10), run_name("tome", 2.0): Score(reduced, 3, 10)}


def test_summary_of_windows_reckoned_by_hand() -> None:
    rows = language_report.summarise(5 * [scores_of(20, 25, 30), scores_of(40, 45, 50)], ["tome"], [2.0])
    tome = rows[2]
    assert tome["nats"] == pytest.approx(3.5)
    assert tome["perplexity"] == pytest.approx(math.exp(3.5))
    assert tome["accuracy"] == pytest.approx(0.3)
    # Half a nat in all windows: paired, there is no doubt about it.
    assert tome["nats_more"] == pytest.approx(0.5)
    assert tome["nats_more_interval"] == pytest.approx((0.5, 0.5))
    assert [row["cost_share"] for row in rows] == pytest.approx([0, 1, 0.5])


def test_tables_replace_only_what_stands_between_the_marks(tmp_path) -> None:
    file = tmp_path / "results.md"
    file.write_text(f"before\n{language_report.BEGIN}\nold\n{language_report.END}\nafter\n")
    language_report.write_tables("new", file)
    assert file.read_text() == f"before\n{language_report.BEGIN}\nnew\n{language_report.END}\nafter\n"
    language_report.write_tables("fresh", tmp_path / "none.md")
    assert "fresh" in (tmp_path / "none.md").read_text()


def test_ratios_of_times_are_taken_within_pairs() -> None:
    times = cost.PairedTimes([2.0, 20.0, 6.0], [1.0, 10.0, 2.0])
    assert times.ratio_quartiles[1] == 2.0


def test_costs_count_every_byte_and_call(model: "transformers.LlamaForCausalLM", token_ids: torch.Tensor) -> None:
    calls: list[int] = []
    rows = cost.measure_costs(
        ReducedLanguageModel(model, 1),
        token_ids[:1, :24],
        find_methods(["tome", "window"]),
        [2.0, 4.0],
        repeats=2,
        decode_steps=2,
        on_progress=lambda: calls.append(1),
    )
    assert len(calls) == 2 * 2 * 2 * 2
    assert [(row["method"], row["num_kept"]) for row in rows] == [
        ("1x", 24),
        ("tome", 12),
        ("tome", 6),
        ("window", 12),
        ("window", 6),
    ]
    assert [row["kv_ratio"] for row in rows[1:]] == pytest.approx([(24 + 36) / 96, (24 + 18) / 96] * 2)


def test_peak_memory_sees_what_an_action_needs_and_not_what_was_there() -> None:
    resting = torch.ones(8_000_000)
    peak = cost.peak_bytes(lambda: torch.ones(16_000_000).sum())
    if peak is None:
        pytest.skip("the system has no high-water mark that can be reset")
    assert 60e6 < peak < 90e6, "64 MB were needed"
    # What an earlier action freed must not hide it.
    assert 60e6 < (cost.peak_bytes(lambda: torch.ones(16_000_000).sum()) or 0) < 90e6
    assert resting[0] == 1


@pytest.fixture
def invoke(root: Path) -> Callable[..., Result]:
    """Call a script of `benchmarks/` as its command line does, in this process."""

    def call(script: str, *arguments: str) -> Result:
        spec = importlib.util.spec_from_file_location(f"benchmarks_{script}", root / "benchmarks" / f"{script}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        app = typer.Typer()
        app.command()(module.main)
        return CliRunner().invoke(app, arguments, catch_exceptions=False)

    return call


def test_language_benchmark_writes_its_files_and_goes_on_where_it_stopped(invoke, tmp_path) -> None:
    arguments = ["--methods", "quickmerge,window", "--ratios", "2", "--depths", "0,3", "--context", "32"]
    arguments += ["--continuation", "8", "--windows", "3", "--no-cost", "--out", str(tmp_path)]
    assert invoke("language", *arguments).exit_code == 0
    results = json.loads((tmp_path / "quickmerge.json").read_text())
    assert [part["depth"] for part in results["quality"]] == [0, 3]
    assert (tmp_path / "quickmerge.png").stat().st_size > 10_000
    assert "quickmerge minus" in (tmp_path / "quickmerge.md").read_text()

    # The rows of an interrupted run: two are there, the third was being written.
    rows = tmp_path / "quickmerge.windows.jsonl"
    lines = rows.read_text().splitlines()
    assert len(lines) == 1 + 6
    lines[1] = lines[1].replace('"correct": ', '"correct": 1')
    rows.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])
    assert invoke("language", *arguments).exit_code == 0
    again = rows.read_text().splitlines()
    assert again[1] == lines[1], "a row that was there must be taken"
    assert again[3:] == lines[3:], "the others must be measured again, to the same numbers"

    # Other settings: nothing may be taken over.
    assert invoke("language", *arguments, "--seed", "1").exit_code == 0
    assert '"correct": 1' in lines[1] and rows.read_text().splitlines()[1] != lines[1]


@pytest.mark.parametrize("script", ["language", "bench_methods"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "nonsense"], "got nonsense"),
        (["--target", "nowhere"], "nowhere holds no config.json"),
        (["--text", "nowhere"], "nowhere does not exist"),
    ],
)
def test_benchmarks_refuse_bad_input_with_a_sentence(invoke, tmp_path, script, arguments, message) -> None:
    bad = invoke(script, *arguments, "--out", str(tmp_path / "x"))
    assert bad.exit_code == 2
    assert message in bad.output


def test_methods_benchmark_prints_a_row_per_method(invoke, tmp_path) -> None:
    arguments = ["--tokens", "32", "--batch", "1", "--windows", "1", "--repeats", "1", "--depth", "1"]
    done = invoke("bench_methods", *arguments, "--out", str(tmp_path / "methods.json"))
    assert done.exit_code == 0
    rows = json.loads((tmp_path / "methods.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ALL
    assert all(row["method"] in done.output for row in rows)
