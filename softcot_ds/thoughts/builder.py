"""Building a thought cache: what is missing is computed by all ranks, and written while they compute.

Rank 0 finds out what is missing and cuts it into batches, longest first; every rank, rank 0 too, takes the next batch
when it has done one. Rows go to disk while the next batch is computed, each rank into shards of its own. Rank 0 lists
finished shards in the manifest. Knows nothing about models: see ``fill``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from softcot_ds.errors import OtherRankFailed, SoftCoTError
from softcot_ds.lock import sole_owner
from softcot_ds.progress import Progress, size, tell
from softcot_ds.thoughts import manifest as tm
from softcot_ds.thoughts import store as ts
from softcot_ds.thoughts.manifest import DamagedShard, Manifest, ShardRecord, StoreIdentity
from softcot_ds.thoughts.ranks import Ranks
from softcot_ds.thoughts.reader import input_key
from softcot_ds.thoughts.store import StoreWriter, ThoughtStore

if TYPE_CHECKING:
    from softcot_ds.data.prompts import AssistantInput

    Compute = Callable[[Sequence[AssistantInput]], torch.Tensor]
    """Inputs to thoughts (B, T, P), on any device in any floating dtype."""

LOCK_NAME = "builder.lock"
PROGRESS_SECONDS = 5.0
_MANIFEST_SECONDS = 0.5
_FAILURE_GRACE_SECONDS = 30.0
_BATCHES_IN_FLIGHT = 2
"""Batches of thoughts that wait for the disk, at most; then computing waits too."""


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
            with only_builder(folder) as locked:
                manifest = _open_for_building(folder, identity, remove_leftovers=locked)
                _fill_as_first(folder, manifest, inputs, load, ranks, shard_mib, tokens_per_batch, in_step)
        else:
            _verify_shards(folder, identity, ranks)
            if batches := ranks.fetch("batches"):
                _compute(folder, identity, inputs, batches, load, ranks, shard_mib, in_step)
    except BaseException:
        ranks.fail()
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
        say(f"all {len(wanted):,} rows are in {folder}, verified ({extent(manifest)}); nothing to compute")
        return
    _check_room(folder, identity, len(wanted), len(missing), ranks)
    lengths = [_length(inputs[index]) for index in missing]
    batches = [[missing[i] for i in batch] for batch in token_budget_batches(lengths, tokens_per_batch)]
    ranks.post("batches", batches)

    start = time.monotonic()
    with _ManifestKeeper(folder, manifest, ranks, len(missing), sum(lengths)) as keeper:
        _compute(folder, identity, inputs, batches, load, ranks, shard_mib, in_step)
    seconds = time.monotonic() - start
    say(
        f"done: {len(missing):,} rows in {seconds:,.1f} s ({len(missing) / seconds:,.1f} rows/s, "
        f"{sum(lengths) / seconds:,.0f} tokens/s); {folder} holds {keeper.manifest.rows:,} rows, "
        f"{extent(keeper.manifest)}"
    )


def _length(item: AssistantInput) -> int:
    """Tokens that the assistant has to read."""
    return item.positions[-1] + 1


def say(message: str) -> None:
    """Tell the user how the cache is getting on."""
    tell(f"cache: {message}")


def extent(manifest: Manifest) -> str:
    """How much a cache holds, in words."""
    shards = "1 shard" if len(manifest.shards) == 1 else f"{len(manifest.shards):,} shards"
    return f"{size(manifest.bytes)} in {shards}"


@contextlib.contextmanager
def only_builder(folder: Path) -> Iterator[bool]:
    """Wait until no other builder works in ``folder``, then keep others out; yields whether that is certain.

    The lock only saves work: without it two builders would compute rows twice, but never spoil anything, since each
    writes shards of its own.
    """
    with contextlib.ExitStack() as stack:
        try:
            locked = stack.enter_context(sole_owner(folder / LOCK_NAME, "builder", say))
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
        say(f"{error}: doing so now from its shards")
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
        say(f"removed {len(leftovers)} unfinished files of a builder that was stopped")
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
        say(f"damaged: {reason}")
        # One that a node does not see, as a network file system may have it, can be whole: a later build finds it.
        if is_there:
            try:
                os.rename(folder / name, folder / (name + tm.DAMAGED_SUFFIX))
            except OSError as error:
                raise tm.disk_error(folder, error) from error
    adopted = set(good) - set(manifest.shards)
    if adopted:
        rows = sum(record.rows for record in adopted)
        say(f"kept {rows:,} rows in {len(adopted)} finished shards of a builder that was stopped")
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
    estimate = f"{size(needed)} ({missing:,} rows x {shape} x {identity.torch_dtype.itemsize} bytes)"
    if needed > free:
        raise SoftCoTError(
            f"the cache {folder} needs {estimate}, its disk has {size(free)} free; "
            "make room, or name another cache.path"
        )
    who = "1 process" if ranks.size == 1 else f"{ranks.size} processes over {ranks.launcher}"
    say(f"{folder}: {missing:,} of {wanted:,} rows to compute, {estimate}, {size(free)} free; {who}")


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
        ranks.fail()  # before "finished": rank 0 looks whether any rank failed once all have finished
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
        """Queue thoughts (B, T, P) or (B, K, T, P); waits while the disk lags. Raises what the thread ran into."""
        if self._error is not None:
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
            self._ranks.fail()
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
        self._rows = rows
        self._progress = Progress(tokens, "token", PROGRESS_SECONDS, name="cache:")
        self._next_shard = [0] * ranks.size
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
            while not self._finished.wait(_MANIFEST_SECONDS):
                self._list_new_shards()
                rows = f"{self._ranks.count('rows'):,} of {self._rows:,} rows"
                self._progress.show(self._ranks.count("tokens"), rows)
            self._list_new_shards()
            self._progress.close()
        except BaseException as error:  # a full disk, most likely; raised on leaving
            self._error = error
            self._ranks.fail()

    def _list_new_shards(self) -> None:
        new = []
        for rank in range(self._ranks.size):
            while self._ranks.posted(f"written/{rank}/{self._next_shard[rank]}"):
                new.append(ShardRecord(**self._ranks.fetch(f"written/{rank}/{self._next_shard[rank]}")))
                self._next_shard[rank] += 1
        if new:
            self.manifest = dataclasses.replace(self.manifest, shards=(*self.manifest.shards, *new))
            _save(self._folder, self.manifest)
