"""Intervals hold a known truth as often as they say, and verdicts follow from them."""

import copy

import numpy as np
import pytest
from support.synthetic_results import made_up_results, made_up_rows, made_up_run

from qm_spec.bench.results.bootstrap import (
    ACCEPTANCE,
    SPEED,
    TPOT,
    Estimate,
    PairedRequests,
    Resamples,
    compare_requests,
    estimate,
    estimate_mean,
    metric_value,
    noise_floor,
    pair_requests,
    verdict,
)
from qm_spec.bench.results.compare import compare_results, format_comparisons, noise_floors


def skewed_ratio(rng, n):
    """Return columns whose ratio of means is 3, both skewed as latencies are and depending on each other."""
    common = rng.lognormal(0, 0.5, n)
    return {"up": 3 * common * rng.lognormal(-0.08, 0.4, n), "down": common}


# Intervals


@pytest.mark.parametrize("n", [8, 60])
def test_intervals_hold_the_truth_as_often_as_they_say(n):
    """500 data sets: the share of 95 % intervals that hold 3 lies in 0.92..0.98, 3 standard errors around 0.95."""
    rng = np.random.default_rng(0)
    held = 0
    for number in range(500):
        found = Resamples(skewed_ratio(rng, n), seed=number, num_resamples=1000).ratio({"up": 1, "down": -1})
        held += found.low <= 3 <= found.high
    assert 0.92 <= held / 500 <= 0.98, held / 500


def test_a_wider_confidence_gives_a_wider_interval():
    resamples = Resamples(skewed_ratio(np.random.default_rng(1), 30))
    narrow, wide = (resamples.ratio({"up": 1, "down": -1}, confidence) for confidence in (0.5, 0.95))
    assert wide.low < narrow.low < narrow.value == wide.value < narrow.high < wide.high


def test_an_interval_is_the_same_for_the_same_seed():
    columns = skewed_ratio(np.random.default_rng(1), 30)
    first, again, other = (Resamples(columns, seed).ratio({"up": 1, "down": -1}) for seed in (0, 0, 1))
    assert first == again
    assert first != other and other.low == pytest.approx(first.low, rel=0.02)


def test_the_value_is_the_ratio_of_sums_not_the_mean_of_ratios():
    columns = {"up": np.array([1.0, 10, 10, 10, 10]), "down": np.array([1.0, 1, 1, 1, 100])}
    assert Resamples(columns).ratio({"up": 1, "down": -1}).value == pytest.approx(41 / 104)
    assert Resamples(columns).ratio({"down": 2, "up": -1}).value == pytest.approx(104**2 / 41)


def test_a_share_may_be_of_either_sign():
    """500 data sets of 20 passes: the share of 95 % intervals that hold 0 lies in 0.92..0.98."""
    rng = np.random.default_rng(0)
    held = 0
    for number in range(500):
        columns = {"ours": rng.normal(0, 5, 20), "theirs": rng.normal(20, 5, 20)}
        found = Resamples(columns, seed=number, num_resamples=1000).share("ours", "theirs")
        held += found.low <= 0 <= found.high
    assert 0.92 <= held / 500 <= 0.98, held / 500
    assert Resamples({"ours": np.ones(9), "theirs": -np.ones(9)}).share("ours", "theirs") is None


def test_resampling_in_pieces_is_as_good_as_at_once(monkeypatch):
    columns = skewed_ratio(np.random.default_rng(1), 30)
    whole = Resamples(columns, num_resamples=1001).ratio({"up": 1, "down": -1})
    monkeypatch.setattr("qm_spec.bench.results.bootstrap._CHUNK", 30 * 100)
    assert Resamples(columns, num_resamples=1001).ratio({"up": 1, "down": -1}) == whole


def test_few_prompts_have_a_value_and_no_interval():
    found = Resamples({"up": np.ones(4), "down": np.full(4, 2.0)}).ratio({"up": 1, "down": -1})
    assert found == Estimate(0.5) and not found.has_interval


def test_an_undefined_ratio_is_no_number():
    ratio = {"up": 1, "down": -1}
    assert Resamples({"up": np.ones(9), "down": np.zeros(9)}).ratio(ratio) is None
    # One prompt of nine drafted: a third of the resamples have no draft at all.
    assert Resamples({"up": np.ones(9), "down": np.eye(9)[0]}).ratio(ratio) == Estimate(9.0)
    with pytest.raises(ValueError, match=r"one length, got \[2, 3\]"):
        Resamples({"up": np.ones(2), "down": np.ones(3)})


def test_the_interval_of_a_mean_is_students():
    values = np.random.default_rng(0).normal(1.0, 2.0, 400)
    found, error = estimate_mean(list(values)), values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.966 * error, abs=0.2 * error)
    assert found.high == pytest.approx(values.mean() + 1.966 * error, abs=0.2 * error)
    assert not estimate_mean([1.0, 2.0]).has_interval


# Pairs of measurements


def test_pairing_cancels_what_prompts_differ_in():
    before = made_up_rows(noise=0.01)
    after = made_up_rows(noise=0.011, seconds_per_step=0.0097)
    paired = compare_requests(SPEED, before, after)
    assert paired.value == pytest.approx(1 / 0.97, rel=0.01)
    assert paired.high - paired.low < 0.02
    alone = estimate(SPEED, before)
    assert (alone.high - alone.low) / alone.value > 5 * (paired.high - paired.low)


def test_paired_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = 0
    for number in range(400):
        hard = rng.lognormal(0, 0.6, 30)
        columns = {
            "before": hard * rng.lognormal(0, 0.05, 30),
            "after": 1.1 * hard * rng.lognormal(0, 0.05, 30),
        }
        found = Resamples(columns, seed=number, num_resamples=1000).ratio({"after": 1, "before": -1})
        held += found.low <= 1.1 <= found.high
    assert 0.915 <= held / 400 <= 0.985, held / 400


def test_requests_pair_by_prompt_and_length():
    rows = made_up_rows(num_prompts=4)
    others = [*made_up_rows(num_prompts=2, context_tokens=99), *rows[:0:-1]]
    ours, theirs = pair_requests(rows, others)
    assert [row.prompt_id for row in ours] == ["1", "2", "3"]
    assert ours == theirs
    assert compare_requests(SPEED, rows, []) is None


def test_metrics_are_those_of_the_sums():
    rows = made_up_rows("qm_spec", num_prompts=3)
    drafts, accepted = sum(row.num_drafts for row in rows), sum(row.num_accepted_tokens for row in rows)
    assert metric_value(ACCEPTANCE, rows) == pytest.approx(1 + accepted / drafts)
    assert metric_value(SPEED, rows) == pytest.approx(3 * 64 / sum(row.latency_s for row in rows))
    assert metric_value(TPOT, rows) == pytest.approx(1000 * sum(row.tpot_s for row in rows) / 3)
    assert metric_value(ACCEPTANCE, made_up_rows("none")) is None
    assert estimate(ACCEPTANCE, []) is None


def test_the_machine_cancels_from_the_ratio_of_speedups():
    fast, slow = 0.01, 0.02
    sides = [
        made_up_rows(method, seconds_per_step=step, noise=0.01)
        for step in (fast, slow)
        for method in ("qm_spec", "none")
    ]
    paired = PairedRequests(sides[0], sides[2], sides[1], sides[3])
    assert paired.ratio(SPEED).value == pytest.approx(0.5, rel=0.02)
    assert paired.speedup_ratio().value == pytest.approx(1, abs=0.02)
    assert verdict(SPEED, paired.speedup_ratio(), 1.02) == "no difference shown"


# Verdicts


@pytest.mark.parametrize(
    ("low", "high", "floor", "expected"),
    [
        (1.01, 1.2, 1.0, "faster"),
        (0.99, 1.2, 1.0, "no difference shown"),
        (1.01, 1.2, 1.02, "no difference shown"),
        (0.8, 0.95, 1.02, "slower"),
        (0.8, 0.99, 1.02, "no difference shown"),
        (None, None, 1.0, "too few prompts"),
    ],
)
def test_a_verdict_needs_the_whole_interval_beyond_the_floor(low, high, floor, expected):
    assert verdict(SPEED, Estimate(1.1, low, high), floor) == expected
    opposite = {"faster": "slower", "slower": "faster"}.get(expected, expected)
    assert verdict(TPOT, Estimate(1.1, low, high), floor) == opposite


def test_the_noise_floor_is_the_farthest_end_in_either_direction():
    assert noise_floor([Estimate(1.0, 0.98, 1.01), Estimate(1.0, 0.99, 1.015), None]) == pytest.approx(1 / 0.98)
    assert noise_floor([Estimate(1.03)]) == 1.03
    assert noise_floor([]) == 1.0


# Two results files


def results_of(seconds_per_step=0.01, keep=0.6, noise=0.01, again=True, **options):
    plain = made_up_rows("none", seconds_per_step=seconds_per_step, noise=noise, **options)
    drafted = made_up_rows("qm_spec", seconds_per_step=seconds_per_step, keep=keep, noise=noise, **options)
    runs = [made_up_run("none", plain), made_up_run("qm_spec", drafted, plain)]
    if again:
        second = made_up_rows("none-again", seconds_per_step=seconds_per_step, noise=noise, **options)
        runs.append(made_up_run("none-again", second, plain))
    return made_up_results(*runs)


def verdicts(report, method):
    return {one.metric.name: one.verdict for one in report.comparisons if one.setting.method == method}


def test_a_file_compared_with_itself_shows_no_difference():
    report = compare_results(results_of(), results_of())
    assert {one.verdict for one in report.comparisons} == {"no difference shown"}
    assert all(one.ratio.value == pytest.approx(1) for one in report.comparisons)
    assert report.notes == ()
    assert "-0.0%" not in format_comparisons(report)


def test_a_better_drafter_on_a_slower_machine():
    report = compare_results(results_of(keep=0.3), results_of(keep=0.8, seconds_per_step=0.011))
    assert verdicts(report, "qm_spec") == {
        "speedup": "faster",
        "tokens/s per request": "faster",
        "TTFT ms": "slower",
        "TPOT ms": "faster",
        "latency ms": "faster",
        "accept length": "longer",
    }
    assert verdicts(report, "none")["tokens/s per request"] == "slower"
    text = format_comparisons(report)
    assert "qm_spec, K=4, context 256, concurrency 1, temperature 0 (40 prompts)" in text
    assert "95% interval" in text


def test_noise_hides_a_small_difference():
    calm = compare_results(results_of(again=False), results_of(seconds_per_step=0.0098, again=False))
    assert verdicts(calm, "none")["tokens/s per request"] == "faster"
    assert "noise floor is not known in A and B" in calm.notes[0]
    busy = results_of()
    again = made_up_rows("none-again", seconds_per_step=0.0105)
    busy["runs"][2] = made_up_run("none-again", again)
    assert 1.04 < noise_floors(busy)["tokens/s per request"] < 1.08
    assert (
        verdicts(compare_results(busy, results_of(seconds_per_step=0.0098)), "none")["TPOT ms"] == "no difference shown"
    )


def test_what_only_one_file_has_is_named():
    before, after = results_of(), results_of()
    after["runs"][1]["num_speculative_tokens"] = 5
    before["runs"][0]["requests"] = before["runs"][0]["requests"][:30]
    report = compare_results(before, after)
    assert "only in A: qm_spec, K=4, context 256, concurrency 1, temperature 0" in report.notes
    assert "only in B: qm_spec, K=5, context 256, concurrency 1, temperature 0" in report.notes
    assert any("30 of 40 prompts are in both files" in note for note in report.notes)
    assert not verdicts(report, "qm_spec")


def test_what_cannot_be_compared_is_refused():
    before, after = results_of(), results_of()
    other = copy.deepcopy(after)
    other["provenance"]["prompts_sha256"] = "1" * 64
    with pytest.raises(ValueError, match="same prompts, got prompts_sha256 000000000000 and 111111111111"):
        compare_results(before, other)
    for run in other["runs"]:
        run["concurrency"] = 9
    other["provenance"] = {}
    with pytest.raises(ValueError, match="must share a setting, got none in common"):
        compare_results(before, other)
    for run in after["runs"]:
        del run["requests"]
    with pytest.raises(ValueError, match="must list the requests"):
        compare_results(before, after)
