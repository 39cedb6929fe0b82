"""Votes of several samples: the formulas against every subset, one by one."""

import itertools
import random
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softcot_ds.evaluation.votes import Ballot


def ballot_of(answers, right):
    return Ballot.of([{"answer": answer, "correct": answer == right} for answer in answers])


def by_enumeration(answers, right, k):
    """Score of the majority, chance of a tie, chance that one is right: over all subsets of k."""
    subsets = list(itertools.combinations(answers, k))
    score, ties, passed = Fraction(0), 0, 0
    for subset in subsets:
        votes = Counter(answer for answer in subset if answer is not None)
        best = [answer for answer, count in votes.items() if count == max(votes.values())]
        score += Fraction(right in best, len(best)) if best else 0
        ties += len(best) > 1
        passed += right in subset
    return score / len(subsets), Fraction(ties, len(subsets)), Fraction(passed, len(subsets))


@given(st.lists(st.sampled_from(["7", "8", "9", "10", None]), min_size=1, max_size=9), st.sampled_from(["7", "x"]))
def test_expectations_equal_every_subset_one_by_one(answers, right):
    ballot = ballot_of(answers, right)
    for k in range(1, len(answers) + 1):
        found = ballot.majority()[k - 1], ballot.ties()[k - 1], ballot.pass_at()[k - 1]
        assert found == pytest.approx([float(value) for value in by_enumeration(answers, right, k)], abs=1e-15)


def test_of_64_samples_too():
    """Drawn subsets of 9 against the formula, and all answers different: the costliest."""
    answers = ["7"] * 24 + ["8"] * 20 + ["9"] * 5 + [str(number) for number in range(10, 18)] + [None] * 7
    ballot = ballot_of(answers, "7")
    drawn = random.Random(0)
    total = sum(by_enumeration(drawn.sample(answers, 9), "7", 9)[0] for _ in range(4000))
    assert ballot.majority()[8] == pytest.approx(float(total) / 4000, abs=0.03)
    assert ballot.majority()[63] == 1
    different = Ballot(1, (1,) * 63, 0)
    assert different.majority() == [1 / 64] * 64, "whichever is chosen"
    assert different.ties() == [0] + [1] * 63


def test_the_order_of_samples_changes_nothing():
    answers = ["7", "8", None, "8", "7", "9"]
    ballots = {ballot_of(order, "7") for order in itertools.permutations(answers)}
    assert ballots == {Ballot(2, (1, 2), 1)}
    assert ballots.pop().majority()[-1] == 0.5


def test_without_any_vote_a_problem_is_wrong_and_not_tied():
    ballot = ballot_of([None] * 3, "7")
    assert (ballot.majority(), ballot.ties(), ballot.pass_at()) == ([0] * 3, [0] * 3, [0] * 3)
