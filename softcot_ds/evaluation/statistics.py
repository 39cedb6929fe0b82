"""Intervals and tests for accuracies on the same problems."""

from collections.abc import Mapping

from scipy.stats import binomtest


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
