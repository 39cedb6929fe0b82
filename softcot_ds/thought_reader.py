"""The thoughts that a training or evaluation job reads."""

from collections.abc import Sequence

import torch

from softcot_ds.backbone import load_frozen
from softcot_ds.cache import open_cache
from softcot_ds.data import Example
from softcot_ds.distributed import device, say
from softcot_ds.errors import SoftCoTError
from softcot_ds.experiment import Experiment
from softcot_ds.recipe import Dtype, Recipe
from softcot_ds.thought_manifest import row_key
from softcot_ds.thought_store import ThoughtStore
from softcot_ds.thoughts import SharedPrefix, compute_thoughts
from softcot_ds.trial import check_model


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


def states_dtype(recipe: Recipe) -> Dtype:
    """The dtype of the states that a job reads: the cache's, or the assistant's own where it runs along."""
    return (recipe.cache.dtype if recipe.thoughts.source == "cache" else None) or recipe.assistant.dtype


def read_all_thoughts(experiment: Experiment, examples: Sequence[Example]) -> torch.Tensor | None:
    """(len(examples), T, P) assistant states on the device; None where the recipe needs none.

    Without a cache of them the assistant is loaded, and let go again.
    """
    recipe = experiment.recipe
    if recipe.projection.kind == "static":
        return None
    if recipe.thoughts.source == "cache":
        try:
            return ThoughtReader.open(recipe, examples).read(examples).to(device())
        except SoftCoTError as error:
            say(f"{error}\ncomputing the thoughts of {len(examples)} questions with the assistant instead")
    assistant = load_frozen(recipe.assistant, "none", device())
    check_model(assistant, "assistant", recipe.assistant.model)
    size = recipe.evaluation.batch_size
    prefix = SharedPrefix.of(assistant, experiment.splits.assistant_inputs())
    inputs = [example.assistant for example in examples]
    batches = [inputs[start : start + size] for start in range(0, len(inputs), size)]
    states = torch.cat([compute_thoughts(assistant, batch, prefix) for batch in batches])
    return states.to(getattr(torch, states_dtype(recipe)))
