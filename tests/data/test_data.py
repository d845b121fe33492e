"""Files of prompts, conversations and answers: what is read, what is left out, what is refused."""

from __future__ import annotations

import gzip
import json
import lzma

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qm_spec.data.answers import Answered, read_answers
from qm_spec.data.conversations import read_conversations
from qm_spec.data.json_lines import read_rows
from qm_spec.data.kind import data_kind

USER = {"role": "user", "content": "a b"}
ANSWER = {"role": "assistant", "content": "c d"}
CHAT = (
    "{% for one in messages %}{{ '[' + one.role + '] ' + one.content + ' [end] e ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)


def write(file, *rows):
    opened = {".gz": gzip.open, ".xz": lzma.open}.get(file.suffix, open)
    with opened(file, "wt", encoding="utf-8") as stream:
        stream.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return file


def answered(prompt=(1, 2), output=(3,), **more):
    return {"prompt_token_ids": list(prompt), "output_token_ids": list(output), **more}


# Rows


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.xz"])
def test_lines_are_read_packed_or_not_and_keep_their_numbers(tmp_path, name):
    file = write(tmp_path / name, {"text": "é"}, "", {"text": "b"})
    assert list(read_rows(file)) == [(1, {"text": "é"}), (3, {"text": "b"})]


def test_a_list_is_read_packed_or_not(tmp_path):
    for name in ("rows.json", "rows.json.gz"):
        file = write(tmp_path / name, "[{}, 5]")
        with pytest.raises(ValueError, match=r"rows.json(.gz)?:2 must be a JSON object, got int"):
            list(read_rows(file))


@pytest.mark.parametrize(
    ("line", "message"), [("{oops", "must be a JSON object, got '{oops'"), ("[1]", "must be a JSON object, got list")]
)
def test_a_bad_line_is_fatal_by_its_number_or_left_out_by_it(tmp_path, line, message):
    file = write(tmp_path / "rows.jsonl", {"text": "a"}, line, {"text": "b"})
    with pytest.raises(ValueError, match=r"rows.jsonl:2 must be"):
        list(read_rows(file))
    said = []
    assert [row["text"] for _, row in read_rows(file, said.append)] == ["a", "b"]
    assert len(said) == 1 and f"rows.jsonl:2 {message}" in said[0]


def test_bytes_that_are_no_utf8_are_a_bad_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:2 must be a JSON object"):
        list(read_rows(file))


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_a_file_that_breaks_off_is_named_even_where_bad_lines_are_left_out(tmp_path, suffix):
    file = write(tmp_path / f"rows.jsonl{suffix}", *({"text": str(number**9)} for number in range(200)))
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(ValueError, match=rf"must be a whole {suffix} file, got one that breaks off"):
        list(read_rows(file, lambda message: None))


# Answers


def test_answers_come_from_folders_in_the_order_of_shards_and_from_files(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "answers-00001.jsonl.xz", answered((5,), (6,)))
    write(folder / "answers-00000.jsonl.xz", answered((1, 2), (3, 4), category="code", id="x", temperature=0.0))
    file = write(tmp_path / "more.jsonl", answered((7,), (8,)))
    assert list(read_answers([folder, file], vocab_size=9, fingerprint="any")) == [
        Answered((1, 2), (3, 4), "code"),
        Answered((5,), (6,)),
        Answered((7,), (8,)),
    ]


def test_an_empty_answer_is_left_out_by_name(tmp_path):
    file = write(tmp_path / "a.jsonl", answered(output=()), answered())
    said = []
    assert list(read_answers([file], on_skip=said.append)) == [Answered((1, 2), (3,))]
    assert said == [f"{file}:1 has an empty answer"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, r"a.jsonl:2 must have prompt_token_ids, a list of token ids, got only \['text'\]"),
        (answered(output=(3, -1)), r"must have output_token_ids, a list of token ids, got \[3, -1\]"),
        (answered(prompt=()), "must have a prompt of at least one token"),
        ("{oops", "a.jsonl:2 must be a JSON object"),
    ],
)
def test_a_row_without_an_answer_is_fatal_or_left_out(tmp_path, row, message):
    file = write(tmp_path / "a.jsonl", answered(), row)
    with pytest.raises(ValueError, match=message):
        list(read_answers([file]))
    said = []
    assert len(list(read_answers([file], skip_bad_lines=True, on_skip=said.append))) == 1
    assert "a.jsonl:2" in said[0]


def test_ids_of_another_tokenizer_are_refused_even_where_bad_lines_are_left_out(tmp_path):
    file = write(tmp_path / "a.jsonl", answered(), answered(output=(32,)))
    assert len(list(read_answers([file], vocab_size=33))) == 2
    with pytest.raises(ValueError, match=r"a.jsonl:2 must hold token ids below the target's 32, got 32.*tokenizer"):
        list(read_answers([file], vocab_size=32, skip_bad_lines=True))


def test_answers_of_another_target_are_refused_before_the_first_is_read(tmp_path):
    shard = write(tmp_path / "answers-00000.jsonl.xz", answered())
    (tmp_path / "provenance.json").write_text(json.dumps({"stages": [{"target_fingerprint": "abc"}]}))
    for path in (tmp_path, shard):
        assert len(list(read_answers([path], fingerprint="abc"))) == 1
        with pytest.raises(ValueError, match="must hold answers of the target def, got those of abc"):
            read_answers([path], fingerprint="def")


def test_a_folder_without_answers_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold answers-\*.jsonl.xz, found none"):
        read_answers([tmp_path])
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        read_answers([tmp_path / "nowhere"])


# Conversations


@pytest.fixture
def tokenizer():
    special = ["[user]", "[assistant]", "[system]", "[end]"]
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate("abcdef?")}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens([AddedToken(word) for word in special])
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", chat_template=CHAT)


def masked(tokenizer, file, **options):
    """Return for each conversation its text and the part of it that is to be learnt."""
    return [
        tuple(
            " ".join(tokenizer.convert_ids_to_tokens(ids))
            for ids in (one.token_ids, [i for i, learn in zip(one.token_ids, one.answer_mask, strict=True) if learn])
        )
        for one in read_conversations([file], tokenizer, **options)
    ]


def test_the_mask_covers_each_answer_and_its_end_token_and_nothing_else(tokenizer, tmp_path):
    system, more = {"role": "system", "content": "f"}, {"role": "assistant", "content": "d"}
    file = write(tmp_path / "c.jsonl", {"messages": [system, USER, ANSWER, USER, more, USER]})
    assert masked(tokenizer, file) == [
        (
            "[system] f [end] e [user] a b [end] e [assistant] c d [end] e [user] a b [end] e [assistant] d [end]",
            "c d [end] d [end]",
        )
    ]


def test_sharegpt_turns_are_read_and_one_that_opens_is_no_answer(tokenizer, tmp_path):
    turns = [{"from": "gpt", "value": "f"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "c"}]
    file = write(tmp_path / "c.json", json.dumps([{"conversations": turns, "category": "talk"}]))
    assert masked(tokenizer, file) == [
        ("[assistant] f [end] e [user] a [end] e [assistant] c [end]", "c [end]"),
    ]
    (found,) = read_conversations([file], tokenizer)
    assert found.category == "talk"


def test_a_template_without_a_special_end_token_teaches_all_that_it_adds(tokenizer, tmp_path):
    tokenizer.chat_template = CHAT.replace(" [end]", "")
    file = write(tmp_path / "c.jsonl", {"messages": [USER, ANSWER]})
    assert masked(tokenizer, file) == [("[user] a b e [assistant] c d e", "c d e")]


def test_a_prompt_that_begins_the_answer_itself_is_compared_by_what_both_begin_with(tokenizer, tmp_path):
    # As templates do that open a thought for the model, and close none in what has been said.
    tokenizer.chat_template = CHAT.replace("'[assistant] '", "'[assistant] f '")
    file = write(tmp_path / "c.jsonl", {"messages": [USER, ANSWER]})
    assert masked(tokenizer, file) == [("[user] a b [end] e [assistant] c d [end]", "c d [end]")]


def test_an_answer_that_later_turns_change_is_not_learnt(tokenizer, tmp_path):
    # The last answer gets an f in front, as thinking is written for the last turn alone.
    tokenizer.chat_template = CHAT.replace(
        "one.content +", "('f ' if loop.last and one.role == 'assistant' else '') + one.content +"
    )
    file = write(tmp_path / "c.jsonl", {"messages": [USER, ANSWER, USER, {"role": "assistant", "content": "d"}]})
    ((text, learnt),) = masked(tokenizer, file)
    assert learnt == "f d [end]"
    assert "[assistant] c d [end]" in text


def test_a_long_conversation_ends_at_a_turn_and_one_without_room_for_an_answer_is_left_out(tokenizer, tmp_path):
    file = write(tmp_path / "c.jsonl", {"messages": [USER, ANSWER, USER, ANSWER]})
    whole = "[user] a b [end] e [assistant] c d [end]"
    said = []
    assert masked(tokenizer, file, max_tokens=9, on_skip=said.append) == [(whole, "c d [end]")]
    assert masked(tokenizer, file, max_tokens=8, on_skip=said.append) == []
    assert said == [
        f"{file}:1: behind token 9 lie, left out, the last answers: 1",
        f"{file}:1: prompt and first answer must fit 8 tokens, got 9",
    ]


@pytest.mark.parametrize("answer", ["", " \n", None])
def test_a_conversation_without_an_answer_is_left_out_by_name(tokenizer, tmp_path, answer):
    file = write(tmp_path / "c.jsonl", {"messages": [USER, {"role": "assistant", "content": answer}]})
    said = []
    assert masked(tokenizer, file, on_skip=said.append) == []
    assert said == [f"{file}:1: the conversation must have an answer that is not empty, got none"]


def test_a_conversation_that_the_template_refuses_is_left_out_by_name(tokenizer, tmp_path):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    file = write(tmp_path / "c.jsonl", {"messages": [USER, ANSWER]})
    said = []
    assert masked(tokenizer, file, on_skip=said.append) == []
    assert "roles must alternate" in said[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, r"c.jsonl:1 must have a list of 'messages' .* got only \['text'\]"),
        ({"messages": [{"role": "user"}]}, "must have messages each with a 'role' and a 'content'"),
        ({"conversations": [{"from": "nobody", "value": "a"}]}, "must have conversations each with a 'from'"),
    ],
)
def test_a_row_without_a_conversation_is_fatal_or_left_out(tokenizer, tmp_path, row, message):
    file = write(tmp_path / "c.jsonl", row, {"messages": [USER, ANSWER]})
    with pytest.raises(ValueError, match=message):
        masked(tokenizer, file)
    said = []
    assert len(masked(tokenizer, file, skip_bad_lines=True, on_skip=said.append)) == 1
    assert "c.jsonl:1" in said[0]


def test_a_target_without_a_chat_template_is_refused_at_once(tokenizer, tmp_path):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"tokenizer has a chat template, got one without; .*chat_template.jinja"):
        read_conversations([tmp_path], tokenizer)


def test_the_first_row_tells_which_reader_a_path_is_for(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    assert data_kind(folder) == "text"
    shard = write(folder / "answers-00000.jsonl.xz", answered())
    assert data_kind(folder) == data_kind(shard) == "answers"
    assert data_kind(write(tmp_path / "c.jsonl", {"messages": [USER, ANSWER]})) == "conversations"
    assert data_kind(write(tmp_path / "t.jsonl", {"text": "a"})) == "text"
    assert data_kind(write(tmp_path / "book.txt", "It was")) == "text"
