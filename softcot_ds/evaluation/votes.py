"""What several sampled answers to a problem are worth: majority votes (self-consistency) and pass@k, for any number.

Of K samples every number k up to K is looked at, not by one draw but by the exact expectation over all subsets of k:
what a vote of k samples, or the best of k, reaches on average. With integers, so that K may be 64 and more.

A sample without an answer casts no vote; without any vote a problem is wrong. Where several answers have the most
votes, the problem counts as the share of these that is right: what choosing one of them by lot reaches on average. So
nothing depends on the order of the samples.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import comb, fsum
from statistics import fmean, stdev
from typing import Any

Verdict = dict[str, Any]
"""Of one sample: its ``answer`` or None, and whether it is ``correct``."""


@dataclass(frozen=True)
class Ballot:
    """How the K samples of one problem voted."""

    right: int
    """Votes for the right answer."""
    wrong: tuple[int, ...]
    """Votes for each of the others that has some, in ascending order."""
    none: int
    """Samples without an answer."""

    @classmethod
    def of(cls, samples: Sequence[Verdict]) -> "Ballot":
        wrong = Counter(one["answer"] for one in samples if one["answer"] is not None and not one["correct"])
        none = sum(one["answer"] is None for one in samples)
        return cls(sum(one["correct"] for one in samples), tuple(sorted(wrong.values())), none)

    @property
    def samples(self) -> int:
        return self.right + sum(self.wrong) + self.none

    def pass_at(self) -> list[float]:
        """For k from 1 to K: the chance that one of k samples is right at least (Chen et al. 2021, unbiased)."""
        size = self.samples
        return [float(1 - Fraction(comb(size - self.right, k), comb(size, k))) for k in range(1, size + 1)]

    def majority(self) -> list[float]:
        """For k from 1 to K: the score of the majority of k samples, from 0 to 1."""
        return list(_majority(self)[0])

    def ties(self) -> list[float]:
        """For k from 1 to K: the chance that several answers have the most of k votes."""
        return list(_majority(self)[1])


@cache  # many problems have the same counts: mostly all samples agree
def _majority(ballot: Ballot) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scores and chances of a tie, by the number of samples in the subset.

    A polynomial whose k-th coefficient counts subsets of k samples is one integer: its value at 2**bits, above which no
    coefficient comes. An answer with m votes gives comb(m, i) subsets of i; for independent choices polynomials are
    multiplied. The subsets are split by ``top``, the most votes of any answer, and by how many answers have so many.
    """
    size = ballot.samples
    bits = size + 1
    won: dict[int, int] = {}  # by the number of answers at the top: subsets in which the right one is among them
    tied = 0

    def exactly(votes: int, count: int) -> int:
        return comb(votes, count) << bits * count

    for top in range(1, max(ballot.right, *ballot.wrong, 0) + 1):
        able = [votes for votes in ballot.wrong if votes >= top]
        free = size - sum(able) - (ballot.right if ballot.right >= top else 0)
        ways = [(1 + (1 << bits)) ** free]  # by the number of wrong answers with ``top`` votes
        for votes in able:
            fewer, full = sum(exactly(votes, count) for count in range(top)), exactly(votes, top)
            ways = [same * fewer + less * full for same, less in zip([*ways, 0], [0, *ways], strict=True)]
        right_fewer, right_full = 1, 0
        if ballot.right >= top:
            right_fewer = sum(exactly(ballot.right, count) for count in range(top))
            right_full = exactly(ballot.right, top)
        for wrong, way in enumerate(ways):
            won[wrong + 1] = won.get(wrong + 1, 0) + way * right_full
            tied += way * ((wrong > 0) * right_full + (wrong > 1) * right_fewer)

    def coefficient(polynomial: int, k: int) -> int:
        return polynomial >> bits * k & (1 << bits) - 1

    numbers = range(1, size + 1)
    scores = (sum(Fraction(coefficient(ways, k), among) for among, ways in won.items()) for k in numbers)
    return (
        tuple(float(score / comb(size, k)) for k, score in zip(numbers, scores, strict=True)),
        tuple(float(Fraction(coefficient(tied, k), comb(size, k))) for k in numbers),
    )


def voted(samples: Sequence[Verdict]) -> dict[str, Any]:
    """The record of one problem's K samples: themselves, the votes for each answer, and the score of their majority."""
    votes = Counter(one["answer"] for one in samples if one["answer"] is not None)
    return {
        "samples": list(samples),
        "votes": dict(sorted(votes.items(), key=lambda vote: (-vote[1], vote[0]))),
        "majority": Ballot.of(samples).majority()[-1],
    }


def over_problems(samples: Sequence[Sequence[Verdict]]) -> dict[str, Any]:
    """What K samples of each problem say together, K at least 2.

    Returns:
        ``accuracy_sd``: the standard deviation of the accuracies of the K samples, each on all problems; and by k, from
        "1" to str(K), means over the problems: ``majority``, the score of the majority; ``ties``, the share in which
        several answers have the most votes; ``pass_at_k``, the share with a right one among k.
    """
    ballots = [Ballot.of(problem) for problem in samples]

    def by_number(values: list[list[float]]) -> dict[str, float]:
        return {str(k): fsum(column) / len(column) for k, column in enumerate(zip(*values, strict=True), 1)}

    return {
        "accuracy_sd": stdev(fmean(one["correct"] for one in sample) for sample in zip(*samples, strict=True)),
        "majority": by_number([ballot.majority() for ballot in ballots]),
        "ties": by_number([ballot.ties() for ballot in ballots]),
        "pass_at_k": by_number([ballot.pass_at() for ballot in ballots]),
    }
