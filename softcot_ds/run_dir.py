"""What a run has left in its directory: complete checkpoints, and the journal of the attempts to train it.

Needs neither torch nor DeepSpeed: a batch script asks before and after the ranks work.
"""

import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softcot_ds.errors import SoftCoTError
from softcot_ds.files import cannot_write, parse_json, read_yaml
from softcot_ds.hub import adapter_on_hub
from softcot_ds.recipe import Recipe, load_recipe
from softcot_ds.shipped import found

MARKER = "COMPLETE"
"""File of a checkpoint that is written last."""
CHAT_TEMPLATES = {"base": "base_chat_template.jinja", "assistant": "assistant_chat_template.jinja"}
"""In an adapter directory, copies of the chat templates that its recipe names."""
_CHECKPOINT = re.compile(r"step-(0|[1-9][0-9]{0,15})")
"""A checkpoint's name, just as training writes it: a copy beside it (step-100-best) is none."""


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first.

    Raises:
        SoftCoTError: their folder cannot be read. It is not taken for an empty one, over which a run would start anew.
    """
    folder = run_dir / "checkpoints"
    try:
        names = os.listdir(folder) if folder.exists() else []
        found = [folder / name for name in names if _CHECKPOINT.fullmatch(name) and (folder / name / MARKER).is_file()]
    except OSError as error:
        raise SoftCoTError(f"cannot read {folder}: {error}; mend that, or set output_dir") from error
    return sorted(found, key=checkpoint_step)


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = checkpoints(run_dir)
    return found[-1] if found else None


def require_complete(folder: Path) -> None:
    """Raises SoftCoTError when ``folder`` is no complete adapter directory, as each checkpoint is one."""
    if not folder.is_dir():
        raise SoftCoTError(f"no such adapter directory: {folder}")
    if not (folder / MARKER).is_file():
        raise SoftCoTError(f"{folder} is no complete checkpoint: it has no file {MARKER}; choose another step")


def load_for_evaluation(source: str, overrides: list[str], adapter: Path | None = None) -> Recipe:
    """The recipe by which runs of a recipe, a run's directory or an adapter (``adapter_folder``) are evaluated.

    Where the overrides name another task, its settings are those of the overrides alone: data and wording of the one
    that the adapter was trained on are none of its. Its own copies of wording and chat templates count: the files that
    it was trained with may have changed since. What the base was trained to write is of no account any more, nor is a
    server that an adapter names.

    Args:
        adapter: which one of the recipe's runs; None where there may be none yet.

    Raises:
        SoftCoTError: the recipe is wrong, or the directory holds no complete adapter.
    """
    folder, another = adapter_folder(source), names_another_task(source, overrides)
    if folder is not None:
        require_complete(adapter := folder)
    own = [f"task.prompts={adapter / 'prompts.yaml'}", "task.targets=gold"] if adapter and not another else []
    templates = {name: adapter / file for name, file in CHAT_TEMPLATES.items()} if adapter else {}
    own += [f"{name}.chat_template={copy}" for name, copy in templates.items() if copy.is_file()]
    if adapter and (weights := adapter / "projection.safetensors").is_file():
        # What it began with may be gone: all that still counts of it is in the adapter.
        own.append(f"projection.init_from={weights}")
    if folder is not None:
        own.append("evaluation.server=null")  # it may be anybody's, and does not decide who is told questions and key
    return load_recipe(_recipe_file(source), [*own, *overrides], "task" if another else None, folder is not None)


def recipe_and_adapter(source: str, overrides: list[str]) -> tuple[Recipe, Path]:
    """What to evaluate: ``source`` is an adapter directory or ``owner/name`` on the hub, or the directory or the recipe
    of a run, whose newest checkpoint is meant.

    Raises:
        SoftCoTError: no complete checkpoint is there, or the recipe is wrong.
    """
    if (folder := adapter_folder(source)) is not None:
        written_to = ["evaluation.outputs=null", f"output_dir={Recipe.model_fields['output_dir'].default}"]
        here = [] if Path(source).is_dir() else written_to  # which one of the hub does not decide
        return load_for_evaluation(str(folder), [*here, *overrides]), folder
    recipe = load_for_evaluation(source, overrides)
    folder = latest_checkpoint(recipe.run_dir)
    if folder is None:
        own = "".join(f" {text}" for text in overrides if text.startswith(("name=", "seed=", "output_dir=")))
        raise SoftCoTError(
            f"no complete checkpoint in {recipe.run_dir}/checkpoints; train first: softcot-ds train {source}{own}"
        )
    return load_for_evaluation(source, overrides, folder), folder


def names_another_task(source: str, overrides: Sequence[str]) -> bool:
    """Whether the overrides name another task than the recipe, or the adapter directory, is of."""
    names = [override.removeprefix("task.name=") for override in overrides if override.startswith("task.name=")]
    path = _recipe_file(source)
    values = read_yaml(path) if names and path.is_file() else None
    task = values.get("task") if isinstance(values, dict) else None
    return isinstance(task, dict) and task.get("name") != names[-1]


def _recipe_file(source: str) -> Path:
    folder = adapter_folder(source)
    return found(Path(source)) if folder is None else folder / "recipe.yaml"


def adapter_folder(source: str) -> Path | None:
    """The directory that is named; where it is a run's, its newest checkpoint; where there is none, the adapter of this
    name on the hub, from the local cache. None where something else is named.

    Raises:
        SoftCoTError: the hub's is not in the cache and cannot be downloaded; with what to do.
    """
    folder = Path(source)
    if folder.is_dir():
        return latest_checkpoint(folder) or folder
    return None if os.path.exists(found(folder)) else adapter_on_hub(source, MARKER)


def checkpoint_step(folder: Path) -> int:
    """Optimizer steps that a checkpoint directory stands for, by its name."""
    return int(folder.name.removeprefix("step-"))


def refuse_other_steps(chosen: Sequence[tuple[Recipe, Path]]) -> None:
    """Raises SoftCoTError where the runs' newest checkpoints are of different steps: a mean of them is of none."""
    steps = {recipe.name: checkpoint_step(adapter) for recipe, adapter in chosen}
    if len(set(steps.values())) > 1:
        named = ", ".join(f"{name}: {step}" for name, step in steps.items())
        raise SoftCoTError(
            f"the newest checkpoints are of different steps ({named}), and are not reported as one. Train all to the "
            f"same with training.steps={max(steps.values())}, or remove what is beyond the others from checkpoints/"
        )


def saved_step(run_dir: Path) -> int:
    """Optimizer steps that are safe on disk; 0 without a checkpoint."""
    folder = latest_checkpoint(run_dir)
    return checkpoint_step(folder) if folder else 0


@dataclass
class Attempt:
    """One stretch of training by one batch job: from its start, or from a restart, to its end."""

    job: str
    """Id of the SLURM job; restarts keep it."""
    first_step: int
    """Steps that were saved when it began."""
    last_step: int
    """Steps that were saved when it ended; of one that just vanished (a dead node) when the next began."""
    signal: str = ""
    """The signal that it stopped for, as train wrote it; empty when there was none."""
    preempted: bool = False
    """Whether another job took its nodes."""

    @property
    def progress(self) -> int:
        return self.last_step - self.first_step


_FIELDS = {"begin": {"job": str, "step": int}, "stop": {"signal": str}, "end": {"step": int}}
"""What a line of each event says at least."""
_OPTIONAL = {"preempted": bool}


class Journal:
    """``attempts.jsonl`` of a run: a line when an attempt begins, when it stops for a signal, and when it ends."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "attempts.jsonl"

    def add(self, event: str, **facts: Any) -> None:
        """Append a line. Raises SoftCoTError when it cannot be written."""
        line = json.dumps({"event": event, "time": time.strftime("%Y-%m-%d %H:%M:%S %z"), **facts}) + "\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "ab") as file:
                # A line that a full disk cut short must not swallow this one.
                if file.tell() and not self._path.read_bytes().endswith(b"\n"):
                    line = "\n" + line
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(self._path, error, otherwise="set output_dir") from error

    def records(self) -> list[dict[str, Any]]:
        """All whole lines. What one that a crash or a full disk cut short would say shows in the next one.

        Raises:
            SoftCoTError: the file is there and cannot be read.
        """
        try:
            lines = self._path.read_bytes().split(b"\n") if self._path.exists() else []
        except OSError as error:
            raise SoftCoTError(f"cannot read {self._path}: {error.strerror}; mend that, or set output_dir") from error
        return [record for line in lines if (record := _record(line)) is not None]

    def attempts(self, job: str, saved: int) -> list[Attempt]:
        """The attempts of one job, oldest first; ``saved`` steps are on disk now, where the newest has got to."""
        attempts: list[Attempt] = []
        for record in self.records():
            if record["event"] == "begin":
                if attempts and attempts[-1].last_step < 0:
                    attempts[-1].last_step = record["step"]
                attempts.append(Attempt(record["job"], record["step"], -1))
            elif attempts and record["event"] == "stop":
                attempts[-1].signal = record["signal"]
            elif attempts and record["event"] == "end":
                attempts[-1].last_step = record["step"]
                attempts[-1].preempted = record.get("preempted", False)
        if attempts and attempts[-1].last_step < 0:
            attempts[-1].last_step = saved
        return [attempt for attempt in attempts if attempt.job == job]


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = parse_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    kinds = _FIELDS.get(str(record.get("event")), {})
    whole = kinds and all(type(record.get(name)) is kind for name, kind in kinds.items())
    right = all(type(record.get(name, kind())) is kind for name, kind in _OPTIONAL.items())
    return record if whole and right else None


def stuck_at(attempts: Sequence[Attempt]) -> int | None:
    """The step that the last two attempts could not get past, or None. Preempted ones are not to blame, nor counted."""
    tried = [attempt for attempt in attempts if attempt.progress or not attempt.preempted]
    if len(tried) >= 2 and not any(attempt.progress for attempt in tried[-2:]):
        return tried[-1].last_step
    return None
