"""Suffix lookup by a search of the whole text."""

from qm_spec.drafter.suffix_index import Lookup


def searched(text: list[int], newest: int, num_drafts: int, min_length: int, max_length: int) -> Lookup:
    """Look up by comparing the suffix with every place."""
    for length in range(min(max_length, len(text) + 1), min_length - 1, -1):
        suffix = [*text, newest][-length:]
        for end in range(len(text), length - 1, -1):
            if text[end - length : end] == suffix:
                copied = [*text, newest]
                for place in range(end, end + num_drafts):
                    copied.append(copied[place])
                return Lookup(tuple(copied[len(text) + 1 :]), length)
    return Lookup((), 0)
