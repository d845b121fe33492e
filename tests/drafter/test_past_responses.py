"""Copies from finished answers against a search through all of them, and what bounds them."""

from __future__ import annotations

import tracemalloc
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from qm_spec.drafter.past_responses import TOKEN_BYTES, PastResponses
from qm_spec.drafter.suffix_index import NO_MATCH, Lookup

PLENTY = 1 << 20
ANSWERS = st.lists(st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 2), max_size=8)), max_size=6)


def searched(answers: list[list[int]], suffix: list[int], num_drafts: int, min_length: int) -> Lookup:
    """Look up by comparing the suffix with every place of every answer; the latest of the longest matches counts."""
    for length in range(len(suffix), min_length - 1, -1):
        for answer in reversed(answers):
            for end in range(len(answer), length - 1, -1):
                if answer[end - length : end] == suffix[-length:]:
                    followed = answer[end:]
                    if not followed:
                        return NO_MATCH
                    drafts = (followed * num_drafts)[:num_drafts] if len(followed) < num_drafts else followed
                    return Lookup(tuple(drafts[:num_drafts]), length)
    return NO_MATCH


@given(ANSWERS, st.lists(st.integers(0, 2), min_size=1, max_size=4), st.integers(1, 5), st.integers(1, 3))
def test_what_is_found_is_what_a_search_of_the_groups_answers_finds(
    answers: list[tuple[str, list[int]]], suffix: list[int], num_drafts: int, min_length: int
) -> None:
    responses = PastResponses(min_length, PLENTY, max_length=4)
    for group, answer in answers:
        responses.add(group, answer)
    for group in "abc":
        own = [answer for name, answer in answers if name == group and len(answer) >= min_length]
        assert responses.look_up(group, suffix, num_drafts) == searched(own, suffix, num_drafts, min_length)


def test_the_latest_answers_are_kept_and_the_oldest_dropped() -> None:
    responses = PastResponses(2, 2 * TOKEN_BYTES * 100)
    for number in range(8):
        responses.add("a", [number] * 2 + [100 + number] * 28)
    kept = [number for number in range(8) if responses.look_up("a", [number, number], 1).length]
    # Half the memory holds 100 tokens, two answers with what each costs beside its tokens.
    assert kept == [4, 5, 6, 7]
    assert responses.look_up("a", [7, 7], 1) == Lookup((107,), 2)


def test_an_answer_larger_than_half_the_memory_is_not_kept() -> None:
    responses = PastResponses(2, 2 * TOKEN_BYTES * 100)
    responses.add("a", [1, 2, 3])
    responses.add("a", [1, 2] * 100)
    assert responses.look_up("a", [1, 2], 1) == Lookup((3,), 2)


def test_memory_stays_below_what_is_allowed_whatever_the_answers_and_groups() -> None:
    most, random = 1 << 20, Random(0)
    for longest, num_groups in ((3, 10_000), (300, 2), (300, 10_000)):
        tracemalloc.start()
        responses = PastResponses(2, most)
        for _ in range(6_000):
            answer = [random.randrange(100_000) for _ in range(random.randint(2, longest))]
            responses.add(f"group {random.randrange(num_groups)}", answer)
        taken, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most / 8 < taken < 1.3 * most, (longest, num_groups)
