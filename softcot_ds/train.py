"""Train the projection: ``softcot-ds train RECIPE``; on many ranks ``deepspeed --module softcot_ds.train RECIPE``."""

import sys
from functools import partial
from itertools import islice

from torch.utils.data import DataLoader

from softcot_ds.adapter import adapter_config
from softcot_ds.checkpoint import load_checkpoint, save_checkpoint
from softcot_ds.command import recipe_command
from softcot_ds.data import Batch
from softcot_ds.distributed import barrier, device, init_distributed, is_main, on_main, say, set_timeout, world_size
from softcot_ds.engine import accumulation_steps, build_engine, build_model
from softcot_ds.errors import Stopped
from softcot_ds.experiment import Experiment
from softcot_ds.metrics import PhaseTimer, TensorBoard, flatten
from softcot_ds.progress import Progress
from softcot_ds.recipe import Recipe
from softcot_ds.record import History, Window, name_step, report_skip, scalars
from softcot_ds.resume import agreed_start, sole_trainer
from softcot_ds.run_dir import Journal, checkpoint_step
from softcot_ds.schedule import learning_rate_at
from softcot_ds.stop import StopRequest
from softcot_ds.thought_reader import ThoughtReader
from softcot_ds.training_batches import TrainingBatches
from softcot_ds.validation import Validator


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

    batches = TrainingBatches(
        splits.train, reader, experiment.base_pad_id, model.num_shared, recipe, start, accumulation
    )
    on_gpu = device().type == "cuda"  # from pinned memory, a copy to the GPU does not wait for the work before it
    loader = DataLoader(
        batches, batch_sampler=batches.of_this_rank(), collate_fn=lambda batch: batch, pin_memory=on_gpu
    )
    micro_batch = iter(loader)
    validator = Validator(engine, splits.validation, reader, experiment)
    stop = StopRequest()
    barrier()  # a signal from here on is heard by every rank; before, it would end those alone that do not listen yet
    board = TensorBoard(recipe.run_dir / "tensorboard", is_main(), resumed_step=start)
    board.text("recipe", recipe.to_yaml(), start + 1)
    history = History(recipe, start)
    timer = PhaseTimer(device())
    window = Window()
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
            board.scalars(scalars(losses, throughput, learning_rate, len(history.skipped), engine, timer), step)
            if skipped:
                report_skip(name_step(step, batch, splits.train), history, folder)
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
            validated, samples = validator.run()
            board.scalars(validated, step)
            board.text("samples", samples, step)
            say(f"step {step}  validation loss {validated['loss/validation']:.4f}")
        if saving or validating or step == start + 1:
            set_timeout(min(config.step_timeout_minutes, config.timeout_minutes))
            window.restart_clock()

    board.hyperparameters(flatten(recipe.model_dump(mode="json")), {"loss/train": summary["last_loss"]}, config.steps)
    board.close()
    say(f"loss {summary['first_loss']:.4f} to {summary['last_loss']:.4f} in {config.steps} steps; adapter: {folder}")
    if history.skipped:
        say(f"skipped, as their gradient was not finite: steps {', '.join(map(str, sorted(history.skipped)))}")


main = recipe_command("train", "Train the projection of a recipe.", train)

if __name__ == "__main__":
    sys.exit(main())
