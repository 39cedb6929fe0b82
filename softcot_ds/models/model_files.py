"""A model's files: in a local folder, or by hub name in the local cache, into which they are downloaded when missing.

What is in the cache is never asked about again, so that a run does not change when its hub model does.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache

from softcot_ds.errors import SoftCoTError
from softcot_ds.hub import CARD, fetched, plainly_said
from softcot_ds.recipe import ModelConfig
from softcot_ds.values import resolve_location

_WEIGHTS = (
    ("model.safetensors", False),
    ("model.safetensors.index.json", True),
    ("pytorch_model.bin", False),
    ("pytorch_model.bin.index.json", True),
)
"""Where transformers looks for weights, in its order, and whether the file is an index of shards."""
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
_SMALL = (".json", ".jinja", ".model", ".txt", ".tiktoken")
"""What configurations, tokenizers and indices end in."""
_POINTER = b"version https://git-lfs"


def model_folder(config: ModelConfig, weights: bool = False) -> Path:
    """The folder that a model is read from.

    Args:
        weights: whether its weights must be there, or its configuration and tokenizer alone.

    Raises:
        SoftCoTError: it is not there and cannot be downloaded, or some files hold no content; with what to do.
    """
    location = resolve_location(config.model)
    folder = Path(location)
    if not folder.is_dir():
        folder = _cached(location, config.revision, weights) or _fetched(location, config.revision, weights)
    for path in sorted(folder.iterdir()):
        if path.suffix in _SMALL:
            _refuse_pointer(path)
    return folder


def is_here(config: ModelConfig) -> bool:
    """Whether nothing needs to be downloaded."""
    location = resolve_location(config.model)
    return Path(location).is_dir() or _cached(location, config.revision, weights=True) is not None


def config_folder(config: ModelConfig) -> Path | None:
    """The folder of a model's config.json where it lies here already, which the rest of the model may not."""
    location = resolve_location(config.model)
    if Path(location).is_dir():
        return Path(location)
    found = try_to_load_from_cache(location, "config.json", revision=config.revision)
    return Path(found).parent if isinstance(found, str) else None


def fetch_config(config: ModelConfig) -> Path:
    """Download a model's config.json and nothing else; returns its folder.

    Raises:
        SoftCoTError: it cannot be downloaded; with what to do.
    """
    with plainly_said(config.model, config.revision, "config.json"):
        return Path(hf_hub_download(config.model, "config.json", revision=config.revision)).parent


def tokenizer_is_here(config: ModelConfig) -> bool:
    """Whether configuration and tokenizer need no download."""
    location = resolve_location(config.model)
    return Path(location).is_dir() or _cached(location, config.revision, weights=False) is not None


def weight_files(folder: Path, name: str) -> list[Path]:
    """The files that transformers would read the weights in ``folder`` from.

    Raises:
        SoftCoTError: there are none, some are missing or hold no content. ``name`` is the model's.
    """
    first, is_index = next(
        ((folder / file, index) for file, index in _WEIGHTS if (folder / file).exists()), (None, False)
    )
    if first is None:
        raise SoftCoTError(f"{name}: no weights ({' or '.join(file for file, _ in _WEIGHTS)}) in {folder}")
    files = [first]
    if is_index:
        try:
            files = [folder / file for file in sorted(set(json.loads(first.read_bytes())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SoftCoTError(f"{first}: no index of weights ({error}); fetch the model again") from error
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise SoftCoTError(
            f"{name}: {len(missing)} of {len(files)} weight files are missing in {folder}, {missing[0]} first, which "
            f"{first.name} names; fetch the model again (hf download goes on from what is there)"
        )
    for file in files:
        _refuse_pointer(file)
    return files


def _refuse_pointer(path: Path) -> None:
    try:
        with path.open("rb") as file:
            pointer = file.read(len(_POINTER)) == _POINTER
    except OSError as error:
        raise SoftCoTError(f"cannot read {path}: {error.strerror}") from error
    if pointer:
        raise SoftCoTError(
            f"{path} is a pointer of git-lfs, not the file itself: run git lfs pull in {path.parent}, or fetch the "
            "model with hf download"
        )


def _cached(name: str, revision: str | None, weights: bool) -> Path | None:
    """The folder in the local cache, where it holds all that is asked for."""
    config = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    if not any((folder / file).exists() for file in _TOKENIZERS):
        return None
    try:
        if weights:
            weight_files(folder, name)
    except SoftCoTError:
        return None
    return folder


def _fetched(name: str, revision: str | None, weights: bool) -> Path:
    what = "" if weights else "configuration and tokenizer"
    cached, wanted = partial(_cached, name, revision, weights), partial(_wanted, weights=weights)
    return fetched(name, revision, cached, wanted, what)


def _wanted(sizes: Mapping[str, int], weights: bool) -> list[str]:
    wanted = {path for path in sizes if (path.endswith(_SMALL) and "/" not in path) or path == CARD}
    first, is_index = next(((file, index) for file, index in _WEIGHTS if file in sizes), (None, False))
    if weights and first is not None:
        stem, suffix = first.split(".")[:2]
        wanted |= (
            {path for path in sizes if path.startswith(f"{stem}-") and path.endswith(suffix)} if is_index else {first}
        )
    return sorted(wanted)
