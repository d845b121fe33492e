"""Dependent documents say the truth about themselves: every span is told by its source, and by nothing else."""

import json
import re
from collections import Counter
from random import Random

import pytest

from qm_spec.training.data import read_documents
from qm_spec.training.dependent import KINDS, MIN_LENGTH, Span, generate, generate_many, write_jsonl
from qm_spec.training.dependent.kinds import kind_class


def prose(seed, num_words=20000):
    rng = Random(seed)
    known = ["".join(rng.choices("aeiorstlnd", k=rng.randint(2, 10))) for _ in range(2000)]
    sentences = (rng.choices(known, k=rng.randint(4, 25)) for _ in range(num_words // 14))
    return "\n".join(" ".join(words).capitalize() + "." for words in sentences)


FILLER = [prose(1), prose(2)]


def lines(document):
    """The lines that are not cut off at the end."""
    return document.text.split("\n")[:-1]


def dependent_characters(documents):
    return sum(span.end - span.start for document in documents for span in document.spans)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [MIN_LENGTH, 6000, 50000])
def test_spans_are_told_by_their_sources(kind, length):
    for seed in range(5):
        document = generate(kind, length, seed, FILLER)
        assert document.kind == kind
        assert 0.97 * length <= len(document.text) <= length
        assert document.spans, "a document that depends on nothing"
        end = 0
        for span in document.spans:
            # Sorted, without overlap, and behind the source's own text.
            assert end <= span.start < span.end <= len(document.text)
            assert span.source >= 0 and span.source + (span.end - span.start) <= span.start
            source = document.text[span.source : span.source + span.end - span.start]
            assert document.text[span.start : span.end] == source
            assert span.distance == span.start - span.source
            end = span.end


@pytest.mark.parametrize("kind", KINDS)
def test_even_the_shortest_documents_depend_on_something(kind):
    assert all(generate(kind, MIN_LENGTH, seed, FILLER).spans for seed in range(100))


@pytest.mark.parametrize("kind", ["needle", "multi_key"])
def test_a_question_has_one_answer(kind):
    answers = {}
    text = generate(kind, 50000, 3, FILLER).text
    for owned, value in re.findall(r"The ([\w' ]+ of the [\w' ]+) is ([\w ]+)\.", text):
        assert answers.setdefault(owned, value) == value
    assert len(answers) > 5
    # Values, too, are told apart.
    assert len(set(answers.values())) > 0.95 * len(answers)


def test_variables_are_what_an_interpreter_says():
    values, printed = {}, 0
    for line in lines(generate("variables", 50000, 3, FILLER)):
        if set_to := re.fullmatch(r"VAR ([A-Z0-9 ]+) = (VAR )?([\w ]+)\.", line):
            name, copied, value = set_to.groups()
            assert name not in values
            values[name] = values[value] if copied else value
        elif shown := re.fullmatch(r"(?:print|the values? of)? ?([A-Z0-9, and]+?)(?::| is| are) ([\w, ]+)\.", line):
            names, shown_values = (re.split(", | and ", group) for group in shown.groups())
            assert [values[name] for name in names] == shown_values
            printed += len(names)
    assert len(values) > 100 and printed > 300


def test_words_are_those_of_their_list():
    words, kinds_of_recall = {}, Counter()
    for line in lines(generate("words", 50000, 3, FILLER)):
        if given := re.search(r"^(?:List |Once more list )?([A-Z]\d{3})( again)?: ([a-z, ]+)\.$", line):
            name, listed = given[1], given[3].split(", ")
            kinds_of_recall["whole"] += name in words
            assert words.setdefault(name, listed) == listed
        elif asked := re.search(r"^More than once in list ([A-Z]\d{3}): ([a-z, ]+)\.$", line):
            count = Counter(words[asked[1]])
            assert asked[2].split(", ") == [word for word in count if count[word] > 1]
            kinds_of_recall["often"] += 1
    assert kinds_of_recall["whole"] > 20 and kinds_of_recall["often"] > 5


def test_records_are_looked_up_right():
    text, looked_up = generate("records", 50000, 3, FILLER).text, 0
    for aspect, person, again, named, value in re.findall(
        r"What is the (\w+) of ([\w ]+)\? The (\w+) of ([\w ]+) is ([\w ]+)\.", text
    ):
        assert (aspect, person) == (again, named)
        record = text[text.index(person) :].partition("\n")[0]
        assert re.search(rf"\b{value}\b", record), record
        looked_up += 1
    assert looked_up > 20


def test_quotations_come_from_the_filler():
    document = generate("quotation", 50000, 3, FILLER)
    for span in document.spans:
        quoted = document.text[span.start : span.end]
        assert any(quoted in text for text in FILLER)
        assert 6 <= len(quoted.split()) <= 200


def test_distances_cover_the_range():
    documents = list(generate_many(60, 16384, 5, FILLER))
    distances = [span.distance for document in documents for span in document.spans]
    octaves = Counter(distance.bit_length() for distance in distances)
    # 64..127 has 7 bits, 4096..8191 has 13; what is far can only be met late.
    for bits in range(7, 14):
        assert octaves[bits] > 0.04 * len(distances), f"{2 ** (bits - 1)}.. holds {octaves[bits]} of {len(distances)}"
    assert max(octaves.values()) < 0.3 * len(distances)
    assert max(distances) > 0.8 * 16384


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.05, 0.15, 1.0])
def test_a_kind_meets_its_density(kind, density):
    documents = [generate(kind, 40000, seed, FILLER, density) for seed in range(5)]
    share = dependent_characters(documents) / sum(len(document.text) for document in documents)
    assert share == pytest.approx(min(density, kind_class(kind).most), rel=0.15)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.2])
def test_a_mixture_meets_its_density(density):
    documents = list(generate_many(100, (2000, 20000), 5, FILLER, density=density))
    share = dependent_characters(documents) / sum(len(document.text) for document in documents)
    assert share == pytest.approx(density, rel=0.1, abs=0.002)


def test_the_same_arguments_write_the_same_and_others_do_not():
    for kind in KINDS:
        first = generate(kind, 3000, 7, FILLER)
        assert first == generate(kind, 3000, 7, list(FILLER))
        assert first.text != generate(kind, 3000, 8, FILLER).text
    mixture = list(generate_many(20, (1000, 3000), 7, FILLER))
    assert mixture == list(generate_many(20, (1000, 3000), 7, FILLER))
    assert mixture[:5] == list(generate_many(5, (1000, 3000), 7, FILLER))
    assert len({document.text for document in mixture}) == 20
    assert mixture[0] != next(generate_many(1, (1000, 3000), 8, FILLER))


def test_a_mixture_has_the_kinds_and_lengths_that_were_asked_for():
    documents = list(generate_many(60, (1500, 3000), 1, FILLER))
    assert {document.kind for document in documents} == set(KINDS)
    assert all(0.97 * 1500 <= len(document.text) <= 3000 for document in documents)
    assert len({len(document.text) for document in documents}) > 30
    assert {document.kind for document in generate_many(10, 1500, 1, FILLER, kinds=("words",))} == {"words"}


def test_a_file_is_read_back(tmp_path):
    documents = list(generate_many(6, 1500, 1, ["Çà et là, naïve prose. " * 100]))
    write_jsonl(tmp_path / "dependent.jsonl", iter(documents))
    assert list(read_documents([tmp_path / "dependent.jsonl"])) == [document.text for document in documents]
    rows = [json.loads(line) for line in (tmp_path / "dependent.jsonl").read_text("utf-8").splitlines()]
    assert [row["kind"] for row in rows] == [document.kind for document in documents]
    assert [tuple(Span(*span) for span in row["spans"]) for row in rows] == [document.spans for document in documents]


def test_bad_input_is_refused_with_a_way_out():
    with pytest.raises(ValueError, match=r"one of multi_key, needle, .*, got 'haystack'"):
        generate("haystack", 3000, 0, FILLER)
    with pytest.raises(ValueError, match=rf"at least {MIN_LENGTH} characters, got 999"):
        generate("needle", 999, 0, FILLER)
    with pytest.raises(ValueError, match=r"density must be a share in 0\.\.1, got 1\.5"):
        generate("needle", 3000, 0, FILLER, density=1.5)
    for empty in ([], [""], ["too few words"]):
        with pytest.raises(ValueError, match="at least 100 words of prose"):
            generate("needle", 3000, 0, empty)
    with pytest.raises(ValueError, match=r"got one string; pass \[text\]"):
        generate("needle", 3000, 0, FILLER[0])
    # Before the first document is asked for.
    with pytest.raises(ValueError, match="got 'haystack'"):
        generate_many(1, 3000, 0, FILLER, kinds=("needle", "haystack"))
    with pytest.raises(ValueError, match="at least one of"):
        generate_many(1, 3000, 0, FILLER, kinds=())
    with pytest.raises(ValueError, match=r"got \(3000, 2000\)"):
        generate_many(1, (3000, 2000), 0, FILLER)
