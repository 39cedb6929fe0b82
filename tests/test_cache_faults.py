"""Builders that are killed, disks that fill up, files that rot: nothing wrong is read, nothing finished is redone.

Builders are forked, not started, so that many can be killed in little time. SOFTCOT_FAULT_KILLS sets how many.
"""

import contextlib
import errno
import fcntl
import os
import random
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import exit_code, fork
from small_disk import small_disk

from softcot_ds import cache
from softcot_ds.data.prompts import AssistantInput
from softcot_ds.errors import SoftCoTError
from softcot_ds.thoughts import builder as thought_builder
from softcot_ds.thoughts import inspection as thought_inspection
from softcot_ds.thoughts import manifest as tm
from softcot_ds.thoughts import store as ts
from softcot_ds.thoughts.manifest import StoreIdentity
from softcot_ds.thoughts.ranks import Ranks
from softcot_ds.thoughts.reader import input_key
from softcot_ds.thoughts.store import ThoughtStore

KILLS = int(os.environ.get("SOFTCOT_FAULT_KILLS", "60"))

T, P = 8, 1024  # rows of 32 KiB: 31 to a shard of 1 MiB
IDENTITY = StoreIdentity("f" * 64, T, P, "float32", "float32", "sdpa", assistant="toy")
INPUTS = [AssistantInput(f"e{i}", [i, 7 * i + 1] + [0] * T, list(range(2, 2 + T))) for i in range(200)]
KEYS = [input_key(item) for item in INPUTS]


def truth(item: AssistantInput) -> torch.Tensor:
    """What a row must hold: every value tells the example."""
    return torch.arange(T * P, dtype=torch.float32).view(T, P) + 10_000 * item.token_ids[0]


TRUTH = torch.stack([truth(item) for item in INPUTS])


def build(
    folder: Path, log: Path, ranks: Ranks | None = None, seconds_per_batch: float = 0.002, count: int = len(INPUTS)
) -> None:
    """Fill the cache with the first ``count`` inputs. ``log`` gets each computed example, and survives any kill."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def compute(batch):
        os.write(descriptor, "".join(f"{item.example_id}\n" for item in batch).encode())
        time.sleep(seconds_per_batch)
        return torch.stack([truth(item) for item in batch])

    ranks = ranks or Ranks(0, 1, 0, 1, dist.HashStore(), "no launcher")
    thought_builder.fill(
        folder, IDENTITY, INPUTS[:count], lambda: compute, ranks, shard_mib=1, tokens_per_batch=5 * (T + 2)
    )


def fork_team(folder: Path, log: Path, size: int) -> list[int]:
    """Builders of one team, connected over TCP as under the deepspeed launcher."""
    if size == 1:
        return [fork(lambda: build(folder, log))]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]

    def member(rank: int) -> None:
        store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
        ranks = Ranks(rank, size, rank, size, store, "TCP")
        build(folder, log, ranks)
        ranks.leave()

    return [fork(lambda rank=rank: member(rank)) for rank in range(size)]


def computed(log: Path) -> list[int]:
    """Numbers of the examples that have been computed since the last call."""
    lines = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return [int(line[1:]) for line in lines]


def finished(folder: Path) -> set[int]:
    """Numbers of the examples in finished shards, listed or not."""
    return {number for path in folder.glob("thoughts-*.safetensors") for number in examples_in(path)}


def examples_in(path: Path) -> list[int]:
    """Numbers of the examples in a shard, which is read with safetensors alone."""
    from safetensors import safe_open

    numbers = {key: number for number, key in enumerate(KEYS)}
    with safe_open(path, "pt") as shard:
        return [numbers[bytes(key)] for key in shard.get_tensor("keys").numpy()]


def check_reader(folder: Path) -> int:
    """Read every row that a reader can see; each is right. Returns how many."""
    try:
        store = ThoughtStore.open(folder, IDENTITY)
    except SoftCoTError:
        return 0  # killed before there was a manifest
    missing = set(store.missing(KEYS))
    there = [number for number in range(len(KEYS)) if number not in missing]
    assert torch.equal(store.read([KEYS[number] for number in there]), TRUTH[there])
    return len(there)


def check_complete(folder: Path, count: int = len(INPUTS)) -> None:
    assert check_reader(folder) == count
    assert tm.leftover_names(folder) == []


@pytest.mark.distributed
def test_builders_killed_at_random_moments_lose_nothing_finished(tmp_path):
    """One or two ranks, killed with SIGKILL, resumed, until enough have been killed; then a last one is left alone."""
    rng = random.Random(0)
    folder, log = tmp_path / "cache", tmp_path / "log"
    kills = rows_kept = completed = 0
    while kills < KILLS:
        before = finished(folder)
        team = fork_team(folder, log, size=rng.choice([1, 2]))
        time.sleep(rng.uniform(0, 0.25))
        victim = rng.choice(team)
        os.kill(victim, signal.SIGKILL)
        time.sleep(rng.choice([0, 0.01]))  # a launcher takes a moment to end the others
        for child in team:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        codes = [exit_code(child) for child in team]
        kills += -signal.SIGKILL in codes
        assert not before & set(computed(log)), "a row of a finished shard was computed again"
        assert before <= finished(folder)
        rows_kept += len(finished(folder) - before)
        check_reader(folder)
        if len(finished(folder)) == len(KEYS):
            assert exit_code(fork_team(folder, log, 1)[0]) == 0
            check_complete(folder)
            shutil.rmtree(folder)
            completed += 1
    before = finished(folder)
    assert exit_code(fork_team(folder, log, 1)[0]) == 0
    assert not before & set(computed(log))
    check_complete(folder)
    assert rows_kept > 500  # the kills did come in the midst of the work


@pytest.mark.distributed
@pytest.mark.parametrize("late", [False, True])
def test_a_builder_may_die_at_any_step_that_touches_the_disk(tmp_path, monkeypatch, late):
    """Die at the first, second, ... fsync or rename, before it or right after it, until a build gets through."""
    for step in range(1, 200):
        folder, log = tmp_path / f"{step}", tmp_path / "log"

        def build_and_die(folder=folder, log=log, step=step):
            steps = 0

            def dying(call):
                def wrapper(*args):
                    nonlocal steps
                    steps += 1
                    if steps == step and not late:
                        os._exit(137)
                    result = call(*args)
                    if steps == step:
                        os._exit(137)
                    return result

                return wrapper

            for name in ("fsync", "rename", "replace"):
                monkeypatch.setattr(os, name, dying(getattr(os, name)))
            build(folder, log, seconds_per_batch=0, count=80)

        code = exit_code(fork(build_and_die))
        check_reader(folder)
        computed(log)
        before = finished(folder)
        again = fork(lambda folder=folder, log=log: build(folder, log, seconds_per_batch=0, count=80))
        assert exit_code(again) == 0
        assert before.isdisjoint(computed(log))
        check_complete(folder, 80)
        shutil.rmtree(folder)
        if code == 0:
            assert step > 12  # three shards and a manifest, three steps each
            return
        assert code == 137
    raise AssertionError("the build never got through")


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


DAMAGE = {
    "flipped bit": flip,
    "truncated": lambda path, rng: os.truncate(path, rng.randrange(path.stat().st_size)),
    "emptied": lambda path, rng: os.truncate(path, 0),
    "grown": lambda path, rng: path.write_bytes(path.read_bytes() + b"\0"),
    "removed": lambda path, rng: path.unlink(),
    "overwritten": lambda path, rng: path.write_bytes(rng.randbytes(path.stat().st_size)),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("victim", [pytest.param("shard", marks=pytest.mark.slow), "manifest"])
def test_damaged_files_are_noticed_and_only_their_rows_redone(tmp_path, kind, victim, capfd):
    rng = random.Random(f"{kind} {victim}")
    folder, log = tmp_path / "cache", tmp_path / "log"
    build(folder, log, seconds_per_batch=0)
    for _ in range(4):
        computed(log)
        path = folder / (tm.MANIFEST_NAME if victim == "manifest" else rng.choice(tm.shard_names(folder)))
        rows_before = finished(folder)
        DAMAGE[kind](path, rng)
        with contextlib.suppress(SoftCoTError):
            store = ThoughtStore.open(folder, IDENTITY)
            for key, row in zip(KEYS, TRUTH, strict=True):
                with contextlib.suppress(SoftCoTError):
                    assert torch.equal(store.read([key])[0], row)
        capfd.readouterr()
        build(folder, log, seconds_per_batch=0)
        assert "damaged" in capfd.readouterr().out or (kind, victim) == ("removed", "manifest")
        redone = computed(log)
        assert len(redone) <= (31 if victim == "shard" else 0)
        assert len(redone) == len(set(redone))
        assert rows_before == set(range(len(KEYS)))
        check_complete(folder)


class Failing:
    """A file whose reads fail."""

    def __init__(self, file, error: OSError) -> None:
        self._file, self._error = file, error

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def read(self, *_):
        raise self._error

    readinto = read


@pytest.fixture
def fault(monkeypatch):
    """``fault(path, number, step)`` lets opening a file, reading it, or mapping it fail from now on; as root, no
    permission would. ``fault.mend()`` ends that."""
    faults: dict[Path, tuple[int, str]] = {}

    def failure(path, step: str) -> OSError | None:
        number, failing = faults.get(Path(path), (0, ""))
        return OSError(number, os.strerror(number), str(path)) if failing == step else None

    def open_(path, *args, **kwargs):
        if error := failure(path, "open"):
            raise error
        file = open(path, *args, **kwargs)  # noqa: SIM115  # closed by whom it is handed to
        error = failure(path, "read")
        return Failing(file, error) if error else file

    def from_file(path, *args, **kwargs):
        if error := failure(path, "map"):
            raise RuntimeError(f"unable to open file <{path}> in read-only mode: {error.strerror} ({error.errno})\nat")
        return real_map(path, *args, **kwargs)

    def read_bytes(path):
        with open_(path, "rb") as file:
            return file.read()

    real_map = torch.from_file
    monkeypatch.setattr(ts, "open", open_, raising=False)
    monkeypatch.setattr(ts.torch, "from_file", from_file)
    monkeypatch.setattr(Path, "read_bytes", read_bytes)

    def fault(path: Path, number: int, step: str) -> None:
        faults[path] = (number, step)

    fault.mend = faults.clear
    return fault


UNREADABLE = pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.ESTALE, errno.EIO, errno.ETIMEDOUT])


@UNREADABLE
@pytest.mark.parametrize("step", ["open", "read"])
def test_a_file_that_cannot_be_read_is_no_damage_and_is_left_alone(tmp_path, fault, capfd, number, step):
    folder, log = tmp_path / "cache", tmp_path / "log"
    build(folder, log, seconds_per_batch=0, count=80)
    computed(log)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.name != thought_builder.LOCK_NAME}
    listed = tm.load_manifest(folder).shards[1]
    shard, why = folder / listed.name, f"cannot read .*{os.strerror(number)}"
    for victim, tries in {
        shard: [
            lambda: build(folder, log, seconds_per_batch=0, count=80),
            lambda: build(folder, log, seconds_per_batch=0, count=100),  # with rows to compute
            lambda: ThoughtStore.open(folder).read(KEYS[:80]),
            lambda: ts.read_index(shard, IDENTITY, listed),
            lambda: ts.read_index(shard, IDENTITY),
            lambda: ts.verify_shard(shard, IDENTITY, listed),
        ],
        folder / tm.MANIFEST_NAME: [
            lambda: build(folder, log, seconds_per_batch=0, count=80),
            lambda: ThoughtStore.open(folder, IDENTITY),
            lambda: thought_inspection.info(folder),
            lambda: thought_inspection.verify(folder),
            lambda: thought_inspection.prune(folder),
        ],
    }.items():
        fault(victim, number, step)
        for attempt in tries:
            with pytest.raises(SoftCoTError, match=why) as caught:
                attempt()
            assert str(victim) in str(caught.value)
            assert not isinstance(caught.value, tm.DamagedShard)
        fault.mend()
    fault(shard, number, step)
    with pytest.raises(SoftCoTError, match=r"1 of 3 shards of .* cannot be read, 0 are damaged"):
        thought_inspection.verify(folder)
    fault.mend()
    assert computed(log) == []
    assert "damaged" not in capfd.readouterr().out
    assert {path: path.read_bytes() for path in folder.iterdir() if path.name != thought_builder.LOCK_NAME} == before
    build(folder, log, seconds_per_batch=0, count=80)
    assert computed(log) == []
    check_complete(folder, 80)


def test_a_shard_that_cannot_be_mapped_is_no_damage(tmp_path, fault):
    folder = tmp_path / "cache"
    build(folder, tmp_path / "log", seconds_per_batch=0, count=40)
    fault(folder / tm.load_manifest(folder).shards[0].name, errno.EACCES, "map")
    with pytest.raises(SoftCoTError, match=r"cannot read .*Permission denied") as caught:
        ThoughtStore.open(folder).read(KEYS[:40])
    assert not isinstance(caught.value, tm.DamagedShard)


@UNREADABLE
def test_a_folder_that_cannot_be_listed_is_said(tmp_path, monkeypatch, number):
    folder = tmp_path / "cache"
    build(folder, tmp_path / "log", seconds_per_batch=0, count=40)

    def listdir(path):
        raise OSError(number, os.strerror(number), str(path))

    for name in ("listdir", "lstat"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, listdir)
            for attempt in (
                lambda: cache.main(["--info", str(folder)]),
                lambda: cache.main(["--verify", str(tmp_path)]),
                lambda: cache.main(["--prune", str(folder)]),
            ):
                assert attempt() == 2
            if name == "listdir":
                with pytest.raises(SoftCoTError, match="cannot read"):
                    build(folder, tmp_path / "log", count=41)
    check_complete(folder, 40)


def test_a_shard_that_one_node_does_not_see_is_not_set_aside(tmp_path, fault):
    folder, log = tmp_path / "cache", tmp_path / "log"
    build(folder, log, seconds_per_batch=0, count=80)
    computed(log)
    shard = folder / tm.load_manifest(folder).shards[0].name
    fault(shard, errno.ENOENT, "open")
    build(folder, log, seconds_per_batch=0, count=80)
    assert sorted(computed(log)) == sorted(examples_in(shard))
    assert shard.exists()
    fault.mend()
    build(folder, log, seconds_per_batch=0, count=80)
    assert shard.name in {record.name for record in tm.load_manifest(folder).shards}
    check_complete(folder, 80)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_damaged_shard_that_cannot_be_set_aside_is_said(tmp_path, monkeypatch, number):
    folder, log = tmp_path / "cache", tmp_path / "log"
    build(folder, log, seconds_per_batch=0, count=40)
    (folder / tm.shard_names(folder)[0]).write_bytes(b"")

    def rename(source, target):
        raise OSError(number, os.strerror(number), str(source))

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(SoftCoTError, match=f"cannot write to .*{os.strerror(number)}"):
        build(folder, log, count=40)


@pytest.mark.distributed
def test_two_builders_at_once_share_the_work(tmp_path, capfd):
    folder, logs = tmp_path / "cache", [tmp_path / "log0", tmp_path / "log1"]
    children = [fork(lambda log=log: build(folder, log)) for log in logs]
    assert [exit_code(child) for child in children] == [0, 0]
    done = [number for log in logs for number in computed(log)]
    assert sorted(done) == list(range(len(KEYS)))
    assert f"another builder ({socket.gethostname()}, process " in capfd.readouterr().out
    check_complete(folder)


@pytest.mark.distributed
def test_a_waiting_builder_takes_over_from_one_that_is_killed(tmp_path):
    folder, logs = tmp_path / "cache", [tmp_path / "log0", tmp_path / "log1"]
    first = fork(lambda: build(folder, logs[0], seconds_per_batch=0.02))
    while len(finished(folder) if folder.exists() else ()) < 31:
        time.sleep(0.01)
    second = fork(lambda: build(folder, logs[1]))
    time.sleep(0.05)
    os.kill(first, signal.SIGKILL)
    exit_code(first)
    kept = finished(folder)
    assert exit_code(second) == 0
    assert kept.isdisjoint(computed(logs[1]))
    check_complete(folder)


@pytest.mark.distributed
def test_two_builders_without_locks_do_no_harm(tmp_path, monkeypatch, capfd):
    """Some network file systems have none: work is then done twice, never wrong."""

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    folder = tmp_path / "cache"
    children = []
    for number in range(2):
        children.append(fork(lambda number=number: build(folder, tmp_path / f"log{number}")))
        time.sleep(0.05)
    assert [exit_code(child) for child in children] == [0, 0]
    assert "no file locks" in capfd.readouterr().out
    check_complete(folder)


@pytest.mark.distributed
def test_a_reader_during_a_build_sees_right_rows_and_ever_more(tmp_path):
    folder, log = tmp_path / "cache", tmp_path / "log"
    child = fork(lambda: build(folder, log, seconds_per_batch=0.03))
    seen = [0]
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        seen.append(check_reader(folder))
        time.sleep(0.01)
    check_complete(folder)
    assert seen == sorted(seen)
    assert len(set(seen)) > 2  # not only nothing and everything


def test_a_disk_that_fills_up_stops_the_build_and_keeps_what_is_finished(tmp_path, monkeypatch):
    """Others fill it while the builder works, so that the check before the work has passed."""
    usage = shutil.disk_usage(tmp_path)
    log = tmp_path / "log"
    with small_disk(tmp_path / "disk", "4m") as resize:
        folder = tmp_path / "disk" / "cache"
        with monkeypatch.context() as patch:
            patch.setattr(thought_builder.shutil, "disk_usage", lambda _: usage)
            with pytest.raises(SoftCoTError, match=r"disk of .* is full .*finished shards are kept\. Make room or"):
                build(folder, log)
        assert tm.leftover_names(folder) == []
        kept = finished(folder)
        assert check_reader(folder) == len(kept) >= 31
        computed(log)
        with pytest.raises(SoftCoTError, match=r"needs .* its disk has"):
            build(folder, log)
        resize("32m")
        build(folder, log)
        assert kept.isdisjoint(computed(log))
        check_complete(folder)


def test_a_disk_too_full_for_the_manifest_stops_the_build(tmp_path, monkeypatch):
    folder, log = tmp_path / "cache", tmp_path / "log"
    save = tm.save_manifest

    def full(folder, manifest):
        if manifest.shards:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(folder, manifest)

    with monkeypatch.context() as patch:
        patch.setattr(tm, "save_manifest", full)
        with pytest.raises(SoftCoTError, match=r"disk of .* is full"):
            build(folder, log, seconds_per_batch=0.02)
    kept = finished(folder)
    assert kept
    computed(log)
    build(folder, log)
    assert kept.isdisjoint(computed(log))
    check_complete(folder)
