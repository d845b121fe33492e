"""From which batch size on drafts cost more than they bring, by what is expected of them."""

import pytest

from qm_spec.drafter.cut_off import CutOff


def run(cut_off, num_requests, gain, steps):
    """Return which of so many steps draft; a step's expectation is known where the three before it have drafted."""
    decisions = []
    for _ in range(steps):
        decisions.append(cut_off.drafts(num_requests, gain))
    return decisions


@pytest.fixture
def said():
    return []


@pytest.fixture
def cut_off(said):
    return CutOff(said.append)


def test_drafts_that_pay_are_drafted_in_every_step(cut_off, said):
    assert all(run(cut_off, 8, 1.3, 1000)) and not said


def test_nothing_is_decided_while_nothing_is_known(cut_off, said):
    assert all(run(cut_off, 8, None, 1000)) and not said


def test_drafts_that_do_not_pay_rest_ever_longer_and_the_log_says_it_once(cut_off, said):
    decisions = run(cut_off, 200, 0.8, 10_000)
    assert decisions[:10] == [True] * 10 and not any(decisions[10:74])
    # Each trial has three steps whose chances are not known yet, and eight that decide, of which the last drafts not.
    assert sum(decisions) == 10 * (1 + sum(1 for start in starts(decisions) if start))
    assert sum(decisions[5000:]) <= 0.011 * 5000
    assert said == [
        "drafts do not pay with about 200 requests: 0.80 times as many tokens a second are expected of them; "
        "such steps draft nothing and are tried again now and then"
    ]


def starts(decisions):
    """Return the steps at which drafting begins again."""
    return [step for step in range(1, len(decisions)) if decisions[step] and not decisions[step - 1]]


def test_drafts_that_pay_again_are_drafted_again(cut_off, said):
    run(cut_off, 200, 0.8, 400)
    decisions = run(cut_off, 200, 1.2, 400)
    assert all(decisions[300:]) and said[-1].startswith("drafts pay again with about 200 requests: 1.20 times")


def test_sizes_are_judged_apart(cut_off):
    run(cut_off, 200, 0.8, 40)
    assert all(run(cut_off, 8, 1.3, 100)), "few requests draft while many rest"
    assert not any(run(cut_off, 200, 0.8, 20)), "the rest goes on where it was left"
    assert all(run(cut_off, 120, 0.8, 3)), "half as many are another size"


def test_one_bad_expectation_among_good_ones_changes_nothing(cut_off, said):
    for _ in range(20):
        assert all(run(cut_off, 8, 1.2, 30))
        assert cut_off.drafts(8, 0.1)
    assert not said
