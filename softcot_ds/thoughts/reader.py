"""The thoughts that a training or evaluation job reads: the recipe's cache, found and opened."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from softcot_ds.errors import SoftCoTError
from softcot_ds.recipe import Dtype, Recipe
from softcot_ds.thoughts import manifest as tm
from softcot_ds.thoughts.manifest import StoreIdentity
from softcot_ds.thoughts.store import ThoughtStore

# transformers and DeepSpeed take seconds to import: only what looks at a model does so, where it begins.
if TYPE_CHECKING:
    from softcot_ds.data.examples import Example
    from softcot_ds.data.prompts import AssistantInput
    from softcot_ds.experiment import Experiment
    from softcot_ds.thoughts.moments import Moments


def open_cache(recipe: Recipe, inputs: Sequence[AssistantInput] = ()) -> ThoughtStore:
    """The recipe's cache, for reading.

    Raises:
        SoftCoTError: there is none (says what else lies in cache.path and how it differs), or it lacks an input.
    """
    identity = cache_identity(recipe)
    folder = recipe.cache.path / identity.folder_name
    if _has_manifest(folder):
        store = ThoughtStore.open(folder, identity)
        if missing := store.missing([input_key(item) for item in inputs]):
            raise SoftCoTError(
                f"the cache {folder} lacks {len(missing):,} of {len(inputs):,} examples, "
                f"{inputs[missing[0]].example_id} first; add them with: softcot-ds cache RECIPE"
            )
        return store
    others, folders = [], []
    with contextlib.suppress(SoftCoTError):  # what else there is, is good to know and no more
        folders = cache_folders(recipe.cache.path)
    for other in folders:
        with contextlib.suppress(SoftCoTError):
            differing = ThoughtStore.open(other).identity.difference(identity)
            others.append(f"{other.name} ({', '.join(differing)})")
    raise SoftCoTError(
        f"no cache of these thoughts at {folder}; build it with: softcot-ds cache RECIPE"
        + (f". There are others: {'; '.join(others)}" if others else "")
    )


def cached(recipe: Recipe) -> list[tuple[Recipe, list[AssistantInput]]]:
    """What the recipe's caches are to hold, one for each number of thoughts: for ``open_cache``.

    Raises:
        SoftCoTError: see ``Experiment.splits``.
    """
    from softcot_ds.experiment import Experiment

    recipe = recipe.on_gold()  # a question has one row, whoever solves it
    splits, evaluated = Experiment(recipe).splits, recipe.in_evaluation
    if evaluated.thoughts.count == recipe.thoughts.count:
        return [(recipe, splits.assistant_inputs())]
    trained = [example.assistant for example in (*splits.train, *splits.validation)]
    tested = [example.assistant for example in Experiment(evaluated).splits.test]
    return [(of, inputs) for of, inputs in ((recipe, trained), (evaluated, tested)) if inputs]


def cache_identity(recipe: Recipe) -> StoreIdentity:
    """What decides the recipe's thoughts, besides the tokens. Reads the assistant's configuration and weight files."""
    from softcot_ds.methods.initial import initial_embeddings
    from softcot_ds.models import backbone
    from softcot_ds.models.assistant import states_layer

    assistant, initial = recipe.assistant, initial_embeddings(recipe)
    return StoreIdentity(
        fingerprint=backbone.weights_fingerprint(assistant),
        num_thoughts=recipe.thoughts.count,
        width=backbone.width(backbone.load_config(assistant)),
        dtype=recipe.cache.dtype or assistant.dtype,
        compute_dtype=assistant.dtype,
        attention=assistant.attention,
        num_initial_embeddings=initial and initial.count,
        initial_embeddings=initial and initial.identity,
        layer=states_layer(recipe),
        assistant=assistant.model,
        revision=assistant.revision,
    )


def input_key(item: AssistantInput) -> bytes:
    """The row key of an assistant input."""
    return tm.row_key(item.token_ids, item.positions)


def cache_folders(path: Path) -> list[Path]:
    """Folders below ``path``, or ``path`` itself, that hold a cache. Raises SoftCoTError when it cannot be listed."""
    try:
        names = sorted(os.listdir(path))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise tm.unreadable(path, error) from error
    return [folder for folder in (path, *(path / name for name in names)) if _has_manifest(folder)]


def _has_manifest(folder: Path) -> bool:
    """Whether there is one, damaged or not. Raises SoftCoTError when the system does not tell."""
    try:
        os.lstat(folder / tm.MANIFEST_NAME)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise tm.unreadable(folder, error) from error
    return True


class ThoughtReader:
    """Assistant states of examples, from the cache; or none, where they are computed online or not needed."""

    def __init__(self, store: ThoughtStore | None) -> None:
        self._store = store

    @classmethod
    def open(cls, recipe: Recipe, examples: Sequence[Example]) -> ThoughtReader:
        """Raises SoftCoTError when the cache is missing, of another assistant, or lacks one of ``examples``."""
        from softcot_ds.methods.base import method_class

        if recipe.thoughts.source == "online" or not method_class(recipe.method).needs_states:
            return cls(None)
        return cls(open_cache(recipe, [example.assistant for example in examples]))

    def read(self, examples: Sequence[Example]) -> torch.Tensor | None:
        """(B, T, P) states, or (B, K, T, P) of K chains, in the cache's dtype; or None."""
        if self._store is None:
            return None
        return self._store.read([input_key(example.assistant) for example in examples])

    def moments(self, examples: Sequence[Example]) -> Moments:
        """Of these examples' states; all ranks call it. Raises SoftCoTError: see ``moments_of``.

        Only for states that are read from a cache (``check_conditioning``).
        """
        from softcot_ds.thoughts.moments import moments_of

        return moments_of(self._store, [input_key(example.assistant) for example in examples])


def states_dtype(recipe: Recipe) -> Dtype:
    """The dtype of the states that a job reads: the cache's, or the assistant's own where it runs along."""
    return (recipe.cache.dtype if recipe.thoughts.source == "cache" else None) or recipe.assistant.dtype


def read_all_thoughts(
    experiment: Experiment, examples: Sequence[Example], make_room: Callable[[], object] = lambda: None
) -> torch.Tensor | None:
    """(len(examples), T, P) assistant states on the device, or (len(examples), K, T, P) of K chains; None where the
    recipe needs none.

    Without a cache of them the assistant is loaded, and let go again.

    Args:
        make_room: is called before that.
    """
    from softcot_ds.distributed import device, say
    from softcot_ds.methods.base import method_class
    from softcot_ds.methods.initial import Thinker, initial_embeddings
    from softcot_ds.methods.trial import load_assistant

    recipe = experiment.recipe
    if not method_class(recipe.method).needs_states:
        return None
    if recipe.thoughts.source == "cache":
        try:
            return ThoughtReader.open(recipe, examples).read(examples).to(device())
        except SoftCoTError as error:
            say(f"{error}\ncomputing the thoughts of {len(examples)} questions with the assistant instead")
    make_room()
    size = recipe.evaluation.batch_size
    think = Thinker.of(load_assistant(recipe), experiment.splits.assistant_inputs(), initial_embeddings(recipe))
    inputs = [example.assistant for example in examples]
    batches = [inputs[start : start + size] for start in range(0, len(inputs), size)]
    states = torch.cat([think(batch) for batch in batches])
    return states.to(getattr(torch, states_dtype(recipe)))
