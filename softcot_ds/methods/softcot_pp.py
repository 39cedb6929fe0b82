"""SoftCoT++ (arXiv:2505.11484): K sets of thoughts for a question, its chains, of one projection.

At the assistant's placeholders stand K initial embeddings (initial.py), the same for every question: so the states of
all chains are constants, and are read from a cache. The base reads each chain's thoughts alone; what stands before
them is the same for all, and runs once. Beside the cross entropy of each chain, a contrastive loss keeps the thoughts
of a question's chains apart.

B questions, K chains, T thoughts, L prefix tokens, P assistant width, D base width, N supervised tokens.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn

from softcot_ds.data.batches import Batch
from softcot_ds.methods.conditioning import Weights
from softcot_ds.methods.initial import EMBEDDING, initial_embeddings
from softcot_ds.methods.softcot import SoftCoT
from softcot_ds.models.partition import whole_shape
from softcot_ds.recipe import Recipe

_SHARPNESS = 20.0
"""By which cosines are multiplied: a temperature of 0.05."""


class SoftCoTPlusPlus(SoftCoT):
    """SoftCoT with K sets of thoughts for a question."""

    losses: ClassVar[dict[str, Literal["tokens", "problems"]]] = {"language_model": "tokens", "contrastive": "problems"}

    def __init__(self, *args: Any, chains: int, contrastive: float = 1.0, **kwargs: Any) -> None:
        """
        Args:
            chains: K.
            contrastive: weight of the contrastive loss.

        The others are those of ``SoftThoughts``.
        """
        super().__init__(*args, **kwargs)
        self.chains = chains
        self._contrastive = contrastive

    @classmethod
    def own_settings(cls, recipe: Recipe) -> dict[str, Any]:
        chains = recipe.chains
        return {"chains": chains.count, "contrastive": chains.contrastive, "initial": initial_embeddings(recipe)}

    def adapter_weights(self, weights: Weights) -> Weights:
        """With initial embeddings that are not found again by a token or a seed."""
        rows_KP = self.initial and self.initial.rows_KP
        return super().adapter_weights(weights) | ({} if rows_KP is None else {EMBEDDING: rows_KP})

    def forward(self, batch: Batch, per_token: bool = False) -> torch.Tensor:
        """(2,): the cross entropy of all chains, summed over their supervised tokens, in nats; and the contrastive
        loss, a mean over chains, summed over the questions.

        Args:
            per_token: give (N,) float64, the cross entropy of each supervised token, a mean over the chains, instead.
        """
        self._read_shared(batch)
        given_BKTP = self._given(batch)
        rows = batch.repeated(self.chains)
        embeds_RSD = self._embeds(rows, given_BKTP.flatten(0, 1))
        losses = self._language_loss(rows, embeds_RSD, per_token, self.chains)
        if per_token:
            return losses.unflatten(0, (self.chains, -1)).mean(dim=0)
        if batch.kept is None:
            return torch.stack([losses, torch.zeros_like(losses)])
        first = rows.prefix_ids.shape[1]
        thoughts_BKTD = embeds_RSD[:, first : first + given_BKTP.shape[2]].unflatten(0, (-1, self.chains))
        return torch.stack([losses, self._contrastive * contrastive_loss(thoughts_BKTD, batch.kept)])

    def dropout(self, drawn_by: Sequence[str], batch: Batch) -> torch.Tensor | None:
        if not self._contrastive:
            return None
        shape = self.chains, len(batch.assistant[0].positions), whole_shape(self.projection.bias).numel()
        return torch.stack([half(text, shape) for text in drawn_by])


def half(drawn_by: str, shape: Sequence[int]) -> torch.Tensor:
    """Which coordinates a dropout of one half keeps, bool on the CPU: bits that depend on a text alone.

    They are those of SHAKE-256 of the text, the highest of each byte first: the same everywhere.
    """
    count = math.prod(shape)
    digest = hashlib.shake_256(drawn_by.encode()).digest(-(-count // 8))
    bits = np.unpackbits(np.frombuffer(digest, np.uint8), count=count)
    return torch.from_numpy(bits).view(torch.bool).view(shape)


def contrastive_loss(thoughts_BKTD: torch.Tensor, kept_BKTD: torch.Tensor) -> torch.Tensor:
    """How badly each chain's thoughts are told from the other chains': mean over the chains, summed over the questions.

    The thoughts of a chain are one vector. Among its cosines to a copy of itself that has lost half of its coordinates
    and to each of the other chains, each times 20, the first is the right one: the loss is its cross entropy. Questions
    know nothing of each other.

    Args:
        thoughts_BKTD: in any floating dtype; the loss is in float32 at least.
        kept_BKTD: bool, the coordinates that the copies keep.
    """
    thoughts_BKTD = thoughts_BKTD.to(torch.promote_types(thoughts_BKTD.dtype, torch.float32))
    chains_BKW = nn.functional.normalize(thoughts_BKTD.flatten(2), dim=-1)
    copies_BKW = nn.functional.normalize((thoughts_BKTD * kept_BKTD).flatten(2), dim=-1)
    itself_BK1 = (chains_BKW * copies_BKW).sum(dim=-1, keepdim=True)
    is_itself_KK = torch.eye(chains_BKW.shape[1], dtype=torch.bool, device=chains_BKW.device)
    cosines_BKK = torch.where(is_itself_KK, itself_BK1, chains_BKW @ chains_BKW.mT)
    right_BK = (_SHARPNESS * cosines_BKK).log_softmax(dim=-1).diagonal(dim1=1, dim2=2)
    return -right_BK.mean(dim=1).sum()
