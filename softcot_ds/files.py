"""Files that are complete or absent, and YAML and JSON read with care.

What both give is a tree of texts, numbers, booleans, null, lists, and mappings of texts: of bounded size and depth, and
without what their usual readers pass over in silence. A key that stands twice is an error.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import yaml

from softcot_ds.errors import SoftCoTError
from softcot_ds.progress import size


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, sync it, rename it: readers see the old file or the whole new one."""
    temporary = temporary_name(path)
    try:
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            publish(file, path)
    finally:
        temporary.unlink(missing_ok=True)


TEMPORARY_SUFFIX = ".tmp"


def temporary_name(path: Path) -> Path:
    """Where to write what is to be renamed to ``path``: beside it, hidden, and no other process's on any node."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")


def publish(file: BinaryIO, path: Path) -> None:
    """Sync and close a file that is complete under its ``temporary_name``, and rename it to ``path``."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(file.name, path)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Make a written file's content survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


sync_folder = sync_file
"""Make the names in a folder, new or renamed, survive a crash of the machine."""


def write_in_folder(path: Path, text: str) -> Path:
    """``write_atomically``, of a file whose folder may not be there yet; gives its path. Raises SoftCoTError when it
    cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


def cannot_write(path: Path, error: Exception, kept: str = "", otherwise: str = "") -> SoftCoTError:
    """What to tell the user when ``path`` could not be written; when its disk is full, also how much room it has.

    Args:
        kept: what is safe all the same: "finished shards are kept".
        otherwise: what helps besides mending the cause: "set output_dir".
    """
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        existing = next(place for place in (path, *path.absolute().parents) if os.path.exists(place))
        free = size(shutil.disk_usage(existing).free)
        said, remedy = f"the disk of {path} is full ({error.strerror}, {free} free)", "Make room"
    else:
        said, remedy = f"cannot write to {path}: {error}", "Mend that"
    said += f"; {kept}" if kept else ""
    remedy += f" or {otherwise}" if otherwise else ""
    return SoftCoTError(f"{said}. {remedy} and run the same command again")


MAX_DEPTH, MAX_VALUES = 100, 1_000_000
"""Levels and values of what is read, at most: a few lines of YAML with aliases can stand for billions of values."""


class _Resolver(yaml.resolver.BaseResolver):
    """Plain scalars mean what YAML 1.2's core schema says, as in JSON.

    PyYAML's own are those of YAML 1.1, where ``1e-3`` is a text, ``1:30`` is 90, ``0100`` is 64, ``no`` is false and
    2024-07-26 is a date.
    """


for _tag, _pattern, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", "<<", "<"),
):
    _Resolver.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), list(_first))


class _Loader(yaml.SafeLoader):
    """Refuses what PyYAML reads in silence: keys that stand twice, keys that are no texts, and tags."""

    yaml_implicit_resolvers = _Resolver.yaml_implicit_resolvers

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        event = self.peek_event()
        if getattr(event, "tag", None):
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            _refuse(event, f"the tag {tag} is not read here; write the value without, a text in quotes")
        return super().compose_node(parent, index)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Called for each mapping before it is constructed, or merged into another."""
        seen: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in _KEY_TAGS:
                written = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                _refuse(key, f"a key is a text, not {written}; put it in quotes")
            if key.value in seen:
                first = seen[key.value].start_mark.line + 1
                _refuse(key, f"the key {key.value!r} stands twice, first in line {first}")
            seen[key.value] = key
        super().flatten_mapping(node)
        # What is merged stands before the mapping's own keys. Kept, repetitions would grow with each merge of merges.
        node.value = list({key.value: (key, value) for key, value in node.value}.values())

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = node.value
        if re.fullmatch("[-+]?0[0-9]+", text):
            _refuse(node, f"{text} is octal to some readers; write it without the leading 0, or a text in quotes")
        if len(text) > 1000:  # Python refuses those of more than 4,300 digits, on reading or on printing them
            _refuse(node, f"the number {text[:20]} and so on is too large; a text may stand in quotes")
        return int(text, 0)

    def construct_float(self, node: yaml.ScalarNode) -> float:
        if not math.isfinite(value := float(node.value)):
            _refuse(node, f"the number {node.value} is too large; a text may stand in quotes")
        return value


_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_float)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that ``_Loader`` would take for something else."""

    yaml_implicit_resolvers = _Resolver.yaml_implicit_resolvers


def _refuse(where: yaml.Event | yaml.Node, problem: str) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)


def parse_yaml(text: str) -> Any:
    """The value that ``text`` stands for, by YAML 1.2's core schema. Aliases and merge keys work, tags do not.

    Raises:
        ValueError: it is not YAML, or not one tree of values; one line that says where.
    """
    try:
        value = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        context = f"{error.context}, " if error.context else ""
        raise ValueError(f"{where}{context}{error.problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from error
    _check_tree(value)
    return value


def dump_yaml(value: Any) -> str:
    """The text that ``parse_yaml`` reads as ``value``, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def parse_json(text: str | bytes) -> Any:
    """The value that ``text``, in UTF-8, stands for.

    Raises:
        ValueError: it is not JSON, a key stands twice, a number is NaN, infinite or too large, or it is nested too
            deeply; one line that says where, as far as that is known.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = strict_loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}, column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start}: not UTF-8 text") from error
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from error
    _check_tree(value)
    return value


def strict_loads(text: str) -> Any:
    """``json.loads`` without what it passes over in silence, for whoever has words of their own for what is wrong.

    Raises:
        json.JSONDecodeError: it is not JSON.
        ValueError: a key stands twice, or a number is NaN, infinite or too large.
        RecursionError: it is nested too deeply.
    """
    return json.loads(
        text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite, parse_int=_whole
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {twice[:40]!r} stands twice")
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _whole(text: str) -> int:
    if len(text) > 1000:  # Python refuses those of more than 4,300 digits, on reading or on printing them
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)


def _check_tree(value: Any) -> None:
    """Raises ValueError when the value is too deep or too large, counted with all that aliases repeat."""
    level = [value]
    depth = count = 0
    while level:
        depth, count = depth + 1, count + len(level)
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        if count > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES:,} values")
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                _check_text(item)
            elif isinstance(item, dict):
                below += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                below += item
            if len(below) > MAX_VALUES:
                raise ValueError(f"more than {MAX_VALUES:,} values")
        level = below


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair in {text[:40]!r}; it is no character") from error


def content_digest(value: Any) -> str:
    """A hash of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_yaml(path: Path) -> Any:
    """The value in a YAML file. Raises SoftCoTError when it cannot be read or is not YAML."""
    return _read(path, parse_yaml, "YAML")


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises SoftCoTError when it cannot be read or is not JSON."""
    return _read(path, parse_json, "JSON")


def _read(path: Path, parse: Callable[[str], Any], kind: str) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SoftCoTError(f"cannot read {path.absolute()}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SoftCoTError(f"{path}: byte {error.start}: not UTF-8 text, so not {kind}") from error
    except ValueError as error:
        raise SoftCoTError(f"{path}: not {kind}: {error}") from error
