"""What the values of a recipe may be: names of models and data, paths, numbers. A wrong one raises ValueError."""

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, PlainValidator

from softcot_ds.shipped import found

PACKAGE_SCHEME = "package:"
"""``package:pair/base`` names a folder that is shipped inside the installed package."""
UNPUBLISHED_SCHEME = "unpublished:"
"""``unpublished:train.jsonl`` stands for data of the machine that an adapter was sent from, in what was sent."""


def resolve_location(name: str) -> str:
    """The local path or hub name that ``name`` stands for."""
    if name.startswith(PACKAGE_SCHEME):
        return str(Path(__file__).parent / name.removeprefix(PACKAGE_SCHEME))
    return name


def is_hub_name(name: str) -> bool:
    """Whether ``name`` has the form of a hub repository, ``owner/name``."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)) and not name.lower().endswith(_FILES)


_FILES = (".json", ".jsonl", ".xml", ".csv", ".tsv", ".txt", ".yaml", ".yml", ".parquet", ".gz", ".bz2", ".xz", ".zip")
"""What no hub repository is called. Any ending will not do: there are names like whisper-base.en."""


# The checks ask os.path, which says False where pathlib raises: a folder that may not be read, too long a name.
def _check_model(name: str) -> str:
    location = resolve_location(name)
    if os.path.isdir(location):
        if not os.path.isfile(os.path.join(location, "config.json")):
            raise ValueError(f"the folder {location!r} holds no config.json; name a folder written by save_pretrained")
    elif name.startswith(PACKAGE_SCHEME) or not is_hub_name(name):
        raise ValueError(f"{location!r} is neither a folder nor a hub name (owner/name)")
    return name


def _check_data(name: str) -> str:
    if not os.path.isfile(name) and not is_hub_name(name) and not name.startswith(UNPUBLISHED_SCHEME):
        raise ValueError(f"no such file: {os.path.abspath(name)}; and {name!r} is no hub name (owner/name)")
    return name


def _check_path(path: Path) -> Path:
    if "\0" in str(path):
        raise ValueError(f"{str(path)!r} has a NUL character in it, and no path has")
    if str(path).startswith("~"):
        raise ValueError(f"{str(path)!r}: ~ stands for a home folder in a shell only; write the whole path")
    if len(longest := max(map(os.fsencode, path.parts), default=b"")) > 255:
        raise ValueError(f"a name of {len(longest)} bytes in it; file systems take 255 at most")
    return path


def _check_file(path: Path) -> Path:
    if os.path.isdir(path):
        raise ValueError(f"{path.absolute()} is a folder, not a file")
    if not os.path.isfile(path):
        raise ValueError(f"no such file: {path.absolute()}")
    if not os.access(path, os.R_OK):
        raise ValueError(f"no permission to read {path.absolute()}")
    return path


def _check_folder(path: Path) -> Path:
    nearest = next((p for p in (path, *path.absolute().parents) if os.path.lexists(p)), path)
    if os.path.lexists(nearest) and not os.path.isdir(nearest):
        raise ValueError(f"{nearest.absolute()} is not a folder")
    return path


def _check_targets(name: str) -> str:
    if os.path.isdir(_check_path(Path(name))):
        raise ValueError(f"{os.path.abspath(name)} is a folder; write gold, or name a file")
    return name


def _check_texts(value: Any) -> str | list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a text, or a list of texts, found {value!r}; put numbers in quotes")
    return value


def _check_server(url: str) -> str:
    try:
        parts = urlsplit(url)
        named = parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        named = None
    if not named or parts.scheme not in ("http", "https"):
        raise ValueError(f"{url!r} is no address of a server; write one such as http://localhost:8000")
    if parts.username or parts.password or parts.query or parts.fragment:
        # Without the value: it may be a secret.
        raise ValueError("an address with a name, a key or a query in it; give the key in VLLM_API_KEY alone")
    return url.rstrip("/").removesuffix("/v1")


def _check_scale(value: Any) -> Any:
    if value != "auto" and (type(value) not in (int, float) or not 0 < value <= sys.float_info.max):
        raise ValueError(f"auto, or a number above 0, found {value!r}")
    return value if value == "auto" else float(value)


ModelName = Annotated[str, AfterValidator(_check_model)]
DataName = Annotated[str, AfterValidator(_check_data)]
Key = Annotated[str, Field(min_length=1)]
"""Of a record of the data."""
TargetsName = Annotated[str, Field(min_length=1), AfterValidator(_check_targets)]
"""``gold``, or a file that exists or can be made."""
TextOrTexts = Annotated[str | list[str], PlainValidator(_check_texts, json_schema_input_type=str | list[str])]
AnyPath = Annotated[Path, Field(strict=False), AfterValidator(_check_path)]
ExistingFile = Annotated[AnyPath, AfterValidator(found), AfterValidator(_check_file)]
"""Of the current directory, or one that is shipped."""
Folder = Annotated[AnyPath, AfterValidator(_check_folder)]
"""Exists, or can be made."""
ServerURL = Annotated[str, AfterValidator(_check_server)]
_Bounded = Annotated[int, Field(le=2**31 - 1)]  # what PyTorch, DeepSpeed and SLURM take everywhere
Count = Annotated[_Bounded, Field(ge=1)]
CountOrZero = Annotated[_Bounded, Field(ge=0)]
Scale = Annotated[float | Literal["auto"], PlainValidator(_check_scale, json_schema_input_type=float | Literal["auto"])]
Beta = Annotated[float, Field(ge=0, lt=1)]
