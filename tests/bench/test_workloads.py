"""Loaders of benchmarks: published formats on small files, generated documents, books and traces."""

import gzip
import json
from collections import Counter

import pytest

from qm_spec.bench.workloads.catalogue import DATA_VARIABLE, SPEC_BENCH_TASKS, WORKLOADS, load_workload, workload_path
from qm_spec.bench.workloads.generated import KINDS
from qm_spec.bench.workloads.long_documents import book_prompts, generated_prompts
from qm_spec.bench.workloads.prompts import read_prompts, tokenize_prompts

MT_BENCH = ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"]


class WordTokenizer:
    """A token per word: its length, or with a template the roles before the contents."""

    def __init__(self, chat_template=None):
        self.chat_template = chat_template

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [len(word) for word in text.split()]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return " ".join(word for message in messages for word in (message["role"], message["content"]))


@pytest.fixture(autouse=True)
def no_folder_of_the_user(monkeypatch):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)


def write_jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def spec_bench_rows():
    categories = [*MT_BENCH, *(name for name in SPEC_BENCH_TASKS for _ in range(8) if name not in MT_BENCH)]
    return [
        {"question_id": 81 + number, "category": name, "turns": [f"{name} a bc", "again"], "reference": ["x"]}
        for number, name in enumerate(categories)
    ]


# Published files


def test_spec_bench_has_its_thirteen_categories(tmp_path):
    write_jsonl(tmp_path / "spec_bench.jsonl", spec_bench_rows())
    found = load_workload("spec_bench", WordTokenizer(), data=tmp_path)
    assert Counter(one.category for one in found) == {
        **dict.fromkeys(MT_BENCH, 1),
        **dict.fromkeys(("translation", "summarization", "qa", "math_reasoning", "rag"), 8),
    }
    assert found[0].prompt_id == "81"
    # The first turn alone: the second asks about an answer that is not there.
    assert found[0].token_ids == (len("writing"), 1, 2)


def test_a_part_of_a_benchmark_holds_every_task(tmp_path):
    write_jsonl(tmp_path / "spec_bench.jsonl", spec_bench_rows())
    found = load_workload("spec_bench", WordTokenizer(), data=tmp_path, num_prompts=12)
    assert set(Counter(SPEC_BENCH_TASKS[one.category] for one in found).values()) == {2}
    assert len({one.prompt_id for one in found}) == 12
    with pytest.raises(ValueError, match="spec_bench: must hold at least 49 prompts, got 48"):
        load_workload("spec_bench", WordTokenizer(), data=tmp_path, num_prompts=49)


def test_the_first_of_each_category_come_in_turn(tmp_path):
    rows = [{"id": f"{name}{number}", "category": name, "text": name} for name in "ab" for number in range(3)]
    file = write_jsonl(tmp_path / "p.jsonl", rows)
    found = load_workload(str(file), WordTokenizer(), per_category=2)
    assert [one.prompt_id for one in found] == ["a0", "b0", "a1", "b1"]
    write_jsonl(file, rows[:-2])
    with pytest.raises(ValueError, match="every category must hold at least 2 prompts, got b 1; lower per_category"):
        load_workload(str(file), WordTokenizer(), per_category=2)
    with pytest.raises(ValueError, match="documents: per_category needs a file of prompts"):
        load_workload("documents", WordTokenizer(), per_category=2, num_tokens=100)


def test_conversations_of_spec_bench_go_through_the_chat_template(tmp_path):
    write_jsonl(tmp_path / "spec_bench.jsonl", spec_bench_rows())
    found = load_workload("spec_bench", WordTokenizer("template"), data=tmp_path)
    assert found[0].token_ids == (len("user"), len("writing"), 1, 2)


def test_mt_bench_keeps_its_eight_categories(tmp_path, monkeypatch):
    (tmp_path / "mt_bench").mkdir()
    rows = [row for row in spec_bench_rows() if row["category"] in MT_BENCH]
    write_jsonl(tmp_path / "mt_bench" / "question.jsonl", rows)
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    assert [one.category for one in load_workload("mt_bench", WordTokenizer())] == MT_BENCH


def test_gsm8k_asks_by_the_chat_template_or_as_question_and_answer(tmp_path):
    write_jsonl(tmp_path / "gsm8k_test.jsonl", [{"question": "how many ducks", "answer": "#### 9"}])
    (chat,) = load_workload("gsm8k", WordTokenizer("template"), data=tmp_path)
    assert chat.token_ids == (4, 3, 4, 5)  # user how many ducks
    (plain,) = load_workload("gsm8k", WordTokenizer(), data=tmp_path)
    assert plain.token_ids == (9, 3, 4, 5, 7)  # Question: how many ducks Answer:


def test_humaneval_is_code_to_be_continued_even_by_a_chat_model(tmp_path):
    row = {"task_id": "HumanEval/0", "prompt": "def f (x) :", "test": "assert", "entry_point": "f"}
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as stream:
        stream.write(json.dumps(row) + "\n")
    (found,) = load_workload("humaneval", WordTokenizer("template"), data=tmp_path)
    assert (found.prompt_id, found.token_ids) == ("HumanEval/0", (3, 1, 3, 1))


def test_sharegpt_begins_with_the_person_and_skips_monologues(tmp_path):
    rows = [
        {"id": "a", "conversations": [{"from": "system", "value": "be kind"}, {"from": "human", "value": "hi you"}]},
        {"id": "b", "conversations": []},
        {"id": "c", "conversations": [{"from": "gpt", "value": "I speak alone"}]},
        {"id": "a", "conversations": [{"from": "user", "value": "same id"}, {"from": "gpt", "value": "yes"}]},
    ]
    (tmp_path / "sharegpt.json").write_text(json.dumps(rows))
    found = load_workload("sharegpt", WordTokenizer(), data=tmp_path)
    assert [(one.prompt_id, one.token_ids) for one in found] == [("a", (2, 3)), ("a#2", (4, 2))]


def test_a_file_of_any_shape_goes_by_its_path(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "one two"}]},
        {"prompt": "three"},
        {"_id": "l", "context": "long text", "input": "and question", "dataset": "qasper"},
    ]
    found = load_workload(str(write_jsonl(tmp_path / "any.jsonl", rows)), WordTokenizer("template"))
    assert [one.token_ids for one in found] == [(4, 3, 3), (5,), (4, 4, 4, 3, 8)]
    assert [(one.prompt_id, one.category) for one in found] == [("1", None), ("2", None), ("l", "qasper")]


# What is missing


def test_without_a_folder_of_data_the_way_out_is_named():
    with pytest.raises(FileNotFoundError, match=r"pass one with --data or set QM_SPEC_DATA.*hemingkx/Spec-Bench"):
        load_workload("spec_bench", WordTokenizer())


def test_a_missing_file_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"looked for gsm8k_test.jsonl and gsm8k/test.jsonl in {tmp_path}"):
        load_workload("gsm8k", WordTokenizer(), data=tmp_path)


def test_an_unknown_workload_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"must be one of books, builtin, documents, gsm8k, .*got nothing_here"):
        workload_path("nothing_here")
    assert list(WORKLOADS) == sorted(WORKLOADS)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"turns": []}, "must have a 'text' or 'prompt'"),
        ({"question": "no answer"}, "must have a 'text' or 'prompt'"),
        ({"input_length": 0}, "must have a 'text' or 'prompt'"),
        ({"prompt": "a", "timestamp": "noon"}, "timestamp in milliseconds or as an ISO time, got 'noon'"),
    ],
)
def test_a_row_of_no_shape_is_refused(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        load_workload(str(write_jsonl(tmp_path / "rows.jsonl", [row])), WordTokenizer())


def test_a_json_file_must_be_a_list(tmp_path):
    (tmp_path / "one.json").write_text('{"prompt": "a"}')
    with pytest.raises(ValueError, match="must be a list of objects, got dict"):
        load_workload(str(tmp_path / "one.json"), WordTokenizer())


# Traces


def test_times_of_arrival_begin_at_zero(tmp_path):
    by_seconds = [{"prompt": "a", "arrival_s": 10.5}, {"prompt": "b", "arrival_s": 12}]
    by_stamp = [{"prompt": "a", "timestamp": 27_000}, {"prompt": "b", "timestamp": 27_250}]
    by_iso = [
        {"prompt": "a", "timestamp": "2023-11-16 18:15:46.6"},
        {"prompt": "b", "timestamp": "2023-11-16 18:16:46.6"},
    ]
    arrivals = [
        [one.arrival_s for one in load_workload(str(write_jsonl(tmp_path / "t.jsonl", rows)), WordTokenizer())]
        for rows in (by_seconds, by_stamp, by_iso, [{"prompt": "a"}])
    ]
    assert arrivals == [[0, 1.5], [0, 0.25], [0, 60], [None]]


def test_a_trace_of_lengths_gets_texts_of_those_lengths(tmp_path):
    rows = [
        {"timestamp": 0, "input_length": 700, "output_length": 52, "hash_ids": [1, 2]},
        {"timestamp": 100, "prompt": "a text of its own"},
        {"timestamp": 900, "input_length": 33, "output_length": 5, "hash_ids": [3]},
    ]
    file = write_jsonl(tmp_path / "trace.jsonl", rows)
    found = load_workload(str(file), WordTokenizer())
    assert [len(one.token_ids) for one in found] == [700, 5, 33]
    assert [one.arrival_s for one in found] == [0, 0.1, 0.9]
    assert found == load_workload(str(file), WordTokenizer())
    assert found != load_workload(str(file), WordTokenizer(), seed=1)
    with pytest.raises(ValueError, match="must have a text, got only its length of 700 tokens"):
        tokenize_prompts(read_prompts(file), WordTokenizer())


# Long documents


def test_documents_have_exactly_the_length_and_repeat_by_their_seed():
    found = load_workload("documents", WordTokenizer(), num_tokens=1500, seed=3)
    assert [one.category for one in found] == list(KINDS)
    assert {len(one.token_ids) for one in found} == {1500}
    again = load_workload("documents", WordTokenizer(), num_tokens=1500, seed=3)
    assert again == found
    other = load_workload("documents", WordTokenizer(), num_tokens=1500, seed=4, num_prompts=2)
    assert len(other) == 2 and other[0].token_ids != found[0].token_ids


def test_a_first_guess_that_is_too_short_is_corrected():
    class DenseAtFirst(WordTokenizer):
        """Sees many tokens in the first text it meets, so that lengths are guessed too short."""

        met = False

        def __call__(self, text, **options):
            ids = super().__call__(text)["input_ids"]
            dense, self.met = not self.met, True
            return {"input_ids": ids * 5 if dense else ids}

    (found,) = generated_prompts(DenseAtFirst(), 1, 2000, seed=0)
    assert len(found.token_ids) == 2000


def test_documents_need_a_length():
    with pytest.raises(ValueError, match="documents: needs a length in tokens"):
        load_workload("documents", WordTokenizer())


def test_books_are_cut_from_their_beginning_and_short_ones_left_out(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("too short")
    (tmp_path / "deep" / "c.txt").write_text("x " * 40 + "yy " * 500)
    (tmp_path / "a.txt").write_text("zzz " * 300)
    found = book_prompts(tmp_path, WordTokenizer(), None, 50)
    assert [one.prompt_id for one in found] == ["a", "deep/c"]
    assert found[1].token_ids == (1,) * 40 + (2,) * 10
    assert load_workload(str(tmp_path), WordTokenizer(), num_prompts=1, num_tokens=50) == found[:1]
    whole = book_prompts(tmp_path, WordTokenizer(), None, None)
    assert [len(one.token_ids) for one in whole] == [300, 2, 540]
    with pytest.raises(ValueError, match=r"at least 3 texts \(.txt\) of 50 tokens, got 2 of 3"):
        book_prompts(tmp_path, WordTokenizer(), 3, 50)
