"""The DeepSpeed engine around the models and what is trained of them or beside them."""

from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.runtime import bf16_optimizer

from softcot_ds.data.batches import token_ids
from softcot_ds.distributed import device, say
from softcot_ds.experiment import Experiment
from softcot_ds.methods.base import Given, Method, method_class
from softcot_ds.methods.trial import check_model, why_not_fast
from softcot_ds.models.assistant import load_to_think, states_layer
from softcot_ds.models.backbone import load_frozen, partition_that_fits
from softcot_ds.models.fused_layers import fuse_layers
from softcot_ds.models.partition import engine_config, keep_layers, make_layers_leaves, with_limits
from softcot_ds.models.reading import PADDING
from softcot_ds.planning.fit import spare_to_train
from softcot_ds.progress import count
from softcot_ds.recipe import Recipe
from softcot_ds.training.start import Start


def build_model(recipe: Recipe, experiment: Experiment, start: Start | None = None) -> Method:
    """The recipe's method around its models, with weights that come from ``start`` or from the seed alone."""
    method, config = method_class(recipe.method), engine_config(recipe)
    partition, group_size = recipe.backbone.partition, recipe.backbone.group_size
    base = load_frozen(recipe.base, partition, device(), config, group_size, recipe.backbone.bits)
    assistant = None
    if recipe.thoughts.source == "online" and method.needs_states:
        # Where the base is in slices, the engine is of another stage than weights that are gathered need.
        partition = partition_that_fits(recipe.assistant, partition, group_size, otherwise="none")
        assistant = load_to_think(recipe, partition, device(), config, group_size)
    if not method.changes_base:  # what comes here is chosen for weights that stay as they are
        spare_of = partial(spare_to_train, recipe, experiment.splits)
        if kept := keep_layers(base, recipe.backbone.resident_gib, spare_of):
            say(f"{count(kept, 'layer')} of the base held whole on each rank")
        if recipe.backbone.use_liger_kernel and (line := fuse_layers(base)):
            say(line)
    examples = [*experiment.splits.train, *experiment.splits.validation]
    model = method.build(
        Given(
            recipe,
            base,
            assistant,
            experiment.widths,
            examples,
            token_ids(examples, experiment.base_pad_id) | {PADDING},  # the validation's samples are prompts, too
            experiment.splits.assistant_inputs(),
            start.conditioning if start is not None else None,
        )
    )
    if start is not None:
        start.put_into(model)
    return model.settled()


def build_engine(model: Method, recipe: Recipe) -> Any:
    """DeepSpeed's engine with AdamW over what is trained and nothing else.

    The models are tried here, before the first step: a base that the fast step does not suit takes the full one.

    Raises:
        SoftCoTError: a model cannot be what the recipe makes of it.
    """
    config = recipe.training
    optimizer = torch.optim.AdamW(
        model.trained().values(),
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
    )
    models = [part for part in (model.base, model.assistant) if part is not None]
    for part in models:
        # DeepSpeed reduces the gradients in a leaf when its backward hook runs, which for a first layer is too early.
        if not any(parameter.requires_grad for parameter in part.parameters()):
            make_layers_leaves(part)
    settings = with_limits(engine_config(recipe), *models)
    bf16_optimizer.see_memory_usage = lambda *_, **__: None  # it prints a dozen lines, whatever the level of its log
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    check_model(model.base, "base", recipe.base.model)
    if model.assistant is not None:
        check_model(model.assistant, "assistant", recipe.assistant.model, states_layer(recipe))
    if model.prefixed is not None and (reason := why_not_fast(model.base, model.prefixed)):
        model.use_full_step(reason)
    return engine
