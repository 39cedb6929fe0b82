"""SoftCoT (arXiv:2502.12134): one linear layer from the assistant's states to thoughts, fused with the embedding.

B batch, S base tokens, T thoughts, P assistant width, D base width.
"""

from typing import Self

import torch
from softcot_kernels import thought_embedding
from torch import nn
from transformers import PreTrainedModel

from softcot_ds.methods.projection import Projection
from softcot_ds.methods.soft_thoughts import SoftThoughts
from softcot_ds.models.embedding import CompactTable
from softcot_ds.models.partition import whole_shape
from softcot_ds.recipe import Recipe


class LinearProjection(Projection):
    """``W h + b``, the projection of SoftCoT (arXiv:2502.12134, section 3.3)."""

    needs_states = True
    is_per_thought = True
    is_affine = True
    entry = "weight", "bias"

    def __init__(self, assistant_width: int, base_width: int, init_scale: float = 1.0) -> None:
        super().__init__()
        linear = nn.Linear(assistant_width, base_width)
        self.weight = nn.Parameter(linear.weight.detach() * init_scale)  # (D, P)
        self.bias = nn.Parameter(linear.bias.detach() * init_scale)  # (D)

    @classmethod
    def create(cls, recipe: Recipe, assistant_width: int, base: PreTrainedModel, base_width: int) -> Self:
        scale = recipe.projection.init_scale
        return cls(assistant_width, base_width, 1.0 if scale == "auto" else scale)

    @classmethod
    def empty(cls, recipe: Recipe, assistant_width: int, base_width: int) -> Self:
        return cls(assistant_width, base_width)

    def forward(self, hidden_BTP: torch.Tensor, batch_size: int | None = None) -> torch.Tensor:
        return nn.functional.linear(hidden_BTP.to(self.weight.dtype), self.weight, self.bias)

    def fused_with(self, table: CompactTable) -> "ThoughtEmbedding":
        return ThoughtEmbedding(self, table)

    def operations(self, batch_size: int, num_thoughts: int) -> int:
        return 4 * batch_size * num_thoughts * whole_shape(self.weight).numel()


class SoftCoT(SoftThoughts):
    """SoftCoT (arXiv:2502.12134): a linear projection of the assistant's states."""

    projection_class = LinearProjection


class ThoughtEmbedding(nn.Module):
    """The base's input embeddings: tokens looked up, thoughts projected, both written by one fused kernel."""

    def __init__(self, projection: LinearProjection, table: CompactTable) -> None:
        super().__init__()
        self.projection = projection
        self.table = table

    def forward(self, hidden_BTP: torch.Tensor, numbers: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """(B, S+T, D) embeddings in the table's dtype; the thoughts of row b stand after its first ``slot[b]`` tokens.

        Args:
            numbers: (B, S) int64, tokens by their rows in the table.
            slot: (B,) int64.
        """
        rows_KD = self.table.rows_KD
        return thought_embedding(
            hidden_BTP.to(rows_KD.dtype),
            self.projection.weight,
            self.projection.bias,
            numbers,
            rows_KD,
            slot,
            check_ids=False,  # the table has made them
        )
