"""What a cache is, whether it is whole, and what may go: no model is run."""

from pathlib import Path

from softcot_ds.errors import SoftCoTError
from softcot_ds.progress import size
from softcot_ds.recipe import load_recipe
from softcot_ds.thoughts import manifest as tm
from softcot_ds.thoughts import store as ts
from softcot_ds.thoughts.anatomy import Anatomy, sample
from softcot_ds.thoughts.builder import extent, only_builder, say
from softcot_ds.thoughts.manifest import DamagedShard
from softcot_ds.thoughts.ranks import join_ranks
from softcot_ds.thoughts.reader import cache_folders, open_cache
from softcot_ds.thoughts.store import ThoughtStore

_SAMPLED_ROWS = 512
"""Whose anatomy is told, at most: of 32 thoughts of width 8,192 in bfloat16 they are 256 MiB."""


def info(folder: Path) -> None:
    """Print what a cache is, how large, who made it, and what of its states varies with the question.

    Raises:
        SoftCoTError: there is none, or it is damaged.
    """
    store = ThoughtStore.open(folder)
    manifest, identity = store.manifest, store.identity
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
    if len(store) > 1:
        states_NTP = sample(store, _SAMPLED_ROWS)
        of = "all" if len(states_NTP) == len(store) else f"a fixed sample of {len(states_NTP):,}"
        print(f"  states     of {of} rows")
        for line in Anatomy.of(states_NTP).lines():
            print(f"  {line}")


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


def inspect(what: str, source: str, overrides: list[str]) -> None:
    """Info, verify or prune (``what``) a recipe's cache, or all caches in a folder.

    Raises:
        SoftCoTError: there is none; or what these functions say.
    """
    recipe = None
    if Path(source).is_dir():
        folders = cache_folders(Path(source))
        if not folders:
            raise SoftCoTError(f"no thought cache in {source}: neither it nor a folder in it has a manifest.json")
    else:
        recipe = load_recipe(source, overrides)
        counts = {of.thoughts.count: of for of in (recipe, recipe.in_evaluation)}
        folders = [open_cache(of).folder for of in counts.values()]
    for folder in folders:
        {"info": info, "verify": verify, "prune": prune}[what](folder)
    if what == "verify" and recipe is not None:
        from softcot_ds.thoughts.computing import recompute_sample  # brings transformers, which takes seconds

        recompute_sample(recipe, join_ranks())
