"""Intervals and tests against the formulas of the papers, with integers and fractions."""

import math
import random
import statistics
from fractions import Fraction
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softcot_ds.evaluation.statistics import (
    compare,
    compare_losses,
    compare_scores,
    holm,
    over_seeds,
    per_token,
    wilson_interval,
)

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


LOSSES = st.lists(st.tuples(st.integers(-9, 9), st.integers(1, 5)), min_size=2, max_size=6)


@given(LOSSES)
def test_a_difference_of_losses_has_the_p_value_of_all_signs(pairs):
    differences, tokens = zip(*pairs, strict=True)
    found = compare_losses([d + 3.0 for d in differences], [3.0] * len(pairs), tokens, seed=0)
    assert found["per_token"] == pytest.approx(sum(differences) / sum(tokens))
    assert found["per_problem"] == pytest.approx(sum(differences) / len(pairs))
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in product((1, -1), repeat=len(pairs))
    ]
    least = min(sum(s >= sum(differences) for s in sums), sum(s <= sum(differences) for s in sums))
    assert found["p_value"] == pytest.approx(min(1, 2 * least / len(sums)))


@settings(max_examples=10)
@given(LOSSES.filter(lambda pairs: len(pairs) < 5), st.integers(0, 2**64 - 1))
def test_the_interval_of_a_difference_of_losses_is_that_of_all_resamples(pairs, seed):
    differences, tokens = (list(map(float, values)) for values in zip(*pairs, strict=True))
    low, high = compare_losses(differences, [0.0] * len(pairs), tokens, seed)["ci95"]
    drawn = [list(zip(*picked, strict=True)) for picked in product(pairs, repeat=len(pairs))]
    every = sorted(sum(lost) / sum(counts) for lost, counts in drawn)
    # Drawn resamples may err about which of two neighbours a percentile falls on, by four standard errors of 9,999.
    for bound, share in ((low, 0.025), (high, 0.975)):
        error = 4 * math.sqrt(0.025 * 0.975 / 9999)
        ranks = [min(max(0, round((share + sign * error) * len(every)) + sign), len(every) - 1) for sign in (-1, 1)]
        assert every[ranks[0]] - 1e-12 <= bound <= every[ranks[1]] + 1e-12


@pytest.mark.slow
def test_the_interval_of_many_problems_is_that_of_the_normal_distribution_and_its_seeds_agree():
    draw = random.Random(0)
    differences = [draw.gauss(-0.5, 2) for _ in range(400)]
    found = [compare_losses(differences, [0.0] * 400, [10] * 400, seed) for seed in (0, 1, 0)]
    half = Z * statistics.pstdev(differences) / math.sqrt(400) / 10
    assert found[0]["ci95"] == pytest.approx(
        (found[0]["per_token"] - half, found[0]["per_token"] + half), abs=0.05 * half
    )
    assert found[0] == found[2] != found[1]
    assert found[0]["p_value"] == pytest.approx(2 / 10_000), "the smallest that can be drawn"


def test_losses_of_one_problem_have_no_interval_and_equal_ones_no_difference():
    assert compare_losses([3.0], [1.0], [4], seed=0) == {
        "per_token": 0.5,
        "ci95": None,
        "per_problem": 2.0,
        "p_value": 1.0,
    }
    equal = {"per_token": 0.0, "ci95": (0.0, 0.0), "per_problem": 0.0, "p_value": 1.0}
    assert compare_losses([3.0] * 20, [3.0] * 20, [4] * 20, seed=0) == equal


@pytest.mark.parametrize(
    ("samples", "first", "second"),
    [(3, [3, 2, 1, 2, 1, 1, 1, 0], [1, 1, 0, 2, 1, 3, 2, 1]), (3, [2, 3, 0, 0, 0, 0], [0, 0, 0, 2, 0, 3])],
)
def test_differences_that_cancel_out_are_no_evidence_at_all(samples, first, second):
    # As floating numbers these shares sum to something by 1e-17, and p was 0.81 and 0.88.
    shares = ([count / samples for count in side] for side in (first, second))
    found = compare_scores(*shares, seed=0)
    assert (found["difference"], found["p_value"]) == (0, 1)


def test_scores_between_right_and_wrong_are_compared_by_every_choice_of_signs():
    first, second = [1, 0.5, 1, 0, 0.25, 1, 0.5], [0, 0.5, 0.5, 0.25, 0, 0, 1]
    differences = [Fraction(one) - Fraction(other) for one, other in zip(first, second, strict=True)]
    signs = list(product([1, -1], repeat=7))
    as_far = sum(
        abs(sum(s * d for s, d in zip(chosen, differences, strict=True))) >= abs(sum(differences)) for chosen in signs
    )
    found = compare_scores(first, second, seed=0)
    assert found["difference"] == pytest.approx(float(sum(differences) / 7))
    assert found["p_value"] == pytest.approx(as_far / len(signs))
    assert 0 < found["p_value"] < 1
    resampled = np.random.default_rng(1).choice(np.array(differences, float), (20000, 7)).mean(axis=1)
    assert found["ci95"] == pytest.approx(np.percentile(resampled, [2.5, 97.5]), abs=0.02)
    assert compare_scores([1], [0], seed=0) == {"difference": 1, "ci95": None, "p_value": 1}


def pairwise_components(values):
    """Variances of seeds, of problems and of the rest: averages over all pairs, by their definition, in fractions."""
    cells = [(s, p, Fraction(x)) for s, row in enumerate(values) for p, x in enumerate(row)]

    def average(same_seed, same_problem):
        products = [
            x * y for s, p, x in cells for r, q, y in cells if (s == r) == same_seed and (p == q) == same_problem
        ]
        return Fraction(sum(products), len(products))

    nothing = average(False, False)
    seeds, problems = average(True, False) - nothing, average(False, True) - nothing
    return seeds, problems, average(True, True) - nothing - seeds - problems


@settings(max_examples=40)
@given(
    st.integers(2, 4).flatmap(
        lambda n: st.lists(st.lists(st.integers(-3, 3), min_size=n, max_size=n), min_size=2, max_size=4)
    )
)
def test_the_variance_over_seeds_is_that_of_all_pairs(rows):
    seeds, problems, rest = pairwise_components(rows)
    S, N = len(rows), len(rows[0])
    found = over_seeds(np.array(rows, float))
    assert found["mean"] == pytest.approx(float(Fraction(sum(map(sum, rows)), S * N)))
    errors = {name: value**2 for name, value in found["standard_error"].items()}
    assert errors["all"] == pytest.approx(errors["seeds"] + errors["problems"] + errors["rest"])
    assert found["seeds_sd"] == pytest.approx(statistics.stdev(statistics.fmean(row) for row in rows))
    values = [value for row in rows for value in row]
    assert (found["ci95"] is None) == (len(set(values)) == 1)
    if errors["seeds"] > 1e-12 and errors["problems"] > 1e-12:
        assert errors["seeds"] == pytest.approx(float(seeds / S))
        assert errors["problems"] == pytest.approx(float(problems / N))
        assert errors["rest"] == pytest.approx(float(rest / (S * N)), abs=1e-12)
        return
    # What is left of a source that is none is variance of a mean of independent values: of seeds, of problems, of all.
    assert seeds <= 0 or problems <= 0
    if errors["seeds"] > 1e-12:
        known, df = statistics.variance(map(statistics.fmean, rows)) / S, S - 1
    elif errors["problems"] > 1e-12:
        known, df = statistics.variance(map(statistics.fmean, zip(*rows, strict=True))) / N, N - 1
    else:
        known, df = statistics.variance(values) / (S * N), S * N - 1
    assert errors["all"] == pytest.approx(known, abs=1e-12)
    assert found["df"] is None or found["df"] == pytest.approx(df)


@pytest.mark.parametrize("difference", [1.0, -1.0, 0.0])
def test_where_nothing_varies_p_is_that_of_the_problems(difference):
    found = over_seeds(np.full((3, 6), difference))
    ones, zeros = dict.fromkeys("abcdef", True), dict.fromkeys("abcdef", False)
    mcnemar = compare(ones, zeros if difference else ones)["p_value"]
    assert found["p_value"] == pytest.approx(mcnemar)
    assert found["p_value"] == pytest.approx(compare_scores([difference] * 6, [0.0] * 6, seed=0)["p_value"])
    assert (found["ci95"], found["df"]) == (None, None)


def test_of_one_problem_nothing_but_the_mean_is_known():
    found = over_seeds(np.array([[1.0], [0.0]]))
    assert (found["mean"], found["seeds_sd"]) == (0.5, pytest.approx(0.5**0.5))
    assert found["ci95"] is found["p_value"] is found["df"] is None
    assert set(found["standard_error"].values()) == {None}


def test_two_seeds_that_do_not_differ_do_not_make_the_interval_wide():
    draw = np.random.default_rng(0)
    ends = [over_seeds(draw.normal(0, 0.2, 500) + draw.normal(0, 1, (2, 500)))["ci95"] for _ in range(200)]
    true = 2 * Z * math.sqrt(0.2**2 / 500 + 1 / 1000)
    assert statistics.median(high - low for low, high in ends) < 1.2 * true


@pytest.mark.parametrize(
    ("values", "df", "t"),
    [  # where one of the two alone varies it is the interval of a mean of so many; t from a printed table
        (np.outer([0.1, 0.5, 0.3, 0.9, 0.7], np.ones(40)), 4, 2.776),
        (np.outer(np.ones(5), [0.0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0]), 10, 2.228),
    ],
)
def test_the_interval_over_seeds_is_students_where_one_source_varies(values, df, t):
    found = over_seeds(values)
    own = values[:, 0] if df == 4 else values[0]
    half = t * statistics.stdev(own) / math.sqrt(len(own))
    assert found["df"] == pytest.approx(df)
    assert found["ci95"] == pytest.approx((statistics.fmean(own) - half, statistics.fmean(own) + half), abs=2e-4)
    assert found["standard_error"]["problems" if df == 4 else "seeds"] == pytest.approx(0, abs=1e-9)
    assert 0.0001 < found["p_value"] < 0.05


@pytest.mark.parametrize(
    ("seeds_sd", "problems_sd", "rest_sd"), [(1, 4, 4), (1, 0, 4), (0, 4, 4), (0.2, 4, 8), (1, 8, 0)]
)
def test_the_interval_over_seeds_holds_the_truth_as_often_as_it_says(seeds_sd, problems_sd, rest_sd):
    draw, held, runs = np.random.default_rng(0), 0, 600
    for _ in range(runs):
        values = draw.normal(0, seeds_sd, (5, 1)) + draw.normal(0, problems_sd, 60) + draw.normal(0, rest_sd, (5, 60))
        low, high = over_seeds(values + 7)["ci95"]
        held += low <= 7 <= high
    assert 0.93 <= held / runs <= 0.985, held / runs


def test_a_bootstrap_over_five_seeds_promises_too_much():
    """Why there is none: as the docstring says, four in five."""
    draw, held = np.random.default_rng(0), 0
    picked = draw.integers(0, 5, (1000, 5))
    for _ in range(1000):
        low, high = np.percentile(draw.normal(0, 1, 5)[picked].mean(axis=1), [2.5, 97.5])
        held += low <= 0 <= high
    assert 0.77 <= held / 1000 <= 0.86, held


def test_losses_per_token_over_seeds_move_as_their_ratio_does():
    draw = np.random.default_rng(0)
    tokens = draw.integers(3, 30, 50)
    losses = draw.gamma(2, tokens / 20, (4, 50))
    values = per_token(losses, list(tokens))
    assert values.mean() == pytest.approx(losses.sum() / (4 * tokens.sum()))
    assert values.mean(axis=1) == pytest.approx(losses.sum(axis=1) / tokens.sum())
    ratios = [np.delete(losses, p, 1).sum() / (4 * np.delete(tokens, p).sum()) for p in range(50)]
    jackknife = math.sqrt(49 / 50 * sum((ratio - statistics.fmean(ratios)) ** 2 for ratio in ratios))
    assert values.mean(axis=0).std(ddof=1) / math.sqrt(50) == pytest.approx(jackknife, rel=0.05)


@pytest.mark.parametrize("p_values", [[0.01, 0.04, 0.03, 0.5, 0.005], [0.02, 0.02, 0.9], [0.3], [1.0, 0.0], []])
def test_holms_p_values_are_those_of_the_closed_test(p_values):
    """A hypothesis is rejected when every set of hypotheses that it belongs to is, by Bonferroni."""
    places = range(len(p_values))
    sets = [some for size in places for some in combinations(places, size + 1)]
    wanted = [
        max(min(1.0, len(some) * min(p_values[other] for other in some)) for some in sets if place in some)
        for place in places
    ]
    assert holm(p_values) == pytest.approx(wanted)
