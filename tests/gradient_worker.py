"""Run by test_training_steps.py on several ranks: the losses of some steps, and the first one's gradient.

The gradient is the one that DeepSpeed has summed over micro-batches and ranks. Of the first micro-batch, also the bytes
that its forward pass holds on the first rank. A variant is overrides of the recipe and words: ``apart`` for tokens and
thoughts one by one, ``lookup`` for tokens that the base's own module embeds as well, ``from:FILE`` for weights to start
from.
"""

import sys
from functools import partial
from itertools import islice

import torch
import triton
from deepspeed.utils import safe_get_full_grad
from kept import Kept
from safetensors.torch import load_file, save_file
from softcot_kernels import reference

from softcot_ds.distributed import init_distributed, is_main, shut_down, sum_over_ranks, world_size
from softcot_ds.experiment import Experiment
from softcot_ds.models.partition import data_ranks
from softcot_ds.recipe import load_recipe
from softcot_ds.thoughts.reader import ThoughtReader
from softcot_ds.training.batches import read_batch, training_batches
from softcot_ds.training.engine import build_engine, build_model
from softcot_ds.training.start import Start

recipe_path, output, *variants = (argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
init_distributed(5)
if triton.knobs.runtime.interpret:  # then kernels must do it, not what takes their place on a CPU
    del reference.thought_embedding, reference.weight_grads
results = {}
for variant in variants:
    overrides = variant.split()
    recipe = load_recipe(recipe_path, [text for text in overrides if "=" in text])
    experiment = Experiment(recipe)
    examples = experiment.splits.train
    reader = ThoughtReader.open(recipe, examples)
    ranks = data_ranks(recipe.backbone.partition, recipe.backbone.group_size)
    files = [text.removeprefix("from:") for text in overrides if text.startswith("from:")]
    model = build_model(recipe, experiment, Start(load_file(files[0])) if files else None)
    if "apart" in overrides:
        model.embed = None
    if "lookup" in overrides:
        model.table = model.embed = None
    engine = build_engine(model, recipe)
    make_batch = partial(read_batch, reader=reader, pad_id=experiment.base_pad_id, model=engine.module)
    batches = training_batches(examples, make_batch, recipe, ranks, 0, experiment.example_at)
    losses, micro_batch_counts = [], []
    for batch in islice(batches, recipe.training.steps):
        total = 0.0
        for number, make in enumerate(batch.micro_batches, 1):
            engine.set_gradient_accumulation_boundary(number == len(batch.micro_batches))
            tensors = make()
            with Kept() as kept:
                sums, kinds = torch.atleast_1d(engine(tensors)), engine.module.losses.values()
                parts = [part / (batch.sizes[of] * ranks.alike) for part, of in zip(sums, kinds, strict=True)]
                loss = sum(parts)
            results.setdefault(f"{variant}/kept", torch.tensor(kept.bytes(engine.module)))
            engine.backward(loss * world_size())
            total = total + loss.detach()
            if not losses and engine.is_gradient_accumulation_boundary():
                for name, parameter in engine.module.trained().items():
                    results[f"{variant}/{name}"] = safe_get_full_grad(parameter).float().contiguous()
            engine.step()
        losses.append(total)
        micro_batch_counts.append(len(batch.micro_batches))
    if engine.module.prefixed is not None:
        results[f"{variant}/fuses_loss"] = torch.tensor(engine.module.prefixed.fuses_loss)
    results[f"{variant}/fuses_embedding"] = torch.tensor(getattr(engine.module, "embed", None) is not None)
    results[f"{variant}/micro_batches"] = torch.tensor(micro_batch_counts)
    results[f"{variant}/losses"] = sum_over_ranks(torch.stack(losses))
if is_main():
    save_file(results, output)
shut_down()
