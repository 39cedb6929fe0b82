"""Computing a recipe's thoughts with its assistant: all that its cache lacks, or a sample again."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import deepspeed
import torch
from transformers import PreTrainedModel

from softcot_ds import distributed
from softcot_ds.data.prompts import AssistantInput
from softcot_ds.errors import SoftCoTError
from softcot_ds.methods.base import method_class
from softcot_ds.methods.initial import Thinker, initial_embeddings
from softcot_ds.methods.trial import check_ahead, check_model
from softcot_ds.models.assistant import decoder_of, load_to_think, states_layer
from softcot_ds.models.partition import make_layers_leaves, plain_config, with_limits
from softcot_ds.recipe import Recipe
from softcot_ds.thoughts.builder import fill, say
from softcot_ds.thoughts.ranks import Ranks, join_ranks
from softcot_ds.thoughts.reader import cache_identity, cached, input_key, open_cache

if TYPE_CHECKING:
    from softcot_ds.thoughts.builder import Compute

RECOMPUTE_TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""How much a row may depend on its batch, the number of ranks and the hardware: relative error in the Euclidean norm,
by the coarser of the dtypes that it is computed in and stored in."""
_RECOMPUTED_ROWS = 32


def build(recipe: Recipe | Sequence[Recipe], ranks: Ranks | None = None) -> None:
    """Compute and store what the recipe's caches lack, one for each number of thoughts. To be called by all ranks.

    Args:
        recipe: or several, which differ in the number of thoughts in evaluation.

    Raises:
        SoftCoTError: see ``fill``; or the base, for which all this is, cannot be one.
    """
    ranks = ranks or join_ranks()
    recipes = [recipe] if isinstance(recipe, Recipe) else recipe
    if idle := {one.method for one in recipes if not method_class(one.method).needs_states}:
        if ranks.rank == 0:
            say(f"nothing is cached for method={', '.join(sorted(idle))}, which reads no states of the assistant")
        recipes = [one for one in recipes if one.method not in idle]
    wanted: dict[int, tuple[Recipe, list[AssistantInput]]] = {}
    for pair in (pair for one in recipes for pair in cached(one)):
        count = pair[0].thoughts.count
        wanted[count] = max(wanted.get(count, pair), pair, key=lambda pair: len(pair[1]))  # with the test's, or without
    for of, inputs in wanted.values():
        _build(of, inputs, ranks.on(f"{of.thoughts.count} thoughts"))


def _build(recipe: Recipe, inputs: Sequence[AssistantInput], ranks: Ranks) -> None:
    identity = cache_identity(recipe)

    def load() -> Compute:
        if ranks.rank == 0:
            check_ahead(recipe.base, "base", recipe.backbone.bits)
            ranks.post("base", "fit")
        ranks.fetch("base")  # before the ranks meet to load: there they would wait for one that has given up
        return load_assistant(recipe, inputs, ranks)

    fill(
        recipe.cache.path / identity.folder_name,
        identity,
        inputs,
        load,
        ranks,
        shard_mib=recipe.cache.shard_mib,
        # The assistant reads an input once for each of its chains.
        tokens_per_batch=max(1, recipe.cache.tokens_per_batch // (identity.num_initial_embeddings or 1)),
        in_step=recipe.cache.partition != "none",
    )


def load_assistant(recipe: Recipe, inputs: Sequence[AssistantInput], ranks: Ranks) -> Compute:
    """Load the assistant on this rank's device and let it read what all inputs begin with.

    Raises:
        SoftCoTError: it cannot be loaded, or cannot be an assistant.
    """
    if recipe.cache.partition != "none":
        model = _load_partitioned(recipe, ranks)
        check_model(model, "assistant", recipe.assistant.model, states_layer(recipe))
        return Thinker.of(model, inputs, initial_embeddings(recipe))
    if torch.cuda.is_available():
        device = torch.device("cuda", ranks.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            # PyTorch would take every core in every rank. A launcher may have bound the ranks to cores already.
            cores = len(os.sched_getaffinity(0))
            bound = cores < (os.cpu_count() or 1)
            torch.set_num_threads(cores if bound else max(1, cores // ranks.local_size))
    model = load_to_think(recipe, "none", device)
    check_model(model, "assistant", recipe.assistant.model, states_layer(recipe))
    return Thinker.of(model, inputs, initial_embeddings(recipe))


def _load_partitioned(recipe: Recipe, ranks: Ranks) -> PreTrainedModel:
    """The assistant's decoder, its weights split over ranks by ZeRO-3. To be called, and run, by all at once."""
    ranks.export_environment()
    distributed.init_distributed(recipe.training.timeout_minutes)
    config = plain_config(recipe.assistant.dtype)
    partition, group_size = recipe.cache.partition, recipe.backbone.group_size
    model = load_to_think(recipe, partition, distributed.device(), config, group_size)
    make_layers_leaves(model)
    # The decoder is the root: DeepSpeed follows the order of layers from one forward pass of its root to the next.
    engine, *_ = deepspeed.initialize(model=decoder_of(model), config=with_limits(config, model))
    return engine.module.eval()


def recompute_sample(recipe: Recipe, ranks: Ranks) -> None:
    """Compute some rows of each of the recipe's caches again and compare: within ``RECOMPUTE_TOLERANCE``, and each
    nearer to itself than to any other. Rows of different questions may differ by less than that tolerance.

    Raises:
        SoftCoTError: no row is there, or one differs; names the example.
    """
    for of, inputs in cached(recipe):
        _recompute_sample(of, inputs, ranks.on(f"{of.thoughts.count} thoughts"))


def _recompute_sample(recipe: Recipe, inputs: Sequence[AssistantInput], ranks: Ranks) -> None:
    store = open_cache(recipe)
    by_key = {input_key(item): item for item in inputs}
    keys = [*by_key]
    missing = set(store.missing(keys))
    there = [index for index in range(len(keys)) if index not in missing]
    if not there:
        raise SoftCoTError(f"{store.folder} holds no row of this recipe; add them with: softcot-ds cache RECIPE")
    compute = load_assistant(recipe, inputs, ranks)
    sample = [keys[index] for index in random.Random(0).sample(there, min(_RECOMPUTED_ROWS, len(there)))]
    anew = torch.cat([compute([by_key[key]]).cpu() for key in sample])
    names = [by_key[key].example_id for key in sample]
    dtypes = (store.identity.dtype, store.identity.compute_dtype)
    say(_compared(anew, store.read(sample), names, max(RECOMPUTE_TOLERANCE[dtype] for dtype in dtypes), store.folder))


def _compared(anew: torch.Tensor, stored: torch.Tensor, names: Sequence[str], tolerance: float, folder: Path) -> str:
    """What is to be said of rows that are as they were. ``anew``, ``stored``: (N, ...) in any floating dtype."""
    anew_NF, stored_NF = (rows.double().flatten(1) for rows in (anew, stored))
    # By differences: a product of rows would lose what is small beside them.
    apart_NN = torch.cdist(anew_NF, stored_NF, compute_mode="donot_use_mm_for_euclid_dist")
    apart_NN /= stored_NF.norm(dim=1)[:, None]
    again = f"remove {folder} and build it anew"
    for name, error in zip(names, apart_NN.diagonal().tolist(), strict=True):
        if not error <= tolerance:
            raise SoftCoTError(
                f"example {name}: computed again it differs by {error:.1e} (relative, tolerance {tolerance:.0e}) from "
                f"its row; {again}"
            )
    for number, (name, nearest) in enumerate(zip(names, apart_NN.argmin(dim=1).tolist(), strict=True)):
        error, least = apart_NN[number, number].item(), apart_NN[number, nearest].item()
        if least < error:
            raise SoftCoTError(
                f"example {name}: computed again it differs by {error:.1e} (relative) from its row, and by "
                f"{least:.1e} from that of {names[nearest]}: rows are exchanged; {again}. If it is so again, questions "
                "differ by less than rounding does: see softcot-ds cache RECIPE --info"
            )
    others = apart_NN.clone().fill_diagonal_(torch.inf).min()
    beside = f"; the nearest row of another question is {others:.1e} away" if len(names) > 1 else ""
    worst = apart_NN.diagonal().max()
    return f"{len(names)} rows computed again: largest relative error {worst:.1e}, tolerance {tolerance:.0e}{beside}"
