"""``softcot-ds cache``: compute the assistant's thoughts once, in parallel, and keep them on disk.

Run it alone, under ``mpirun -n N``, ``srun --mpi=pmix`` or the deepspeed launcher. Rank 0 finds out what is missing and
cuts it into batches, longest first; every rank, rank 0 too, takes the next batch when it has done one. Rows go to disk
while the next batch is computed, each rank into shards of its own. Rank 0 lists finished shards in the manifest.

A run that was killed is continued by running the same command again: see ``fill``. ``--verify``, ``--info`` and
``--prune`` take a recipe or a folder of caches.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import queue
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from softcot_ds import thought_manifest as tm
from softcot_ds import thought_store as ts
from softcot_ds.cli import exit_code_of, interrupted_by_signals
from softcot_ds.errors import Interrupted, SoftCoTError
from softcot_ds.lock import sole_owner
from softcot_ds.progress import duration
from softcot_ds.ranks import OtherRankFailed, Ranks, join_ranks
from softcot_ds.recipe import Recipe, load_recipe
from softcot_ds.thought_manifest import DamagedShard, Manifest, ShardRecord, StoreIdentity
from softcot_ds.thought_reader import cache_folders, cache_identity, input_key, open_cache
from softcot_ds.thought_store import StoreWriter, ThoughtStore

# transformers and DeepSpeed take seconds to import: only what runs the assistant does so, where it begins.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from softcot_ds.prompts import AssistantInput

    Compute = Callable[[Sequence[AssistantInput]], torch.Tensor]
    """Inputs to thoughts (B, T, P), on any device in any floating dtype."""

RECOMPUTE_TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""How much a row may depend on its batch, the number of ranks and the hardware: relative error in the Euclidean norm,
by the coarser of the dtypes that it is computed in and stored in."""
LOCK_NAME = "builder.lock"
PROGRESS_SECONDS = 5.0
_MANIFEST_SECONDS = 0.5
_FAILURE_GRACE_SECONDS = 30.0
_HAND_OUTS = ("shard", "batch")
"""Counters by which ranks share out work."""
_RECOMPUTED_ROWS = 32
_BATCHES_IN_FLIGHT = 2
"""Batches of thoughts that wait for the disk, at most; then computing waits too."""


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
        SoftCoTError: it cannot be loaded, or cannot be an assistant.
    """
    from softcot_ds import backbone
    from softcot_ds.thoughts import SharedPrefix, compute_thoughts
    from softcot_ds.trial import check_model

    if recipe.cache.partition == "zero3":
        model = _load_partitioned(recipe, ranks)
        check_model(model, "assistant", recipe.assistant.model)
        prefix = SharedPrefix.of(model, inputs)
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
    prefix = SharedPrefix.of(model, inputs)
    return lambda batch: compute_thoughts(model, batch, prefix)


def _load_partitioned(recipe: Recipe, ranks: Ranks) -> PreTrainedModel:
    """The assistant's decoder, its weights split over the ranks by ZeRO-3. To be called, and run, by all at once."""
    import deepspeed

    from softcot_ds import backbone, distributed
    from softcot_ds.thoughts import decoder_of

    ranks.export_environment()
    distributed.init_distributed(recipe.training.timeout_minutes)
    config = {
        "train_micro_batch_size_per_gpu": 1,  # asked for, and without meaning where nothing is trained
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": recipe.assistant.dtype == "bfloat16"},
        "fp16": {"enabled": recipe.assistant.dtype == "float16"},
        "steps_per_print": 2**31 - 1,
    }
    model = backbone.load_frozen(recipe.assistant, "zero3", distributed.device(), config)
    # The decoder is the root: DeepSpeed follows the order of layers from one forward pass of its root to the next.
    engine, *_ = deepspeed.initialize(model=decoder_of(model), config=config)
    return engine.module.eval()


def token_budget_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first, each at most ``tokens_per_batch`` with padding (or one).

    Longest first, because the last batches decide how long ranks wait for each other at the end, and because a batch
    that does not fit into memory had better be the first.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens_per_batch:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def fill(
    folder: Path,
    identity: StoreIdentity,
    inputs: Sequence[AssistantInput],
    load: Callable[[], Compute],
    ranks: Ranks,
    shard_mib: int = 256,
    tokens_per_batch: int = 16384,
    in_step: bool = False,
) -> None:
    """Make the cache in ``folder`` hold a row for each input. To be called by all ranks with the same arguments.

    First every finished shard is verified, byte for byte, also those that a killed builder had no time to list. Damaged
    ones are set aside. Only rows that are then missing are computed. Builders that come upon another one wait for it.

    Args:
        load: makes what computes thoughts; called only when something is missing.
        tokens_per_batch: tokens of a batch, padding included.
        in_step: all ranks compute at the same time, as a partitioned assistant needs, instead of each at its own pace.

    Raises:
        SoftCoTError: a cache of something else, a disk that is full or would be, thoughts that are not finite, a shard
            that cannot be read: what it holds is not known, so nothing is done to it.
        OtherRankFailed: another rank raised one of these.
    """
    try:
        if ranks.rank == 0:
            with _only_builder(folder) as locked:
                manifest = _open_for_building(folder, identity, remove_leftovers=locked)
                _fill_as_first(folder, manifest, inputs, load, ranks, shard_mib, tokens_per_batch, in_step)
        else:
            _verify_shards(folder, identity, ranks)
            if batches := ranks.fetch("batches"):
                _compute(folder, identity, inputs, batches, load, ranks, shard_mib, in_step)
    except BaseException:
        ranks.fail(_HAND_OUTS)
        raise


def _fill_as_first(
    folder: Path,
    manifest: Manifest,
    inputs: Sequence[AssistantInput],
    load: Callable[[], Compute],
    ranks: Ranks,
    shard_mib: int,
    tokens_per_batch: int,
    in_step: bool,
) -> None:
    """Rank 0's part of ``fill``: find what is missing, take part in computing it, keep the manifest."""
    identity = manifest.identity
    listed = {record.name: dataclasses.asdict(record) for record in manifest.shards}
    names = [*listed, *(name for name in tm.shard_names(folder) if name not in listed)]
    ranks.post("shards", [[name, listed.get(name)] for name in names])
    _verify_shards(folder, identity, ranks)
    manifest = _keep_good_shards(folder, manifest, names, ranks)

    wanted = {input_key(item): index for index, item in reversed(list(enumerate(inputs)))}
    keys = list(wanted)
    missing = [wanted[keys[i]] for i in ThoughtStore(folder, manifest).missing(keys)]
    if not missing:
        ranks.post("batches", [])
        _say(f"all {len(wanted):,} rows are in {folder}, verified ({_size(manifest)}); nothing to compute")
        return
    _check_room(folder, identity, len(wanted), len(missing), ranks)
    lengths = [_length(inputs[index]) for index in missing]
    batches = [[missing[i] for i in batch] for batch in token_budget_batches(lengths, tokens_per_batch)]
    ranks.post("batches", batches)

    start = time.monotonic()
    with _ManifestKeeper(folder, manifest, ranks, len(missing), sum(lengths)) as keeper:
        _compute(folder, identity, inputs, batches, load, ranks, shard_mib, in_step)
    seconds = time.monotonic() - start
    _say(
        f"done: {len(missing):,} rows in {seconds:,.1f} s ({len(missing) / seconds:,.1f} rows/s, "
        f"{sum(lengths) / seconds:,.0f} tokens/s); {folder} holds {keeper.manifest.rows:,} rows, "
        f"{_size(keeper.manifest)}"
    )


def _length(item: AssistantInput) -> int:
    """Tokens that the assistant has to read."""
    return item.positions[-1] + 1


def _say(message: str) -> None:
    print(f"cache: {message}", flush=True)


def _size(manifest: Manifest) -> str:
    shards = "1 shard" if len(manifest.shards) == 1 else f"{len(manifest.shards):,} shards"
    return f"{_bytes(manifest.bytes)} in {shards}"


def _bytes(number: int) -> str:
    return f"{number / 1e9:,.2f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


@contextlib.contextmanager
def _only_builder(folder: Path) -> Iterator[bool]:
    """Wait until no other builder works in ``folder``, then keep others out; yields whether that is certain.

    The lock only saves work: without it two builders would compute rows twice, but never spoil anything, since each
    writes shards of its own.
    """
    with contextlib.ExitStack() as stack:
        try:
            locked = stack.enter_context(sole_owner(folder / LOCK_NAME, "builder", _say))
        except OSError as error:
            raise tm.disk_error(folder, error) from error
        yield locked


def _open_for_building(folder: Path, identity: StoreIdentity, remove_leftovers: bool) -> Manifest:
    """The manifest of the cache in ``folder``, made if there is none."""
    manifest = None
    try:
        with contextlib.suppress(FileNotFoundError):
            manifest = tm.load_manifest(folder)
    except DamagedShard as error:
        _say(f"{error}: doing so now from its shards")
    try:
        if manifest is None:
            manifest = tm.new_manifest(identity)
            tm.save_manifest(folder, manifest)
        tm.refuse_other_identity(folder, manifest.identity, identity)
        # Without a lock they may belong to a builder at work.
        leftovers = tm.leftover_names(folder) if remove_leftovers else []
        for name in leftovers:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise tm.disk_error(folder, error) from error
    if leftovers:
        _say(f"removed {len(leftovers)} unfinished files of a builder that was stopped")
    return manifest


def _verify_shards(folder: Path, identity: StoreIdentity, ranks: Ranks) -> None:
    """Check shards, shared out over all ranks, every byte of them, and post what is found: a record, or what is wrong
    and whether there is something to set aside."""
    shards = ranks.fetch("shards")
    while (number := ranks.take("shard")) < len(shards):
        name, listed = shards[number]
        try:
            index = ts.verify_shard(folder / name, identity, ShardRecord(**listed) if listed else None)
            ranks.post(f"verified/{number}", [dataclasses.asdict(index.record), "", False])
        except DamagedShard as error:
            ranks.post(f"verified/{number}", [None, str(error), not isinstance(error, tm.MissingShard)])


def _keep_good_shards(folder: Path, manifest: Manifest, names: Sequence[str], ranks: Ranks) -> Manifest:
    """Set damaged shards aside and list the others."""
    good: list[ShardRecord] = []
    for number, name in enumerate(names):
        record, reason, is_there = ranks.fetch(f"verified/{number}")
        if record:
            good.append(ShardRecord(**record))
            continue
        _say(f"damaged: {reason}")
        # One that a node does not see, as a network file system may have it, can be whole: a later build finds it.
        if is_there:
            try:
                os.rename(folder / name, folder / (name + tm.DAMAGED_SUFFIX))
            except OSError as error:
                raise tm.disk_error(folder, error) from error
    adopted = set(good) - set(manifest.shards)
    if adopted:
        rows = sum(record.rows for record in adopted)
        _say(f"kept {rows:,} rows in {len(adopted)} finished shards of a builder that was stopped")
    if tuple(good) != manifest.shards:
        manifest = dataclasses.replace(manifest, shards=tuple(good))
        _save(folder, manifest)
    return manifest


def _save(folder: Path, manifest: Manifest) -> None:
    try:
        tm.save_manifest(folder, manifest)
    except OSError as error:
        raise tm.disk_error(folder, error) from error


def _check_room(folder: Path, identity: StoreIdentity, wanted: int, missing: int, ranks: Ranks) -> None:
    """Say how much is to be done, and refuse if the disk has not got the room."""
    needed = missing * (identity.row_bytes + ts.INDEX_BYTES)
    free = shutil.disk_usage(folder).free
    shape = " x ".join(f"{n:,}" for n in identity.row_shape)
    estimate = f"{_bytes(needed)} ({missing:,} rows x {shape} x {identity.torch_dtype.itemsize} bytes)"
    if needed > free:
        raise SoftCoTError(
            f"the cache {folder} needs {estimate}, its disk has {_bytes(free)} free; "
            "make room, or name another cache.path"
        )
    who = "1 process" if ranks.size == 1 else f"{ranks.size} processes over {ranks.launcher}"
    _say(f"{folder}: {missing:,} of {wanted:,} rows to compute, {estimate}, {_bytes(free)} free; {who}")


def _compute(
    folder: Path,
    identity: StoreIdentity,
    inputs: Sequence[AssistantInput],
    batches: Sequence[Sequence[int]],
    load: Callable[[], Compute],
    ranks: Ranks,
    shard_mib: int,
    in_step: bool,
) -> None:
    """Take batches, compute and save them, until none is left."""
    take = _take_in_step if in_step else _take_when_ready
    try:
        compute = load()
        with _Saver(folder, identity, shard_mib, ranks) as saver:
            for number, save in take(ranks, len(batches), saver):
                batch = [inputs[index] for index in batches[number]]
                thoughts = compute(batch)
                if save:
                    saver.put(batch, thoughts)
        if ranks.failed:
            raise OtherRankFailed("another rank failed")
    except BaseException:
        ranks.fail(_HAND_OUTS)  # before "finished": rank 0 looks whether any rank failed once all have finished
        raise
    finally:
        ranks.count("finished", 1)


def _take_when_ready(ranks: Ranks, batches: int, saver: _Saver) -> Iterator[tuple[int, bool]]:
    """Numbers of batches that no other rank takes, and whether to save them: always."""
    while (number := ranks.take("batch")) < batches:
        yield number, True


def _take_in_step(ranks: Ranks, batches: int, saver: _Saver) -> Iterator[tuple[int, bool]]:
    """As ``_take_when_ready``, but equally many on all ranks.

    In the last round some ranks have nothing to do and compute what they do not save. If one rank cannot go on, all
    stop before the same round: a rank that stopped alone would leave the others waiting for its part of the weights.
    """
    from softcot_ds.distributed import any_rank

    for first in range(0, batches, ranks.size):
        if any_rank(saver.failed):
            return
        number = first + ranks.rank
        yield min(number, batches - 1), number < batches


class _Saver:
    """A thread that checks computed thoughts and writes them while the next batch is computed."""

    def __init__(self, folder: Path, identity: StoreIdentity, shard_mib: int, ranks: Ranks) -> None:
        self._identity = identity
        self._ranks = ranks
        self._shards = 0
        self._writer = StoreWriter(folder, identity, shard_mib, self._post_shard)
        self._queue: queue.Queue[tuple[list[AssistantInput], torch.Tensor] | None] = queue.Queue(_BATCHES_IN_FLIGHT)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="thought-saver")

    def put(self, batch: list[AssistantInput], thoughts: torch.Tensor) -> None:
        """Queue thoughts (B, T, P); waits while the disk lags behind. Raises what the thread ran into."""
        if self.failed:
            raise self._error
        self._queue.put((batch, thoughts))

    @property
    def failed(self) -> bool:
        return self._error is not None

    def __enter__(self) -> _Saver:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Write what is queued and finish the shard, also after a failure: those rows are right."""
        self._queue.put(None)
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error

    def _run(self) -> None:
        try:
            with self._writer:
                while (item := self._queue.get()) is not None:
                    self._save(*item)
        except BaseException as error:  # handed to the computing thread, whatever it is
            self._error = error
            self._ranks.fail(_HAND_OUTS)
            while self._queue.get() is not None:
                pass  # so that ``put`` never blocks

    def _save(self, batch: list[AssistantInput], thoughts: torch.Tensor) -> None:
        rows = thoughts.to(self._identity.torch_dtype).cpu()
        finite = rows.isfinite().flatten(1).all(dim=1)
        # Right rows are kept, whatever the rest of their batch is: the next run then starts at the offender.
        kept = finite.nonzero().flatten().tolist()
        self._writer.append([input_key(batch[i]) for i in kept], rows[finite])
        self._ranks.count("rows", len(kept))
        self._ranks.count("tokens", sum(_length(batch[i]) for i in kept))
        if len(kept) < len(batch):
            bad = int(finite.long().argmin())
            wrong = int((~rows[bad].isfinite()).sum())
            raise SoftCoTError(
                f"example {batch[bad].example_id}: {wrong:,} of the {rows[bad].numel():,} values of its thoughts are "
                f"NaN or infinite ({self._identity.assistant} in {self._identity.compute_dtype}, stored as "
                f"{self._identity.dtype}); try assistant.dtype=float32, or look at that example"
            )

    def _post_shard(self, record: ShardRecord) -> None:
        self._ranks.post(f"written/{self._ranks.rank}/{self._shards}", dataclasses.asdict(record))
        self._shards += 1


class _ManifestKeeper:
    """A thread of rank 0 that lists finished shards in the manifest and reports progress.

    Leaving it waits until all ranks have finished.
    """

    def __init__(self, folder: Path, manifest: Manifest, ranks: Ranks, rows: int, tokens: int) -> None:
        self.manifest = manifest
        self._folder = folder
        self._ranks = ranks
        self._rows, self._tokens = rows, tokens
        self._next_shard = [0] * ranks.size
        self._samples: list[tuple[float, int]] = []
        self._error: BaseException | None = None
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._run, name="manifest-keeper")

    def __enter__(self) -> _ManifestKeeper:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        while self._ranks.count("finished") < self._ranks.size and not self._ranks.failed:
            time.sleep(0.02)
        # After a failure the others stop at their next batch; one that died never says so.
        deadline = time.monotonic() + _FAILURE_GRACE_SECONDS
        while self._ranks.count("finished") < self._ranks.size and time.monotonic() < deadline:
            time.sleep(0.02)
        self._finished.set()
        self._thread.join()
        if self._error is not None and (kind is None or kind is OtherRankFailed):
            raise self._error
        if self._ranks.failed and kind is None:
            raise OtherRankFailed("another rank failed")

    def _run(self) -> None:
        try:
            next_report = time.monotonic() + PROGRESS_SECONDS
            while not self._finished.wait(_MANIFEST_SECONDS):
                self._list_new_shards()
                if time.monotonic() >= next_report:
                    self._report()
                    next_report += PROGRESS_SECONDS
            self._list_new_shards()
        except BaseException as error:  # a full disk, most likely; raised on leaving
            self._error = error
            self._ranks.fail(_HAND_OUTS)

    def _list_new_shards(self) -> None:
        new = []
        for rank in range(self._ranks.size):
            while self._ranks.posted(f"written/{rank}/{self._next_shard[rank]}"):
                new.append(ShardRecord(**self._ranks.fetch(f"written/{rank}/{self._next_shard[rank]}")))
                self._next_shard[rank] += 1
        if new:
            self.manifest = dataclasses.replace(self.manifest, shards=(*self.manifest.shards, *new))
            _save(self._folder, self.manifest)

    def _report(self) -> None:
        rows, tokens, now = self._ranks.count("rows"), self._ranks.count("tokens"), time.monotonic()
        if not rows:
            _say("the first batches are being computed")
            return
        self._samples = [*self._samples[-12:], (now, tokens)]  # the rate of the last minute
        (then, tokens_then), seconds_left = self._samples[0], ""
        if tokens > tokens_then:
            rate = (tokens - tokens_then) / (now - then)
            seconds_left = f", {rate:,.0f} tokens/s, {duration((self._tokens - tokens) / rate)} left"
        _say(f"{rows:,} of {self._rows:,} rows ({tokens / self._tokens:.0%} of the tokens){seconds_left}")


def info(folder: Path) -> None:
    """Print what a cache is, how large, who made it. Raises SoftCoTError when there is none or it is damaged."""
    manifest = ThoughtStore.open(folder).manifest
    identity = manifest.identity
    unlisted = set(tm.shard_names(folder)) - {shard.name for shard in manifest.shards}
    shape = " x ".join(f"{n:,}" for n in identity.row_shape)
    print(f"{folder}")
    print(f"  assistant  {identity.assistant} (revision {identity.revision}), weights {identity.fingerprint[:16]}")
    print(f"  rows       {manifest.rows:,} of {shape} {identity.dtype}; {_size(manifest)}")
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
            _say(f"damaged: {error}")
            damaged += 1
        except SoftCoTError as error:
            _say(str(error))
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
    _say(f"{folder}: all checksums agree, {store.manifest.rows:,} rows, {_size(store.manifest)}")


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
    _say(f"{len(sample)} rows computed again: largest relative error {worst:.1e}, tolerance {tolerance:.0e}")


def prune(folder: Path) -> None:
    """Remove what stopped builders left unfinished and the damaged shards that were set aside.

    Raises:
        SoftCoTError: no cache there, or it cannot be written.
    """
    ThoughtStore.open(folder)
    with _only_builder(folder) as locked:
        # Without a lock, unfinished files may belong to a builder at work.
        names = [*(tm.leftover_names(folder) if locked else []), *tm.damaged_names(folder)]
        freed = 0
        for name in names:
            try:
                freed += (folder / name).stat().st_size
                (folder / name).unlink()
            except OSError as error:
                raise tm.disk_error(folder, error) from error
    _say(f"{folder}: removed {len(names)} files, {_bytes(freed)}")


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
            ranks.fail(_HAND_OUTS)
        raise
    finally:
        if ranks is not None:
            ranks.leave()
    return 0


def _complain(message: str, ranks: Ranks | None) -> None:
    """Tell the user, once, even if all ranks found the same; and the other ranks that this one stops."""
    if ranks is not None:
        ranks.fail(_HAND_OUTS)
    if ranks is None or ranks.count(f"complaint/{message}", 1) == 1:
        where = f"rank {ranks.rank}: " if ranks is not None and ranks.size > 1 else ""
        print(f"softcot-ds cache: {where}{message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
