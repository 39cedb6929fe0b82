"""Reading the records of a data set, from a JSON-lines file or from the hub, with the same checks."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from softcot_ds.errors import SoftCoTError
from softcot_ds.files import strict_loads

Record = dict[str, Any]

_LONGEST_LINE = 2**24
"""Bytes. Longer lines are no problems and solutions, but another kind of file, perhaps larger than the memory."""


def read_records(
    source: str, split: str, required: dict[str, type], subset: str | None = None
) -> Iterator[tuple[str, Record]]:
    """Records with the place where each stands ("data.jsonl:3"), all holding the ``required`` keys.

    Args:
        source: a JSON-lines file, which holds one split, or a data set of the hub.
        split: of a hub data set.
        required: keys and the types of their values.
        subset: of a hub data set.

    Raises:
        SoftCoTError: names the place and what is wrong there, or that the source cannot be read.
    """
    is_file = Path(source).is_file()
    records = read_json_lines(Path(source)) if is_file else _hub_records(source, subset, split)
    for where, record in records:
        for key, kind in required.items():
            _check_value(where, record, key, kind)
        yield where, record


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


def _hub_records(source: str, subset: str | None, split: str) -> Iterator[tuple[str, Record]]:
    from datasets import load_dataset  # slow to import, and not needed for a local file

    try:
        for number, record in enumerate(load_dataset(source, subset, split=split)):
            yield f"{source} record {number}", record
    except Exception as error:  # the library raises a dozen kinds for one cause: it cannot get the data set
        raise SoftCoTError(
            f"task.{split}: cannot load {source!r} from the hub ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:500]}); check the name and the network, or name a local JSON-lines file"
        ) from error


def _check_value(where: str, record: Record, key: str, kind: type) -> None:
    if key not in record:
        raise SoftCoTError(f"{where}: the key {key!r} is missing; found {_short(sorted(record))}")
    value = record[key]
    if not isinstance(value, kind):
        raise SoftCoTError(
            f"{where}: {key!r} is {type(value).__name__}, expected {kind.__name__}; found {_short(value)}"
        )
    if isinstance(value, str):
        if "\0" in value:
            raise SoftCoTError(f"{where}: {key!r} holds a NUL character, which is no text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise SoftCoTError(f"{where}: {key!r} holds half of a surrogate pair, which is no character") from error


def _short(value: Any) -> str:
    """For a message: in one line, and not for ever."""
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
