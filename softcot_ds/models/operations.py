"""Floating-point operations, counted from shapes.

Products of matrices alone count, two operations for each pair of factors, as PyTorch's own counter has it.
"""

from dataclasses import dataclass
from typing import Self

from torch import nn
from transformers import PreTrainedModel

from softcot_ds.models.partition import whole_shape


@dataclass(frozen=True)
class Decoder:
    """What decides the operations of a frozen model."""

    weights: int
    """Elements of the layers' matrices: each is a factor once for each position."""
    attention: int
    """Heads times head width, summed over the layers."""
    head: int
    """Elements of the head's matrix."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self | None:
        """None where a layer is, or may be, more than plain attention, norms and matrices that every position meets."""
        layers, head = getattr(model.get_decoder(), "layers", None), model.get_output_embeddings()
        if not isinstance(layers, nn.ModuleList) or not isinstance(head, nn.Linear):
            return None
        if any("expert" in name for name, _ in layers.named_modules()):
            return None
        matrices = [module for module in layers.modules() if isinstance(module, nn.Linear)]
        known = {parameter for module in matrices for parameter in module.parameters()}
        for name, parameter in layers.named_parameters():
            if parameter not in known and (
                len(whole_shape(parameter)) != 1 or name.rpartition(".")[2] not in ("weight", "bias")
            ):
                return None
        attention = 0
        for layer in layers:
            parts = dict(layer.self_attn.named_children()) if hasattr(layer, "self_attn") else {}
            # With keys made in other ways (of a latent state, say) values may have another width than keys.
            if not isinstance(parts.get("o_proj"), nn.Linear) or not parts.keys() & {"k_proj", "qkv_proj"}:
                return None
            attention += parts["o_proj"].in_features
        weights = sum(module.in_features * module.out_features for module in matrices)
        return cls(weights, attention, head.in_features * head.out_features)

    def run(self, rows: int, queries: int, keys: int) -> int:
        """Operations of the layers over ``queries`` positions of each row, which attend to ``keys`` each: masks spare
        nothing."""
        return rows * queries * (2 * self.weights + 4 * keys * self.attention)

    def train(self, rows: int, queries: int, keys: int) -> int:
        """The same with the backward pass: a product more for each with a frozen matrix, two for each of two states."""
        return rows * queries * (4 * self.weights + 12 * keys * self.attention)

    def train_head(self, positions: int) -> int:
        return 4 * positions * self.head
