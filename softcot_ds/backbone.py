"""Loading the two frozen models, whole or partitioned over the ranks."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import GENERATION_CONFIG_NAME, cached_file
from transformers.utils import logging as transformers_logging

from softcot_ds.errors import SoftCoTError
from softcot_ds.files import read_json
from softcot_ds.recipe import ModelConfig, Partition, resolve_location

transformers_logging.disable_progress_bar()


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with the recipe's chat template if it names one.

    Raises:
        SoftCoTError: it cannot be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_location(config.model), revision=config.revision)
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
    try:
        return AutoConfig.from_pretrained(resolve_location(config.model), revision=config.revision)
    except (OSError, ValueError) as error:
        raise _cannot_load("configuration", config, error) from error


def generation_stop_ids(config: ModelConfig) -> list[int]:
    """The tokens at which the model's generation_config.json says that generation ends; none where there is none.

    Raises:
        SoftCoTError: it cannot be read, or lists what is no token id.
    """
    location = resolve_location(config.model)
    optional = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    try:
        path = cached_file(location, GENERATION_CONFIG_NAME, revision=config.revision, **optional)
    except (OSError, ValueError) as error:
        raise _cannot_load(GENERATION_CONFIG_NAME, config, error) from error
    if path is None:
        return []
    values = read_json(Path(path))
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
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0].partition(". ")[0]
        raise SoftCoTError(f"model type {config.model_type!r} is no causal language model here: {reason}") from error
    return model.get_input_embeddings().weight.shape[1]


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


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to fill padding with; masks hide it, so any valid id serves where there is no pad token."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def load_frozen(
    config: ModelConfig, partition: Partition, device: torch.device, deepspeed_config: dict[str, Any] | None = None
) -> PreTrainedModel:
    """A frozen causal language model in evaluation mode, no parameter of which wants a gradient.

    Args:
        partition: ``zero3`` splits each weight over the ranks while it is read: no rank ever holds the whole model.
            It needs ``deepspeed_config`` and an initialized process group, and the model must then be given to
            ``deepspeed.initialize``, alone or as a part, before it runs.

    Raises:
        SoftCoTError: the model cannot be loaded, or weights are missing in its files.
    """
    kwargs = {
        "revision": config.revision,
        "dtype": getattr(torch, config.dtype),
        "attn_implementation": config.attention,
        "output_loading_info": True,
    }
    location = resolve_location(config.model)
    if (folder := Path(location)).is_dir():
        _weight_files(config, folder)
    # from_pretrained partitions while this object lives. It is undone at once, so that loading one model partitioned
    # does not partition whatever is loaded later.
    zero3 = HfDeepSpeedConfig(copy.deepcopy(deepspeed_config)) if partition == "zero3" else None
    try:
        model, info = AutoModelForCausalLM.from_pretrained(location, **kwargs)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        if "ttention" in str(error) and config.attention != "eager":
            # transformers names an argument of its own, after a first sentence with the reason.
            raise SoftCoTError(
                f"{config.model} cannot be loaded with attention {config.attention}: {str(error).split('. ')[0]}. Set "
                "attention: eager for it in the recipe (base.attention or assistant.attention)"
            ) from error
        raise _cannot_load("model", config, error) from error
    finally:
        if zero3 is not None:
            unset_hf_deepspeed_config()
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise SoftCoTError(
            f"{config.model}: {len(missing)} weights are missing in its files, {missing[0]!r} first; "
            "transformers would have filled them with random numbers. Check the folder or the revision"
        )
    model.requires_grad_(False)
    model.eval()
    return model if partition == "zero3" else model.to(device)


def weights_fingerprint(config: ModelConfig) -> str:
    """A hash that tells one set of weights from another, in seconds even for a large model.

    Over ``config.json`` and, of each weight file, its size, its first MiB, which holds the names, the shapes and the
    places of all tensors, and 256 samples of 4 KiB spread over the rest: training changes practically every weight.

    Raises:
        SoftCoTError: some of the model's files cannot be found.
    """
    digest = hashlib.sha256()
    try:
        config_file = cached_file(resolve_location(config.model), "config.json", revision=config.revision)
    except (OSError, ValueError) as error:
        raise _cannot_load("configuration", config, error) from error
    folder = Path(config_file).parent
    digest.update(Path(config_file).read_bytes())
    for path in _weight_files(config, folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(2**20))
            for sample in range(256):
                file.seek(sample * max(0, size - 4096) // 255)
                digest.update(file.read(4096))
    return digest.hexdigest()


def _weight_files(config: ModelConfig, folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    index = folder / "model.safetensors.index.json"
    if index.exists() and folder / "model.safetensors" not in files:  # an index counts where there is no single file
        try:
            named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SoftCoTError(f"{index}: no index of weights ({error}); fetch the model again") from error
        missing = [name for name in named if not (folder / name).exists()]
        if missing:
            raise SoftCoTError(
                f"{config.model}: {len(missing)} of {len(named)} weight files are missing in {folder}, {missing[0]} "
                "first, which model.safetensors.index.json names; fetch the model again (hf download goes on from what "
                "is there)"
            )
    if not files:
        raise SoftCoTError(f"{config.model}: no weights (*.safetensors) in {folder}")
    return files


def _cannot_load(part: str, config: ModelConfig, error: Exception) -> SoftCoTError:
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return SoftCoTError(f"cannot load the {part} of {config.model}: {first_line}")
