"""Files that are complete or absent, and YAML read with care."""

import os
import uuid
from pathlib import Path
from typing import Any

import yaml

from softcot_ds.errors import SoftCoTError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, sync it, rename it: readers see the old file or the whole new one."""
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def temporary_name(path: Path) -> Path:
    """Where to write what is to be renamed to ``path``: beside it, hidden, and no other process's on any node."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def sync_file(path: Path) -> None:
    """Make a written file's content survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


sync_folder = sync_file
"""Make the names in a folder, new or renamed, survive a crash of the machine."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which PyYAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """The value that ``text`` stands for.

    Raises:
        ValueError: it is not YAML; one line that says where.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # a ValueError comes from values such as the date 2024-13-01
        raise ValueError(" ".join(str(error).split())) from error


def read_yaml(path: Path) -> Any:
    """The value in a YAML file. Raises SoftCoTError when it cannot be read or is not YAML."""
    try:
        return parse_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SoftCoTError(f"cannot read {path.absolute()}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SoftCoTError(f"{path}: byte {error.start}: not UTF-8 text, so not YAML") from error
    except ValueError as error:
        raise SoftCoTError(f"{path}: not YAML: {error}") from error
