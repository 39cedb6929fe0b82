"""The training loop."""

from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from signal import Signals
from typing import Any

import torch

from softcot_ds.adapter import adapter_config, train_summary
from softcot_ds.distributed import DataRanks, barrier, device, init_distributed, on_main, say, set_timeout, world_size
from softcot_ds.errors import Stopped
from softcot_ds.experiment import Experiment
from softcot_ds.models.backbone import settled
from softcot_ds.models.partition import data_ranks, whole_shape
from softcot_ds.progress import count
from softcot_ds.recipe import Recipe
from softcot_ds.run_dir import Journal, checkpoint_step
from softcot_ds.thoughts.reader import ThoughtReader
from softcot_ds.training.batches import (
    GlobalBatch,
    accumulation_steps,
    check_micro_batches,
    read_batch,
    training_batches,
)
from softcot_ds.training.checkpoint import forget_moments, load_checkpoint, save_checkpoint
from softcot_ds.training.engine import build_engine, build_model
from softcot_ds.training.memory import expected_memory
from softcot_ds.training.metrics import PhaseTimer
from softcot_ds.training.profiling import StepProfiler
from softcot_ds.training.record import Record, Validations
from softcot_ds.training.resume import agreed_start, sole_trainer
from softcot_ds.training.schedule import learning_rate_at
from softcot_ds.training.start import Start
from softcot_ds.training.stop import StopRequest
from softcot_ds.training.trackers import Trackers, require_trackers
from softcot_ds.training.validation import Validator


def train(recipe: Recipe) -> None:
    """Train from the newest complete checkpoint of the run, or from the start, to its last step.

    Raises:
        SoftCoTError: data, cache or run directory do not fit the recipe; the ranks differ; the run is being trained by
            another process; a tracker is not installed, or refuses a run that begins; the loss is not finite, or the
            gradient was not in several steps in a row.
        Stopped: a signal asked for it; a checkpoint has been saved.
    """
    init_distributed(recipe.training.timeout_minutes)
    on_main(lambda: require_trackers(recipe))
    with sole_trainer(recipe), Trackers() as trackers:
        _train(recipe, trackers)


def _train(recipe: Recipe, trackers: Trackers) -> None:
    experiment = _read(recipe)
    recipe, splits, prompts = experiment.recipe, experiment.splits, experiment.task.prompt_file
    config = recipe.training
    folder = agreed_start(experiment)
    start = checkpoint_step(folder) if folder else 0
    is_due = partial(_is_due, config.validate_every, config.num_steps if splits.validation else 0)
    owed = is_due(start) and start not in Validations(recipe, start)
    if start >= config.num_steps and not owed:
        return say(f"{recipe.name}: trained to step {start} before; adapter: {folder}")
    trackers.start(recipe, start)

    reader = ThoughtReader.open(recipe, [*splits.train, *splits.validation])
    adapter = on_main(lambda: adapter_config(experiment))
    recipe = settled(recipe)
    ranks = data_ranks(recipe.backbone.partition, recipe.backbone.group_size)
    engine = _prepare_engine(experiment, recipe, reader, ranks, folder)
    make_batch = partial(read_batch, reader=reader, pad_id=experiment.base_pad_id, model=engine.module)
    batches = training_batches(splits.train, make_batch, recipe, ranks, start, experiment.example_at)
    validator = Validator(engine, splits.validation, make_batch, experiment, ranks)
    stop = StopRequest()
    barrier()  # a signal from here on is heard by every rank; before, it would end those alone that do not listen yet
    record, profiler = Record(recipe, splits.train, start, trackers), StepProfiler(recipe)
    summary = train_summary(folder) if folder else {}
    if owed:  # it was stopped, or killed, before or in this validation
        record.report_validation(start, validator.run())

    for step, batch in enumerate(islice(batches, config.num_steps - start), start + 1):
        learning_rate = learning_rate_at(step, config)
        if engine.module.begins_anew(step, recipe):
            forget_moments(engine)
        with profiler.step(step):
            losses, *work = _take_step(engine, batch, learning_rate, ranks, record.timer)
        record.window.add(step, batch.indices, losses, *work)

        # DeepSpeed takes no step, on any rank, when the norm of the gradient is not finite; it looks in every step.
        skipped = not engine.was_step_applied()
        last = step == config.num_steps
        stopping = stop.agreed_signal()
        saving = step % config.save_every == 0 or last or stopping is not None
        # A job that is about to be taken away has no time for more than the checkpoint.
        validating = is_due(step) and stopping is None
        pausing = saving or validating or profiler.ends_with(step)  # for what may take longer than a step
        if step % config.log_every == 0 or step == start + 1 or pausing or skipped:
            record.report(step, batch.indices, learning_rate, engine, skipped, folder)
        if pausing:
            set_timeout(config.timeout_minutes)
        if saving:
            summary = record.write(engine) | ({"own_targets": asdict(splits.own)} if splits.own else {})
            folder = save_checkpoint(engine, recipe, adapter.at_step(step), prompts, summary, record.best_step)
        if stopping is not None and not last:
            _stop(recipe, stopping, step, folder)
        if validating:
            record.report_validation(step, validator.run())
        if profiler.ends_with(step):
            profiler.write()
        if pausing or step == start + 1:
            set_timeout(min(config.step_timeout_minutes, config.timeout_minutes))
            record.window.restart_clock()
    record.finish(summary, folder)


def _read(recipe: Recipe) -> Experiment:
    """Read the data of a training, and say what is to be said of it."""
    experiment = Experiment(recipe)
    experiment.require_training()
    experiment.count_epochs()
    for note in experiment.splits.notes:
        say(f"data: {note}")
    return experiment


def _is_due(every: int, last: int, step: int) -> bool:
    """Whether a validation follows a step, of which ``last`` is the last one; none does where that is 0."""
    return 0 < step <= last and (step % every == 0 or step == last)


def _prepare_engine(
    experiment: Experiment, recipe: Recipe, reader: ThoughtReader, ranks: DataRanks, resume_from: Path | None
) -> Any:
    """The engine, with the weights and moments of the checkpoint that the run goes on from, if there is one."""
    splits = experiment.splits
    check_micro_batches(splits.train, recipe.training, ranks)
    # Before the models are there: to sum up the states takes memory, too.
    start = Start.again(resume_from) if resume_from else Start.anew(experiment, reader, splits.train)
    model = build_model(recipe, experiment, start)
    num_trained = sum(whole_shape(parameter).numel() for parameter in model.trained().values())
    engine = build_engine(model, recipe)
    if resume_from:
        load_checkpoint(engine, resume_from)
        say(f"resuming from {resume_from}")
    say(
        f"{recipe.name}: {len(splits.train)} training and {len(splits.validation)} validation problems, "
        f"{num_trained:,} trained parameters, {count(world_size(), 'rank')} ({device().type}), ZeRO stage "
        f"{engine.zero_optimization_stage()}, global batch {recipe.training.global_batch_size}"
    )
    read_once = engine.module.num_shared
    lengths = [example.length - len(example.assistant.positions) - read_once for example in splits.train]
    tokens = sum(lengths) / len(lengths)
    per_rank = tokens * recipe.training.global_batch_size / ranks.count
    micro_batches = count(accumulation_steps(recipe.training, ranks), "micro-batch", "micro-batches")
    if recipe.training.micro_batch_tokens:
        micro_batches = f"micro-batches of at most {recipe.training.micro_batch_tokens:,} tokens"
    say(
        f"per rank and step: {micro_batches}, {per_rank:,.0f} tokens on average, "
        f"without padding, thoughts and the {read_once} tokens of each prompt that are read once"
    )
    say(f"memory expected per rank: {expected_memory(engine)}; activations and buffers come on top")
    return engine


def _take_step(
    engine: Any, batch: GlobalBatch, learning_rate: float, ranks: DataRanks, timer: PhaseTimer
) -> tuple[dict[str, torch.Tensor], float, float]:
    """One optimizer step; returns this rank's share of each of the losses, of the tokens, and of the floating-point
    operations.

    What is trained is the sum of the losses. Each is a mean over the whole global batch, wherever it is computed.
    DeepSpeed divides by the ranks, which hold different numbers of tokens: undo that here.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    sizes = [batch.sizes[each] * ranks.alike for each in engine.module.losses.values()]
    parts, num_tokens, operations = [], 0, 0
    for number, make_batch in enumerate(batch.micro_batches, 1):
        engine.set_gradient_accumulation_boundary(number == len(batch.micro_batches))
        with timer.phase("data"):
            micro = make_batch()
            num_tokens += micro.num_tokens
            operations += engine.module.operations(micro)
            micro = micro.to(device())
        with timer.phase("forward"):
            sums = torch.atleast_1d(engine(micro))
            losses = torch.stack([part / size for part, size in zip(sums, sizes, strict=True)])
            loss = losses.sum()
        with timer.phase("backward"):
            # Where the loss is not finite, this makes the gradient NaN also if it were not: so no step is taken.
            engine.backward(loss * (world_size() + 0 * loss.detach()))
        with timer.phase("optimizer"):
            engine.step()  # the optimizer moves on the last one
        parts.append(losses.detach())
    total = sum(parts[1:], start=parts[0])
    return dict(zip(engine.module.losses, total, strict=True)), num_tokens / ranks.alike, operations / ranks.alike


def _stop(recipe: Recipe, signal: Signals, step: int, saved: Path) -> None:
    """Raises Stopped, with a line in the run's journal."""
    on_main(partial(Journal(recipe.run_dir).add, "stop", signal=signal.name, step=step))
    raise Stopped(
        f"stopped by {signal.name} after step {step}; saved {saved}. The same command goes on from there", signal
    )
