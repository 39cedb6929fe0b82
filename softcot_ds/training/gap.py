"""Whether thoughts carry their question: how much worse the base does with those of another one.

N problems.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy.stats import t as students_t


@dataclass(frozen=True)
class Gap:
    """The loss with another question's thoughts less that with the question's own, nats per supervised token."""

    mean: float
    """All nats over all tokens."""
    margin: float
    """Half the width of its 95% interval over problems."""
    num_problems: int

    @classmethod
    def of(cls, own_N: np.ndarray, shuffled_N: np.ndarray, tokens_N: np.ndarray) -> Self:
        """A paired comparison of the same problems: the mean is a ratio of sums, and its error that of the problems'
        residuals (Cochran, Sampling Techniques, 1977, section 6.4), in Student's distribution.

        Args:
            own_N: nats of each problem with its own thoughts, float64; two problems at least.
            shuffled_N: with another's.
            tokens_N: supervised tokens of each.
        """
        differences, count = shuffled_N - own_N, len(own_N)
        mean = differences.sum() / tokens_N.sum()
        residuals = differences - mean * tokens_N
        error = np.sqrt(np.square(residuals).sum() * count / (count - 1)) / tokens_N.sum()
        return cls(float(mean), float(students_t.ppf(0.975, count - 1) * error), count)

    @property
    def is_seen(self) -> bool:
        """Whether the whole interval is above zero."""
        return self.mean > self.margin

    @property
    def doubt(self) -> str | None:
        """Where it is not seen what is, in words."""
        if self.is_seen:
            return None
        nats = f"{self} nats per token with those, over {self.num_problems} problems"
        if self.mean < -self.margin:
            return f"another question's thoughts are better than the question's own: {nats}"
        return f"cannot tell a question's thoughts from another's: {nats}; more (task.validation_problems) may"

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.margin:.4f}"
