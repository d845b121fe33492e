"""Suffix lookup against a search of the whole text, and the drafter's setting for it."""

import tracemalloc
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.suffix_search import searched

from qm_spec.drafter.prior_config import QuickMergeConfig
from qm_spec.drafter.suffix_index import MOST_PLACES, Lookup, SuffixIndex


@given(
    pieces=st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=9),
    newest=st.integers(0, 2),
    num_drafts=st.integers(0, 6),
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=2).map(sorted),
)
def test_what_is_found_is_what_a_search_finds(
    pieces: list[list[int]], newest: int, num_drafts: int, lengths: list[int]
) -> None:
    index, text = SuffixIndex(*lengths), []
    for piece in pieces:
        index.read(piece)
        text += piece
        assert index.look_up(newest, num_drafts) == searched(text, newest, num_drafts, *lengths)
    assert len(index) == len(text) and index.token_ids.tolist() == text, "a lookup reads nothing"


def test_a_common_suffix_is_followed_back_so_far_and_no_further() -> None:
    # The longest match is the first of so many places of its last token.
    for places, length in ((MOST_PLACES, 2), (MOST_PLACES + 1, 1)):
        index = SuffixIndex(1)
        index.read([7, 1] + [2, 1] * (places - 1) + [7])
        assert index.look_up(1, 1).length == length


def test_a_copy_that_meets_the_newest_token_goes_round() -> None:
    index = SuffixIndex(2)
    index.read([9, 1, 2, 3, 1])
    assert index.look_up(2, 7) == Lookup((3, 1, 2, 3, 1, 2, 3), 2)


def test_ids_as_large_as_vocabularies_are_told_apart() -> None:
    index = SuffixIndex(2)
    # The same bytes, two further on.
    index.read([1 << 16, 2 << 16, 7, 8])
    assert index.look_up(1, 2).length == 0
    index.read([(1 << 31) - 1] * 2)
    assert index.look_up((1 << 31) - 1, 1) == Lookup(((1 << 31) - 1,), 2)


@pytest.mark.parametrize("num_tokens", [400, 4400, 17_600])
def test_memory_is_what_the_docstring_says(num_tokens: int) -> None:
    """At lengths where the dictionary has just grown, and of tokens that never repeat."""
    token_ids = [Random(number).randrange(100_000) for number in range(num_tokens)]
    tracemalloc.start()
    index = SuffixIndex(2)
    index.read(token_ids)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 90 < taken / num_tokens < 150


def test_a_drafter_keeps_its_lookup_length(tmp_path) -> None:
    assert QuickMergeConfig().lookup_length == 0
    QuickMergeConfig(lookup_length=4).save_pretrained(tmp_path)
    assert QuickMergeConfig.from_pretrained(tmp_path).lookup_length == 4


@pytest.mark.parametrize("length", [1, 9, -2, True, "4", 4.0, None])
def test_a_lookup_length_out_of_range_is_refused(length) -> None:
    with pytest.raises(ValueError, match=r"lookup_length must be 0 \(no lookup\) or in 2..8 tokens .*, got "):
        QuickMergeConfig(lookup_length=length)
