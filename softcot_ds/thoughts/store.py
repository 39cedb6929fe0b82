"""The rows of a thought cache: its shards, their reader and their writer. Knows nothing about models.

What a cache is, and what keeps wrong data from being read: see ``manifest``.

Symbols: B rows asked for, T thoughts, P assistant width, K initial embeddings.
"""

import contextlib
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import torch
import xxhash

from softcot_ds.errors import SoftCoTError
from softcot_ds.files import parse_json, publish, temporary_name
from softcot_ds.thoughts.manifest import (
    DTYPES,
    FORMAT,
    FORMAT_VERSION,
    SHARD_PREFIX,
    SHARD_SUFFIX,
    DamagedShard,
    Manifest,
    MissingShard,
    ShardRecord,
    StoreIdentity,
    disk_error,
    is_count,
    load_manifest,
    refuse_other_identity,
    unreadable,
)

KEY_BYTES, ROW_CHECKSUM_BYTES = 32, 8
INDEX_BYTES = KEY_BYTES + ROW_CHECKSUM_BYTES
"""Bytes that a shard holds per row besides the row."""

_PAGE = 4096
_READ_CHUNK = 8 << 20
_MAX_HEADER = 1 << 20


@dataclass(frozen=True)
class ShardIndex:
    """What a shard holds, without its rows."""

    record: ShardRecord
    data_start: int
    """Byte at which the rows start."""
    keys: np.ndarray
    """(rows,), S32."""
    row_checksums: np.ndarray
    """(rows,), uint64: xxh3_64 of each row's bytes."""


def _header(identity: StoreIdentity, rows: int, index_checksum: str) -> bytes:
    """The safetensors header of a shard, padded with spaces so that the rows start on a page."""
    rows_end = rows * identity.row_bytes
    keys_end = rows_end + rows * KEY_BYTES
    header = {
        "__metadata__": {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "identity_digest": identity.digest,
            "identity": json.dumps(identity.to_json()),
            "index_checksum": index_checksum,
        },
        "thoughts": {
            "dtype": DTYPES[identity.dtype][1],
            "shape": [rows, *identity.row_shape],
            "data_offsets": [0, rows_end],
        },
        "keys": {"dtype": "U8", "shape": [rows, KEY_BYTES], "data_offsets": [rows_end, keys_end]},
        # Bytes, not U64: rows of odd size would leave 64-bit integers unaligned.
        "row_checksums": {
            "dtype": "U8",
            "shape": [rows, ROW_CHECKSUM_BYTES],
            "data_offsets": [keys_end, keys_end + rows * ROW_CHECKSUM_BYTES],
        },
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    length = math.ceil((8 + len(text)) / _PAGE) * _PAGE - 8
    return length.to_bytes(8, "little") + text.ljust(length)


def read_index(path: Path, identity: StoreIdentity, record: ShardRecord | None = None) -> ShardIndex:
    """Check a shard's size, header and index, and return the index. Reads 40 bytes per row and the header.

    Args:
        record: what the manifest says of the shard; None for a shard that no manifest lists.

    Raises:
        MissingShard: there is no such file.
        DamagedShard: something differs from what was written.
        SoftCoTError: the file cannot be read.
    """

    def damaged(why: str) -> DamagedShard:
        return DamagedShard(f"{path}: {why}; run softcot-ds cache RECIPE to set it aside and compute its rows anew")

    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if record is not None and size != record.bytes:
                raise damaged(f"{size:,} bytes, {record.bytes:,} were written")
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(_MAX_HEADER, size - 8):
                raise damaged(f"{size:,} bytes with a header of {length:,}")
            text = file.read(length)
            try:
                header = parse_json(text)
                metadata, rows = header["__metadata__"], header["thoughts"]["shape"][0]
                index_checksum = metadata["index_checksum"]
                if metadata["identity_digest"] != identity.digest:
                    raise damaged(f"it was made for another assistant ({metadata['identity']})")
                well_formed = is_count(rows)
                expected = json.loads(_header(identity, rows, index_checksum)[8:])
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise damaged(f"its header does not parse ({error})") from error
            for values in (header, expected):  # the free text in it may differ between equal identities
                values["__metadata__"].pop("identity", None)
            if not well_formed or header != expected:
                raise damaged("its header is not what was written")
            data_start = 8 + length
            index_start = data_start + rows * identity.row_bytes
            if size != index_start + rows * INDEX_BYTES:
                raise damaged(f"{size:,} bytes, its {rows:,} rows need {index_start + rows * INDEX_BYTES:,}")
            file.seek(index_start)
            index = file.read(rows * INDEX_BYTES)
    except FileNotFoundError as error:
        raise MissingShard(f"{path} is missing; run softcot-ds cache RECIPE to compute its rows anew") from error
    except OSError as error:
        raise unreadable(path, error) from error
    found = ShardRecord(path.name, rows, size, _shard_checksum(length.to_bytes(8, "little") + text, index))
    if xxhash.xxh3_128_hexdigest(index) != index_checksum or (record is not None and found != record):
        raise damaged("the checksum of its index differs")
    keys = np.frombuffer(index, dtype=f"S{KEY_BYTES}", count=rows)
    row_checksums = np.frombuffer(index, dtype="<u8", offset=rows * KEY_BYTES)
    return ShardIndex(found, data_start, keys, row_checksums)


def _shard_checksum(header: bytes, index: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(header + index)


def verify_shard(path: Path, identity: StoreIdentity, record: ShardRecord | None = None) -> ShardIndex:
    """Check every byte of a shard. Arguments and errors as of ``read_index``."""
    index = read_index(path, identity, record)
    rows_at_once = max(1, _READ_CHUNK // identity.row_bytes)
    buffer = memoryview(bytearray(rows_at_once * identity.row_bytes))
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(index.data_start)
            for start in range(0, index.record.rows, rows_at_once):
                chunk = buffer[: min(rows_at_once, index.record.rows - start) * identity.row_bytes]
                _read_fully(file, chunk)
                for offset in range(0, len(chunk), identity.row_bytes):
                    row = start + offset // identity.row_bytes
                    if (
                        xxhash.xxh3_64_intdigest(chunk[offset : offset + identity.row_bytes])
                        != index.row_checksums[row]
                    ):
                        raise DamagedShard(f"{path}: the checksum of row {row:,} of {index.record.rows:,} differs")
    except OSError as error:
        raise unreadable(path, error) from error
    return index


def _read_fully(file: BinaryIO, buffer: memoryview) -> None:
    filled = 0
    while filled < len(buffer):
        count = file.readinto(buffer[filled:])
        if not count:
            raise DamagedShard(f"{file.name}: ends early; it was truncated while it was read")
        filled += count


class ThoughtStore:
    """Read-only view of a cache, as its manifest was when the store was opened.

    Opening reads the manifest alone. The index (40 bytes per row) is read when a row is first looked up, a shard is
    mapped when a row of it is first read. Copies and pickles (DataLoader workers) start with nothing opened.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._dtype, self._row_shape = self.identity.torch_dtype, self.identity.row_shape
        self._mapped: dict[int, np.ndarray] = {}

    @property
    def identity(self) -> StoreIdentity:
        return self.manifest.identity

    @classmethod
    def open(cls, folder: str | Path, identity: StoreIdentity | None = None) -> Self:
        """Open the cache in ``folder``.

        Args:
            identity: refuse a cache of anything else; None takes what is there.

        Raises:
            SoftCoTError: no cache there, a manifest that is damaged or cannot be read, or a cache of something else
                (says which fields differ).
        """
        folder = Path(folder)
        try:
            manifest = load_manifest(folder)
        except FileNotFoundError as error:
            raise SoftCoTError(
                f"no thought cache at {folder} ({error.strerror}); build it with: softcot-ds cache RECIPE"
            ) from error
        if identity is not None:
            refuse_other_identity(folder, manifest.identity, identity)
        return cls(folder, manifest)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __len__(self) -> int:
        """Number of different rows."""
        return len(self._index.keys)

    def __contains__(self, key: bytes) -> bool:
        return bool(self._locate([key])[1][0])

    def keys(self) -> list[bytes]:
        """Of all different rows, ascending."""
        return [bytes(key).ljust(KEY_BYTES, b"\0") for key in self._index.keys]  # numpy drops zeros at the end

    def missing(self, keys: Sequence[bytes]) -> list[int]:
        """Indices into ``keys`` of those that are not in the cache."""
        return np.flatnonzero(~self._locate(keys)[1]).tolist()

    def read(self, keys: Sequence[bytes]) -> torch.Tensor:
        """Rows of the given keys, in their order, copied once.

        Returns:
            (B, T, P) or (B, K, T, P) in the stored dtype, on the CPU.

        Raises:
            SoftCoTError: a key is not in the cache, a row is damaged, or a shard cannot be read.
        """
        entries, found = self._locate(keys)
        if not found.all():
            raise SoftCoTError(
                f"{np.count_nonzero(~found):,} of {len(keys):,} rows are not in the cache {self.folder}; "
                "add them with: softcot-ds cache RECIPE"
            )
        index = self._index
        shards, rows = index.shards[entries].tolist(), index.rows[entries].tolist()
        # One call for all rows: a loop that copies row by row into a tensor takes an eighth longer.
        parts = [self._rows(shard)[row] for shard, row in zip(shards, rows, strict=True)]
        if not parts:
            return torch.empty(0, *self._row_shape, dtype=self._dtype)
        batch = np.concatenate(parts)
        if not index.verified[entries].all():
            # The copy is checked, not the map: it is in the processor's cache, and it is what is handed out.
            for i, row in enumerate(batch.reshape(len(keys), -1)):
                if xxhash.xxh3_64_intdigest(row) != index.row_checksums[entries[i]]:
                    path = self.folder / self.manifest.shards[shards[i]].name
                    raise DamagedShard(
                        f"{path}: the checksum of row {rows[i]:,} differs; run softcot-ds cache RECIPE to set the "
                        "shard aside and compute its rows anew"
                    )
            index.verified[entries] = True
        return torch.from_numpy(batch).view(self._dtype).view(len(keys), *self._row_shape)

    def _rows(self, shard: int) -> np.ndarray:
        """(rows, row_bytes) uint8 of a shard, mapped on first use."""
        mapped = self._mapped.get(shard)
        if mapped is None:
            mapped = self._mapped[shard] = self._map(shard)
        return mapped

    def _map(self, shard: int) -> np.ndarray:
        """(rows, row_bytes) uint8."""
        record, row_bytes = self.manifest.shards[shard], self.identity.row_bytes
        path = self.folder / record.name
        try:
            size = os.stat(path).st_size
            if size != record.bytes:  # a map that reaches past the end of its file ends the process with SIGBUS
                raise DamagedShard(
                    f"{path}: {size:,} bytes, {record.bytes:,} were written; run softcot-ds cache RECIPE"
                )
            # torch's map keeps no file descriptor, unlike mmap and numpy.memmap: thousands of shards may be mapped.
            whole = torch.from_file(str(path), shared=False, size=record.bytes, dtype=torch.uint8).numpy()
        except FileNotFoundError as error:
            raise MissingShard(f"{path} is missing; run softcot-ds cache RECIPE to compute its rows anew") from error
        except OSError as error:
            raise unreadable(path, error) from error
        except RuntimeError as error:  # torch's for a failing open or mmap; its text ends in the system's reason
            raise unreadable(path, OSError(str(error).splitlines()[0])) from error
        start = record.bytes - record.rows * (row_bytes + INDEX_BYTES)
        return whole[start : start + record.rows * row_bytes].reshape(record.rows, row_bytes)

    @cached_property
    def _index(self) -> "_StoreIndex":
        shards = [read_index(self.folder / s.name, self.identity, s) for s in self.manifest.shards]
        keys = np.concatenate([np.empty(0, f"S{KEY_BYTES}"), *(shard.keys for shard in shards)])
        # A row that two builders both computed is taken from the shard that is listed first.
        keys, first = np.unique(keys, return_index=True)
        counts = [shard.record.rows for shard in shards]
        return _StoreIndex(
            keys=keys,
            shards=np.repeat(np.arange(len(shards)), counts)[first],
            rows=np.concatenate([np.empty(0, np.int64), *(np.arange(count) for count in counts)])[first],
            row_checksums=np.concatenate([np.empty(0, np.uint64), *(shard.row_checksums for shard in shards)])[first],
            verified=np.zeros(len(keys), dtype=bool),
        )

    def _locate(self, keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """For each key its entry in the index, and whether it has one."""
        known = self._index.keys
        wanted = np.array(keys, dtype=f"S{KEY_BYTES}")
        if not len(known):
            return np.zeros(len(keys), np.int64), np.zeros(len(keys), bool)
        entries = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        return entries, known[entries] == wanted


@dataclass(frozen=True)
class _StoreIndex:
    """Where each row is, sorted by key: one entry per different row."""

    keys: np.ndarray
    """S32."""
    shards: np.ndarray
    """Number of the shard in the manifest, int64."""
    rows: np.ndarray
    """Number of the row in its shard, int64."""
    row_checksums: np.ndarray
    """uint64."""
    verified: np.ndarray
    """Whether the row has been read and found right, bool."""


class StoreWriter:
    """Writes rows into new shards of a cache folder. Several may write into one folder at once.

    Rows go to a temporary file as they come, so a writer holds no more than the batch in hand and 40 bytes per row.
    A shard is finished (index, header, fsync, rename) when it is full, and by ``commit``. Listing it in the manifest is
    the caller's work: see ``on_commit``.
    """

    def __init__(
        self,
        folder: str | Path,
        identity: StoreIdentity,
        shard_mib: int = 256,
        on_commit: Callable[[ShardRecord], None] = lambda record: None,
    ) -> None:
        """
        Args:
            shard_mib: largest size of a shard, MiB; a shard holds at least one row.
            on_commit: called with each shard once it is safely on disk.
        """
        self.folder = Path(folder)
        self.identity = identity
        self.on_commit = on_commit
        self._rows_per_shard = max(1, ((shard_mib << 20) - 2 * _PAGE) // (identity.row_bytes + INDEX_BYTES))
        # The header's size must be known before the rows are written: take that of the largest shard there can be.
        self._data_start = len(_header(identity, self._rows_per_shard, "0" * 32))
        self._file: BinaryIO | None = None
        self._path = self.folder
        self._keys: list[bytes] = []
        self._checksums: list[int] = []

    def append(self, keys: Sequence[bytes], rows: torch.Tensor) -> None:
        """Write rows.

        Args:
            keys: 32 bytes each.
            rows: (B, T, P) or (B, K, T, P), on the CPU, in the identity's dtype.

        Raises:
            ValueError: shape or dtype differ from the identity's, or a key has another length.
            SoftCoTError: the disk is full or fails; the unfinished shard is removed, finished ones stay.
        """
        expected = (len(keys), *self.identity.row_shape)
        if tuple(rows.shape) != expected or rows.dtype != self.identity.torch_dtype:
            raise ValueError(
                f"rows are {tuple(rows.shape)} {rows.dtype}, wanted {expected} {self.identity.torch_dtype}"
            )
        if any(len(key) != KEY_BYTES for key in keys):
            raise ValueError(f"a row key has {KEY_BYTES} bytes, see row_key")
        data = rows.contiguous().flatten(1).view(torch.uint8).numpy()
        start = 0
        while start < len(keys):
            with self._removing_on_failure():
                if self._file is None:
                    self._path = self.folder / f"{SHARD_PREFIX}{uuid.uuid4().hex}{SHARD_SUFFIX}"
                    self._file = open(temporary_name(self._path), "xb")  # noqa: SIM115  # closed by commit or abort
                    self._file.seek(self._data_start)
                stop = min(len(keys), start + self._rows_per_shard - len(self._keys))
                self._file.write(memoryview(data[start:stop]).cast("B"))
            self._checksums += [xxhash.xxh3_64_intdigest(row) for row in data[start:stop]]
            self._keys += keys[start:stop]
            start = stop
            if len(self._keys) == self._rows_per_shard:
                self.commit()

    def commit(self) -> None:
        """Finish the current shard, if it has any row. Raises SoftCoTError as ``append`` does."""
        if self._file is None:
            return
        index = b"".join(self._keys) + np.array(self._checksums, dtype="<u8").tobytes()
        header = _header(self.identity, len(self._keys), xxhash.xxh3_128_hexdigest(index))
        # Fewer rows make fewer digits; the rows already stand behind the largest header.
        length = self._data_start - 8
        header = length.to_bytes(8, "little") + header[8:].rstrip().ljust(length)
        with self._removing_on_failure():
            self._file.write(index)
            size = self._file.tell()
            self._file.seek(0)
            self._file.write(header)
            publish(self._file, self._path)
        record = ShardRecord(self._path.name, len(self._keys), size, _shard_checksum(header, index))
        self._forget()
        self.on_commit(record)

    def abort(self) -> None:
        """Remove the unfinished shard."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # what is buffered does not fit on a full disk, and need not
                self._file.close()
            Path(self._file.name).unlink(missing_ok=True)
            self._forget()

    def _forget(self) -> None:
        self._file = None
        self._keys, self._checksums = [], []

    @contextlib.contextmanager
    def _removing_on_failure(self) -> Iterator[None]:
        """Turn OSError into SoftCoTError and remove the unfinished shard, which frees its space for others."""
        try:
            yield
        except OSError as error:
            self.abort()
            raise disk_error(self.folder, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.commit()  # rows that were computed before a failure are worth keeping
