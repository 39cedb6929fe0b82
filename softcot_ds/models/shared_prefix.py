"""What all rows begin with, an instruction mostly, is read by a model once: its keys and values serve every batch.

B rows, I tokens that all of them begin with.
"""

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Self

import torch
from torch import nn
from transformers import DynamicCache

from softcot_ds.models.backbone import cache_name

KeysValues = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, each (B, heads, tokens, head width)."""


def common_prefix(rows: Collection[Sequence[int]]) -> list[int]:
    """The longest run of tokens that every row begins with."""
    # In lexicographic order, all stand between the first and the last, and so begin with what both begin with.
    first, last = min(rows, default=()), max(rows, default=())
    return [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))]


@dataclass(frozen=True)
class SharedPrefix:
    """Keys and values of the tokens that all rows begin with."""

    length: int
    """I."""
    cache: DynamicCache | None
    """Batch of one; None when nothing is shared."""

    @classmethod
    @torch.no_grad()
    def read(cls, decoder: nn.Module, ids_I: torch.Tensor, cache: DynamicCache) -> Self:
        """Run the tokens, int64. What ``cache`` is made of decides which of their keys each layer keeps."""
        decoder(input_ids=ids_I[None], use_cache=True, **{cache_name(decoder.forward): cache})
        return cls(len(ids_I), cache)

    def layer(self, index: int, batch: int) -> KeysValues:
        """One layer's keys and values for a batch, as views."""
        layer = self.cache.layers[index]
        return layer.keys.expand(batch, -1, -1, -1), layer.values.expand(batch, -1, -1, -1)

    def expanded(self, batch: int) -> DynamicCache | None:
        """The cache for a batch, to be extended by a forward pass, which leaves this one as it is."""
        if self.cache is None:
            return None
        expanded = copy.copy(self.cache)
        expanded.layers = [copy.copy(layer) for layer in self.cache.layers]
        for index, layer in enumerate(expanded.layers):  # a view: the forward pass concatenates, and so copies, once
            layer.keys, layer.values = self.layer(index, batch)
        return expanded


NO_PREFIX = SharedPrefix(0, None)
