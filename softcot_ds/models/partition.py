"""How frozen weights are held: whole on every rank, split by DeepSpeed's ZeRO-3 over all ranks or those of a node, or
in slices (slices.py), which compute without being gathered.

Whatever depends on that is asked here: the configuration, loading, running, and reading single weights.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from pydantic import ValidationError
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from softcot_ds.backbone_config import SPLIT, BackboneConfig, Partition
from softcot_ds.distributed import (
    DataRanks,
    Group,
    agreed,
    device,
    from_all_ranks,
    max_over_ranks,
    rank,
    say,
    world_size,
)
from softcot_ds.errors import SoftCoTError
from softcot_ds.models import limits
from softcot_ds.models.limits import Gathers
from softcot_ds.models.loading import LoadingLines
from softcot_ds.models.quantized import FewBits
from softcot_ds.models.slices import slice_of
from softcot_ds.recipe import Dtype, Recipe

_NEVER = 2**31 - 1
_LIMITS = ("stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance")
_BUFFERS = ("buffer_count", "buffer_size")
_SWITCHES = {"overlap_comm": True, "stage3_allgather_sequential": False}


def data_ranks(partition: Partition, group_size: int | None) -> DataRanks:
    """Among whom data is divided: each rank works on its own, but those that hold slices of one model work together.

    Raises:
        SoftCoTError: the ranks make no groups of that size; all call it together.
    """
    if partition != "tensor":
        return DataRanks(rank(), world_size())
    group = Group.of(group_size)
    return DataRanks(group.number, group.count, group.size, group.rank == 0)


def engine_config(recipe: Recipe) -> dict[str, Any]:
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
    config["gradient_accumulation_steps"] = 1  # whoever trains says which micro-batch is the last of a step
    config["gradient_clipping"] = recipe.training.gradient_clipping
    config["bf16"] = {"enabled": recipe.base.dtype == "bfloat16"}
    # Sums of gradients over micro-batches and ranks stay in float32: bf16 sums would depend on the number of ranks.
    config["data_types"] = {"grad_accum_dtype": "fp32"}
    config["communication_data_type"] = "fp32"
    # The norm of the gradient is what tells one that is not finite.
    config["zero_optimization"].pop("compute_grad_norm", None)
    # DeepSpeed would replace PyTorch's linear for the rest of the process: see keep_weights_by_name.
    config["zero_optimization"]["memory_efficient_linear"] = False
    config.pop("tensorboard", None)  # DeepSpeed's monitor would write a second set of curves
    # DeepSpeed's own progress lines; ours are better placed.
    config["steps_per_print"] = _NEVER
    return config


def decoding_config(recipe: Recipe) -> dict[str, Any]:
    """The same for models that are only run, split."""
    if recipe.backbone.partition not in SPLIT:  # but evaluation.partition is: the recipe's file is of another stage
        recipe = recipe.model_copy(update={"backbone": BackboneConfig(partition="zero3")})
    return engine_config(recipe)


def plain_config(dtype: Dtype) -> dict[str, Any]:
    """ZeRO-3 and nothing else, for a model of this dtype that is only run."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # asked for, and without meaning where nothing is trained
        "zero_optimization": {"stage": 3, "memory_efficient_linear": False},
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
        "steps_per_print": _NEVER,
    }


def with_limits(config: dict[str, Any], *models: PreTrainedModel, ranks: int | None = None) -> dict[str, Any]:
    """A DeepSpeed configuration in which the limits that it does not set follow from the models (``limits.py``).

    Args:
        models: all that run in one step, with weights or on the meta device. ``make_layers_leaves`` comes first.
        ranks: that hold a copy between them; None for all ranks. Only buffers for NVMe depend on it.
    """
    zero = config.get("zero_optimization", {})
    derived = derived_limits(config, *models, ranks=ranks)
    ours = {key: value for key, value in derived.items() if not {key, key.removeprefix("stage3_")} & zero.keys()}
    zero = zero | {key: value for key, value in ours.items() if key not in _BUFFERS}
    if any(key in derived for key in _BUFFERS):
        zero["offload_param"] = {key: derived[key] for key in _BUFFERS} | zero["offload_param"]
    return config | {"zero_optimization": zero}


def derived_limits(config: dict[str, Any], *models: PreTrainedModel, ranks: int | None = None) -> dict[str, int]:
    """What ``with_limits`` would set where a configuration sets nothing; none but in stage 3."""
    zero = config.get("zero_optimization", {})
    if zero.get("stage") != 3:
        return {}
    threshold = DeepSpeedZeroConfig(**zero).param_persistence_threshold
    gathers = [gathers_of(model, threshold) for model in models]
    found = limits.derive(gathers)
    values = dict(zip(_LIMITS, (found.prefetch, found.live, found.reuse), strict=True))
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        needed = [limits.buffers(model, found, ranks or world_size()) for model in gathers]
        values |= zip(_BUFFERS, map(max, zip(*needed, strict=True)), strict=True)
    return values


def short_limits(config: dict[str, Any], *models: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """What a configuration of stage 3 sets against gathering ahead: limits lower than ``with_limits`` would set them,
    switches the other way. Its value of each, and the one that is needed."""
    zero = DeepSpeedZeroConfig(**with_limits(config, *models)["zero_optimization"])
    found = {}
    for key, needed in {**derived_limits(config, *models), **_SWITCHES}.items():
        value = getattr(zero.offload_param if key in _BUFFERS else zero, key.removeprefix("stage3_"))
        if value != needed if key in _SWITCHES else value < needed:
            found[key] = value, needed
    return found


def gathers_of(model: PreTrainedModel, threshold: int) -> Gathers:
    """What of a model comes and goes, with weights or on the meta device, marked by ``make_layers_leaves`` or not.

    Args:
        threshold: weights of at most so many elements stay gathered.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    hooked = [module for module in _hooked(model) if module is not table and module is not head]
    if any(map(is_leaf, hooked)):  # what lies between the layers is small, or a single weight like the head
        hooked = [module for module in hooked if is_leaf(module)]
    sizes = [_sizes(module, threshold) for module in hooked]
    layers = tuple(layer for layer in sizes if layer)
    return Gathers(layers, sum(_sizes(table, threshold)), sum(_sizes(head, threshold)) if head is not None else 0)


def _hooked(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that ZeRO-3 gathers for, each for its own weights, leaves for all that is in them."""
    yield module
    if not is_leaf(module):
        for child in module.children():
            yield from _hooked(child)


def _sizes(module: nn.Module, threshold: int) -> tuple[int, ...]:
    """Elements of the weights that are gathered for a module."""
    sizes = (whole_shape(parameter).numel() for parameter in module.parameters(recurse=is_leaf(module)))
    return tuple(size for size in sizes if size > threshold)


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
def loading(
    config: dict[str, Any], group: Group | None, lines: LoadingLines, quantized: FewBits | None = None
) -> Iterator[None]:
    """Have ``from_pretrained`` split each weight while it reads it: no rank ever holds more than one whole.

    The first rank of a group reads a weight and sends it to the others: nothing moves between groups. Undone at the
    end, so that loading one model partitioned does not partition whatever is loaded later.

    Args:
        config: DeepSpeed's configuration.
        group: who splits the weights between them; None for all ranks.
        lines: that tell how far it is.
        quantized: the layers to be held in few bits.
    """
    partitioning = HfDeepSpeedConfig(copy.deepcopy(config))  # in effect while it lives
    of_deepspeed, get_rank = deepspeed.zero.Init, dist.get_rank
    deepspeed.zero.Init = partial(_Init, group, lines, quantized)
    try:
        yield
    finally:
        deepspeed.zero.Init, dist.get_rank = of_deepspeed, get_rank
        del partitioning
        unset_hf_deepspeed_config()


class _Init(deepspeed.zero.Init):
    """What makes DeepSpeed split the weights of a model as its modules are built, here over any group of ranks.

    It outlives the building: DeepSpeed later splits what is trained with it, over all ranks.
    """

    def __init__(self, group: Group | None, lines: LoadingLines, quantized: FewBits | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._group = group
        self._quantized = quantized
        self._lines = lines
        self._building = False
        self._empty: set[int] = set()  # weights without values, by their ds_id
        if (swapper := self.param_swapper) is not None:
            # DeepSpeed reads ahead along a list in which the last weights stand twice: their backward pass comes next.
            swap_in = swapper.swap_in
            swapper.swap_in = lambda params, *rest, **named: swap_in([*dict.fromkeys(params)], *rest, **named)

    def __enter__(self) -> None:
        super().__enter__()
        self._building = True

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._building = False
        self._lines.expect(len(self._empty))
        if (mine := self._group) is not None:
            # transformers fills the model next. It has the rank read that is rank 0, and DeepSpeed sends from the first
            # of a weight's group: all groups but one would get garbage.
            get_rank = dist.get_rank
            dist.get_rank = lambda group=None: mine.rank if group is None else get_rank(group)

    def _post_init_method(self, module: nn.Module) -> None:
        if self._building and self._quantized is not None:
            self._quantized.prepare(module)
        super()._post_init_method(module)

    def _convert_to_deepspeed_param(self, param: nn.Parameter) -> None:
        if self._building and self._group is not None:
            param.ds_zero_partition_process_group = self._group.process_group  # which DeepSpeed looks for
        super()._convert_to_deepspeed_param(param)
        if self._building:
            self._empty.add(param.ds_id)

    def _zero_init_param(self, param: nn.Parameter) -> None:
        if not self._building:
            super()._zero_init_param(param)
            return
        # DeepSpeed would send each weight to all ranks here, before it has a value.
        self._convert_to_deepspeed_param(param)
        param.partition()

    def _all_gather(self, param_list: list[nn.Parameter], async_op: bool = False, hierarchy: Any = None) -> Any:
        # transformers gathers each weight that it is about to fill. Room is enough: there is nothing to be sent yet.
        self._ensure_availability_of_partitioned_params(param_list)  # of NVMe: room for the parts, too
        for param in param_list:
            if param.ds_id in self._empty:
                param.data = torch.empty(param.ds_shape, dtype=param.dtype, device=param.device)
                param.ds_status = ZeroParamStatus.AVAILABLE
        return super()._all_gather(param_list, async_op, hierarchy)

    def _partition(self, param_list: list[nn.Parameter], has_been_updated: bool = False, **rest: Any) -> None:
        super()._partition(param_list, has_been_updated=has_been_updated, **rest)
        if has_been_updated:
            filled = self._empty & {param.ds_id for param in param_list}
            self._empty -= filled
            self._lines.add(len(filled))


def keep_layers(model: PreTrainedModel, gib: float | None, spare_of: Callable[[int], float]) -> int:
    """Have each rank hold the weights of the first layers whole, so that nothing is gathered for them.

    All ranks call it together, after loading and before the model is given to ``deepspeed.initialize``.

    Args:
        gib: memory of a rank that may be taken beside its share, GiB; None for what a GPU has to spare.
        spare_of: those bytes, from the free ones of the GPU that has least. It raises SoftCoTError where they are not
            known: if that is so on one rank, none are taken, which is said.

    Returns:
        How many layers are held whole now; 0 where the model is not split, or offloaded.
    """
    layers = getattr(model.get_decoder(), "layers", ())
    spare = _least_spare(model, spare_of) if gib is None else gib * 2**30
    for number, layer in enumerate(layers):
        split = [parameter for parameter in layer.parameters() if comes_and_goes(parameter)]
        spare -= sum(parameter.element_size() * parameter.ds_numel - parameter.ds_tensor.nbytes for parameter in split)
        if spare < 0 or not split:
            return number
        for parameter in split:
            parameter.all_gather()
            parameter.ds_process_group = Group.of(1).process_group
            parameter.ds_zero_partition_rank, parameter.ds_zero_partition_world_size = 0, 1
            parameter.ds_tensor = None  # or it would be kept, in its old size
            parameter.partition()
    return len(layers)


def _least_spare(model: PreTrainedModel, spare_of: Callable[[int], float]) -> float:
    """Of the rank that has least: each reads the data, and files, on its own node."""
    reason, spare = None, 0.0
    free = _free_bytes(model)
    try:
        spare = spare_of(free) if free else 0.0
    except SoftCoTError as error:
        reason = str(error)
    if (reason := agreed(reason)) is not None:
        say(f"no layers are held whole, as it is not known what else memory is needed for: {reason}")
        return 0.0
    return min(from_all_ranks(spare))


def _free_bytes(model: PreTrainedModel) -> int:
    """What is free on the GPU that has least. 0 without a GPU, where memory is shared with whatever else runs, and for
    offloaded weights, which are to lie elsewhere."""
    here = all(weight.ds_tensor.device == weight.device for weight in model.parameters() if comes_and_goes(weight))
    free = torch.cuda.mem_get_info()[0] if device().type == "cuda" and here else 0
    return -max_over_ranks(-free)


def hook_partitioned(model: PreTrainedModel, config: dict[str, Any]) -> None:
    """Make a model that was loaded partitioned gather its weights as it runs, for use without training."""
    make_layers_leaves(model)
    deepspeed.initialize(model=model, config=with_limits(config, model), dist_init_required=False)


class OwnPasses:
    """A context for passes of an engine's model other than those that train.

    ZeRO-3 knows in which order a pass with its backward pass asks for weights, and gathers ahead along it. A pass
    without one would have it gather in vain, and read from NVMe, into buffers that are then missing; a module out of
    that order would make it forget, gather nothing ahead and listen to the next step anew. So these passes have an
    order of their own, and the engine's stays as it is.
    """

    def __init__(self, engine: Any, part: nn.Module | None = None) -> None:
        """
        Args:
            engine: before it has run, with whatever it is that holds its weights.
            part: of the engine's model, which is run by itself, as in decoding; None where the engine is.
        """
        self._part = part
        self._offload = getattr(engine.optimizer, "parameter_offload", None)
        if self._offload is not None:
            self._others = copy.copy(self._offload.param_coordinator)
            self._others._clear_trace_structures()  # they would be the same objects

    def _exchange(self) -> None:
        self._offload.param_coordinator, self._others = self._others, self._offload.param_coordinator

    def __enter__(self) -> None:
        if self._offload is None:
            return
        self._exchange()
        if self._part is not None:
            begin = self._offload.param_coordinator.reset_step
            # First, before the hook that asks for weights. Where the engine runs, DeepSpeed has this hook.
            self._hook = self._part.register_forward_pre_hook(lambda *_: begin(), prepend=True)

    def __exit__(self, *exception: Any) -> None:
        if self._offload is None:
            return
        if self._part is not None:
            self._hook.remove()
        self._exchange()


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
    """Whether any of these weights is split over ranks."""
    return any(hasattr(parameter, "ds_id") for parameter in parameters)


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of a weight on all ranks together, held whole or in parts."""
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape


def comes_and_goes(parameter: nn.Parameter) -> bool:
    """Whether what of a weight lies elsewhere is brought to this rank's device for each use; small ones stay."""
    return is_partitioned(parameter) and not parameter.ds_persist and not _is_here(parameter)


def is_on_its_way(*parameters: nn.Parameter) -> bool:
    """Whether any of these weights is being gathered for a module that comes later in a pass, as a tied head."""
    return any(is_partitioned(weight) and weight.ds_status == ZeroParamStatus.INFLIGHT for weight in parameters)


def held_bytes(parameter: nn.Parameter) -> int:
    """Bytes of a weight that stay on this rank's device all the time. Offloaded parts lie elsewhere."""
    if not is_partitioned(parameter):
        return slice_of(parameter).nbytes
    part = parameter.ds_tensor.nbytes if parameter.ds_tensor.device == parameter.device else 0
    return part + (parameter.element_size() * parameter.ds_numel if parameter.ds_persist else 0)


def _is_here(parameter: nn.Parameter) -> bool:
    """Whether this rank's part is all of a weight, and stays on its device: gathering it moves and copies nothing."""
    if parameter.ds_zero_partition_world_size > 1:
        return False
    part = parameter.ds_tensor
    return part.device == parameter.device and part.final_location is None  # from NVMe, it lies in a buffer for a while


def is_leaf(module: nn.Module) -> bool:
    """Whether ZeRO-3 gathers all that is in a module at once (``make_layers_leaves``)."""
    return getattr(module, "_z3_leaf", False)


def needs_all_ranks(model: nn.Module) -> bool:
    """Whether each forward pass needs other ranks: one that is done must run along with the others.

    Those of its group would be enough. All ranks agree upon when they are done, as transformers' ``generate`` has it.
    """
    return world_size() > 1 and is_partitioned(*model.parameters())


def gathered(*parameters: nn.Parameter) -> Any:
    """A context in which parameters have their whole values, partitioned or not. All ranks enter it together."""
    return deepspeed.zero.GatheredParameters([parameter for parameter in parameters if is_partitioned(parameter)])


@torch.no_grad()
def set_whole(parameter: nn.Parameter, whole: torch.Tensor) -> None:
    """Give a weight its whole value, rounded to its dtype, whatever of it lies here: between loading and DeepSpeed."""
    if is_partitioned(parameter):
        parameter.ds_tensor.copy_(local_part(parameter, whole))
    else:
        parameter.copy_(whole)


def local_part(parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a partitioned parameter whose whole value is given: flat, padded as ZeRO-3 pads it.

    DeepSpeed 0.19's ``safe_set_full_*`` do not pad a parameter that the ranks do not divide.
    """
    size, place = parameter.ds_tensor.numel(), parameter.ds_zero_partition_rank
    padded = nn.functional.pad(whole.flatten(), (0, size * parameter.ds_zero_partition_world_size - whole.numel()))
    return padded[place * size : (place + 1) * size]
