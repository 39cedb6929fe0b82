"""Loading the two frozen models, whole or partitioned over ranks."""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from inspect import Parameter
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.initialization import no_init_weights
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils import logging as transformers_logging

from softcot_ds.backbone_config import SPLIT, Partition
from softcot_ds.distributed import Group, lost_rank, say, world_size
from softcot_ds.distributed import device as own_device
from softcot_ds.errors import SoftCoTError
from softcot_ds.files import read_json
from softcot_ds.models.loading import LoadingLines
from softcot_ds.models.model_files import model_folder, weight_files
from softcot_ds.models.partition import (
    decoding_config,
    hook_partitioned,
    keep_layers,
    keep_weights_by_name,
    loading,
    make_layers_leaves,
    with_limits,
)
from softcot_ds.models.quantized import FewBits
from softcot_ds.models.slices import read_slices, why_not_sliced
from softcot_ds.recipe import ModelConfig, Recipe

transformers_logging.disable_progress_bar()

_WHOLE_BYTES = 64 * 2**20
"""Weight files up to this size are read whole for a fingerprint."""
_DOES_NOT_MATTER = {"transformers_version", "_name_or_path", "_commit_hash", "dtype", "torch_dtype", "use_cache"}
"""Settings of ``config.json`` that change nothing here; the dtype is the recipe's."""


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with the recipe's chat template if it names one.

    Raises:
        SoftCoTError: it cannot be loaded.
    """
    folder = model_folder(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception for a damaged file
        raise _cannot_load("tokenizer", config, error) from error
    if config.chat_template is not None:
        try:
            tokenizer.chat_template = config.chat_template.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise SoftCoTError(f"cannot read the chat template {config.chat_template.absolute()}: {error}") from error
    return tokenizer


def load_config(config: ModelConfig) -> PreTrainedConfig:
    """The configuration of a model, without its weights. Raises SoftCoTError when it cannot be loaded."""
    return read_config(model_folder(config), config)


def read_config(folder: Path, config: ModelConfig) -> PreTrainedConfig:
    """The same from the folder of its config.json."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each family's configuration checks its values in its own way
        raise _cannot_load("configuration", config, error) from error


def generation_stop_ids(config: ModelConfig) -> list[int]:
    """The tokens at which the model's generation_config.json says that generation ends; none where there is none.

    Raises:
        SoftCoTError: it cannot be read, or lists what is no token id.
    """
    path = model_folder(config) / GENERATION_CONFIG_NAME
    if not path.exists():
        return []
    values = read_json(path)
    listed = values.get("eos_token_id") if isinstance(values, dict) else values
    ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise SoftCoTError(
            f"{path}: eos_token_id is {listed!r}, no token id and no list of them; fetch the model again"
        )
    return ids


def width(config: PreTrainedConfig) -> int:
    """Width of the token embeddings and the last hidden states.

    Asked of the model, built without weights: what a configuration calls ``hidden_size`` is for some (OPT-350m) the
    width between the two.

    Raises:
        SoftCoTError: it is no configuration of a causal language model.
    """
    return empty_model(config).get_input_embeddings().weight.shape[1]


def empty_model(config: PreTrainedConfig, **settings: Any) -> PreTrainedModel:
    """A model without weights, on the meta device, for its shapes. ``settings``: of ``from_config``, such as dtype.

    Raises:
        SoftCoTError: it is no configuration of a causal language model.
    """
    try:
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(config, **settings)
    except (ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0].partition(". ")[0]
        raise SoftCoTError(f"model type {config.model_type!r} is no causal language model here: {reason}") from error
    model.tie_weights()  # which goes with filling in values
    return model


def shapes_of(config: ModelConfig) -> PreTrainedModel:
    """A model without weights whose layers are marked as a partitioned one's. Raises SoftCoTError as ``load_config``
    and ``empty_model``."""
    model = empty_model(load_config(config))
    make_layers_leaves(model)
    return model


def context_length(config: PreTrainedConfig) -> int:
    """The longest sequence, tokens, for which a result does not depend on what else is in its batch.

    Some rotary embeddings (dynamic NTK, LongRoPE) change all positions of a batch as soon as its longest row goes
    beyond the length of pretraining: those models end there.
    """
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or 2**31
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [kind for kind in rope.values() if isinstance(kind, dict)]
    changing = [kind for kind in kinds if kind.get("rope_type") in ("dynamic", "longrope")]
    return min([longest, *(kind.get("original_max_position_embeddings") or longest for kind in changing)])


def keeps_keys_and_values(config: PreTrainedConfig) -> bool:
    """Whether the layers of a model keep keys and values of tokens, and nothing else."""
    layers = DynamicCache(config=config.get_text_config()).layers
    return {type(layer) for layer in layers} <= {DynamicLayer, DynamicSlidingWindowLayer}


def cache_name(forward: Callable[..., Any]) -> str | None:
    """By which name the forward of a model or of a layer takes the cache of keys and values; None where it takes none.

    transformers says ``cache`` from 5.24 on and ``past_key_values`` before, as code that comes with weights still may.
    By ``cache`` xLSTM takes states of a class of its own.
    """
    parameters = inspect.signature(forward).parameters
    if "cache" in parameters:
        annotation = parameters["cache"].annotation
        kinds = [kind for kind in get_args(annotation) or (annotation,) if isinstance(kind, type) and kind != NoneType]
        if kinds in ([], [Parameter.empty]) or any(issubclass(kind, Cache) for kind in kinds):
            return "cache"
    return "past_key_values" if "past_key_values" in parameters else None


def vocabulary(config: PreTrainedConfig) -> int:
    """Rows of the table of token embeddings; a tokenizer may have fewer tokens, or more by mistake."""
    return config.get_text_config().vocab_size


def partition_that_fits(
    config: ModelConfig, partition: Partition, group_size: int | None, bits: int = 16, otherwise: Partition = "node"
) -> Partition:
    """``partition``; or ``otherwise``, which is said, where it is ``tensor`` and the model cannot be held in slices.

    All ranks call it together. A second or two for ``tensor``; no weight is read.

    Raises:
        SoftCoTError: the model's configuration cannot be loaded, or the ranks make no such groups.
    """
    if partition != "tensor":
        return partition
    settings = load_config(config)
    quantized = FewBits(bits, vocabulary(settings)) if bits < 16 else None
    if reason := why_not_sliced(settings, Group.of(group_size).size, quantized):
        say(f"{config.model} is held as by partition={otherwise}, not tensor: {reason}")
        return otherwise
    return partition


def settled(recipe: Recipe) -> Recipe:
    """The recipe with ``partition_that_fits`` its base. All ranks call it together."""
    backbone = recipe.backbone
    fits = partition_that_fits(recipe.base, backbone.partition, backbone.group_size, backbone.bits)
    if fits == backbone.partition:
        return recipe
    held = backbone.model_copy(update={"partition": fits, "deepspeed": None})  # its file is of another stage
    return recipe.model_copy(update={"backbone": held})


def load_frozen(
    config: ModelConfig,
    partition: Partition,
    device: torch.device,
    deepspeed_config: dict[str, Any] | None = None,
    group_size: int | None = None,
    bits: int = 16,
) -> PreTrainedModel:
    """A frozen causal language model in evaluation mode, no parameter of which wants a gradient.

    Args:
        partition: ``zero3`` splits each weight over all ranks while it is read, ``node`` over those of a group: no rank
            ever holds the whole model. Both need ``deepspeed_config`` and an initialized process group, and the model
            must then be given to ``deepspeed.initialize``, alone or as a part, before it runs. ``tensor`` is for
            models that ``partition_that_fits``: each rank of a group reads its slices.
        group_size: ranks of a group; None for those of a node.
        bits: of a weight of its linear layers; 16 is the recipe's dtype, whatever that is.

    Raises:
        SoftCoTError: the model cannot be loaded or held in so few bits, weights are missing in its files, or the ranks
            make no such groups.
    """
    check_weights(config)
    quantized = layers_in_few_bits(config, bits, device) if bits < 16 else None
    load = partial(_from_pretrained, config, config.attention)
    with closing(LoadingLines(config.model)) as lines:
        if partition in SPLIT:
            group = Group.of(group_size) if partition == "node" else None
            # Buffers for weights on NVMe are made before there is a model.
            ranks = group.size if group else world_size()
            settings = with_limits(deepspeed_config, shapes_of(config), ranks=ranks)
            with loading(settings, group, lines, quantized):
                model, info = load()
        else:
            # Each rank reads for itself: of several on a node, all but the first find the files' pages in memory.
            with lines.counting():
                sliced = partition == "tensor"
                model, info = read_slices(Group.of(group_size).size, load, quantized) if sliced else load()
    _refuse_missing(config, info["missing_keys"])
    model.requires_grad_(False)
    model.eval()
    if partition not in SPLIT:
        if quantized is not None and partition == "none":
            quantized.quantize(model, device)
        return model.to(device)
    keep_weights_by_name(model)
    return model


def layers_in_few_bits(config: ModelConfig, bits: int, device: torch.device) -> FewBits:
    """The layers of a model to be held so. Raises SoftCoTError where they cannot be."""
    settings = load_config(config)
    if getattr(settings, "quantization_config", None) is not None:
        raise SoftCoTError(
            f"backbone.bits={bits}: the weights of {config.model} are quantized in its files; set backbone.bits=16, "
            "which leaves them as they are, or name a model with weights in 16 bits"
        )
    layers = FewBits(bits, vocabulary(settings))
    layers.check(empty_model(settings), config.model, device)
    return layers


@dataclass(frozen=True)
class Change:
    """What makes another model of one that is loaded, before DeepSpeed has it."""

    apply: Callable[[PreTrainedModel], None]
    made_from: dict[str, Any]
    """All that decides it, by content."""

    def __call__(self, model: PreTrainedModel) -> None:
        self.apply(model)


def load_to_run(
    config: ModelConfig,
    recipe: Recipe,
    partition: Partition,
    spare_of: Callable[[int], float],
    change: Change | None = None,
) -> PreTrainedModel:
    """One of the recipe's frozen models on this rank's device, ready to run, not to be trained through.

    Args:
        spare_of: see ``keep_layers``.
        change: what is to be made of it.

    Raises:
        SoftCoTError: see ``load_frozen``; or it cannot be changed so.
    """
    group_size, bits = recipe.backbone.group_size, recipe.bits_of(config)
    settings = decoding_config(recipe) if partition in SPLIT else None
    model = load_frozen(config, partition, own_device(), settings, group_size, bits)
    if change is not None:
        change(model)
    if partition not in SPLIT:
        return model
    if config is recipe.base:
        keep_layers(model, recipe.backbone.resident_gib, spare_of)
    hook_partitioned(model, settings)
    return model


def check_weights(config: ModelConfig) -> None:
    """Compare the names and shapes in a model's weight files with its architecture; no weight is read.

    Raises:
        SoftCoTError: some are missing, of another shape, or there are some which ``config.json`` leaves out.
    """
    weight_files(model_folder(config, weights=True), config.model)
    if getattr(load_config(config), "quantization_config", None) is not None:
        return  # quantized weights have other names and shapes than the architecture's
    # What flash attention needs may be missing where this is asked (the doctor on a login node).
    attention = "eager" if "flash" in config.attention else config.attention
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it would print its own table
    try:
        model, info = _from_pretrained(config, attention, device_map="meta", ignore_mismatched_sizes=True)
    finally:
        transformers_logging.set_verbosity(verbosity)
    _refuse_missing(config, info["missing_keys"])
    if info["mismatched_keys"]:
        name, found, expected = min(info["mismatched_keys"])
        raise SoftCoTError(
            f"{config.model}: {len(info['mismatched_keys'])} weights have other shapes than its config.json says, "
            f"{name!r} first: {tuple(found)} in the files, {tuple(expected)} expected (vocab_size, hidden_size?). "
            "Weights and config.json are of different models: fetch or save the model again"
        )
    if left_out := sorted(name for name in info["unexpected_keys"] if _is_left_out(model, name)):
        raise SoftCoTError(
            f"{config.model}: its config.json leaves out {len(left_out)} weights of its files, {left_out[0]!r} first "
            "(fewer layers, no biases?). It would be another model: fetch or save it again"
        )


def _is_left_out(model: PreTrainedModel, name: str) -> bool:
    """Whether a weight that the model did not take has its place in it: a layer more, a bias that is switched off.

    Others belong to parts that are not read here (vision towers, heads for several tokens) or are no parameters.
    """
    module: torch.nn.Module | None = model
    parts = name.split(".")
    for part in parts[:-1]:
        child = getattr(module, part, None)
        if not isinstance(child, torch.nn.Module):
            return isinstance(module, torch.nn.ModuleList) and part.isdigit()
        module = child
    return module._parameters.get(parts[-1], module) is None


def _refuse_missing(config: ModelConfig, keys: Iterable[str]) -> None:
    if missing := sorted(keys):
        raise SoftCoTError(
            f"{config.model}: {len(missing)} weights are missing in its files, {missing[0]!r} first; "
            "transformers would have filled them with random numbers. Check the folder or the revision"
        )


def _from_pretrained(config: ModelConfig, attention: str, **kwargs: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    try:
        return AutoModelForCausalLM.from_pretrained(
            model_folder(config, weights=True),
            dtype=getattr(torch, config.dtype),
            attn_implementation=attention,
            output_loading_info=True,
            trust_remote_code=False,
            **kwargs,
        )
    except Exception as error:  # each family, quantization and file format has its own
        if isinstance(error, RuntimeError) and lost_rank(error):
            raise
        if "ttention" in str(error) and attention != "eager":
            # transformers names an argument of its own, after a first sentence with the reason.
            reason = str(error).split(". ")[0].rstrip(".")
            raise SoftCoTError(
                f"{config.model} cannot be loaded with attention {config.attention}: {reason}. Set "
                "attention: eager for it in the recipe (base.attention or assistant.attention)"
            ) from error
        raise _cannot_load("model", config, error) from error


def weights_fingerprint(config: ModelConfig) -> str:
    """A hash that tells one set of weights from another, in seconds even for a large model.

    Over what is loaded: the settings of ``config.json`` and, of each weight file that transformers reads, its size, its
    first MiB, which holds the names, the shapes and the places of all tensors, and 256 samples of 4 KiB spread over the
    rest: training changes practically every weight. Small files are read whole. The same weights in other shards have
    another fingerprint.

    Raises:
        SoftCoTError: some of the model's files cannot be found.
    """
    folder = model_folder(config, weights=True)
    digest = hashlib.sha256()
    try:
        settings = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise _cannot_load("configuration", config, error) from error
    digest.update(json.dumps(_that_matter(settings), sort_keys=True).encode())
    for path in weight_files(folder, config.model):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= _WHOLE_BYTES:
                digest.update(file.read())
                continue
            digest.update(file.read(2**20))
            for sample in range(256):
                file.seek(sample * (size - 4096) // 255)
                digest.update(file.read(4096))
    return digest.hexdigest()


def weight_bytes(config: ModelConfig) -> int:
    """Size of a model's weight files. Raises SoftCoTError where they are not there."""
    return sum(path.stat().st_size for path in weight_files(model_folder(config, weights=True), config.model))


def _that_matter(settings: Any) -> Any:
    """A configuration without what no computation depends on, in its parts too."""
    if not isinstance(settings, dict):
        return settings
    return {key: _that_matter(value) for key, value in settings.items() if key not in _DOES_NOT_MATTER}


def _cannot_load(part: str, config: ModelConfig, error: Exception) -> SoftCoTError:
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return SoftCoTError(f"cannot load the {part} of {config.model}: {first_line}")
