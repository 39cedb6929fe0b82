"""Low-rank matrices beside frozen linear layers, as PEFT has them (LoRA, arXiv:2106.09685).

They stand in the layers of a loaded model, in the place of which PEFT puts modules of its own; the model stays what it
is to everyone else. Their names are those of PEFT's files.
"""

import math
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn
from transformers import PreTrainedModel

from softcot_ds.distributed import device
from softcot_ds.errors import SoftCoTError
from softcot_ds.files import read_json
from softcot_ds.lora_config import LoraConfig

FILE = "adapter_model.safetensors"
"""What PEFT calls the file of the matrices."""
CONFIG_FILE = "adapter_config.json"
DEFAULT = "default"
"""What PEFT calls the matrices where there is one set of them; its files leave that out."""
_BEFORE = "base_model.model."
"""What stands before a module's name in PEFT's files."""


def peft_config(config: LoraConfig, base: str) -> Any:
    """PEFT's own settings; ``base`` is the name of the model."""
    from peft import LoraConfig as PeftLora  # takes seconds, and most methods need none of it

    return PeftLora(
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
        init_lora_weights=False,
    )


def read_peft_config(folder: Path) -> LoraConfig:
    """What of PEFT's settings in an adapter directory decides what is computed. Raises SoftCoTError when they are
    damaged, or of another kind than ``peft_config`` makes."""
    values = read_json(folder / CONFIG_FILE)
    try:
        return LoraConfig(r=values["r"], alpha=values["lora_alpha"], targets=values["target_modules"])
    except (KeyError, TypeError, ValidationError) as error:
        raise SoftCoTError(f"{folder / CONFIG_FILE}: no settings of LoRA as training writes them: {error}") from error


def add_low_rank(
    model: PreTrainedModel, config: LoraConfig, seed: int, name: str = DEFAULT, section: str = "lora"
) -> dict[str, nn.Parameter]:
    """Put matrices beside the layers that the settings name, before DeepSpeed has the model.

    Args:
        name: by which they are told from others beside the same model; all of them are added up.
        section: of the recipe, for messages.

    Returns:
        The matrices in float32, by their names in PEFT's files. What is added begins as zero: the first matrix is drawn
        from the seed, the same on every rank, the second is zero.

    Raises:
        SoftCoTError: the model has no linear layer of one of these names.
    """
    _check_targets(model, config.targets, section)
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    inject_adapter_in_model(peft_config(config, ""), model, name)
    vars(model).pop("peft_config", None)  # where there are several sets, PEFT would warn of its own mark
    model.eval()  # PEFT's modules are not
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter(list(module.lora_A))  # PEFT has those run that came first
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for key, parameter in low_rank_parameters(model, name).items():
        drawn = torch.zeros(parameter.shape)
        if ".lora_A." in key and not parameter.is_meta:
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)  # as PEFT has it
        parameter.data = drawn.to(parameter.device if parameter.is_meta else device())
        parameter.requires_grad_(True)
        found[key] = parameter
    return found


def low_rank_parameters(model: nn.Module, name: str = DEFAULT) -> dict[str, nn.Parameter]:
    """The matrices of this name in a model, by their names in PEFT's files."""
    return {
        _BEFORE + key.replace(f".{name}.", "."): parameter
        for key, parameter in model.named_parameters()
        if f".lora_A.{name}." in key or f".lora_B.{name}." in key
    }


def low_rank_dropouts(model: nn.Module) -> list[nn.Module]:
    """What leaves out inputs in training mode."""
    return [module for name, module in model.named_modules() if name.rpartition(".")[2] == "lora_dropout"]


def low_rank_size(model: PreTrainedModel, config: LoraConfig, section: str = "lora") -> int:
    """Elements of the matrices that ``add_low_rank`` would add. Raises SoftCoTError as it does."""
    _check_targets(model, config.targets, section)
    return sum(
        config.r * (module.in_features + module.out_features)
        for name, module in _linear_layers(model).items()
        if name.rpartition(".")[2] in config.targets
    )


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The model's own, by its names, where there are matrices beside them already too."""
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }


def _check_targets(model: PreTrainedModel, targets: list[str], section: str) -> None:
    known = sorted({name.rpartition(".")[2] for name in _linear_layers(model.get_decoder())})
    if unknown := [name for name in targets if name not in known]:
        raise SoftCoTError(
            f"{section}.targets: {type(model).__name__} has no linear layers called {', '.join(unknown)}; it has "
            f"{', '.join(known) or 'none'}"
        )
