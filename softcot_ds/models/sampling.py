"""Which token comes next: the most likely one, or one drawn by random numbers that belong to the output alone.

So what is drawn does not depend on what is decoded beside it, on which rank, or in which order.

R rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from transformers import TopPLogitsWarper

from softcot_ds.evaluation_config import EvaluationConfig


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


class Chooser:
    """Chooses the tokens of several outputs."""

    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        """``seeds``: of each output, any whole numbers from 0 on; greedily decoded they mean nothing."""
        self._sampling = sampling
        if sampling.temperature:
            numbers = [np.random.default_rng(seed).random(sampling.max_new_tokens) for seed in seeds]
            self._uniform_BN = torch.tensor(np.array(numbers), dtype=torch.float64)
            self._narrow = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else lambda _, scores: scores

    def __call__(self, logits_RV: torch.Tensor, outputs: Sequence[int], written: Sequence[int]) -> torch.Tensor:
        """(R,) int64 tokens, on the logits' device.

        Args:
            logits_RV: of any floating dtype.
            outputs: the number of each row's output.
            written: how many tokens it has so far.
        """
        logits_RV = logits_RV.float()
        if not self._sampling.temperature:
            return logits_RV.argmax(dim=-1)
        scores_RV = self._narrow(None, logits_RV / self._sampling.temperature)
        upto_RV = scores_RV.softmax(dim=-1).double().cumsum(dim=-1)
        uniform_R1 = self._uniform_BN[list(outputs), list(written)].to(upto_RV.device)[:, None]
        drawn_R1 = torch.searchsorted(upto_RV, uniform_R1 * upto_RV[:, -1:], right=True)
        return drawn_R1[:, 0].clamp(max=upto_RV.shape[1] - 1)
