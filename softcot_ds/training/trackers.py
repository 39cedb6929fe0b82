"""Trackers beside TensorBoard: Weights & Biases, MLflow and trackio, by accelerate's classes.

A tracker is told what TensorBoard is, and the recipe as configuration; nothing of the environment, the console or the
repository. Each has a thread of its own, so that a network that is slow holds up no step, and one that fails is given
up with a line. A run that goes on is the same run there: ``trackers.json`` in its directory has their ids.
"""

import json
import os
import secrets
import time
from collections.abc import Callable
from multiprocessing import TimeoutError as OutOfPatience
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from types import TracebackType
from typing import Any

from softcot_ds.distributed import on_main, say
from softcot_ds.errors import SoftCoTError
from softcot_ds.files import parse_json, write_atomically
from softcot_ds.recipe import Recipe

_PATIENCE_S = 60.0
"""How long what is still to be sent is waited for when a training ends, of all trackers together."""
_HURRY_S = 5.0
"""The same where it is being stopped, or has failed: who stops it, or another rank, kills it before long."""
_PROJECT = "softcot-ds"
"""What runs are filed under, unless the tracker's own variable says otherwise (WANDB_PROJECT and so on)."""
left: list[str] = []
"""Trackers that were not waited for any more. Their packages may wait once more when the process ends."""


def require_trackers(recipe: Recipe) -> None:
    """Raises SoftCoTError where a tracker that the recipe names is not installed."""
    if missing := [name for name in _others(recipe) if not _is_installed(name)]:
        raise SoftCoTError(
            f"trackers: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed; "
            f"pip install {' '.join(missing)}, or leave it out of trackers"
        )


def _others(recipe: Recipe) -> list[str]:
    return [name for name in dict.fromkeys(recipe.trackers) if name != "tensorboard"]


def _is_installed(name: str) -> bool:
    from accelerate import utils  # type: ignore[import-untyped]

    return getattr(utils, f"is_{name}_available")()


class Trackers:
    """Those of one training; none until they are started. All ranks have it, and only rank 0 sends anything."""

    def __init__(self) -> None:
        self._threads: dict[str, ThreadPool] = {}  # of daemons: the end of the process waits for none
        self._runs: dict[str, Any] = {}
        """accelerate's trackers."""
        self._seen: dict[str, int] = {}
        """The last step of which a tracker has points already."""

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        waiting = {name: self._do(name, lambda name=name: _end(name, self._runs[name], kind)) for name in [*self._runs]}
        patience = _PATIENCE_S if kind is None else _HURRY_S
        give_up = time.monotonic() + patience
        for name, told in waiting.items():
            try:
                told.get(max(0.0, give_up - time.monotonic()))
            except OutOfPatience:
                say(f"warning: {name} takes more than {patience:.0f} s to be told the last of this run, and is left")
                left.append(name)

    def start(self, recipe: Recipe, step: int) -> None:
        """Begin the runs, or go on with them after ``step``; all ranks call it.

        Raises:
            SoftCoTError: on every rank, when a tracker refuses a run that begins. One that goes on does so without it.
        """
        on_main(lambda: self._start(recipe, step))

    def _start(self, recipe: Recipe, step: int) -> None:
        path = recipe.run_dir / "trackers.json"
        ids = _read(path) if step else {}  # a run that begins anew is another one
        for name in _others(recipe):
            self._threads[name] = ThreadPool(1)
            try:
                opened = self._threads[name].apply(_open, (name, recipe, ids.get(name)))
            except Exception as error:  # whatever its package, or its service, raises
                words = f"{name} does not take this run: {_in_a_line(error)}"
                if not step:
                    raise SoftCoTError(f"{words}. Mend that, or leave it out of trackers") from error
                say(f"warning: {words}; training goes on without it")
            else:
                self._runs[name], ids[name], self._seen[name] = opened
        if self._runs:
            write_atomically(path, json.dumps(ids) + "\n")

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Send the points of a step, by the names that TensorBoard's curves have."""
        for name in [name for name, seen in self._seen.items() if name in self._runs and step > seen]:
            self._do(name, lambda name=name: self._runs[name].log(values, step=step))

    def _do(self, name: str, work: Callable[[], None]) -> AsyncResult:
        """Have it done in the tracker's thread, which gives the tracker up where it fails."""

        def attempt() -> None:
            try:
                if name in self._runs:
                    work()
            except Exception as error:
                del self._runs[name]
                say(f"warning: {name} is told no more of this run: {_in_a_line(error)}; training goes on")

        return self._threads[name].apply_async(attempt)


def _open(name: str, recipe: Recipe, known: str | None) -> tuple[Any, str, int]:
    """Begin a run, or go on with a known one: accelerate's tracker, the run's id, and the last step that is there."""
    from accelerate import PartialState, tracking  # type: ignore[import-untyped]

    PartialState()  # takes the ranks that have met as they are; the trackers cannot do without
    fresh = f"{recipe.name}-{secrets.token_hex(4)}"
    if name == "wandb":
        import wandb  # type: ignore[import-not-found]

        tracker = tracking.WandBTracker(
            os.environ.get("WANDB_PROJECT", _PROJECT),
            id=known or fresh,
            name=recipe.name,
            resume="allow",
            dir=str(recipe.run_dir.absolute()),
            settings=wandb.Settings(console="off", disable_git=True, save_code=False),
        )
        tracker.start()
        tracker.store_init_configuration(recipe.flat())
        return tracker, known or fresh, tracker.tracker.step - 1
    if name == "trackio":
        project = os.environ.get("TRACKIO_PROJECT", _PROJECT)
        tracker = tracking.TrackioTracker(project, name=known or fresh, resume="allow")
        tracker.start()
        tracker.store_init_configuration(recipe.flat())
        return tracker, known or fresh, tracker.tracker._next_step - 1
    import mlflow  # type: ignore[import-not-found]

    tracker = tracking.MLflowTracker(_PROJECT, run_id=known, run_name=recipe.name)
    tracker.start()
    own = tracker.tracker.info.run_id
    if known is None:  # its parameters cannot be changed
        tracker.store_init_configuration(recipe.flat())
    points = mlflow.MlflowClient().get_metric_history(own, "loss/train") if known else []
    return tracker, own, max((point.step for point in points), default=-1)


def _end(name: str, tracker: Any, kind: type[BaseException] | None) -> None:
    if kind is not None and name == "wandb":
        tracker.tracker.finish(exit_code=1)
    elif kind is not None and name == "mlflow":
        import mlflow  # type: ignore[import-not-found]

        mlflow.end_run("KILLED")
    else:
        tracker.finish()


def _read(path: Path) -> dict[str, str]:
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError):  # not there, or damaged: then these are runs of their own
        return {}
    return {str(name): str(known) for name, known in found.items()} if isinstance(found, dict) else {}


def _in_a_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
