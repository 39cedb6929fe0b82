"""Prompt tuning (arXiv:2104.08691): thoughts that are the same for every question, the baseline.

B batch, T thoughts, D base width.
"""

from typing import Self

import torch
from torch import nn
from transformers import PreTrainedModel

from softcot_ds.distributed import device
from softcot_ds.methods.projection import Projection
from softcot_ds.methods.soft_thoughts import SoftThoughts
from softcot_ds.models.embedding import whole_embedding
from softcot_ds.recipe import Recipe


class StaticThoughts(Projection):
    """T free vectors, the same for every question: prompt tuning (arXiv:2104.08691), the baseline."""

    needs_states = False

    def __init__(self, init_TD: torch.Tensor) -> None:
        """``init_TD``: (T, D) start values; embeddings of real tokens converge better than noise."""
        super().__init__()
        self.weight = nn.Parameter(init_TD.detach().clone())

    @classmethod
    def create(cls, recipe: Recipe, assistant_width: int, base: PreTrainedModel, base_width: int) -> Self:
        return cls(random_token_embeddings(base, recipe.thoughts.count))

    @classmethod
    def empty(cls, recipe: Recipe, assistant_width: int, base_width: int) -> Self:
        return cls(torch.zeros(recipe.thoughts.count, base_width))

    def forward(self, hidden_BTP: torch.Tensor | None, batch_size: int) -> torch.Tensor:
        return self.weight.expand(batch_size, -1, -1)


class PromptTuning(SoftThoughts):
    """Prompt tuning (arXiv:2104.08691): free vectors in the place of thoughts."""

    projection_class = StaticThoughts


def random_token_embeddings(base: PreTrainedModel, count: int) -> torch.Tensor:
    """(count, D) float32 embeddings of random tokens, a start for free vectors (arXiv:2104.08691, section 3.2)."""
    with whole_embedding(base.get_input_embeddings()) as embed:
        rows = torch.randint(0, base.config.get_text_config().vocab_size, (count,))
        return embed(rows[None].to(device()))[0].detach().float().cpu()
