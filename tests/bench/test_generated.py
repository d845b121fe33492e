"""Generated documents say the truth about themselves: what is told again was told before, and alike."""

import re
from random import Random

import pytest

from qm_spec.bench.workloads.generated import KINDS, MIN_LENGTH, generate


def prose(seed, num_words=20000):
    rng = Random(seed)
    known = ["".join(rng.choices("aeiorstlnd", k=rng.randint(2, 10))) for _ in range(2000)]
    sentences = (rng.choices(known, k=rng.randint(4, 25)) for _ in range(num_words // 14))
    return "\n".join(" ".join(words).capitalize() + "." for words in sentences)


FILLER = [prose(1), prose(2)]
AGAIN = {
    "quotation": 'As it was written before: "',
    "records": "What is the ",
    "needle": "What is the secret",
    "multi_key": "For ",
    "variables": "print ",
    "words": " again: ",
}


ASPECTS = ("town", "trade", "number", "dog")


def lines(kind):
    """The lines that are not cut off at the end."""
    return generate(kind, 50000, 3, FILLER).split("\n")[:-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [MIN_LENGTH, 6000, 50000])
def test_documents_have_the_length_and_repeat_themselves(kind, length):
    for seed in range(20):
        text = generate(kind, length, seed, FILLER)
        assert 0.9 * length <= len(text) <= length
        assert AGAIN[kind] in text
        assert text == generate(kind, length, seed, list(FILLER))
        assert text != generate(kind, length, seed + 1, FILLER)


@pytest.mark.parametrize("kind", ["needle", "multi_key"])
def test_a_question_has_one_answer(kind):
    answers, repeated = {}, 0
    for line in lines(kind):
        for topic, value in re.findall(r"(?<!What is )[Tt]he secret of ([A-Z]\w+ [A-Z]\w+) is (\w+)\.", line):
            assert answers.setdefault(topic, value) == value
        if several := re.fullmatch(r"For (.+) the secret is (.+)\.", line):
            topics, values = (part.split(", ") for part in several.groups())
            assert [answers[topic] for topic in topics] == values
        repeated += line.startswith(("What is", "For "))
    assert len(answers) > 10 and repeated > 10


def test_variables_are_what_an_interpreter_says():
    values, printed = {}, 0
    for line in lines("variables"):
        if set_to := re.fullmatch(r"VAR (\w+) = (VAR )?(\w+)\.", line):
            name, copied, value = set_to.groups()
            assert name not in values
            values[name] = values[value] if copied else value
        elif shown := re.fullmatch(r"print (.+): (.+)\.", line):
            names, told = (part.split(", ") for part in shown.groups())
            assert [values[name] for name in names] == told
            printed += len(names)
    assert len(values) > 100 and printed > 100


def test_records_are_looked_up_right():
    table, looked_up = {}, 0
    for line in lines("records"):
        if " | " in line:
            name, *values = line.split(" | ")
            table |= {(aspect, name): value for aspect, value in zip(ASPECTS, values, strict=True)}
        elif asked := re.fullmatch(r"What is the (\w+) of (.+)\? The (\w+) of (.+) is (\w+)\.", line):
            aspect, name, *again, value = asked.groups()
            assert [aspect, name] == again and table[aspect, name] == value
            looked_up += 1
    assert looked_up > 20


def test_lists_come_again_word_for_word():
    lists, again = {}, 0
    for line in lines("words"):
        if told := re.fullmatch(r"List (\w+ \w+): (.+)\.", line):
            lists[told[1]] = told[2]
        elif told := re.fullmatch(r"List (\w+ \w+) again: (.+)\.", line):
            assert lists[told[1]] == told[2]
            again += 1
    assert again > 10


def test_quotations_stand_before_at_all_distances():
    text, distances = generate("quotation", 50000, 3, FILLER), []
    for found in re.finditer(r'As it was written before: "([^"]+)"', text):
        place = text.rindex(found[1], 0, found.start())
        distances.append(found.start() - place)
    assert len(distances) > 10
    assert min(distances) < 2000 and max(distances) > 10000


def test_bad_input_is_refused_with_a_way_out():
    with pytest.raises(ValueError, match=r"one of multi_key, needle, .*, got 'haystack'"):
        generate("haystack", 3000, 0, FILLER)
    with pytest.raises(ValueError, match=rf"at least {MIN_LENGTH} characters, got 999"):
        generate("needle", 999, 0, FILLER)
    for empty in ([], [""], ["too few words"]):
        with pytest.raises(ValueError, match="at least 100 words of prose"):
            generate("needle", 3000, 0, empty)
