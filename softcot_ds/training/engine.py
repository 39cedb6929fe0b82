"""The DeepSpeed engine around the frozen base and the trained projection."""

from functools import partial
from typing import Any

import deepspeed
import torch
from transformers import PreTrainedModel

from softcot_ds.data.batches import token_ids
from softcot_ds.distributed import agreed, device, say
from softcot_ds.errors import SoftCoTError
from softcot_ds.experiment import Experiment
from softcot_ds.methods.base import Projection, projection_class
from softcot_ds.methods.soft_thoughts import SoftCoT
from softcot_ds.methods.trial import check_model, why_not_fast
from softcot_ds.models.assistant import load_to_think, states_layer
from softcot_ds.models.backbone import load_frozen, partition_that_fits
from softcot_ds.models.fused_layers import fuse_layers
from softcot_ds.models.partition import engine_config, keep_layers, make_layers_leaves, with_limits
from softcot_ds.models.reading import PADDING
from softcot_ds.models.shared_prefix import common_prefix
from softcot_ds.planning.fit import spare_to_train
from softcot_ds.progress import count
from softcot_ds.recipe import Recipe
from softcot_ds.training.start import Start


def build_model(recipe: Recipe, experiment: Experiment, start: Start | None = None) -> SoftCoT:
    """The frozen base with the projection, whose weights come from ``start`` or from the seed alone."""
    config = engine_config(recipe)
    partition, group_size = recipe.backbone.partition, recipe.backbone.group_size
    base = load_frozen(recipe.base, partition, device(), config, group_size, recipe.backbone.bits)
    assistant = None
    if recipe.thoughts.source == "online" and projection_class(recipe.projection.kind).needs_states:
        # Where the base is in slices, the engine is of another stage than weights that are gathered need.
        partition = partition_that_fits(recipe.assistant, partition, group_size, otherwise="none")
        assistant = load_to_think(recipe, partition, device(), config, group_size)
    if kept := keep_layers(base, recipe.backbone.resident_gib, partial(spare_to_train, recipe, experiment.splits)):
        say(f"{count(kept, 'layer')} of the base held whole on each rank")
    if recipe.backbone.use_liger_kernel and (line := fuse_layers(base)):
        say(line)
    projection = build_projection(recipe, experiment, base)
    if start is not None:
        start.put_into(projection, base)
    training = recipe.training
    examples = [*experiment.splits.train, *experiment.splits.validation]
    shared_ids = common_prefix([example.prefix_ids for example in examples])
    model = SoftCoT(
        base,
        projection,
        assistant,
        training.step,
        training.activation_checkpointing,
        shared_ids,
        token_ids(examples, experiment.base_pad_id) | {PADDING},  # the validation's samples are prompts, too
        experiment.splits.assistant_inputs(),
        start.conditioning if start is not None else None,
    )
    # DeepSpeed takes a model of one dtype and makes the float32 master copy of what is trained itself.
    projection.to(device=device(), dtype=base.dtype)
    return model


def build_projection(recipe: Recipe, experiment: Experiment, base: PreTrainedModel) -> Projection:
    """A new projection in float32, initialized from the recipe's seed: the same on every rank.

    Raises:
        SoftCoTError: it has state that no checkpoint would hold.
    """
    assistant_width, base_width = experiment.widths
    generator_state = torch.get_rng_state()
    torch.manual_seed(recipe.seed)
    projection = projection_class(recipe.projection.kind).create(recipe, assistant_width, base, base_width)
    torch.set_rng_state(generator_state)
    if lost := sorted(projection.state_dict().keys() - dict(projection.named_parameters()).keys()):
        raise SoftCoTError(
            f"projection.kind={recipe.projection.kind}: checkpoints hold parameters, and {', '.join(lost)} would be "
            "lost; make parameters of these buffers, or register them with persistent=False"
        )
    return projection


def build_engine(model: SoftCoT, recipe: Recipe) -> Any:
    """DeepSpeed's engine with AdamW over the projection's parameters and nothing else.

    The models are tried here, before the first step: a base that the fast step does not suit takes the full one.

    Raises:
        SoftCoTError: a model cannot be what the recipe makes of it.
    """
    config = recipe.training
    optimizer = torch.optim.AdamW(
        model.projection.parameters(),
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
    )
    frozen = [part for part in (model.base, model.assistant) if part is not None]
    for part in frozen:
        make_layers_leaves(part)
    settings = with_limits(engine_config(recipe), *frozen)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    check_model(model.base, "base", recipe.base.model)
    if model.assistant is not None:
        check_model(model.assistant, "assistant", recipe.assistant.model, states_layer(recipe))
    if model.prefixed is not None and (reason := agreed(why_not_fast(model.base, model.prefixed))):
        model.use_full_step(reason)
    return engine
