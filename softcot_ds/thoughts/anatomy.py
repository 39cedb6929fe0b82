"""What of thoughts, or of the states that they are made of, is the same for all questions, and what varies with them.

N questions, T thoughts, P assistant width, W width of either.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch

from softcot_ds.thoughts.store import ThoughtStore

_AT_A_TIME = 64
"""Questions whose vectors are copied together in float64."""
_SHOWN = 3
"""Of the largest coordinates, in words."""
SMALL_RATIO = 0.1
"""Of what varies with the question, by the length of what does not: below it, training sees little else than a
constant."""
ANOTHER_PLACEHOLDER = """thoughts.placeholder='"1"'"""
"""As a shell takes it. Of SmolLM2 a digit's ratio is nine times that of the default (docs/debugging.md)."""


class Parts:
    """Vectors of several questions as two parts: the constant one, which is each slot's mean over the questions, and
    the varying one, the rest. Questions come some at a time, and on any rank."""

    def __init__(self, num_thoughts: int, width: int, device: torch.device | str = "cpu") -> None:
        self._shape = num_thoughts, width
        self.totals = torch.zeros(num_thoughts * width + 2, dtype=torch.float64, device=device)
        """All that is kept: the sums of each slot, of all squares, and the number of questions. What several ranks have
        is added up before anything is asked."""

    @classmethod
    def of(cls, vectors_NTW: torch.Tensor) -> Self:
        """Of all that there is; in any floating dtype, on the CPU."""
        parts = cls(*vectors_NTW.shape[1:])
        for some in vectors_NTW.split(_AT_A_TIME):
            parts.add(some)
        return parts

    def add(self, vectors_NTW: torch.Tensor) -> None:
        """``vectors_NTW``: in any floating dtype, on the device of the totals."""
        vectors_NTW = vectors_NTW.double()
        count = self.totals.new_tensor([float(len(vectors_NTW))])
        self.totals += torch.cat([vectors_NTW.sum(dim=0).flatten(), vectors_NTW.square().sum()[None], count])

    @property
    def constant_norm(self) -> float:
        """Root mean square over the slots."""
        return math.sqrt(self._constant)

    @property
    def varying_norm(self) -> float:
        """Root mean square over questions and slots."""
        return math.sqrt(self._varying)

    @property
    def question_share(self) -> float:
        """The part of the vectors' variance, over questions and slots together, that is not between the means of the
        slots: what comes from the question."""
        total = self._between_slots + self._varying
        return self._varying / total if total else 0.0

    @property
    def varies(self) -> bool:
        """Whether there is any variance, over questions or slots."""
        return self._between_slots + self._varying > 0

    @property
    def _between_slots(self) -> float:
        return max(self._constant - self.means_TW.mean(dim=0).square().sum().item(), 0.0)

    @cached_property
    def means_TW(self) -> torch.Tensor:
        """Of each slot, float64."""
        return (self.totals[:-2] / self.totals[-1]).view(self._shape)

    @cached_property
    def _constant(self) -> float:
        return self.means_TW.square().sum(dim=1).mean().item()

    @cached_property
    def _varying(self) -> float:
        squares, count = self.totals[-2:].tolist()
        return max(squares / (count * self._shape[0]) - self._constant, 0.0)  # what is not finite, which stays if first


@dataclass(frozen=True)
class Anatomy:
    """How the assistant's states of some questions are made."""

    num_questions: int
    """N."""
    parts: Parts
    rank: float
    """Effective rank of what varies with the question, all slots of a question together: the participation ratio of
    its covariance's eigenvalues, (sum v)^2 / sum v^2, which is n where n directions vary alike and the others do not.
    Of N questions it is at most N - 1."""
    slot_ranks: list[float]
    """The same of each slot for itself; 0 for one in which nothing varies."""
    rms_P: torch.Tensor
    """Root mean square of each coordinate over questions and slots, float64."""

    @classmethod
    def of(cls, states_NTP: torch.Tensor) -> Self:
        """``states_NTP``: in any floating dtype, on the CPU."""
        num_questions, num_slots, width = states_NTP.shape
        parts = Parts.of(states_NTP)
        squares_P = torch.zeros(width, dtype=torch.float64)
        gram_NN = torch.zeros(num_questions, num_questions, dtype=torch.float64)
        slot_ranks = []
        for slot, mean_P in enumerate(parts.means_TW):
            states_NP = states_NTP[:, slot].double()
            squares_P += states_NP.square().sum(dim=0)
            deviations_NP = states_NP - mean_P
            # Its eigenvalues that are not zero are those of the covariance, which is larger where states are wide.
            slot_gram_NN = deviations_NP @ deviations_NP.T
            slot_ranks.append(_participation_ratio(slot_gram_NN))
            gram_NN += slot_gram_NN
        rms_P = (squares_P / (num_questions * num_slots)).sqrt()
        return cls(num_questions, parts, _participation_ratio(gram_NN), slot_ranks, rms_P)

    @property
    def ratio(self) -> float:
        """What varies with the question, by the length of what does not."""
        return self.parts.varying_norm / self.parts.constant_norm if self.parts.constant_norm else math.inf

    def lines(self) -> list[str]:
        """In words."""
        if not math.isfinite(self.parts.varying_norm):
            return ["length     not finite: some of these states are damaged; see softcot-ds doctor RECIPE"]
        largest = self.rms_P.topk(min(_SHOWN, len(self.rms_P)))
        coordinates = ", ".join(f"{value:.3g} (number {at})" for value, at in zip(*map(list, largest), strict=True))
        share = self.parts.question_share
        variance = f"{share:.1%} by question, {1 - share:.1%} by slot" if self.parts.varies else "none"
        remedy = (
            "remedy     training would see little else than a constant. If the placeholder is a special token, as by "
            f"default, build a cache with an ordinary one and compare: softcot-ds cache RECIPE {ANOTHER_PLACEHOLDER}"
        )
        return [
            f"length     {self.parts.constant_norm:.3g} of what all questions have in common, "
            f"{self.parts.varying_norm:.3g} of what varies with the question: a ratio of {self.ratio:.2g}",
            f"variance   {variance}",
            f"rank       {self.rank:.1f} of what varies with the question (participation ratio), all slots together; "
            f"{min(self.slot_ranks):.1f} to {max(self.slot_ranks):.1f} of one slot",
            f"largest    coordinates {coordinates}; median {self.rms_P.median():.3g}",
            *([remedy] if self.ratio < SMALL_RATIO else []),
        ]


def _participation_ratio(gram_NN: torch.Tensor) -> float:
    squares = gram_NN.square().sum().item()
    return gram_NN.trace().item() ** 2 / squares if squares else 0.0


def sample(store: ThoughtStore, most: int) -> torch.Tensor:
    """(N, T, P) rows of a cache in its dtype, at most so many: those with the smallest keys, which are hashes, so that
    it is a fair sample and the same one each time.

    Raises:
        SoftCoTError: a row is damaged, or cannot be read.
    """
    return store.read(store.keys()[:most]).flatten(1, -2)
