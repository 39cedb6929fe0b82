"""Train the projection: ``softcot-ds train RECIPE``; on many ranks ``deepspeed --module softcot_ds.train RECIPE``."""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from softcot_ds.adapter import adapter_config
from softcot_ds.checkpoint import load_checkpoint, save_checkpoint
from softcot_ds.command import STOP_SIGNALS, recipe_command
from softcot_ds.data import Batch, Example, collate, global_batches, micro_batches, order_by_prefix
from softcot_ds.distributed import (
    barrier,
    device,
    init_distributed,
    is_main,
    max_over_ranks,
    on_main,
    rank,
    say,
    set_timeout,
    sum_over_ranks,
    world_size,
)
from softcot_ds.engine import accumulation_steps, build_engine, build_model
from softcot_ds.errors import SoftCoTError, Stopped
from softcot_ds.experiment import Experiment
from softcot_ds.files import parse_json, write_atomically
from softcot_ds.metrics import PhaseTimer, TensorBoard, flatten, peak_memory_gib
from softcot_ds.progress import Progress
from softcot_ds.recipe import Recipe, TrainingConfig
from softcot_ds.resume import agreed_start, sole_trainer
from softcot_ds.run_dir import Journal, checkpoint_step
from softcot_ds.thought_reader import ThoughtReader
from softcot_ds.validation import Validator

_MAX_SKIPPED = 3
"""Steps in a row whose gradient is not finite, upon which a run ends: the next will hardly be better."""


def train(recipe: Recipe) -> None:
    """Train from the newest complete checkpoint of the run, or from the start, to ``training.steps``.

    Raises:
        SoftCoTError: data, cache or run directory do not fit the recipe; the ranks differ; the run is being trained by
            another process; the loss is not finite, or the gradient was not in several steps in a row.
        Stopped: a signal asked for it; a checkpoint has been saved.
    """
    init_distributed(recipe.training.timeout_minutes)
    with sole_trainer(recipe):
        _train(recipe)


def _train(recipe: Recipe) -> None:
    config = recipe.training
    experiment = Experiment(recipe)
    splits = experiment.splits
    for note in splits.notes:
        say(f"data: {note}")

    resume_from = agreed_start(experiment)
    start = checkpoint_step(resume_from) if resume_from else 0
    if start >= config.steps:
        say(f"{recipe.name}: trained to step {start} before; adapter: {resume_from}")
        return

    reader = ThoughtReader.open(recipe, [*splits.train, *splits.validation])
    adapter = on_main(lambda: adapter_config(experiment))
    accumulation = accumulation_steps(recipe)
    model = build_model(
        recipe, experiment, resume_from / "projection.safetensors" if resume_from else recipe.projection.init_from
    )
    num_trained = sum(p.numel() for p in model.projection.parameters())
    engine = build_engine(model, recipe, accumulation)
    if resume_from:
        load_checkpoint(engine, resume_from)
        say(f"resuming from {resume_from}")
    say(
        f"{recipe.name}: {len(splits.train)} training and {len(splits.validation)} validation problems, "
        f"{num_trained:,} trained parameters, {world_size()} ranks ({device().type}), ZeRO stage "
        f"{engine.zero_optimization_stage()}, global batch {config.global_batch_size}, {accumulation} micro-batches "
        "per rank and step"
    )

    batches = _Batches(splits.train, reader, experiment.base_pad_id, model.num_shared, recipe, start, accumulation)
    on_gpu = device().type == "cuda"  # from pinned memory, a copy to the GPU does not wait for the work before it
    loader = DataLoader(
        batches, batch_sampler=batches.of_this_rank(), collate_fn=lambda batch: batch, pin_memory=on_gpu
    )
    micro_batch = iter(loader)
    validator = Validator(engine, splits.validation, reader, experiment)
    stop = _StopRequest()
    barrier()  # a signal from here on is heard by every rank; before, it would end those alone that do not listen yet
    board = TensorBoard(recipe.run_dir / "tensorboard", is_main(), resumed_step=start)
    board.text("recipe", recipe.to_yaml(), start + 1)
    history = _History(recipe, start)
    timer = PhaseTimer(device())
    window = _Window()
    progress = Progress(config.steps - start, "steps")
    folder = resume_from

    for step, batch in enumerate(islice(batches.schedule(), config.steps - start), start + 1):
        learning_rate = learning_rate_at(step, config)
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate
        # The loss is the mean over the supervised tokens of the whole global batch, wherever they are computed.
        # DeepSpeed divides by ranks and micro-batches, which hold different numbers of tokens: undo that here.
        num_labels = sum(len(splits.train[index].target_ids) for index in batch)
        for _ in range(accumulation):
            with timer.phase("data"):
                micro: Batch = next(micro_batch)
                num_tokens = micro.num_tokens
                micro = micro.to(device())
            with timer.phase("forward"):
                loss = engine(micro) / num_labels
            with timer.phase("backward"):
                # Where the loss is not finite, this makes the gradient NaN also if it were not: so no step is taken.
                engine.backward(loss * (world_size() * accumulation + 0 * loss.detach()))
            with timer.phase("optimizer"):
                engine.step()
            window.add(step, batch, loss.detach(), num_tokens)

        # DeepSpeed takes no step, on any rank, when the norm of the gradient is not finite; it looks in every step.
        skipped = not engine.was_step_applied()
        last = step == config.steps
        stopping = stop.agreed_signal()
        saving = step % config.save_every == 0 or last or stopping is not None
        # A job that is about to be taken away has no time for more than the checkpoint.
        validating = bool(splits.validation) and (step % config.validate_every == 0 or last) and stopping is None
        if step % config.log_every == 0 or step == start + 1 or validating or saving or skipped:
            losses, throughput = window.read(splits.train, folder)
            history.add(losses)
            if skipped:
                history.skipped.add(step)
            board.scalars(_scalars(losses, throughput, learning_rate, len(history.skipped), engine, timer), step)
            if skipped:
                _report_skip(_name_step(step, batch, splits.train), history, folder)
            if line := progress.line(step - start):
                say(f"step {step}  loss {losses[step]:.4f}  lr {learning_rate:.1e}  {line}")
        if saving or validating:
            set_timeout(config.timeout_minutes)
        if saving:
            history.write()
            summary = history.summary(engine, window.samples_per_second)
            folder = save_checkpoint(engine, recipe, adapter.at_step(step), experiment.task.prompt_file, summary)
        if stopping is not None and not last:
            on_main(partial(Journal(recipe.run_dir).add, "stop", signal=stopping.name, step=step))
            raise Stopped(
                f"stopped by {stopping.name} after step {step}; saved {folder}. The same command goes on from there",
                stopping,
            )
        if validating:
            scalars, samples = validator.run()
            board.scalars(scalars, step)
            board.text("samples", samples, step)
            say(f"step {step}  validation loss {scalars['loss/validation']:.4f}")
        if saving or validating or step == start + 1:
            set_timeout(min(config.step_timeout_minutes, config.timeout_minutes))
            window.restart_clock()

    board.hyperparameters(flatten(recipe.model_dump(mode="json")), {"loss/train": summary["last_loss"]}, config.steps)
    board.close()
    say(f"loss {summary['first_loss']:.4f} to {summary['last_loss']:.4f} in {config.steps} steps; adapter: {folder}")
    if history.skipped:
        say(f"skipped, as their gradient was not finite: steps {', '.join(map(str, sorted(history.skipped)))}")


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """Learning rate of optimizer step ``step`` (from 1); above zero in every step.

    With W warm-up steps of S in all: ``step / W`` of the peak up to step W. Then the schedule, of which step n has done
    ``(n - 1 - W) / (S - W)``: the peak at step W + 1, and min_lr_ratio of it at step S + 1, which is no more taken.
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    done = (step - 1 - config.warmup_steps) / (config.steps - config.warmup_steps)
    shape = {"cosine": math.cos(math.pi / 2 * done) ** 2, "linear": 1 - done, "constant": 1.0}[config.schedule]
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)


class _Batches(Dataset):
    """The training data as this rank's micro-batches."""

    def __init__(
        self,
        examples: Sequence[Example],
        reader: ThoughtReader,
        pad_id: int,
        num_shared: int,
        recipe: Recipe,
        start: int,
        accumulation: int,
    ) -> None:
        self.examples = examples
        self.reader = reader
        self.pad_id = pad_id
        self.num_shared = num_shared
        self.recipe = recipe
        self.start = start
        self.accumulation = accumulation

    def schedule(self) -> Iterator[list[int]]:
        """The global batches from the first step of this run on."""
        lengths = [example.length for example in self.examples]
        batches = global_batches(lengths, self.recipe.training.global_batch_size, self.recipe.seed)
        return islice(batches, self.start, None)

    def of_this_rank(self) -> "_MicroBatchIndices":
        return _MicroBatchIndices(self)

    def __getitems__(self, indices: list[int]) -> Batch:
        examples = [self.examples[index] for index in indices]
        batch = collate(examples, self.pad_id, self.num_shared)
        batch.thoughts = self.reader.read(examples)
        return batch


class _MicroBatchIndices:
    """Indices of each micro-batch of this rank, for a DataLoader."""

    def __init__(self, batches: _Batches) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches.schedule():
            by_prefix = order_by_prefix(batch, self._batches.examples)
            yield from micro_batches(by_prefix, rank(), world_size(), self._batches.accumulation)


class _Window:
    """Losses and token counts since the last look; looking is the only thing that waits for the GPU."""

    def __init__(self) -> None:
        self._losses: dict[int, torch.Tensor] = {}
        self._batches: dict[int, list[int]] = {}
        self._tokens = 0
        self._samples = 0
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

    def add(self, step: int, batch: list[int], loss: torch.Tensor, num_tokens: int) -> None:
        """Add one micro-batch's share of the loss of ``step``, whose global batch is ``batch``."""
        self._losses[step] = self._losses[step] + loss if step in self._losses else loss
        self._batches[step] = batch
        self._tokens += num_tokens

    def read(self, examples: Sequence[Example], last_saved: Path | None) -> tuple[dict[int, float], dict[str, float]]:
        """Loss per step since the last reading, nats per supervised token, and throughput over all ranks.

        Raises:
            SoftCoTError: a loss is not finite; names the step and its problems. Nothing has been saved since.
        """
        values = torch.stack(list(self._losses.values())).double()
        totals = sum_over_ranks(torch.cat([values, values.new_tensor([float(self._tokens)])])).tolist()
        losses = dict(zip(self._losses, totals, strict=False))
        for step, loss in losses.items():
            if not math.isfinite(loss):
                where = _name_step(step, self._batches[step], examples)
                raise SoftCoTError(f"the loss is {loss} at {where}. {_remedy(last_saved)}")
        seconds = time.perf_counter() - self._began
        samples = sum(len(batch) for batch in self._batches.values())
        throughput = {
            "throughput/tokens_per_second": totals[-1] / seconds,
            "throughput/samples_per_second": samples / seconds,
        }
        self._seconds += seconds
        self._all_samples += samples
        self._losses, self._batches, self._tokens = {}, {}, 0
        self.restart_clock()
        return losses, throughput


def _scalars(
    losses: dict[int, float],
    throughput: dict[str, float],
    learning_rate: float,
    num_skipped: int,
    engine: Any,
    timer: PhaseTimer,
) -> dict[str, float]:
    """The points of the TensorBoard curves for the steps since the last ones."""
    norm = engine.get_global_grad_norm()
    return {
        "loss/train": sum(losses.values()) / len(losses),
        "optimizer/learning_rate": learning_rate,
        "optimizer/gradient_norm": float(norm) if norm is not None else math.nan,
        "optimizer/skipped_steps": num_skipped,
        **throughput,
        **{f"step_time_ms/{name}": 1000 * seconds / len(losses) for name, seconds in timer.read().items()},
        "memory/peak_gib": peak_memory_gib(device()),
    }


def _name_step(step: int, batch: list[int], examples: Sequence[Example]) -> str:
    return f"step {step}, whose global batch holds the problems {', '.join(examples[i].problem.id for i in batch)}"


def _remedy(last_saved: Path | None) -> str:
    return (
        f"The last good checkpoint is {last_saved or 'none: it happened before the first'}; lower "
        "training.learning_rate, or look at these problems"
    )


def _report_skip(where: str, history: "_History", last_saved: Path | None) -> None:
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


class _History:
    """The loss of every step, in ``losses.jsonl`` of the run's directory; a resumed run goes on where it was saved.

    A step that was skipped, since its gradient was not finite, has ``"skipped": true`` there.
    """

    def __init__(self, recipe: Recipe, start: int) -> None:
        self._path = recipe.run_dir / "losses.jsonl"
        self._losses: dict[int, float] = {}
        self.skipped: set[int] = set()
        """Steps whose gradient was not finite."""
        if start and self._path.exists():
            remedy = "Training does not need this file: move it away to go on, with the earlier losses left out"
            try:
                lines = self._path.read_bytes().splitlines()
            except OSError as error:
                raise SoftCoTError(f"cannot read {self._path}: {error.strerror}. {remedy}") from error
            for number, line in enumerate(lines, 1):
                try:
                    record = parse_json(line)
                    step, loss, skipped = int(record["step"]), float(record["loss"]), bool(record.get("skipped"))
                except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
                    raise SoftCoTError(f"{self._path}:{number} is damaged: {error}. {remedy}") from error
                if step <= start:
                    self._losses[step] = loss
                    self.skipped |= {step} if skipped else set()

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


class _StopRequest:
    """Remembers a signal to stop; the loop looks after each step, so that all ranks stop at the same one."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._signal = 0
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: Any) -> None:
        if os.getpid() != self._pid:
            return  # a forked child: a batch system signals those too
        # The first counts, as launchers follow up with SIGTERM; but not against the notice that the run goes on later.
        if not self._signal or number == signal.SIGUSR1:
            self._signal = number

    def agreed_signal(self) -> signal.Signals | None:
        """The signal to stop for, the same on all ranks, or None; the notice of a time limit before others."""
        order = 1 + STOP_SIGNALS.index(self._signal) if self._signal else 0
        agreed = max_over_ranks(order)
        return STOP_SIGNALS[agreed - 1] if agreed else None


main = recipe_command("train", "Train the projection of a recipe.", train)

if __name__ == "__main__":
    sys.exit(main())
