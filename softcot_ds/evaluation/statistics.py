"""Intervals and tests for accuracies and losses on the same problems."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import lcm
from typing import Any

import numpy as np
from scipy.stats import binomtest, bootstrap, permutation_test

_RESAMPLES = 9999
"""With it, a p value that is drawn is 0.0001 at least, and one of up to 13 problems is counted over all cases."""
_AT_A_TIME = 250
"""Resamples that are held together: 20 MB for 10,000 problems."""


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95% Wilson score interval of a proportion (Wilson 1927)."""
    interval = binomtest(correct, total).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def compare(first: Mapping[str, bool], second: Mapping[str, bool]) -> dict[str, float]:
    """Paired comparison of verdicts by problem id.

    Returns:
        ``difference`` of the accuracies, the problems that ``only_first`` or ``only_second`` got right, and the
        two-sided ``p_value`` of McNemar's exact test (a sign test on those problems).

    Raises:
        ValueError: the two are not about the same problems.
    """
    if first.keys() != second.keys():
        raise ValueError("a paired comparison needs the same problems on both sides")
    only_first = sum(first[key] and not second[key] for key in first)
    only_second = sum(second[key] and not first[key] for key in first)
    discordant = only_first + only_second
    return {
        "difference": (only_first - only_second) / len(first),
        "only_first": only_first,
        "only_second": only_second,
        "p_value": float(binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0,
    }


def compare_losses(first: Sequence[float], second: Sequence[float], tokens: Sequence[int], seed: int) -> dict[str, Any]:
    """Paired comparison of losses of the same solutions.

    The test is of what is reported, the mean difference, and assumes nothing of how differences are distributed: if two
    conditions were the same to the base, each problem's difference could as well have the other sign (the paired
    permutation test of Fisher 1935 and Pitman 1937). Wilcoxon's test would be one of another quantity, by ranks.

    Args:
        first: of each problem, nats, the sum over its tokens.
        second: likewise, of the same problems in the same order.
        tokens: of each solution.
        seed: of the random numbers for interval and test.

    Returns:
        The difference ``per_token`` (all nats over all tokens), its ``ci95``, the percentiles of a bootstrap over
        problems (None for a single one), the difference ``per_problem``, and the two-sided ``p_value`` of both: they
        differ by a factor.
    """
    differences, counts = np.subtract(first, second), np.asarray(tokens, float)
    found: dict[str, Any] = {
        "per_token": float(differences.sum() / counts.sum()),
        "ci95": None,
        "per_problem": float(differences.mean()),
        "p_value": 1.0,
    }
    if len(differences) > 1:
        interval = bootstrap((differences, counts), _per_token, paired=True, method="percentile", **_drawn(seed))
        found["ci95"] = tuple(map(float, interval.confidence_interval))
        found["p_value"] = _permutation_p(differences, seed)
    return found


def compare_scores(first: Sequence[float], second: Sequence[float], seed: int) -> dict[str, Any]:
    """Paired comparison of scores from 0 to 1 of the same problems in the same order: of shares of samples that are
    right, or of majorities with ties. McNemar's test has no room for what is between right and wrong, so it is the
    permutation test of ``compare_losses``, which of verdicts alone is nearly the same.

    Returns:
        The ``difference`` of the means, its ``ci95`` as by ``mean_interval``, and the two-sided ``p_value``.
    """
    exact = [_fraction(one) - _fraction(other) for one, other in zip(first, second, strict=True)]
    unit = lcm(*(difference.denominator for difference in exact))
    # Whole numbers: sums that are equal, or cancel out, must be seen as equal for the test to count them.
    counts = np.array([int(difference * unit) for difference in exact], float)
    differences = counts / unit
    return {
        "difference": float(sum(exact) / len(exact)),
        "ci95": mean_interval(differences, seed),
        "p_value": _permutation_p(counts, seed) if len(counts) > 1 else 1.0,
    }


def _fraction(score: float) -> Fraction:
    """The share of K samples, or of tied answers, that a score is."""
    return Fraction(score).limit_denominator(10_000)


def mean_interval(values: Sequence[float] | np.ndarray, seed: int) -> tuple[float, float] | None:
    """95% interval of a mean over problems, percentiles of a bootstrap over them; None for a single one."""
    if len(values) < 2:
        return None
    low, high = bootstrap((values,), np.mean, method="percentile", **_drawn(seed)).confidence_interval
    return float(low), float(high)


def _permutation_p(differences: np.ndarray, seed: int) -> float:
    return float(permutation_test((differences,), np.mean, permutation_type="samples", **_drawn(seed)).pvalue)


def _drawn(seed: int) -> dict[str, Any]:
    return {"n_resamples": _RESAMPLES, "batch": _AT_A_TIME, "vectorized": True, "rng": seed}


def _per_token(losses: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
    return losses.sum(axis) / counts.sum(axis)
