"""Which token comes next: the most likely one, or one drawn by random numbers that belong to the output alone.

So what is drawn does not depend on what is decoded beside it, on which rank, or in which order. Where another model has
drafted tokens, it is said which of them are accepted (speculative sampling, arXiv:2211.17192): what comes out has the
distribution that it has without drafts; greedily, it is the same.

R rows, N drafts of each, V vocabulary, W of the model that drafts, which may be smaller.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from transformers import TopPLogitsWarper

from softcot_ds.recipe import EvaluationConfig

_DRAWN, _ACCEPTING, _INSTEAD = range(3)
"""What the random numbers for a token of an output are for: to draw it, to accept it where it was drafted, and to draw
what stands there instead."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0

    @classmethod
    def of(cls, settings: EvaluationConfig) -> Self:
        """As the recipe says it for the base's answers."""
        return cls(settings.max_new_tokens, settings.temperature, settings.top_p)


@dataclass(frozen=True)
class Drafts:
    """What may come next in each row, if the model agrees."""

    tokens_RN: torch.Tensor
    """int64."""
    counts: Sequence[int]
    """How many of a row's N count, the first ones."""
    chances_RNW: torch.Tensor | None = None
    """The distribution that each was drawn from, float32; None where the most likely token was taken."""


def no_drafts(rows: int) -> Drafts:
    """For so many rows."""
    return Drafts(torch.zeros(rows, 0, dtype=torch.int64), [0] * rows)


class Chooser:
    """Chooses the tokens of several outputs."""

    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        """``seeds``: of each output, any whole numbers from 0 on; greedily decoded they mean nothing."""
        self._sampling = sampling
        if sampling.temperature:
            numbers = [np.random.default_rng(seed).random((3, sampling.max_new_tokens)) for seed in seeds]
            self._uniform_B3N = torch.tensor(np.array(numbers), dtype=torch.float64)
            self._narrow = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else lambda _, scores: scores

    def __call__(self, logits_RV: torch.Tensor, outputs: Sequence[int], written: Sequence[int]) -> torch.Tensor:
        """(R,) int64 tokens, on the logits' device.

        Args:
            logits_RV: of any floating dtype.
            outputs: the number of each row's output.
            written: how many tokens it has so far.
        """
        return self.draft(logits_RV, outputs, written)[0]

    def draft(
        self, logits_RV: torch.Tensor, outputs: Sequence[int], written: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same, and the (R, V) float32 distribution that they are drawn from; None where the most likely are
        taken."""
        if not self._sampling.temperature:
            return logits_RV.float().argmax(dim=-1), None
        chances_RV = self._chances(logits_RV)
        return _drawn(chances_RV, self._uniform(_DRAWN, outputs, written)), chances_RV

    def accept(
        self, logits_RMV: torch.Tensor, drafts: Drafts, outputs: Sequence[int], written: Sequence[int]
    ) -> list[list[int]]:
        """Of each row the drafts that are accepted, and the token that the model has chosen itself behind them.

        A draft of probability q that is p to the model is accepted with probability min(1, p / q). The first that is
        not ends them, and what stands in its place is drawn from what of the model's distribution the draft's leaves
        over; behind drafts that are all accepted, from the model's own.

        A token's random numbers are used again where it is drafted again, behind other tokens: what came of them the
        first time has been thrown away, and nothing before it depended on them.

        Args:
            logits_RMV: after what was read last and after each of the N drafts, M = N + 1.
            outputs, written: see above; without the drafts.
        """
        if not self._sampling.temperature:
            chosen_RM = logits_RMV.float().argmax(dim=-1).cpu()
            accepted_R = _until_one_fails(chosen_RM[:, :-1] == drafts.tokens_RN.cpu(), drafts.counts)
            own_R = chosen_RM.gather(1, accepted_R[:, None])[:, 0]
        else:
            chances_RMV = self._chances(logits_RMV.flatten(0, 1)).unflatten(0, logits_RMV.shape[:2])
            accepted_R = _until_one_fails(self._agreed(chances_RMV, drafts, outputs, written), drafts.counts)
            own_R = self._own(chances_RMV, drafts, accepted_R.tolist(), outputs, written)
        rows = zip(drafts.tokens_RN.tolist(), accepted_R.tolist(), own_R.tolist(), strict=True)
        return [[*tokens[:accepted], own] for tokens, accepted, own in rows]

    def _agreed(
        self, chances_RMV: torch.Tensor, drafts: Drafts, outputs: Sequence[int], written: Sequence[int]
    ) -> torch.Tensor:
        """(R, N) bool on the CPU: whether each draft is accepted, should those before it be."""
        agreed_RN = torch.zeros(drafts.tokens_RN.shape, dtype=torch.bool)
        for place, tokens_R in enumerate(drafts.tokens_RN.T):
            true_R = chances_RMV[:, place].gather(1, tokens_R[:, None])[:, 0].cpu()
            drawn_by_R = drafts.chances_RNW[:, place].gather(1, tokens_R[:, None])[:, 0].cpu()
            uniform_R = self._uniform(_ACCEPTING, outputs, [count + place for count in written])
            agreed_RN[:, place] = uniform_R * drawn_by_R < true_R
        return agreed_RN

    def _own(
        self,
        chances_RMV: torch.Tensor,
        drafts: Drafts,
        accepted: Sequence[int],
        outputs: Sequence[int],
        written: Sequence[int],
    ) -> torch.Tensor:
        """(R,) int64 tokens: the first that is not a draft of those accepted."""
        left_RV = chances_RMV[list(range(len(accepted))), list(accepted)]
        refused = [row for row, count in enumerate(accepted) if count < drafts.counts[row]]
        if refused:
            drawn_by_FW = drafts.chances_RNW[refused, [accepted[row] for row in refused]]
            left_FV = left_RV[refused]
            left_FV[:, : drawn_by_FW.shape[1]] -= drawn_by_FW
            # Nothing is left over of two that are the same: but for rounding, none of its tokens is ever refused.
            is_left_F1 = left_FV.clamp_(min=0).any(dim=1, keepdim=True)
            left_RV[refused] = torch.where(is_left_F1, left_FV, left_RV[refused])
        places = [count + more for count, more in zip(written, accepted, strict=True)]
        uniform_R = self._uniform(_DRAWN, outputs, places)
        uniform_R[refused] = self._uniform(_INSTEAD, outputs, places)[refused]
        return _drawn(left_RV, uniform_R)

    def _chances(self, logits_RV: torch.Tensor) -> torch.Tensor:
        """(R, V) float32, the distribution that tokens are drawn from."""
        return self._narrow(None, logits_RV.float() / self._sampling.temperature).softmax(dim=-1)

    def _uniform(self, what: int, outputs: Sequence[int], places: Sequence[int]) -> torch.Tensor:
        """(R,) float64 on the CPU, from 0 to 1: of each row's output the random number for the token in a place."""
        last = self._sampling.max_new_tokens - 1  # drafts beyond it do not count
        return self._uniform_B3N[list(outputs), what, [min(place, last) for place in places]]


def _drawn(weights_RV: torch.Tensor, uniform_R: torch.Tensor) -> torch.Tensor:
    """(R,) int64: the token up to which the weights sum to that share of all."""
    upto_RV = weights_RV.double().cumsum(dim=-1)
    drawn_R1 = torch.searchsorted(upto_RV, uniform_R.to(upto_RV.device)[:, None] * upto_RV[:, -1:], right=True)
    return drawn_R1[:, 0].clamp(max=upto_RV.shape[1] - 1)


def _until_one_fails(agreed_RN: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """(R,) int64: how many of the first ones hold, of so many of each row."""
    counted_RN = torch.arange(agreed_RN.shape[1]) < torch.tensor(counts)[:, None]
    return (agreed_RN & counted_RN).long().cumprod(dim=1).sum(dim=1)
