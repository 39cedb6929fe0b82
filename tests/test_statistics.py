"""Intervals and tests against the formulas of the papers, with integers and fractions."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softcot_ds.evaluation.statistics import compare, wilson_interval

Z = 1.959963984540054


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_equals_the_formula_of_1927(counts):
    correct, total = counts
    p = correct / total
    centre = (p + Z**2 / (2 * total)) / (1 + Z**2 / total)
    half = Z / (1 + Z**2 / total) * math.sqrt(p * (1 - p) / total + Z**2 / (4 * total**2))
    low, high = wilson_interval(correct, total)
    assert low == pytest.approx(max(0, centre - half), abs=1e-9)
    assert high == pytest.approx(min(1, centre + half), abs=1e-9)
    assert 0 <= low <= p <= high <= 1


def verdicts(both: int, only_first: int, only_second: int, neither: int) -> tuple[dict[str, bool], dict[str, bool]]:
    pairs = [(True, True)] * both + [(True, False)] * only_first + [(False, True)] * only_second
    pairs += [(False, False)] * neither
    first = {str(index): pair[0] for index, pair in enumerate(pairs)}
    second = {str(index): pair[1] for index, pair in reversed(list(enumerate(pairs)))}
    return first, second


@given(st.integers(0, 9), st.integers(0, 40), st.integers(0, 40), st.integers(1, 9))
def test_mcnemar_equals_counting_coin_tosses(both, only_first, only_second, neither):
    result = compare(*verdicts(both, only_first, only_second, neither))
    tosses = only_first + only_second
    tail = sum(math.comb(tosses, k) for k in range(max(only_first, only_second), tosses + 1))
    expected = min(Fraction(1), Fraction(2 * tail, 2**tosses))
    assert result["p_value"] == pytest.approx(float(expected), rel=1e-9)
    assert (result["only_first"], result["only_second"]) == (only_first, only_second)
    total = both + only_first + only_second + neither
    assert result["difference"] == pytest.approx((only_first - only_second) / total)


def test_equal_verdicts_differ_by_nothing():
    assert compare(*verdicts(3, 0, 0, 2)) == {"difference": 0, "only_first": 0, "only_second": 0, "p_value": 1.0}


def test_different_problems_cannot_be_compared():
    with pytest.raises(ValueError, match="needs the same problems"):
        compare({"a": True}, {"b": True})
