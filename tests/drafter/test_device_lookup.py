"""Suffix lookup on the device against the index on the host."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.recorded_graph import WithoutHost, without_values

from qm_spec.drafter import device_lookup
from qm_spec.drafter.device_lookup import find_copies
from qm_spec.drafter.suffix_index import MOST_PLACES, SuffixIndex

# What stands behind the ends of texts, as if of an earlier request: it would match what comes before.
STALE = 1


def rows_of(texts: list[list[int]], width: int) -> torch.Tensor:
    rows = torch.full((len(texts), width), STALE, dtype=torch.int32)
    for row, text in enumerate(texts):
        rows[row, : len(text)] = torch.tensor(text)
    return rows


def by_index(text: list[int], min_length: int, max_length: int, num_drafts: int) -> tuple[list[int], int]:
    if not text:
        return [0] * num_drafts, 0
    index = SuffixIndex(min_length, max_length)
    index.read(text[:-1])
    lookup = index.look_up(text[-1], num_drafts)
    return list(lookup.drafts) or [0] * num_drafts, lookup.length


@given(
    texts=st.lists(st.lists(st.integers(0, 2), max_size=40), min_size=1, max_size=5),
    room=st.integers(1, 9),
    num_drafts=st.integers(1, 16),
    lengths=st.lists(st.integers(1, 8), min_size=2, max_size=2).map(sorted),
    block=st.integers(1, 60),
    data=st.data(),
)
def test_what_is_found_is_what_the_index_finds(
    texts: list[list[int]], room: int, num_drafts: int, lengths: list[int], block: int, data: st.DataObject
) -> None:
    """For texts in any order, of any length, and however many tokens are compared at a time."""
    places = data.draw(st.permutations(range(len(texts))))
    width = max(len(text) for text in texts) + room
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_lookup, "_BLOCK_TOKENS", block * len(texts))
        found = find_copies(
            rows_of(texts, width),
            torch.tensor(places),
            torch.tensor([len(texts[place]) for place in places], dtype=torch.int32),
            lengths[0],
            num_drafts,
            lengths[1],
        )
    expected = [by_index(texts[place], *lengths, num_drafts) for place in places]
    assert [(drafts, length) for drafts, length in zip(*map(torch.Tensor.tolist, found), strict=True)] == expected


def test_a_common_suffix_is_followed_back_to_the_beginning() -> None:
    """Where the index stops: so many places cost nothing more here."""
    text = [7, 1] + [2, 1] * MOST_PLACES + [7, 1]
    found = find_copies(torch.tensor([text]), torch.tensor([0]), torch.tensor([len(text)]), 1, 2)
    assert found.lengths.tolist() == [2] and found.token_ids.tolist() == [[2, 1]]
    assert by_index(text, 1, 8, 2)[1] == 1


def test_a_text_longer_than_its_row_finds_nothing() -> None:
    """As when a request has just reached the longest text that there may be."""
    text = [1, 2, 3, 1, 2]
    for num_tokens, length in ((5, 2), (6, 0)):
        found = find_copies(torch.tensor([text]), torch.tensor([0]), torch.tensor([num_tokens]), 2, 3)
        assert found.lengths.tolist() == [length]


def test_a_lookup_reads_no_value_on_the_host() -> None:
    arguments = without_values(torch.zeros(3, 40, dtype=torch.int32), torch.arange(2), torch.tensor([9, 30]))
    with WithoutHost():
        found = find_copies(*arguments, 2, 4)
    assert found.token_ids.shape == (2, 4) and found.lengths.shape == (2,)
