"""The cache on disk: what is written is what is read, and nothing else ever is."""

import copy
import dataclasses
import hashlib
import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.utils.data import DataLoader

from softcot_ds.errors import SoftCoTError
from softcot_ds.thoughts import inspection as thought_inspection
from softcot_ds.thoughts import manifest as tm
from softcot_ds.thoughts import store as ts
from softcot_ds.thoughts.manifest import DamagedShard, StoreIdentity, row_key
from softcot_ds.thoughts.store import StoreWriter, ThoughtStore


def make_identity(**changes) -> StoreIdentity:
    values = {
        "fingerprint": "f" * 64,
        "num_thoughts": 3,
        "width": 5,
        "dtype": "float32",
        "compute_dtype": "float32",
        "attention": "sdpa",
        "assistant": "some/assistant",
    }
    return StoreIdentity(**(values | changes))


def make_rows(identity: StoreIdentity, count: int, seed: int = 0) -> tuple[list[bytes], torch.Tensor]:
    keys = [row_key([seed, i], [1]) for i in range(count)]
    rows = torch.randn(count, *identity.row_shape, generator=torch.Generator().manual_seed(seed))
    return keys, rows.to(identity.torch_dtype)


def write(folder: Path, identity: StoreIdentity, keys, rows, rows_per_shard: int = 4) -> list[tm.ShardRecord]:
    """Write a cache the plain way: shards of a few rows, then the manifest."""
    records: list[tm.ShardRecord] = []
    writer = StoreWriter(folder, identity, on_commit=records.append)
    for start in range(0, len(keys), rows_per_shard):
        writer.append(keys[start : start + rows_per_shard], rows[start : start + rows_per_shard])
        writer.commit()
    tm.save_manifest(folder, dataclasses.replace(tm.new_manifest(identity), shards=tuple(records)))
    return records


def test_a_cache_made_before_there_was_another_layer_is_one_of_the_last(tmp_path):
    """Name and digest as version 0.1.0 wrote them."""
    identity = make_identity()
    assert identity.digest == "51334fba01ac23b831ec2e8cfc4a6a2aa3bd548615bfdcec1f676ce622b77028"
    write(tmp_path, identity, *make_rows(identity, 3))
    assert "layer" not in json.loads((tmp_path / tm.MANIFEST_NAME).read_text())["identity"]
    assert ThoughtStore.open(tmp_path, identity).identity.layer is None
    other = make_identity(layer=2)
    assert StoreIdentity.from_json(other.to_json()) == other
    assert other.digest != identity.digest
    with pytest.raises(SoftCoTError, match="layer is None, wanted 2"):
        ThoughtStore.open(tmp_path, other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("initial", [None, 2])
@pytest.mark.parametrize(("thoughts", "width"), [(3, 5), (1, 1), (4, 64)])
def test_rows_come_back_bit_for_bit_in_any_order(tmp_path, dtype, initial, thoughts, width):
    identity = make_identity(dtype=dtype, num_initial_embeddings=initial, num_thoughts=thoughts, width=width)
    keys, rows = make_rows(identity, 11)
    write(tmp_path, identity, keys, rows)
    store = ThoughtStore.open(tmp_path, identity)
    order = [7, 0, 10, 3, 3, 9]
    read = store.read([keys[i] for i in order])
    assert read.dtype == identity.torch_dtype
    assert torch.equal(read, rows[order])
    assert len(store) == 11
    assert keys[4] in store
    assert row_key([1], [2]) not in store
    assert store.missing([keys[0], row_key([1], [2]), keys[1]]) == [1]


def test_special_values_survive(tmp_path):
    identity = make_identity(num_thoughts=1, width=4)
    rows = torch.tensor([[[0.0, -0.0, 1e-42, 3.4e38]]])
    write(tmp_path, identity, [row_key([1], [0])], rows)
    read = ThoughtStore.open(tmp_path, identity).read([row_key([1], [0])])
    assert torch.equal(read.view(torch.int32), rows.view(torch.int32))


def test_row_key_is_the_documented_hash():
    data = struct.pack("<7q", 4, 10, 11, 12, 13, 2, 3)
    assert row_key([10, 11, 12, 13], [2, 3]) == hashlib.sha256(data).digest()


def test_row_keys_tell_tokens_from_positions():
    assert row_key([1, 2], [3]) != row_key([1], [2, 3])
    assert row_key([1, 2, 3], [1, 2]) != row_key([1, 2, 3], [0, 1])


def test_a_shard_is_plain_safetensors_with_rows_on_a_page(tmp_path):
    identity = make_identity(dtype="bfloat16")
    keys, rows = make_rows(identity, 4)
    (record,) = write(tmp_path, identity, keys, rows)
    data = (tmp_path / record.name).read_bytes()
    data_start = 8 + int.from_bytes(data[:8], "little")
    assert data_start % 4096 == 0
    assert data[data_start:][: identity.row_bytes] == rows[0].view(torch.uint8).numpy().tobytes()
    with safe_open(tmp_path / record.name, "pt") as shard:
        assert torch.equal(shard.get_tensor("thoughts"), rows)
        assert [bytes(k) for k in shard.get_tensor("keys").numpy()] == keys
        assert shard.get_tensor("row_checksums").shape == (4, 8)
        assert json.loads(shard.metadata()["identity"]) == identity.to_json()


def test_shards_are_split_at_the_stated_size_and_no_other_file_remains(tmp_path):
    identity = make_identity(width=8192, num_thoughts=8)  # 256 KiB a row: three fit into 1 MiB beside the header
    keys, rows = make_rows(identity, 8)
    records: list[tm.ShardRecord] = []
    with StoreWriter(tmp_path, identity, shard_mib=1, on_commit=records.append) as writer:
        writer.append(keys[:5], rows[:5])
        writer.append(keys[5:], rows[5:])
    assert [r.rows for r in records] == [3, 3, 2]
    assert all(r.bytes == (tmp_path / r.name).stat().st_size <= 1 << 20 for r in records)
    assert sorted(os.listdir(tmp_path)) == sorted(r.name for r in records)
    assert tm.shard_names(tmp_path) == sorted(r.name for r in records)


def test_a_row_larger_than_a_shard_gets_one_of_its_own(tmp_path):
    identity = make_identity(width=8192, num_thoughts=64)
    keys, rows = make_rows(identity, 2)
    records: list[tm.ShardRecord] = []
    with StoreWriter(tmp_path, identity, shard_mib=1, on_commit=records.append) as writer:
        writer.append(keys, rows)
    assert [r.rows for r in records] == [1, 1]


def test_an_unfinished_shard_is_invisible(tmp_path):
    identity = make_identity()
    keys, rows = make_rows(identity, 4)
    write(tmp_path, identity, keys, rows)
    writer = StoreWriter(tmp_path, identity)
    more, values = make_rows(identity, 3, seed=1)
    writer.append(more, values)
    assert ThoughtStore.open(tmp_path, identity).missing(more) == [0, 1, 2]
    assert len(tm.leftover_names(tmp_path)) == 1
    writer.abort()
    assert tm.leftover_names(tmp_path) == []


def test_the_first_listed_of_two_equal_rows_is_read(tmp_path):
    identity = make_identity()
    keys, rows = make_rows(identity, 2)
    write(tmp_path, identity, [*keys, *keys], torch.cat([rows, rows + 1]), rows_per_shard=2)
    store = ThoughtStore.open(tmp_path, identity)
    assert len(store) == 2
    assert torch.equal(store.read(keys), rows)


def test_an_open_store_is_a_snapshot(tmp_path):
    identity = make_identity()
    keys, rows = make_rows(identity, 4)
    write(tmp_path, identity, keys[:2], rows[:2])
    before = ThoughtStore.open(tmp_path, identity)
    write(tmp_path, identity, keys[2:], rows[2:])
    assert before.missing(keys) == [2, 3]
    assert torch.equal(before.read(keys[:2]), rows[:2])


def test_opening_reads_the_manifest_alone(tmp_path):
    identity = make_identity()
    keys, rows = make_rows(identity, 4)
    (record,) = write(tmp_path, identity, keys, rows)
    (tmp_path / record.name).unlink()
    store = ThoughtStore.open(tmp_path, identity)
    with pytest.raises(DamagedShard, match=r"is missing; run softcot-ds cache"):
        store.read(keys)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"fingerprint": "0" * 64}, "fingerprint"),
        ({"num_thoughts": 4}, "num_thoughts is 3, wanted 4"),
        ({"width": 6}, "width is 5, wanted 6"),
        ({"dtype": "bfloat16"}, "dtype is 'float32', wanted 'bfloat16'"),
        ({"compute_dtype": "float16"}, "compute_dtype"),
        ({"attention": "eager"}, "attention"),
        ({"num_initial_embeddings": 2}, "num_initial_embeddings"),
    ],
)
def test_a_cache_of_something_else_is_refused_and_the_field_named(tmp_path, change, name):
    identity = make_identity()
    write(tmp_path, identity, *make_rows(identity, 1))
    with pytest.raises(SoftCoTError, match=name):
        ThoughtStore.open(tmp_path, make_identity(**change))
    assert make_identity(**change).digest != identity.digest
    assert make_identity(**change).folder_name != identity.folder_name


def test_weights_that_moved_are_the_same_weights(tmp_path):
    identity = make_identity()
    write(tmp_path, identity, *make_rows(identity, 1))
    ThoughtStore.open(tmp_path, make_identity(assistant="/models/assistant", revision="main"))


def test_a_newer_format_is_refused(tmp_path):
    identity = make_identity()
    write(tmp_path, identity, *make_rows(identity, 1))
    path = tmp_path / tm.MANIFEST_NAME
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(SoftCoTError, match=r"format version 2.*update softcot-ds"):
        ThoughtStore.open(tmp_path, identity)


def test_no_cache_names_the_command_that_makes_one(tmp_path):
    with pytest.raises(SoftCoTError, match="softcot-ds cache RECIPE"):
        ThoughtStore.open(tmp_path / "none")


def test_rows_that_are_not_there_are_counted(tmp_path):
    identity = make_identity()
    keys, rows = make_rows(identity, 2)
    write(tmp_path, identity, keys, rows)
    with pytest.raises(SoftCoTError, match="1 of 3 rows are not in the cache"):
        ThoughtStore.open(tmp_path).read([*keys, row_key([9], [0])])


def test_an_empty_cache_holds_nothing(tmp_path):
    write(tmp_path, make_identity(), [], torch.empty(0, 3, 5))
    store = ThoughtStore.open(tmp_path)
    assert len(store) == 0
    assert store.missing([row_key([1], [0])]) == [0]
    assert store.read([]).shape == (0, 3, 5)


def test_writing_no_rows_writes_nothing(tmp_path):
    with StoreWriter(tmp_path, make_identity()) as writer:
        writer.append([], torch.empty(0, 3, 5))
    assert os.listdir(tmp_path) == []


def test_wrong_shape_dtype_or_key_is_refused(tmp_path):
    identity = make_identity()
    keys, rows = make_rows(identity, 2)
    writer = StoreWriter(tmp_path, identity)
    for bad_keys, bad_rows in [(keys, rows[:1]), (keys, rows.half()), ([b"short"] * 2, rows)]:
        with pytest.raises(ValueError, match=r"rows are|row key"):
            writer.append(bad_keys, bad_rows)


def test_every_flipped_bit_of_a_shard_is_noticed(tmp_path):
    """Each byte of a whole shard in turn; the row that is read is either right or refused."""
    identity = make_identity(num_thoughts=1, width=2)
    keys, rows = make_rows(identity, 3)
    (record,) = write(tmp_path, identity, keys, rows)
    path = tmp_path / record.name
    data = path.read_bytes()
    for at in [*range(0, 4096, 7), *range(4096, len(data))]:
        flipped = bytearray(data)
        flipped[at] ^= 1 << (at % 8)
        path.write_bytes(flipped)
        with pytest.raises(DamagedShard):
            ThoughtStore.open(tmp_path).read(keys)
        with pytest.raises(DamagedShard):
            ts.verify_shard(path, identity, record)
    path.write_bytes(data)
    assert torch.equal(ThoughtStore.open(tmp_path).read(keys), rows)


@pytest.mark.slow
def test_an_unlisted_shard_vouches_for_itself(tmp_path):
    """Without the manifest's word a flipped bit may pass only where it cannot change a row or a key."""
    identity = make_identity(num_thoughts=1, width=2)
    keys, rows = make_rows(identity, 3)
    (record,) = write(tmp_path, identity, keys, rows)
    path = tmp_path / record.name
    data = path.read_bytes()
    assert ts.verify_shard(path, identity).record == record
    harmless = 0
    for at in [*range(0, 1200), *range(4096, len(data))]:
        flipped = bytearray(data)
        flipped[at] ^= 1
        path.write_bytes(flipped)
        try:
            found = ts.verify_shard(path, identity)
        except DamagedShard:
            continue
        harmless += 1
        tm.save_manifest(tmp_path, tm.Manifest(identity, (found.record,)))
        assert torch.equal(ThoughtStore.open(tmp_path).read(keys), rows)
    assert harmless < 400  # free text and padding of the header


@pytest.mark.parametrize("keep", [0, 7, 100, 4095, 4096, 4200, -1])
def test_a_truncated_shard_is_noticed(tmp_path, keep):
    identity = make_identity()
    keys, rows = make_rows(identity, 4)
    (record,) = write(tmp_path, identity, keys, rows)
    path = tmp_path / record.name
    os.truncate(path, keep if keep >= 0 else path.stat().st_size + keep)
    for check in (lambda: ThoughtStore.open(tmp_path).read(keys), lambda: ts.verify_shard(path, identity)):
        with pytest.raises(DamagedShard, match="bytes"):
            check()


def test_a_shard_truncated_between_lookup_and_reading_is_noticed(tmp_path):
    identity = make_identity()
    keys, rows = make_rows(identity, 4)
    (record,) = write(tmp_path, identity, keys, rows)
    store = ThoughtStore.open(tmp_path)
    assert keys[0] in store
    os.truncate(tmp_path / record.name, 5000)
    with pytest.raises(DamagedShard):
        store.read(keys)


def test_a_shard_of_another_cache_is_noticed(tmp_path):
    (tmp_path / "other").mkdir()
    identity = make_identity()
    keys, rows = make_rows(identity, 4)
    (record,) = write(tmp_path / "other", make_identity(fingerprint="0" * 64), keys, rows)
    with pytest.raises(DamagedShard, match="another assistant"):
        ts.verify_shard(tmp_path / "other" / record.name, identity)


def test_every_flipped_bit_of_the_manifest_is_noticed(tmp_path):
    identity = make_identity()
    keys, rows = make_rows(identity, 4)
    write(tmp_path, identity, keys, rows)
    path = tmp_path / tm.MANIFEST_NAME
    data = path.read_bytes()
    for at in range(len(data)):
        for bit in (0, 3):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                read = ThoughtStore.open(tmp_path, identity).read(keys)
            except SoftCoTError:
                continue
            assert torch.equal(read, rows)  # a changed blank


def rewrite_manifest(folder: Path, change) -> None:
    """Change the values of a manifest and give them the checksum that they then have, as damage never does."""
    path = folder / tm.MANIFEST_NAME
    values = json.loads(path.read_bytes())
    del values["checksum"]
    values = change(values) or values
    path.write_text(json.dumps(values | {"checksum": tm._manifest_checksum(values)}))


def with_shard(change: dict | None = None, **renamed):
    """A change of the manifest's first shard: of what it says, or of its name."""

    def apply(values: dict) -> None:
        name, shard = next(iter(values["shards"].items()))
        if not renamed:
            values["shards"][name] = shard | change if isinstance(change, dict) else change
        else:
            values["shards"] = {renamed["name"]: shard}

    return apply


@pytest.mark.parametrize(
    "change",
    [
        *(with_shard(name=name) for name in ("../thoughts-x.safetensors", "/thoughts-x.safetensors", "x", "", "\0",
            "thoughts-/../../x.safetensors", "thoughts-\0.safetensors", "thoughts-/.safetensors", "manifest.json")),
        *(with_shard({key: value}) for key in ("rows", "bytes")
            for value in (0, -1, None, True, "4", 1.5, [], {}, 10**30)),
        *(with_shard({key: value}) for key, value in (("checksum", None), ("checksum", "0"), ("more", 1))),
        *(with_shard(shard) for shard in (None, [], 3, "x")),
        lambda values: {"shards": []},
        lambda values: values | {"shards": []},
        lambda values: values | {"shards": None},
        lambda values: values | {"created": None, "identity": None},
        lambda values: values | {"format": "another"},
        *(lambda values, v=v: values | {"format_version": v} for v in (0, -1, None, "1", 1.5)),
        *(lambda values, k=k, v=v: values | {"identity": values["identity"] | {k: v}}
            for k in ("num_thoughts", "width", "num_initial_embeddings", "dtype")
            for v in (0, -1, 1.5, 10**30, "int8", [])),
        *(lambda values, k=k, v=v: values | {"identity": values["identity"] | {k: v}}
            for k in ("fingerprint", "attention", "assistant", "revision") for v in (0, True, 1.5, [], {})),
        lambda values: values | {"identity": values["identity"] | {"more": 1}},
        lambda values: values | {"identity": {"width": 5}},
    ],
)  # fmt: skip
def test_a_manifest_that_says_what_cannot_be_is_refused(tmp_path, change):
    """Whatever stands in it, a right checksum on top: an error, no wrong row, and nothing else is touched."""
    folder, identity = tmp_path / "cache", make_identity()
    folder.mkdir()
    keys, rows = make_rows(identity, 4)
    (record,) = write(folder, identity, keys, rows)
    for outside in ("x", "thoughts-x.safetensors"):
        (tmp_path / outside).write_bytes((folder / record.name).read_bytes())
    rewrite_manifest(folder, change)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for attempt in (
        lambda: ThoughtStore.open(folder).read(keys),
        lambda: ThoughtStore.open(folder, identity).read(keys),
        lambda: thought_inspection.verify(folder),
    ):
        with pytest.raises(SoftCoTError):
            attempt()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"3", b'"x"', b"{", b"\xff", b"[" * 100_000, b'{"a": 1, "a": 1}', b'{"format_version": NaN}',
     b'{"format": "softcot-ds thoughts", "format_version": 1}', b"9" * 5000, "{}".encode("utf-16")],
)  # fmt: skip
def test_a_manifest_that_is_none_is_damaged(tmp_path, content):
    write(tmp_path, make_identity(), *make_rows(make_identity(), 4))
    (tmp_path / tm.MANIFEST_NAME).write_bytes(content)
    with pytest.raises(DamagedShard, match=r"manifest.json is damaged .*softcot-ds cache RECIPE"):
        ThoughtStore.open(tmp_path)


def test_a_key_that_stands_twice_in_the_manifest_is_damage(tmp_path):
    """The last one would win, and the checksum, taken over it alone, would agree."""
    keys, rows = make_rows(make_identity(), 4)
    (record,) = write(tmp_path, make_identity(), keys, rows)
    path = tmp_path / tm.MANIFEST_NAME
    path.write_text(path.read_text().replace('"shards": {', f'"shards": {{"{record.name}": null, '))
    with pytest.raises(DamagedShard, match="stands twice"):
        ThoughtStore.open(tmp_path)


@pytest.mark.parametrize("header", [b"[" * 4096, b"null", b"{}", b'{"__metadata__": []}', b"\xff" * 64])
def test_a_header_that_is_none_is_damaged(tmp_path, header):
    (record,) = write(tmp_path, make_identity(), *make_rows(make_identity(), 4))
    path = tmp_path / record.name
    data = path.read_bytes()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + len(header) :])
    with pytest.raises(DamagedShard):
        ts.verify_shard(path, make_identity())


def test_each_row_is_checked_whatever_it_is_read_with(tmp_path):
    """Rows are read in batches, some of them checked before: the damaged ones are refused wherever they stand."""
    identity = make_identity()
    keys, rows = make_rows(identity, 10)
    records = write(tmp_path, identity, keys, rows, rows_per_shard=5)
    damaged = {2, 4, 5, 8}
    for row in damaged:
        path = tmp_path / records[row // 5].name
        data = bytearray(path.read_bytes())
        data[4096 + row % 5 * identity.row_bytes + 3 * row] ^= 1
        path.write_bytes(data)
    good = [row for row in range(10) if row not in damaged]
    store = ThoughtStore.open(tmp_path)
    for batch in ([2], [0, 2], [2, 0], [0, 1, 3, 2], [5, 6], [0, 1, 3, 8, 6], list(range(10)), [9, 4]):
        row = next(row for row in batch if row in damaged)
        for _ in range(2):  # the same again: a row that was refused does not count as checked
            with pytest.raises(DamagedShard, match=f"{records[row // 5].name}: the checksum of row {row % 5} differs"):
                store.read([keys[row] for row in batch])
        assert torch.equal(store.read([keys[row] for row in good]), rows[good])
    for number, record in enumerate(records):
        with pytest.raises(DamagedShard, match=f"the checksum of row {(2, 0)[number]} of 5 differs"):
            ts.verify_shard(tmp_path / record.name, identity, record)


@pytest.mark.distributed
def test_data_loader_workers_read_the_same_rows(tmp_path):
    identity = make_identity()
    keys, rows = make_rows(identity, 12)
    write(tmp_path, identity, keys, rows)
    store = ThoughtStore.open(tmp_path, identity)
    store.read(keys[:1])

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(keys)

        def __getitem__(self, i):
            return store.read([keys[i]])[0]

    batches = list(DataLoader(Rows(), batch_size=5, num_workers=2))
    assert torch.equal(torch.cat(batches), rows)


def test_a_pickled_store_is_small_and_opens_nothing(tmp_path):
    identity = make_identity()
    keys, rows = make_rows(identity, 200)
    write(tmp_path, identity, keys, rows, rows_per_shard=100)
    store = ThoughtStore.open(tmp_path, identity)
    assert torch.equal(store.read(keys), rows)
    data = pickle.dumps(store)
    assert len(data) < 3000
    assert torch.equal(pickle.loads(data).read(keys), rows)
    assert torch.equal(copy.deepcopy(store).read(keys), rows)


def test_reading_keeps_no_file_open(tmp_path):
    identity = make_identity()
    keys, rows = make_rows(identity, 50)
    write(tmp_path, identity, keys, rows, rows_per_shard=1)
    before = len(os.listdir("/proc/self/fd"))
    store = ThoughtStore.open(tmp_path, identity)
    store.read(keys)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_batch_belongs_to_the_reader(tmp_path):
    """Writing into a batch must change neither the file nor what the next reader gets."""
    identity = make_identity()
    keys, rows = make_rows(identity, 4)
    write(tmp_path, identity, keys, rows)
    store = ThoughtStore.open(tmp_path, identity)
    store.read(keys).zero_()
    assert torch.equal(store.read(keys), rows)


def test_bytes_are_on_disk_before_they_have_their_name(tmp_path, monkeypatch):
    """A power cut would show it; here the order of the calls does."""
    calls = []

    def recorded(name):
        original = getattr(os, name)

        def call(target, *rest):
            path = Path(os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target)
            calls.append((name, path.suffix or "folder"))
            return original(target, *rest)

        return call

    for name in ("fsync", "rename", "replace"):
        monkeypatch.setattr(os, name, recorded(name))
    identity = make_identity()
    write(tmp_path, identity, *make_rows(identity, 2))
    assert calls == 2 * [("fsync", ".tmp"), ("replace", ".tmp"), ("fsync", "folder")]
