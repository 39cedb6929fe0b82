"""Settings in a YAML file, with overrides on top: read, validated as a whole, and every mistake told at once, with the
value found and, for an unknown key, the nearest known one."""

import difflib
import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from softcot_ds.choices import METHOD_OF_KIND
from softcot_ds.errors import SoftCoTError
from softcot_ds.files import parse_yaml, read_yaml

Settings = TypeVar("Settings", bound=BaseModel)


class WrongSettings(SoftCoTError):
    """Mistakes in a file of settings, or in what stands on top of it."""

    def __init__(self, source: str, kind: str, mistakes: Sequence[str]) -> None:
        """
        Args:
            source: names the origin.
            kind: what the file is, such as a recipe.
        """
        number = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        super().__init__(f"{source}: {number} in the {kind}:\n" + "\n".join(f"  - {mistake}" for mistake in mistakes))
        self.mistakes = tuple(mistakes)


_OTHERS = "softcot-ds recipes lists some to start from"


def read_settings(path: Path, kind: str) -> dict[str, Any]:
    """What stands in a file of settings.

    Args:
        kind: what the file is to be, such as a recipe.

    Raises:
        SoftCoTError: the file is missing, or no YAML mapping.
    """
    if not os.path.isfile(path):
        folder = ", which is a folder" if os.path.isdir(path) else ""
        raise SoftCoTError(f"no such {kind}: {path.absolute()}{folder}; {_OTHERS}")
    values = read_yaml(path)
    if values is None:
        raise SoftCoTError(f"{path}: empty; {_OTHERS}")
    if not isinstance(values, dict):
        raise SoftCoTError(f"{path}: a {kind} is a mapping of keys to values, found {type(values).__name__}")
    is_study, is_recipe = "methods" in values, "base" in values
    if (is_study != is_recipe) and is_study != (kind == "study"):
        other = "study" if is_study else "recipe"
        raise SoftCoTError(f"{path} is a {other}, and a {kind} is wanted here; softcot-ds recipes lists both")
    return values


def validated(
    section: type[Settings], values: dict[str, Any], overrides: Sequence[str], source: str, kind: str
) -> Settings:
    """Validate ``values`` with ``overrides`` on top, which become part of them.

    Raises:
        WrongSettings: lists every mistake; for ``source`` and ``kind`` see there.
    """
    mistakes = [mistake for override in overrides if (mistake := _apply_override(values, override))]
    settings = None
    try:
        settings = section.model_validate(values)
    except ValidationError as error:
        mistakes += [line for detail in error.errors() for line in _explain(detail, section)]
    if mistakes or settings is None:
        raise WrongSettings(source, kind, mistakes)
    return settings


def _apply_override(values: dict[str, Any], override: str) -> str | None:
    """Set one ``key.sub=value`` in ``values``; returns what is wrong with it, or None."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        return f"override {override!r}: write key=value, such as training.steps=200"
    *parents, leaf = key.split(".")
    section = values
    for parent in parents:
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            return f"override {override!r}: {parent!r} is a value, not a section"
    try:
        section[leaf] = parse_yaml(text)
    except ValueError as error:
        return f"override {override!r}: {text!r} is not a YAML value: {error}"
    return None


def _explain(detail: Any, section: type[BaseModel]) -> list[str]:
    """One line per mistake that pydantic found at one place."""
    location = ".".join(part if (part := str(p)).isprintable() else repr(part) for p in detail["loc"])
    found = _REPR.repr(detail["input"])
    message = detail["msg"].removeprefix("Value error, ")
    match detail["type"]:
        case "extra_forbidden" if location == "seeds":
            return ["seeds: only on the command line of evaluate, cache or submit; a run has one seed (seed=41)"]
        case "extra_forbidden" if location == "projection.kind":
            now = METHOD_OF_KIND.get(str(detail["input"]), "NAME")
            return [f"{location}: what is trained is named outside of all sections; write method: {now} in its place"]
        case "int_type" | "int_parsing" if location == "seed":
            found += "; several are seeds=41..45 or seeds=[41,42], on the command line of evaluate, cache or submit"
        case "int_type" if location == "evaluation.thoughts" and isinstance(detail["input"], list):
            return [f"{location}: a list only on the command line of evaluate, cache or submit; here one number"]
        case "extra_forbidden":
            return [f"{location}: unknown key{_suggest(detail['loc'], section)}"]
        case "missing":
            return [f"{location}: missing"]
        case "value_error":
            prefix = f"{location}: " if location else ""
            return [prefix + line for line in message.splitlines()]
        case "model_type":
            return [f"{location}: a section of keys and values, found {found}"]
        case "dict_type":
            return [f"{location}: a mapping of keys to values, found {found}"]
        case "path_type":
            return [f"{location}: a path, found {found}"]
        case "tuple_type":
            return [f"{location}: a list of two numbers, found {found}"]
        case "string_type" if isinstance(detail["input"], int | float):
            return [f"{location}: a text, found {found}; put it in quotes"]
    return [f"{location}: {message[0].lower()}{message[1:]}, found {found}"]


_REPR = reprlib.Repr()  # cuts what was found where it is long
_REPR.maxstring = _REPR.maxother = 200


_ELSEWHERE = {
    "lr": "learning_rate",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "max_steps": "steps",
    "lr_scheduler_type": "schedule",
    "max_grad_norm": "gradient_clipping",
    "gradient_checkpointing": "activation_checkpointing",
    "per_device_train_batch_size": "micro_batch_size",
    "train_batch_size": "global_batch_size",
    "logging_steps": "log_every",
    "eval_steps": "validate_every",
    "save_steps": "save_every",
    "save_total_limit": "keep_checkpoints",
}
"""What other libraries call a setting, and a recipe calls so."""


def _suggest(location: tuple[Any, ...], section: type[BaseModel]) -> str:
    """Name the known key nearest to an unknown one: one that is called so elsewhere, else one in its own section, else
    one elsewhere that is nearly called so; what merely has letters in common with it would mislead."""
    known = known_keys(section)
    *parents, unknown = (str(part) for part in location)
    prefix = "".join(f"{parent}." for parent in parents)
    unknown = _ELSEWHERE.get(unknown, unknown)
    siblings = {key.removeprefix(prefix): key for key in known if key.startswith(prefix)}
    siblings = {name: key for name, key in siblings.items() if "." not in name}
    leaves = {key.rpartition(".")[2]: key for key in known}
    near = [] if unknown in leaves else difflib.get_close_matches(unknown, siblings, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {siblings[near[0]]}?"
    near = difflib.get_close_matches(unknown, leaves, n=1, cutoff=0.8)
    if near:
        return f"; did you mean {leaves[near[0]]}?"
    return f"; known here: {', '.join(siblings)}"


def flattened(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value that is no mapping, by ``section.key``."""
    flat = {}
    for key, value in values.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def known_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key of a file of settings, dotted; sections too."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if kind := section_of(field.annotation):
            keys += known_keys(kind, f"{prefix}{name}.")
    return keys


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field of this type holds, or may hold: some may be left out. None where it is a value."""
    for kind in get_args(annotation) or (annotation,):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None
