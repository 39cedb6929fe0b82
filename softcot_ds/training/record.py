"""What is kept and said of a training's steps: losses, skipped steps, the points of the curves."""

import json
import math
import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softcot_ds.data.batches import steps_per_epoch
from softcot_ds.data.examples import Example
from softcot_ds.distributed import device, is_main, on_main, say, sum_over_ranks, world_size
from softcot_ds.errors import SoftCoTError
from softcot_ds.files import parse_json, write_atomically
from softcot_ds.planning.hardware import peak_flops
from softcot_ds.progress import Progress
from softcot_ds.recipe import Recipe
from softcot_ds.training.gap import Gap
from softcot_ds.training.metrics import PhaseTimer, TensorBoard, peak_memory_gib
from softcot_ds.training.tags import METRICS, VARIED
from softcot_ds.training.trackers import Trackers
from softcot_ds.training.validation import Validation

_MAX_SKIPPED = 3
"""Steps in a row whose gradient is not finite, upon which a run ends: the next will hardly be better."""


class Record:
    """What is kept and said of a run's steps: ``losses.jsonl``, the curves in TensorBoard, the lines of the log."""

    def __init__(self, recipe: Recipe, examples: Sequence[Example], start: int, trackers: Trackers | None = None):
        """Of a run that goes on after step ``start``; ``examples`` are the training data. What an earlier attempt wrote
        of later steps is forgotten. ``trackers`` have been started."""
        self._recipe = recipe
        self._examples = examples
        self._start = start
        self._per_epoch = steps_per_epoch(len(examples), recipe.training.global_batch_size)
        self._board = TensorBoard(recipe.run_dir, is_main() and "tensorboard" in recipe.trackers, resumed_step=start)
        self._trackers = trackers or Trackers()
        self._board.block("recipe", recipe.to_yaml(), start + 1)
        self._history = History(recipe, start)
        self._validations = Validations(recipe, start)
        self.timer = PhaseTimer(device())
        on_gpu = device().type == "cuda"
        self.window = Window(peak_flops(torch.cuda.get_device_name(), recipe.base.dtype) if on_gpu else None)
        self._progress = Progress(recipe.training.num_steps - start, "step", speaks=is_main())
        self._gap: tuple[int, Gap] | None = None
        """The newest of this process, and its step."""

    def report(
        self, step: int, batch: list[int], learning_rate: float, engine: Any, skipped: bool, last_saved: Path | None
    ) -> None:
        """Look at the steps since the last report, up to ``step``: the only thing that waits for the GPU.

        Args:
            batch: the step's global batch.
            skipped: no optimizer step was taken.

        Raises:
            SoftCoTError: a loss is not finite, or the gradient was not in several steps in a row.
        """
        found, throughput = self.window.read(self._examples, last_saved)
        losses = {step: sum(of_step.values()) for step, of_step in found.items()}
        self._history.add(losses)
        if skipped:
            self._history.skipped.add(step)
        points = scalars(found, throughput, learning_rate, len(self._history.skipped), engine, self.timer)
        self._board.scalars(points, step)
        self._trackers.scalars(points, step)
        if skipped:
            report_skip(name_step(step, batch, self._examples), self._history, last_saved)
        epoch = f"epoch {step / self._per_epoch:.2f}"
        note = f"step {step}  {epoch}  loss {losses[step]:.4f}  lr {learning_rate:.1e}  {rates(throughput)}"
        self._progress.show(step - self._start, note)

    def report_validation(self, step: int, found: Validation) -> None:
        self._board.scalars(found.scalars, step)
        self._trackers.scalars(found.scalars, step)
        self._validations.add(step, found.scalars)
        self._board.prose("samples", found.samples, step)
        if seen := found.seen:
            self._board.histogram("thoughts/norms", np.linalg.norm(seen.thoughts_ND, axis=1), step)
            tokens, vectors = zip(*seen.tokens, strict=True)
            kinds = ["thought"] * len(seen.names) + ["token"] * len(tokens)
            self._board.projector("thoughts", [*seen.thoughts_ND, *vectors], [*seen.names, *tokens], kinds)
        self._gap = (step, found.gap) if found.gap else None
        gap = f", {found.gap} with another question's thoughts" if found.gap else ""
        say(f"step {step}  validation loss {found.scalars['loss/validation']:.4f}{gap}")
        self.window.restart_clock()

    @property
    def best_step(self) -> int | None:
        """The step of the least validation loss so far; None before the first validation."""
        return self._validations.best[0] if self._validations.best else None

    def write(self, engine: Any) -> dict[str, Any]:
        """Write the losses so far, and give the summary of the run that goes into a checkpoint."""
        self._history.write()
        return self._history.summary(engine, self.window.samples_per_second)

    def finish(self, summary: dict[str, Any], adapter: Path) -> None:
        """Say how the run ended."""
        first, last = summary["first_loss"], summary["last_loss"]
        steps = self._recipe.training.num_steps
        self._board.hyperparameters(self._recipe.flat(), VARIED, METRICS, steps)
        self._board.close()
        say(f"loss {first:.4f} to {last:.4f} in {steps} steps; adapter: {adapter}")
        step, least = self._validations.best or (steps, 0.0)
        if step != steps and (better := adapter.with_name(f"step-{step}")).is_dir():
            say(f"the least validation loss was {least:.4f}, at step {step}: {better}")
        if self._gap and (doubt := self._gap[1].doubt):
            say(f"validation at step {self._gap[0]}: {doubt}; see docs/debugging.md")
        if skipped := sorted(self._history.skipped):
            say(f"skipped, as their gradient was not finite: steps {', '.join(map(str, skipped))}")


class Window:
    """Losses and work since the last look; looking is the only thing that waits for the GPU."""

    def __init__(self, peak_flops: float | None) -> None:
        """``peak_flops``: what the GPU of a rank does at most per second, or None: then its utilisation is not told."""
        self._peak_flops = peak_flops
        self._losses: dict[int, dict[str, torch.Tensor]] = {}
        self._batches: dict[int, list[int]] = {}
        self._tokens = 0
        self._operations = 0
        self._seconds = 0.0
        self._all_samples = 0
        self.restart_clock()

    @property
    def samples_per_second(self) -> float:
        """Over all steps of this process, validation and checkpoints left out."""
        return self._all_samples / max(self._seconds, 1e-9)

    def restart_clock(self) -> None:
        """What happened since the last step was no training."""
        self._began = time.perf_counter()

    def add(
        self, step: int, batch: list[int], losses: dict[str, torch.Tensor], num_tokens: float, operations: float
    ) -> None:
        """Add this rank's share of the losses of ``step``, by name, whose global batch is ``batch``."""
        self._losses[step] = losses
        self._batches[step] = batch
        self._tokens += num_tokens
        self._operations += operations

    def read(
        self, examples: Sequence[Example], last_saved: Path | None
    ) -> tuple[dict[int, dict[str, float]], dict[str, float]]:
        """Losses by step since the last reading and by name, and throughput over all ranks. Cross entropy is in nats
        per supervised token.

        Raises:
            SoftCoTError: a loss is not finite; names the step and its problems. Nothing has been saved since.
        """
        values = torch.stack([loss for of_step in self._losses.values() for loss in of_step.values()]).double()
        work = values.new_tensor([float(self._tokens), float(self._operations)])
        *totals, tokens, operations = sum_over_ranks(torch.cat([values, work])).tolist()
        left = iter(totals)
        losses = {step: {name: next(left) for name in of_step} for step, of_step in self._losses.items()}
        for step, of_step in losses.items():
            if not math.isfinite(loss := sum(of_step.values())):
                where = name_step(step, self._batches[step], examples)
                raise SoftCoTError(f"the loss is {loss} at {where}. {_remedy(last_saved)}")
        seconds = time.perf_counter() - self._began
        samples = sum(len(batch) for batch in self._batches.values())
        throughput = {
            "throughput/tokens_per_second": tokens / seconds,
            "throughput/tokens_per_second_per_rank": tokens / seconds / world_size(),
            "throughput/samples_per_second": samples / seconds,
        }
        if self._peak_flops and operations:
            throughput["throughput/mfu"] = operations / seconds / world_size() / self._peak_flops
        self._seconds += seconds
        self._all_samples += samples
        self._losses, self._batches, self._tokens, self._operations = {}, {}, 0, 0
        self.restart_clock()
        return losses, throughput


def rates(throughput: dict[str, float]) -> str:
    """What a rank, which has one GPU where there are any, gets done: for a line of the log."""
    owner = "GPU" if device().type == "cuda" else "rank"
    text = f"{throughput['throughput/tokens_per_second_per_rank']:,.0f} tokens/s per {owner}"
    mfu = throughput.get("throughput/mfu")
    return text if mfu is None else f"{text}  MFU {mfu:.1%}"


def scalars(
    losses: dict[int, dict[str, float]],
    throughput: dict[str, float],
    learning_rate: float,
    num_skipped: int,
    engine: Any,
    timer: PhaseTimer,
) -> dict[str, float]:
    """The points of the TensorBoard curves for the steps since the last ones."""
    norm = engine.get_global_grad_norm()
    names = next(iter(losses.values()))
    means = {name: sum(of_step[name] for of_step in losses.values()) / len(losses) for name in names}
    return {
        "loss/train": sum(means.values()),
        **({f"loss/{name}": mean for name, mean in means.items()} if len(means) > 1 else {}),
        "optimizer/learning_rate": learning_rate,
        "optimizer/gradient_norm": float(norm) if norm is not None else math.nan,
        "optimizer/skipped_steps": num_skipped,
        **throughput,
        **{f"step_time_ms/{name}": 1000 * seconds / len(losses) for name, seconds in timer.read().items()},
        "memory/peak_gib": peak_memory_gib(device()),
    }


def name_step(step: int, batch: list[int], examples: Sequence[Example]) -> str:
    return f"step {step}, whose global batch holds the problems {', '.join(examples[i].problem.id for i in batch)}"


def _remedy(last_saved: Path | None) -> str:
    return (
        f"The last good checkpoint is {last_saved or 'none: it happened before the first'}; lower "
        "training.learning_rate, or look at these problems"
    )


def report_skip(where: str, history: "History", last_saved: Path | None) -> None:
    """Say that no optimizer step was taken in the step that ``where`` names.

    Raises:
        SoftCoTError: it is the last of several in a row.
    """
    if history.skips_in_a_row() < _MAX_SKIPPED:
        say(f"the gradient is not finite at {where}: skipped, the weights stay as they were")
        return
    history.write()
    raise SoftCoTError(
        f"the gradient was not finite in {_MAX_SKIPPED} steps in a row, the last of them {where}. {_remedy(last_saved)}"
    )


def _records(path: Path, start: int) -> list[dict[str, Any]]:
    """What a run has written of steps up to ``start``, one in each line; all ranks call it, and have what rank 0 reads.
    Raises SoftCoTError where it is damaged."""
    return on_main(lambda: _read(path, start))


def _read(path: Path, start: int) -> list[dict[str, Any]]:
    found = []
    remedy = "Training does not need this file: move it away to go on, with the earlier losses left out"
    try:
        lines = path.read_bytes().splitlines() if start and path.exists() else []
    except OSError as error:
        raise SoftCoTError(f"cannot read {path}: {error.strerror}. {remedy}") from error
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
            step, _, _ = int(record["step"]), float(record["loss"]), record.get("skipped")
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise SoftCoTError(f"{path}:{number} is damaged: {error}. {remedy}") from error
        if step <= start:
            found.append(record | {"step": step})
    return found


class Validations:
    """What each validation has found, in ``validation.jsonl`` of the run's directory: its step, the loss, and the loss
    with another question's thoughts and the gap where these are looked at; nats per token."""

    def __init__(self, recipe: Recipe, start: int) -> None:
        self._path = recipe.run_dir / "validation.jsonl"
        self._found = _records(self._path, start)

    def __contains__(self, step: int) -> bool:
        return any(record["step"] == step for record in self._found)

    def add(self, step: int, scalars: dict[str, float]) -> None:
        """Add a validation's points and write the file; all ranks call it. Raises SoftCoTError on a full disk."""
        losses = {tag.removeprefix("loss/validation_"): value for tag, value in scalars.items() if "loss/" in tag}
        self._found.append({"step": step, "loss": losses.pop("loss/validation"), **losses})
        lines = "".join(json.dumps(record) + "\n" for record in self._found)
        on_main(lambda: write_atomically(self._path, lines))

    @property
    def best(self) -> tuple[int, float] | None:
        """The step of the least loss, the first of several, and that loss; None where there is none."""
        losses = [(record["step"], float(record["loss"])) for record in self._found]
        return min(losses, key=lambda of_step: of_step[1], default=None)


class History:
    """The loss of every step, in ``losses.jsonl`` of the run's directory; a resumed run goes on where it was saved.

    A step that was skipped, since its gradient was not finite, has ``"skipped": true`` there.
    """

    def __init__(self, recipe: Recipe, start: int) -> None:
        self._path = recipe.run_dir / "losses.jsonl"
        self._losses: dict[int, float] = {}
        self.skipped: set[int] = set()
        """Steps whose gradient was not finite."""
        for record in _records(self._path, start):
            self._losses[record["step"]] = float(record["loss"])
            self.skipped |= {record["step"]} if record.get("skipped") else set()

    def add(self, losses: dict[int, float]) -> None:
        self._losses |= losses

    def skips_in_a_row(self) -> int:
        """How many of the newest steps were skipped."""
        return sum(1 for _ in takewhile(self.skipped.__contains__, range(max(self._losses), 0, -1)))

    def write(self) -> None:
        """Raises SoftCoTError when the disk is full."""
        lines = "".join(
            json.dumps({"step": step, "loss": loss} | ({"skipped": True} if step in self.skipped else {})) + "\n"
            for step, loss in self._losses.items()
        )
        on_main(lambda: write_atomically(self._path, lines))

    def summary(self, engine: Any, samples_per_second: float) -> dict[str, Any]:
        return {
            "world_size": world_size(),
            "zero_stage": engine.zero_optimization_stage(),
            "device": device().type,
            "steps": max(self._losses),
            "first_loss": self._losses[min(self._losses)],
            "last_loss": self._losses[max(self._losses)],
            "samples_per_second": samples_per_second,
        }
