"""How frozen weights are held: whole on every rank, or split over all of them by DeepSpeed's ZeRO-3.

Whatever depends on that is asked here: the configuration, loading, running, and reading single weights.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from softcot_ds.distributed import rank, world_size
from softcot_ds.errors import SoftCoTError
from softcot_ds.recipe import BackboneConfig, Dtype, Recipe

_NEVER = 2**31 - 1


def engine_config(recipe: Recipe, accumulation: int = 1) -> dict[str, Any]:
    """The recipe's DeepSpeed configuration, with what the recipe itself decides filled in.

    ``"auto"`` would not be: only the Hugging Face Trainer replaces it.
    """
    config = recipe.backbone.deepspeed_config()
    try:
        DeepSpeedZeroConfig(**config.get("zero_optimization", {}))
    except ValidationError as error:  # DeepSpeed would end in it too, once a model is loaded
        wrong = [f"zero_optimization.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise SoftCoTError(f"{recipe.backbone.deepspeed_path()}: {'; '.join(wrong)}") from error
    config["train_micro_batch_size_per_gpu"] = recipe.training.micro_batch_size
    config["gradient_accumulation_steps"] = accumulation
    config["gradient_clipping"] = recipe.training.gradient_clipping
    config["bf16"] = {"enabled": recipe.base.dtype == "bfloat16"}
    # Sums of gradients over micro-batches and ranks stay in float32: bf16 sums would depend on the number of ranks.
    config["data_types"] = {"grad_accum_dtype": "fp32"}
    config["communication_data_type"] = "fp32"
    # The norm of the gradient is what tells one that is not finite.
    config["zero_optimization"].pop("compute_grad_norm", None)
    # DeepSpeed would replace PyTorch's linear for the rest of the process: see keep_weights_by_name. But its own alone
    # knows weights that it has quantized.
    quantized = config.get("weight_quantization", {}).get("quantized_initialization")
    config["zero_optimization"]["memory_efficient_linear"] = bool(quantized)
    config.pop("tensorboard", None)  # DeepSpeed's monitor would write a second set of curves
    # DeepSpeed's own progress lines; ours are better placed.
    config["steps_per_print"] = _NEVER
    return config


def decoding_config(recipe: Recipe) -> dict[str, Any]:
    """The same for models that are only run. ZeRO++'s second partition goes: DeepSpeed takes it for one model alone."""
    if recipe.backbone.partition != "zero3":  # but evaluation.partition is: the recipe's file is of another stage
        recipe = recipe.model_copy(update={"backbone": BackboneConfig(partition="zero3")})
    config = engine_config(recipe)
    config["zero_optimization"].pop("zero_hpz_partition_size", None)
    return config


def plain_config(dtype: Dtype) -> dict[str, Any]:
    """ZeRO-3 and nothing else, for a model of this dtype that is only run."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # asked for, and without meaning where nothing is trained
        "zero_optimization": {"stage": 3, "memory_efficient_linear": False},
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
        "steps_per_print": _NEVER,
    }


def quantization(recipe: Recipe) -> dict[str, Any]:
    """What of the DeepSpeed configuration changes the weights of a partitioned model: mostly nothing."""
    config = decoding_config(recipe)
    return {
        key: value
        for section in (config, config["zero_optimization"])
        for key, value in section.items()
        if "quantiz" in key and value
    }


@contextmanager
def loading(config: dict[str, Any] | None) -> Iterator[None]:
    """Have ``from_pretrained`` split each weight over the ranks while it reads it: no rank ever holds the whole model.

    Undone at the end, so that loading one model partitioned does not partition whatever is loaded later.

    Args:
        config: DeepSpeed's configuration; None to load whole.
    """
    if config is None:
        yield
        return
    partitioning = HfDeepSpeedConfig(copy.deepcopy(config))  # in effect while it lives
    try:
        yield
    finally:
        del partitioning
        unset_hf_deepspeed_config()


def hook_partitioned(model: PreTrainedModel, config: dict[str, Any]) -> None:
    """Make a model that was loaded partitioned gather its weights as it runs, for use without training."""
    make_layers_leaves(model)
    deepspeed.initialize(model=model, config=config, dist_init_required=False)


def make_layers_leaves(model: PreTrainedModel) -> None:
    """Have ZeRO-3 gather a decoder layer's weights together, once for all that happens inside of it.

    The fast step runs a layer's modules twice, for prefix and suffix; with hooks on each module, each would be gathered
    or at least tracked twice.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is not None:
        deepspeed.utils.set_z3_leaf_modules(model, [type(layer) for layer in layers])


def keep_weights_by_name(model: PreTrainedModel) -> None:
    """In a forward pass with gradient, have autograd keep a reference in place of a weight that comes and goes.

    PyTorch keeps the values, and all layers' would stay until the backward pass, which gathers them anyway. DeepSpeed
    replaces PyTorch's linear against that, by one that keeps its input too, as only the gradient of a weight needs it,
    and that other products (GPT-2's, slices of experts) do not go through.
    """
    forward = model.forward

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(_by_name, _values):
            return forward(*args, **kwargs)

    model.forward = run


def _by_name(tensor: torch.Tensor) -> Any:
    weight = tensor if tensor._base is None else tensor._base  # mostly it is a view of one, transposed
    if not comes_and_goes(weight):
        return tensor
    return weight, tensor.shape, tensor.stride(), tensor.storage_offset() - weight.storage_offset()


def _values(kept: Any) -> torch.Tensor:
    if isinstance(kept, torch.Tensor):
        return kept
    weight, shape, stride, offset = kept
    return weight.detach().as_strided(shape, stride, weight.storage_offset() + offset)


def is_partitioned(*parameters: nn.Parameter) -> bool:
    """Whether any of these weights is split over the ranks."""
    return any(hasattr(parameter, "ds_id") for parameter in parameters)


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of a weight on all ranks together, held whole or in parts."""
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape


def comes_and_goes(parameter: nn.Parameter) -> bool:
    """Whether the other ranks' parts of a weight are gathered for each use; small ones stay."""
    return is_partitioned(parameter) and not parameter.ds_persist


def held_bytes(parameter: nn.Parameter, device_type: str) -> int:
    """Bytes of a weight that stay on this rank's device all the time. Offloaded parts lie elsewhere."""
    if not is_partitioned(parameter):
        return parameter.nbytes
    part = parameter.ds_tensor.nbytes if parameter.ds_tensor.device.type == device_type else 0
    return part + (0 if comes_and_goes(parameter) else parameter.element_size() * parameter.ds_numel)


def is_leaf(module: nn.Module) -> bool:
    """Whether ZeRO-3 gathers all that is in a module at once (``make_layers_leaves``)."""
    return getattr(module, "_z3_leaf", False)


def needs_all_ranks(model: nn.Module) -> bool:
    """Whether each forward pass needs all ranks: one that is done must run along with the others."""
    return world_size() > 1 and is_partitioned(*model.parameters())


def gathered(*parameters: nn.Parameter) -> Any:
    """A context in which parameters have their whole values, partitioned or not. All ranks enter it together."""
    return deepspeed.zero.GatheredParameters([parameter for parameter in parameters if is_partitioned(parameter)])


def local_part(parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a partitioned parameter whose whole value is given: flat, padded as ZeRO-3 pads it.

    DeepSpeed 0.19's ``safe_set_full_*`` do not pad a parameter that the ranks do not divide.
    """
    size = parameter.ds_tensor.numel()
    padded = nn.functional.pad(whole.flatten(), (0, size * world_size() - whole.numel()))
    return padded[rank() * size : (rank() + 1) * size]
