"""Reading the records of a data set, from a JSON file or from the hub, with the same checks."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from softcot_ds.errors import SoftCoTError
from softcot_ds.files import strict_loads

Record = dict[str, Any]
Types = type | tuple[type, ...]
"""What a value may be."""

_LONGEST_LINE = 2**24
"""Bytes. Longer lines are no problems and solutions, but another kind of file, perhaps larger than the memory."""


_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\3\4")
"""How files begin that gzip, bzip2, xz, zstd and zip write."""


def read_records(
    source: str,
    split: str,
    required: Mapping[str, Types],
    subset: str | None = None,
    hub_split: str | None = None,
) -> Iterator[tuple[str, Record]]:
    """Records with the place where each stands ("data.jsonl:3", "data.json record 2"), all holding the ``required``
    keys.

    Args:
        source: a file, which holds one split, or a data set of the hub. Whatever its name, a file is JSON lines, a JSON
            list of objects, or a JSON object whose key "examples" has such a list.
        split: which the records are for.
        required: keys and the types of their values.
        subset: of a hub data set.
        hub_split: what a hub data set calls the split; default: the same.

    Raises:
        SoftCoTError: names the place and what is wrong there, or that the source cannot be read.
    """
    is_file = Path(source).is_file()
    records = _file_records(Path(source)) if is_file else _hub_records(source, subset, split, hub_split or split)
    for where, record in records:
        for key, kind in required.items():
            check_value(where, record, key, kind)
        yield where, record


def _file_records(path: Path) -> Iterator[tuple[str, Record]]:
    """Lines where the first line is an object of its own; else the records of one JSON value."""
    try:
        with path.open("rb") as file:
            first = file.readline(_LONGEST_LINE + 1).removeprefix(b"\xef\xbb\xbf").strip()
    except OSError as error:
        raise SoftCoTError(f"cannot read {path.absolute()}: {error.strerror}") from error
    if first.startswith(_PACKED):
        raise SoftCoTError(f"{path}: compressed; unpack it, and name what was in it")
    if first.startswith(b"[") or first == b"{" or _holds_examples(first):
        return _whole_records(path)
    return read_json_lines(path)


def _holds_examples(line: bytes) -> bool:
    """Whether a line is a whole file: a record of JSON lines has no list of records."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and isinstance(value.get("examples"), list)


def _whole_records(path: Path) -> Iterator[tuple[str, Record]]:
    value = read_json_value(path)
    records = value.get("examples") if isinstance(value, dict) else value
    if not isinstance(records, list):
        raise SoftCoTError(
            f"{path}: a JSON object without a list of records in 'examples'; write one object on each line, or a list"
        )
    if not records:
        raise SoftCoTError(f"{path}: there is no record in it")
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise SoftCoTError(f"{path} record {number}: expected a JSON object, found {type(record).__name__}")
        yield f"{path} record {number}", record


def read_json_value(path: Path) -> Any:
    """The value that a JSON file holds. Raises SoftCoTError when it is no JSON, or none that can be relied on."""
    try:
        return strict_loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SoftCoTError(f"{path}: byte {error.start}: not UTF-8 text; JSON is UTF-8") from error
    except json.JSONDecodeError as error:
        raise SoftCoTError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # see strict_loads
        raise SoftCoTError(f"{path}: not JSON that can be relied on: {error}") from error


def read_json_lines(path: Path) -> Iterator[tuple[str, Record]]:
    """The objects of a JSON-lines file, with file and line.

    Raises:
        SoftCoTError: names the file and the first bad line: empty, not UTF-8, not a JSON object, a key twice.
    """
    number = 0
    try:
        with path.open("rb") as file:
            # Line by line and bounded: a wrong file may be larger than the memory.
            while line := file.readline(_LONGEST_LINE + 1):
                number += 1
                # A byte-order mark is no content. It stands at the beginning of a file only.
                content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if content or number > 1:
                    yield f"{path}:{number}", _parse(f"{path}:{number}", content)
                else:
                    number = 0
    except OSError as error:
        raise SoftCoTError(f"cannot read {path.absolute()}: {error.strerror}") from error
    if not number:
        raise SoftCoTError(f"{path}: the file is empty")


def _parse(where: str, line: bytes) -> Record:
    if len(line) > _LONGEST_LINE:
        raise SoftCoTError(f"{where}: the line is longer than {_LONGEST_LINE >> 20} MiB; is this a JSON-lines file?")
    if not line.strip():
        raise SoftCoTError(f"{where}: empty line; every line holds one JSON object")
    try:
        record = strict_loads(line.decode())
    except UnicodeDecodeError as error:
        raise SoftCoTError(f"{where}: byte {error.start}: not UTF-8 text; JSON lines are UTF-8") from error
    except json.JSONDecodeError as error:
        raise SoftCoTError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # see strict_loads
        raise SoftCoTError(f"{where}: not JSON that can be relied on: {error}") from error
    if not isinstance(record, dict):
        raise SoftCoTError(f"{where}: expected a JSON object, found {type(record).__name__}")
    return record


def _hub_records(source: str, subset: str | None, split: str, hub_split: str) -> Iterator[tuple[str, Record]]:
    from datasets import load_dataset  # slow to import, and not needed for a local file

    try:
        for number, record in enumerate(load_dataset(source, subset, split=hub_split)):
            yield f"{source} record {number}", record
    except Exception as error:  # the library raises a dozen kinds for one cause: it cannot get the data set
        raise SoftCoTError(
            f"task.{split}: cannot load {source!r} from the hub ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:500]}); check the name and the network, or name a local JSON-lines file"
        ) from error


def check_value(where: str, record: Record, key: str, kind: Types) -> None:
    """Raises SoftCoTError when a record lacks a key, or has a value of another type there, or one that is no text."""
    if key not in record:
        raise SoftCoTError(f"{where}: the key {key!r} is missing; found {_short(sorted(record))}")
    value = record[key]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if type(value) not in kinds:  # true is no number
        expected = " or ".join(one.__name__ for one in kinds)
        raise SoftCoTError(f"{where}: {key!r} is {type(value).__name__}, expected {expected}; found {_short(value)}")
    for text in value if isinstance(value, list) else [value]:
        if isinstance(value, list) and not isinstance(text, str):
            raise SoftCoTError(f"{where}: {key!r} is a list with {type(text).__name__} in it, expected text")
        if isinstance(text, str):
            _check_text(where, key, text)


def _check_text(where: str, key: str, text: str) -> None:
    if "\0" in text:
        raise SoftCoTError(f"{where}: {key!r} holds a NUL character, which is no text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SoftCoTError(f"{where}: {key!r} holds half of a surrogate pair, which is no character") from error


def _short(value: Any) -> str:
    """For a message: in one line, and not for ever."""
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
