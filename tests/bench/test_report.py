"""Reports of made-up results: what is said, that pages stand alone, and older files."""

import base64
import copy
import dataclasses
import itertools
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from support.synthetic_results import made_up_results, made_up_rows, made_up_run
from typer.testing import CliRunner

from qm_spec.bench.report.content import build_report
from qm_spec.bench.report.measurements import CONCURRENCY, CONTEXT, Measurements
from qm_spec.bench.report.render import render_html, write_plots, write_report
from qm_spec.bench.report.tasks import task_header, task_line, task_names
from qm_spec.bench.results.file import RequestRow, read_results, write_results
from qm_spec.bench.workloads.catalogue import SPEC_BENCH_TASKS
from qm_spec.cli import app

TASKS = tuple(dict.fromkeys(SPEC_BENCH_TASKS.values()))
EMPTY_TAGS = {"meta", "br", "hr", "img", "link", "input"}


def results_of(
    contexts=(256,), concurrencies=(1,), methods=("ngram", "qm_spec"), again=True, categories=TASKS, slow=0.0
):
    """Make up a sweep; `slow` is how much longer a step takes for each further request in flight."""
    keep = {"ngram": 0.2, "qm_spec": 0.6}
    runs = []
    for context in contexts:
        for concurrency in concurrencies:
            seconds = 0.01 * (1 + concurrency / 20)
            shape = {
                "num_prompts": 24,
                "concurrency": concurrency,
                "context_tokens": context,
                "categories": categories,
                "noise": 0.01,
            }
            plain = made_up_rows("none", seconds_per_step=seconds, **shape)
            runs.append(made_up_run("none", plain, plain, concurrency=concurrency))
            if again:
                second = made_up_rows("none-again", seconds_per_step=seconds, **shape)
                runs.append(made_up_run("none-again", second, plain, concurrency=concurrency))
            for method in methods:
                step = seconds * (1 + slow * (concurrency - 1))
                rows = made_up_rows(method, seconds_per_step=step, keep=keep[method], **shape)
                runs.append(made_up_run(method, rows, plain, concurrency=concurrency))
    return made_up_results(*runs)


def section(report, title):
    return next((one for one in report.sections if one.title == title), None)


# What is said


def test_every_part_of_a_sweep_is_there():
    report = build_report(results_of(contexts=(256, 1024), concurrencies=(1, 8)))
    assert [one.title for one in report.sections] == [
        "Results",
        "Speed",
        "Tasks",
        "What got slower",
        "Acceptance",
        "Requests",
        "How it was measured",
    ]
    assert [plot.name for one in report.sections for plot in one.plots] == [
        "speedup",
        "speedup-by-context",
        "speedup-by-concurrency",
        "acceptance-by-position",
        "acceptance-by-category",
        "acceptance-by-context",
        "latency",
        "ttft",
        "requests",
    ]
    (summary,) = section(report, "Results").tables
    assert summary.header[:4] == ["method", "context", "concurrency", "tokens/s"]
    # Twelve runs; the repetition of plain decoding is the noise floor and no row.
    assert [row[:3] for row in summary.rows[:4]] == [
        ["none", "256", "1"],
        ["ngram", "256", "1"],
        ["qm_spec", "256", "1"],
        ["none", "256", "8"],
    ]
    assert len(summary.rows) == 12
    assert "Plain decoding measured twice differs by up to" in section(report, "Results").paragraphs[0]
    assert report.warnings == ()


def test_the_summary_has_the_runs_own_numbers():
    results = results_of()
    run = next(one for one in results["runs"] if one["method"] == "qm_spec")
    (summary,) = section(build_report(results), "Results").tables
    row = dict(zip(summary.header, summary.rows[2], strict=True))
    assert row["method"] == "qm_spec"
    assert row["speedup"] == f"{run['speedup']:.2f}"
    assert row["accept length"] == f"{run['acceptance_length']:.2f}"
    low, high = map(float, summary.rows[2][3].split(" to "))
    assert low <= round(run["speedup"], 2) <= high and high - low < 0.5


def test_what_got_slower_names_the_setting_and_the_metric():
    report = build_report(results_of(concurrencies=(1, 32), methods=("qm_spec",), slow=0.1))
    behind, longer = section(report, "What got slower").tables
    assert behind.header == ["method", "concurrency", "what", "plain", "method", "change", "verdict"]
    lines = {(row[1], row[2]): row[-1] for row in behind.rows}
    assert lines["32", "tokens/s per request"] == lines["32", "TTFT ms"] == lines["32", "TPOT ms"] == "slower"
    assert lines["32", "latency ms, p99"] == "-"
    assert not any(concurrency == "1" for concurrency, _ in lines)
    assert [row[:3] for row in longer.rows] == [["qm_spec", "32", "24 of 24"]]
    assert "In 1 of 2 runs no request took longer." in section(report, "What got slower").paragraphs


def test_nothing_slower_is_said_as_well():
    report = build_report(results_of(methods=("qm_spec",)))
    said = section(report, "What got slower")
    assert not said.tables
    assert said.paragraphs[0].startswith("No method was shown to be slower than plain decoding")


def test_the_best_number_of_drafted_tokens_stands_for_a_method():
    results = results_of(methods=("qm_spec",))
    slower = copy.deepcopy(results["runs"][2])
    slower.update(num_speculative_tokens=8, output_tokens_per_s=1.0)
    results["runs"].append(slower)
    measurements = Measurements(results)
    assert [one.setting.num_speculative_tokens for one in measurements.at_base()] == [0, 4]
    names = [plot.name for one in build_report(results).sections for plot in one.plots]
    assert "speedup-by-K" in names


def test_values_of_axes_are_those_of_the_runs():
    measurements = Measurements(results_of(contexts=(1024, 256), concurrencies=(8, 1)))
    assert (measurements.values(CONTEXT), measurements.values(CONCURRENCY)) == ([256, 1024], [1, 8])
    assert {one.setting.context_tokens for one in measurements.at_base(CONCURRENCY)} == {256}
    assert measurements.varied() == [CONTEXT, CONCURRENCY]


def test_whole_prompts_are_grouped_by_their_length():
    results = results_of(categories=(None,))
    for run in results["runs"]:
        run["context_cut"] = False
        for number, row in enumerate(run["requests"]):
            row["context_tokens"] = 50 + 20 * number
    plots = {plot.name: plot for one in build_report(results).sections for plot in one.plots}
    (axes,) = plots["acceptance-by-context"].figure.axes
    labels = [label.get_text() for label in axes.get_xticklabels()]
    ends = [tuple(map(int, label.split("-"))) for label in labels]
    assert ends[0][0] == 50 and ends[-1][1] == 510
    assert all(before[1] < after[0] for before, after in itertools.pairwise(ends))
    assert "acceptance-by-category" not in plots


def test_speed_ups_stand_by_category_where_turns_have_measured_them():
    results = results_of()
    for run in results["runs"]:
        run["categories"] = [
            {
                "category": name,
                "num_prompts": 2,
                "acceptance_length": 2.0,
                "tokens_per_step": 1.9,
                "speedup": None if run["method"] == "none" else value,
                "speedup_low": None,
                "speedup_high": None,
                "num_prompts_different": 0,
            }
            for name, value in (("math", 2.5), ("qa", 1.5))
        ]
    plots = {plot.name: plot for one in build_report(results).sections for plot in one.plots}
    (axes,) = plots["speedup-by-category"].figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["math", "qa"]
    for bars in axes.containers:
        assert bars.lines[0].get_xdata().tolist() == [2.5, 1.5]
    assert {bars.get_label() for bars in axes.containers} == {"ngram", "qm_spec"}


def test_failures_and_doubts_come_first():
    results = results_of(again=False)
    results["failures"] = [
        {"method": "qm_spec-window", "error": "exit code 9"},
        {"method": "qm_spec", "error": "timeout", "prompt_id": "q7"},
        {"method": "ngram", "error": "lost", "prompt_ids": list("abcdefg")},
    ]
    results["runs"][1].update(lossless=False, num_prompts_different=2, first_difference=5)
    results["runs"][2]["repeats_identical"] = False
    warnings = " ".join(build_report(results).warnings)
    assert "qm_spec-window failed: exit code 9" in warnings
    assert "qm_spec failed at prompt q7: timeout" in warnings
    assert "ngram failed at 7 prompts (a, b, c, d, e, ...): lost" in warnings
    assert "The noise floor is not known" in warnings
    assert "not that of plain decoding (2 of 24 prompts, first at token 5)" in warnings
    assert "the output changed from pass to pass" in warnings


def test_a_file_without_requests_still_gives_a_report(tmp_path):
    results = results_of(again=False)
    results["schema_version"] = 1
    for run in results["runs"]:
        del run["requests"]
    write_results(tmp_path, results)
    write_report(tmp_path)
    report = build_report(results)
    assert "lists no requests" in " ".join(report.warnings)
    assert section(report, "Requests") is section(report, "Tasks") is None
    assert [plot.name for one in report.sections for plot in one.plots] == ["speedup", "acceptance-by-position"]


def test_a_recommendation_comes_before_everything_else():
    results = results_of(concurrencies=(1, 8), methods=("qm_spec",))
    results["recommendation"] = {
        "method": "qm_spec",
        "num_speculative_tokens": 4,
        "speedup": 1.5,
        "speedup_low": 1.4,
        "speedup_high": 1.6,
        "confidence": 0.95,
        "num_candidates": 2,
        "num_conditions": 2,
        "command": "vllm serve made/up",
    }
    report = build_report(results)
    assert report.sections[0].title == "Recommended setting"
    said = " ".join(report.sections[0].paragraphs)
    assert "qm_spec with K=4: speed-up 1.50 (95% interval 1.40 to 1.60)" in said
    assert report.sections[0].code == "vllm serve made/up"
    assert "<pre>vllm serve made/up</pre>" in render_html(report)
    (front,) = report.sections[0].tables
    assert {row[0] for row in front.rows} == {"qm_spec"}


def test_busy_machines_are_named():
    results = results_of(methods=("qm_spec",))
    results["runs"][2]["output_tokens_per_s_per_pass"] = [100.0, 130.0]
    assert "tokens/s 100.00 to 130.00 from pass to pass; the machine was busy" in " ".join(
        build_report(results).warnings
    )
    # Side by side it is their ratio that counts.
    results["runs"][2]["speedup_per_pass"] = [2.0, 2.1]
    assert build_report(results).warnings == ()
    results["runs"][2]["speedup_per_pass"] = [2.0, 2.6]
    assert "speed-up 2.00 to 2.60 from pass to pass" in " ".join(build_report(results).warnings)
    results["runs"][0].update(tpot_ms_p10=10.0, tpot_ms_p90=15.0)
    assert "took 10.0 to 15.0 ms a token" in " ".join(build_report(results).warnings)


def test_categories_have_a_table_with_the_slowest_at_its_end():
    def category(name, speedup):
        interval = {"speedup_low": speedup - 0.1, "speedup_high": speedup + 0.1}
        accepted = {"acceptance_length": 2.5, "tokens_per_step": 2.0, "num_prompts_different": 0}
        return {"category": name, "num_prompts": 10, "speedup": speedup, **interval, **accepted}

    results = results_of(methods=("qm_spec",), again=False, categories=(None,))
    results["runs"][1]["categories"] = [category("qa", 1.5), category("rag", 0.9), category("math", 2.0)]
    (table,) = section(build_report(results), "Categories").tables
    assert table.header == ["category", "prompts", "qm_spec"]
    assert table.rows[0] == ["qa", "10", "1.50 (1.40 to 1.60), 2.50 / 2.00"]
    assert table.rows[-1] == ["(slowest)", "-", "0.90 rag"]


def test_results_without_a_run_are_refused():
    results = made_up_results(failures=[{"method": "none", "error": "no memory"}])
    with pytest.raises(ValueError, match="at least one run, got none \\(failures: none failed: no memory\\)"):
        build_report(results)


# Spec-Bench's table


def test_the_task_table_is_computed_as_spec_bench_does():
    plain = [request("0", "qa", 10, 2.0), request("1", "qa", 10, 1.0), request("2", "rag", 10, 1.0)]
    rows = [
        request("0", "qa", 10, 1.0, drafts=5, accepted=5),
        request("1", "qa", 30, 1.0, drafts=10, accepted=20),
        request("2", "rag", 10, 2.0, drafts=5, accepted=5),
    ]
    tasks = task_names(rows)
    assert task_header(tasks) == ["Models", "qa", "rag", "#Mean Accepted Tokens", "Overall"]
    # Means of speeds: (10 + 30) / 2 by (5 + 10) / 2 for "qa"; sums would give 40/2 by 20/3.
    assert task_line("m", tasks, rows, plain) == ["m", "2.67x", "0.50x", "2.50", "1.80x"]
    assert task_line("m", ["qa", "other"], plain, plain) == ["m", "1.00x", "-", "1.00", "1.00x"]


def test_categories_of_spec_bench_are_told_by_task_as_its_leaderboard_does():
    results = results_of(methods=("qm_spec",), categories=("writing", "coding", "rag"))
    results["provenance"]["prompts"] = "spec_bench"
    (table,) = section(build_report(results), "Tasks").tables
    assert table.header[1:3] == ["Multi-turn Conversation", "Retrieval-aug. Generation"]
    # Elsewhere a category is what the file says.
    results["provenance"]["prompts"] = "mine.jsonl"
    (table,) = section(build_report(results), "Tasks").tables
    assert table.header[1:4] == ["writing", "coding", "rag"]


def request(prompt_id, category, tokens, latency, drafts=0, accepted=0):
    return RequestRow(prompt_id, category, 9, tokens, tokens, drafts, 4 * drafts, accepted, (), 0.1, 0.1, latency)


def test_tasks_stand_in_the_order_of_the_leaderboard():
    rows = [request(str(i), task, 1, 1.0) for i, task in enumerate(reversed(TASKS))]
    assert task_names(rows) == list(TASKS)
    assert TASKS[0] == "Multi-turn Conversation" and TASKS[-1] == "Retrieval-aug. Generation"
    assert task_names(rows[:1]) == []
    assert task_names([dataclasses.replace(row, category=None) for row in rows]) == []


# Pages


class Page(HTMLParser):
    """Collects what a browser would load, ids, and open tags at the end."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.ids, self.references, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in EMPTY_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if (name in ("src", "srcset", "data", "action") and not value.startswith("data:")) or tag in (
                "script",
                "link",
                "iframe",
            ):
                self.loads.append((tag, name, value))
            if name in ("href", "xlink:href"):
                self.references.append(value)
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page():
    return render_html(build_report(results_of(contexts=(256, 1024))))


def test_a_page_loads_nothing(page):
    found = Page(page)
    assert found.loads == []
    assert "://" not in page and "@import" not in page
    assert found.references and all(value.startswith("#") for value in found.references)


def test_references_inside_a_page_meet_their_target(page):
    found = Page(page)
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))
    assert {value[1:] for value in found.references} <= set(found.ids)


def test_plots_are_images_inside_the_page(page):
    drawings = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]+)" alt="([^"]+)">', page)
    assert len(drawings) == 8
    for drawing, words in drawings:
        ElementTree.fromstring(base64.b64decode(drawing))
        assert len(words) > 20


@pytest.mark.parametrize("contexts", [(256,), (256, 1024)])
def test_a_measurement_draws_speed_and_acceptance(tmp_path, contexts):
    write_plots(results_of(contexts=contexts), tmp_path)
    for name in ("acceptance.png", "speedup.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_text_of_results_is_no_markup(page):
    assert "Made-up &lt;processor&gt;" in page
    assert "<processor>" not in page


def test_the_same_results_give_the_same_page(page):
    assert render_html(build_report(results_of(contexts=(256, 1024)))) == page


def test_both_files_are_written(tmp_path):
    write_results(tmp_path, results_of(methods=("qm_spec",)))
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    images = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(images) == 6 and all((tmp_path / name).stat().st_size > 5000 for name in images)
    assert "| Models  | Multi-turn Conversation |" in text


def test_compare_on_the_command_line(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_results(tmp_path / name, results_of())
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "a"), str(tmp_path / "b" / "results.json")])
    assert done.exit_code == 0, done.output
    assert "no difference shown" in done.output and "slower" not in done.output


# Results files


def test_rows_of_requests_survive_the_file(tmp_path):
    rows = made_up_rows("qm_spec", num_prompts=3)
    write_results(tmp_path, made_up_results(made_up_run("qm_spec", rows)))
    (run,) = read_results(tmp_path)["runs"]
    assert [RequestRow.from_json(row) for row in run["requests"]] == rows


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, FileNotFoundError, "results.json does not exist; pass the folder"),
        ("{", ValueError, "must be JSON"),
        ("[]", ValueError, "must be an object with a list of runs"),
        ('{"runs": [], "schema_version": 99}', ValueError, "schema_version one of 1, 2, 3, got 99"),
    ],
)
def test_what_is_no_results_file_is_refused(tmp_path, text, error, message):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(error, match=message):
        read_results(tmp_path)


def test_a_row_of_another_shape_is_refused():
    row = made_up_rows(num_prompts=1)[0].to_json()
    del row["ttft_s"]
    with pytest.raises(ValueError, match=r"lacks \['ttft_s'\], has \['extra'\]"):
        RequestRow.from_json({**row, "extra": 1})
