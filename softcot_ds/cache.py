"""``softcot-ds cache``: compute the assistant's thoughts once, in parallel, and keep them on disk.

Run it alone, under ``mpirun -n N``, ``srun --mpi=pmix`` or the deepspeed launcher. ``thought_builder`` says how the
ranks share the work. A run that was killed is continued by running the same command again: see ``fill``. ``--verify``,
``--info`` and ``--prune`` take a recipe or a folder of caches.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from softcot_ds import thought_manifest as tm
from softcot_ds import thought_store as ts
from softcot_ds.command import exit_code_of, interrupted_by_signals
from softcot_ds.errors import Interrupted, SoftCoTError
from softcot_ds.progress import size
from softcot_ds.ranks import OtherRankFailed, Ranks, join_ranks
from softcot_ds.recipe import Recipe, load_recipe
from softcot_ds.thought_builder import HAND_OUTS, extent, fill, only_builder, say
from softcot_ds.thought_manifest import DamagedShard
from softcot_ds.thought_reader import cache_folders, cache_identity, input_key, open_cache
from softcot_ds.thought_store import ThoughtStore

# transformers and DeepSpeed take seconds to import: only what runs the assistant does so, where it begins.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from softcot_ds.prompts import AssistantInput
    from softcot_ds.thought_builder import Compute

RECOMPUTE_TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""How much a row may depend on its batch, the number of ranks and the hardware: relative error in the Euclidean norm,
by the coarser of the dtypes that it is computed in and stored in."""
_RECOMPUTED_ROWS = 32


def build(recipe: Recipe, ranks: Ranks | None = None) -> None:
    """Compute and store what the recipe's cache lacks. To be called by all ranks.

    Raises:
        SoftCoTError: see ``fill``.
    """
    ranks = ranks or join_ranks()
    identity = cache_identity(recipe)
    inputs = _recipe_inputs(recipe)
    fill(
        recipe.cache.path / identity.folder_name,
        identity,
        inputs,
        lambda: load_assistant(recipe, inputs, ranks),
        ranks,
        shard_mib=recipe.cache.shard_mib,
        tokens_per_batch=recipe.cache.tokens_per_batch,
        in_step=recipe.cache.partition == "zero3",
    )


def _recipe_inputs(recipe: Recipe) -> list[AssistantInput]:
    from softcot_ds.experiment import Experiment

    return Experiment(recipe).splits.assistant_inputs()


def load_assistant(recipe: Recipe, inputs: Sequence[AssistantInput], ranks: Ranks) -> Compute:
    """Load the assistant on this rank's device and let it read what all inputs begin with.

    Raises:
        SoftCoTError: it cannot be loaded, or cannot be an assistant; or the base, for which all this is, cannot be one.
    """
    from softcot_ds import backbone
    from softcot_ds.thoughts import compute_thoughts, read_shared
    from softcot_ds.trial import check_ahead, check_model

    if ranks.rank == 0:
        check_ahead(recipe.base, "base")
    if recipe.cache.partition == "zero3":
        model = _load_partitioned(recipe, ranks)
        check_model(model, "assistant", recipe.assistant.model)
        prefix = read_shared(model, inputs)
        return lambda batch: compute_thoughts(model, batch, prefix)
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
    model = backbone.load_frozen(recipe.assistant, "none", device)
    check_model(model, "assistant", recipe.assistant.model)
    prefix = read_shared(model, inputs)
    return lambda batch: compute_thoughts(model, batch, prefix)


def _load_partitioned(recipe: Recipe, ranks: Ranks) -> PreTrainedModel:
    """The assistant's decoder, its weights split over the ranks by ZeRO-3. To be called, and run, by all at once."""
    import deepspeed

    from softcot_ds import backbone, distributed
    from softcot_ds.partition import plain_config
    from softcot_ds.thoughts import decoder_of

    ranks.export_environment()
    distributed.init_distributed(recipe.training.timeout_minutes)
    config = plain_config(recipe.assistant.dtype)
    model = backbone.load_frozen(recipe.assistant, "zero3", distributed.device(), config)
    # The decoder is the root: DeepSpeed follows the order of layers from one forward pass of its root to the next.
    engine, *_ = deepspeed.initialize(model=decoder_of(model), config=config)
    return engine.module.eval()


def info(folder: Path) -> None:
    """Print what a cache is, how large, who made it. Raises SoftCoTError when there is none or it is damaged."""
    manifest = ThoughtStore.open(folder).manifest
    identity = manifest.identity
    unlisted = set(tm.shard_names(folder)) - {shard.name for shard in manifest.shards}
    shape = " x ".join(f"{n:,}" for n in identity.row_shape)
    print(f"{folder}")
    print(f"  assistant  {identity.assistant} (revision {identity.revision}), weights {identity.fingerprint[:16]}")
    print(f"  rows       {manifest.rows:,} of {shape} {identity.dtype}; {extent(manifest)}")
    print(f"  computed   in {identity.compute_dtype} with {identity.attention} attention")
    print(f"  created    {manifest.created}")
    print(
        f"  besides    {len(unlisted)} finished shards that no manifest lists, {len(tm.leftover_names(folder))} "
        f"unfinished files, {len(tm.damaged_names(folder))} damaged shards set aside"
    )


def verify(folder: Path) -> None:
    """Check every byte of a cache.

    Raises:
        SoftCoTError: shards are damaged, or cannot be read; each has been named.
    """
    store = ThoughtStore.open(folder)
    damaged = unread = 0
    for record in store.manifest.shards:
        try:
            ts.verify_shard(folder / record.name, store.identity, record)
        except DamagedShard as error:
            say(f"damaged: {error}")
            damaged += 1
        except SoftCoTError as error:
            say(str(error))
            unread += 1
    if unread:
        raise SoftCoTError(
            f"{unread} of {len(store.manifest.shards)} shards of {folder} cannot be read, {damaged} are damaged"
        )
    if damaged:
        raise SoftCoTError(
            f"{damaged} of {len(store.manifest.shards)} shards of {folder} are damaged; "
            "run softcot-ds cache RECIPE to set them aside and compute their rows anew"
        )
    say(f"{folder}: all checksums agree, {store.manifest.rows:,} rows, {extent(store.manifest)}")


def recompute_sample(recipe: Recipe, ranks: Ranks) -> None:
    """Compute some rows of the recipe's cache again and compare, within ``RECOMPUTE_TOLERANCE``.

    Raises:
        SoftCoTError: no row is there, or one differs; names the example.
    """
    store = open_cache(recipe)
    inputs = _recipe_inputs(recipe)
    keys = [input_key(item) for item in inputs]
    missing = set(store.missing(keys))
    there = [index for index in range(len(inputs)) if index not in missing]
    if not there:
        raise SoftCoTError(f"{store.folder} holds no row of this recipe; add them with: softcot-ds cache RECIPE")
    compute = load_assistant(recipe, inputs, ranks)
    dtypes = (store.identity.dtype, store.identity.compute_dtype)
    tolerance = max(RECOMPUTE_TOLERANCE[dtype] for dtype in dtypes)
    worst = 0.0
    sample = random.Random(0).sample(there, min(_RECOMPUTED_ROWS, len(there)))
    for index in sample:
        stored = store.read([keys[index]]).double()
        error = float((compute([inputs[index]]).cpu().double() - stored).norm() / stored.norm())
        worst = max(worst, error)
        if not error <= tolerance:
            raise SoftCoTError(
                f"example {inputs[index].example_id}: computed again it differs by {error:.1e} (relative, tolerance "
                f"{tolerance:.0e}) from {store.folder}; remove that folder and build it anew"
            )
    say(f"{len(sample)} rows computed again: largest relative error {worst:.1e}, tolerance {tolerance:.0e}")


def prune(folder: Path) -> None:
    """Remove what stopped builders left unfinished and the damaged shards that were set aside.

    Raises:
        SoftCoTError: no cache there, or it cannot be written.
    """
    ThoughtStore.open(folder)
    with only_builder(folder) as locked:
        # Without a lock, unfinished files may belong to a builder at work.
        names = [*(tm.leftover_names(folder) if locked else []), *tm.damaged_names(folder)]
        freed = 0
        for name in names:
            try:
                freed += (folder / name).stat().st_size
                (folder / name).unlink()
            except OSError as error:
                raise tm.disk_error(folder, error) from error
    say(f"{folder}: removed {len(names)} files, {size(freed)}")


def _inspect(args: argparse.Namespace) -> None:
    """``--info``, ``--verify`` and ``--prune`` of a recipe's cache, or of all caches in a folder."""
    recipe = None
    if Path(args.recipe).is_dir():
        folders = cache_folders(Path(args.recipe))
        if not folders:
            raise SoftCoTError(f"no thought cache in {args.recipe}: neither it nor a folder in it has a manifest.json")
    else:
        recipe = load_recipe(args.recipe, args.overrides)
        folders = [open_cache(recipe).folder]
    for folder in folders:
        {"info": info, "verify": verify, "prune": prune}[args.inspect](folder)
    if args.inspect == "verify" and recipe is not None:
        recompute_sample(recipe, join_ranks())


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="softcot-ds cache", description="Compute the assistant's thoughts, once.")
    parser.add_argument("recipe", help="a recipe (YAML); with one of the options below also a folder of caches")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that win over the recipe's")
    for option, help_text in (
        ("verify", "check every byte; given a recipe, also compute some rows again"),
        ("info", "say what the cache is, how large and who made it"),
        ("prune", "remove what stopped builders left, and damaged shards"),
    ):
        parser.add_argument(f"--{option}", dest="inspect", action="store_const", const=option, help=help_text)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    args = parser.parse_intermixed_args(argv)
    ranks = None
    try:
        with interrupted_by_signals():
            if args.inspect:
                _inspect(args)
                return 0
            ranks = join_ranks()
            build(load_recipe(args.recipe, args.overrides), ranks)
    except OtherRankFailed:
        return 2
    except SoftCoTError as error:
        _complain(str(error), ranks)
        return 2
    except Interrupted as error:
        name = signal.Signals(error.signal_number).name
        _complain(f"interrupted by {name}; finished rows are kept, the same command goes on from there", ranks)
        return exit_code_of(error.signal_number)
    except BaseException:  # a defect: the stack trace is wanted, and so is the end of the other ranks
        if ranks is not None:
            ranks.fail(HAND_OUTS)
        raise
    finally:
        if ranks is not None:
            ranks.leave()
    return 0


def _complain(message: str, ranks: Ranks | None) -> None:
    """Tell the user, once, even if all ranks found the same; and the other ranks that this one stops."""
    if ranks is not None:
        ranks.fail(HAND_OUTS)
    if ranks is None or ranks.count(f"complaint/{message}", 1) == 1:
        where = f"rank {ranks.rank}: " if ranks is not None and ranks.size > 1 else ""
        print(f"softcot-ds cache: {where}{message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
