"""The thoughts that a training or evaluation job reads."""

from collections.abc import Sequence

import torch

from softcot_ds.cache import open_cache
from softcot_ds.data import Example
from softcot_ds.recipe import Recipe
from softcot_ds.thought_store import ThoughtStore, row_key


class ThoughtReader:
    """Assistant states of examples, from the cache; or none, where they are computed online or not needed."""

    def __init__(self, store: ThoughtStore | None) -> None:
        self._store = store

    @classmethod
    def open(cls, recipe: Recipe, examples: Sequence[Example]) -> "ThoughtReader":
        """Raises SoftCoTError when the cache is missing, of another assistant, or lacks one of ``examples``."""
        if recipe.thoughts.source == "online" or recipe.projection.kind == "static":
            return cls(None)
        return cls(open_cache(recipe, [example.assistant for example in examples]))

    def read(self, examples: Sequence[Example]) -> torch.Tensor | None:
        """(B, T, P) states in the cache's dtype, or None."""
        if self._store is None:
            return None
        return self._store.read([row_key(e.assistant.token_ids, e.assistant.positions) for e in examples])
