"""What a thought cache is: its identity, the manifest that lists its shards, the names in its folder.

A cache is one folder: shards ``thoughts-*.safetensors`` that are written once under a temporary name, synced and
renamed, and ``manifest.json``, which says what the cache is and lists its shards. ``docs/cache-format.md`` shows the
bytes.

What keeps wrong data from being read:

- A shard name is never used twice and a shard is never changed, so a reader needs no lock and may map it.
- A reader believes the manifest alone, which is replaced as a whole, after the shards that it names.
- Sizes, the row index and the header of a shard are checked before its first use, each row when it is first read.

Checksums are xxh3: it comes with ``datasets``, and at about 50 GB/s for rows of 128 KiB it costs less than the copy
that it checks; zlib.crc32 runs at 5 GB/s and hashlib.blake2b at 1 GB/s on the same core. It guards against broken
hardware and interrupted writes, not against an adversary. Row keys, which must not collide, are SHA-256.

Symbols: T thoughts, P assistant width, K initial embeddings.
"""

import getpass
import hashlib
import json
import math
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import xxhash

from softcot_ds import __version__
from softcot_ds.errors import SoftCoTError
from softcot_ds.files import TEMPORARY_SUFFIX, cannot_write, parse_json, write_atomically

FORMAT = "softcot-ds thoughts"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
SHARD_PREFIX, SHARD_SUFFIX = "thoughts-", ".safetensors"
DAMAGED_SUFFIX = ".damaged"
DTYPES = {
    "float32": (torch.float32, "F32"),
    "bfloat16": (torch.bfloat16, "BF16"),
    "float16": (torch.float16, "F16"),
}
"""By the name in recipes: the torch dtype, and its name in safetensors."""


class DamagedShard(SoftCoTError):
    """The content of a shard, or of the manifest, is not what was written. The builder sets a shard aside and computes
    it anew. What cannot be read at all is another SoftCoTError: it may be whole, and nothing is done to it."""


class MissingShard(DamagedShard):
    """A shard that the manifest lists is not there. The builder strikes it off and computes its rows anew."""


def unreadable(path: Path, error: OSError) -> SoftCoTError:
    """What to tell the user when the system does not let a file or folder be read."""
    return SoftCoTError(
        f"cannot read {path}: {error.strerror or error}. It may be whole, so nothing was changed; look after its "
        "permissions, the disk and the network, then run the same command again. Remove it only if it is lost"
    )


@dataclass(frozen=True)
class StoreIdentity:
    """All that decides the value of a row, besides the tokens. Two caches with equal identities are interchangeable."""

    fingerprint: str
    """Digest of the assistant's configuration and weights."""
    num_thoughts: int
    """T."""
    width: int
    """P."""
    dtype: str
    """Stored dtype: float32, bfloat16 or float16."""
    compute_dtype: str
    """Dtype that the assistant ran in."""
    attention: str
    """Attention implementation that the assistant ran with."""
    num_initial_embeddings: int | None = None
    """K of SoftCoT++; None for SoftCoT, whose rows have no such dimension."""
    layer: int | None = None
    """Of the assistant, from 1 on; None for the last, whose states are after the final norm."""
    initial_embeddings: str | None = None
    """What the K are, besides the assistant: ``InitialEmbeddings.identity``. None where there are none."""
    assistant: str = field(default="", compare=False)
    """Folder or hub name, for people: weights that moved are still the same weights."""
    revision: str | None = field(default=None, compare=False)
    """Hub revision, for people."""

    def __post_init__(self) -> None:
        texts = [self.fingerprint, self.dtype, self.compute_dtype, self.attention, self.assistant]
        texts += [text for text in (self.revision, self.initial_embeddings) if text is not None]
        numbers = [self.num_thoughts, self.width]
        numbers += [number for number in (self.num_initial_embeddings, self.layer) if number is not None]
        if not all(isinstance(text, str) for text in texts) or not all(map(is_count, numbers)):
            raise ValueError(f"an identity of texts and positive integers, not {self}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")

    @property
    def row_shape(self) -> tuple[int, ...]:
        """(T, P) or (K, T, P)."""
        initial = () if self.num_initial_embeddings is None else (self.num_initial_embeddings,)
        return (*initial, self.num_thoughts, self.width)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype][0]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row_shape) * self.torch_dtype.itemsize

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the fields that decide values. Stands in every shard."""
        for_people = {f.name for f in fields(self) if not f.compare}
        decisive = {name: value for name, value in self.to_json().items() if name not in for_people}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    @property
    def folder_name(self) -> str:
        """Name of this cache among others, such as ``Llama-3.2-1B-Instruct-T32-bfloat16-1f0c9a42``."""
        name = Path(self.assistant).name or "assistant"
        chains = "" if self.num_initial_embeddings is None else f"-K{self.num_initial_embeddings}"
        return f"{name}-T{self.num_thoughts}{chains}-{self.dtype}-{self.digest[:8]}"

    def difference(self, wanted: "StoreIdentity") -> list[str]:
        """In words, each decisive field in which this one is not ``wanted``."""
        names = [f.name for f in fields(self) if f.compare and getattr(self, f.name) != getattr(wanted, f.name)]
        return [f"{name} is {getattr(self, name)!r}, wanted {getattr(wanted, name)!r}" for name in names]

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        for later in ("layer", "initial_embeddings"):  # caches were made before there were any: they are what they were
            if values[later] is None:
                del values[later]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Raises ValueError or TypeError on anything but the output of ``to_json``."""
        return cls(**values)


def row_key(token_ids: Sequence[int], positions: Sequence[int]) -> bytes:
    """Content hash, 32 bytes, of what the assistant reads: all its token ids and where its thoughts stand.

    SHA-256 over little-endian int64: the number of ids, the ids, the positions.
    """
    return hashlib.sha256(np.array([len(token_ids), *token_ids, *positions], dtype="<i8").tobytes()).digest()


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard as the manifest lists it."""

    name: str
    rows: int
    bytes: int
    checksum: str
    """xxh3_128, in hex, over the header and the row index (keys and row checksums). The rows have their own."""

    def __post_init__(self) -> None:
        # A name leads nowhere but into the cache's folder.
        if not _is_shard_name(self.name) or re.search(r"[/\0]", self.name):
            raise ValueError(f"{self.name!r} is no name of a shard")
        if not (is_count(self.rows) and is_count(self.bytes) and isinstance(self.checksum, str)):
            raise ValueError(f"a shard of so many rows and bytes, not {self}")


def is_count(number: Any) -> bool:
    return type(number) is int and number >= 1


@dataclass(frozen=True)
class Manifest:
    """What a cache is, and its shards."""

    identity: StoreIdentity
    shards: tuple[ShardRecord, ...] = ()
    created: str = ""
    """By whom, where, when and with which versions."""

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)


def new_manifest(identity: StoreIdentity) -> Manifest:
    created = f"{_user()}@{socket.gethostname()}, {time.strftime('%Y-%m-%d %H:%M:%S %z')}, softcot-ds {__version__}"
    return Manifest(identity, created=f"{created}, torch {torch.__version__}")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return str(os.getuid())


def load_manifest(folder: Path) -> Manifest:
    """Read and check ``manifest.json``.

    Raises:
        FileNotFoundError: there is none, or no such folder.
        DamagedShard: it is not what was written.
        SoftCoTError: it is of a newer format, or cannot be read.
    """
    path = folder / MANIFEST_NAME
    try:
        content = path.read_bytes()
    except NotADirectoryError as error:
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from error
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        values = parse_json(content)
        version = values["format_version"]
        if values["format"] == FORMAT and isinstance(version, int) and version > FORMAT_VERSION:
            raise SoftCoTError(
                f"{path} has format version {version}, this softcot-ds {__version__} reads {FORMAT_VERSION}; "
                "update softcot-ds, or name another cache.path"
            )
        right = values.pop("checksum") == _manifest_checksum(values)
        if not right or values["format"] != FORMAT or version != FORMAT_VERSION:
            raise DamagedShard(f"{path} is damaged (its checksum differs); run softcot-ds cache RECIPE to rebuild it")
        shards = tuple(ShardRecord(name, **record) for name, record in values["shards"].items())
        return Manifest(StoreIdentity.from_json(values["identity"]), shards, values["created"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedShard(f"{path} is damaged ({error}); run softcot-ds cache RECIPE to rebuild it") from error


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace ``manifest.json`` as a whole. Raises OSError; the old one is then still there."""
    values = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "identity": manifest.identity.to_json(),
        "created": manifest.created,
        "shards": {s.name: {"rows": s.rows, "bytes": s.bytes, "checksum": s.checksum} for s in manifest.shards},
    }
    text = json.dumps(values | {"checksum": _manifest_checksum(values)}, indent=1)
    write_atomically(folder / MANIFEST_NAME, text)


def _manifest_checksum(values: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())


def shard_names(folder: Path) -> list[str]:
    """Names of all finished shards in the folder, listed in the manifest or not. Raises SoftCoTError, as all three."""
    return [name for name in _names(folder) if _is_shard_name(name)]


def leftover_names(folder: Path) -> list[str]:
    """Names of what builders that were killed left half-written."""
    return [name for name in _names(folder) if name.endswith(TEMPORARY_SUFFIX)]


def damaged_names(folder: Path) -> list[str]:
    """Names of damaged shards that a builder has set aside."""
    return [name for name in _names(folder) if name.endswith(DAMAGED_SUFFIX)]


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise unreadable(folder, error) from error


def _is_shard_name(name: str) -> bool:
    return name.startswith(SHARD_PREFIX) and name.endswith(SHARD_SUFFIX)


def refuse_other_identity(folder: Path, found: StoreIdentity, wanted: StoreIdentity) -> None:
    """Raises SoftCoTError, naming each field that differs, unless the two are the same."""
    if differing := found.difference(wanted):
        raise SoftCoTError(
            f"the cache {folder} was made for something else: {', '.join(differing)}; "
            "name another cache.path, or remove that folder"
        )


def disk_error(folder: Path, error: OSError) -> SoftCoTError:
    """What to tell the user when writing to the cache ``folder`` failed."""
    return cannot_write(folder, error, kept="finished shards are kept", otherwise="name another cache.path")
