"""What all ranks of a training must have in common, asked of each of them before the first step.

Every node reads its own copy of recipe, code, data and models, or sees a network file system later than it was written.
Ranks that differ would go on all the same, each with another part of what is then saved as one run.
"""

import hashlib
import importlib.util
import os
import platform
import socket
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from softcot_ds.data.examples import digest
from softcot_ds.differences import difference
from softcot_ds.distributed import from_all_ranks, rank
from softcot_ds.errors import SoftCoTError
from softcot_ds.experiment import Experiment
from softcot_ds.models.backbone import weights_fingerprint

_LIBRARIES = ("torch", "deepspeed", "transformers")
_PACKAGES = ("softcot_ds", "softcot_kernels")


@dataclass(frozen=True)
class _Rank:
    rank: int
    node: str
    facts: dict[str, Any]


def agree(facts: dict[str, Any]) -> None:
    """Compare facts, by name, with those of the other ranks; all ranks call it. A rank may leave some out.

    Raises:
        SoftCoTError: on every rank, when a fact is not the same on all that give it; says what differs, and where.
    """
    everyone = from_all_ranks(_Rank(rank(), socket.gethostname(), facts))
    differ = []
    for name in dict.fromkeys(name for one in everyone for name in one.facts):
        giving = [one for one in everyone if name in one.facts]
        if text := difference(giving, lambda one, name=name: str(one.facts[name])):
            differ.append(f"{name}: {text}")
    if differ:
        raise SoftCoTError(
            "the ranks do not agree, and nothing has been trained or changed:\n"
            + "\n".join(f"  - {text}" for text in differ)
            + "\nStart the same command with the same files and the same environment on every node"
        )


def facts_of(experiment: Experiment) -> dict[str, Any]:
    """Whatever decides what a training of this recipe computes, by content, as this rank sees it."""
    recipe = experiment.recipe
    splits = experiment.splits
    facts = {
        **recipe.flat(),
        f"the content of {recipe.backbone.deepspeed_path()}": _short(str(recipe.backbone.deepspeed_config()).encode()),
        "the training data": digest(splits.train)[:12],
        "the validation data": digest(splits.validation)[:12],
        "the code of softcot-ds": code_digest(),
        "Python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
    }
    for name, identity in experiment.chat_identity.items():
        facts[f"the chat template of {name}"] = _short(str(identity).encode())
    if (path := recipe.projection.init_from) is not None:
        facts[f"the content of {path}"] = _short(path.read_bytes())
    if os.environ.get("LOCAL_RANK", "0") == "0":  # the ranks of a node read the same files, and these are large
        facts["the weights of base"] = weights_fingerprint(recipe.base)[:12]
        facts["the weights of assistant"] = weights_fingerprint(recipe.assistant)[:12]
    return facts


@cache
def code_digest() -> str:
    """Of the package's own files, code and wording: a version number does not tell two checkouts apart."""
    content = hashlib.sha256()
    for package in _PACKAGES:
        for folder in importlib.util.find_spec(package).submodule_search_locations:
            for path in sorted(path for path in Path(folder).rglob("*") if path.suffix in (".py", ".yaml")):
                content.update(f"{package}/{path.relative_to(folder)}".encode() + b"\0" + path.read_bytes() + b"\0")
    return content.hexdigest()[:12]


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
