"""What a model's configuration alone says of its weights: built on the meta device, where tensors have shapes and no
values. The configuration comes from where the model lies, from models.yaml, or is the one file that is downloaded."""

import math
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from softcot_ds.errors import SoftCoTError
from softcot_ds.files import read_yaml
from softcot_ds.models.backbone import empty_model, read_config
from softcot_ds.models.model_files import config_folder, fetch_config
from softcot_ds.models.toy import DEPTHS, layer_configs
from softcot_ds.recipe import ModelConfig

SHIPPED = Path(__file__).with_name("models.yaml")


def find_config(config: ModelConfig) -> PreTrainedConfig:
    """A model's configuration. Without a network for models that lie here and those of models.yaml.

    Raises:
        SoftCoTError: it is nowhere, or no configuration.
    """
    folder = config_folder(config)
    if folder is None and config.model in _shipped():
        return AutoConfig.for_model(**_shipped()[config.model])
    return read_config(folder or fetch_config(config), config)


@cache
def _shipped() -> dict[str, dict[str, Any]]:
    return read_yaml(SHIPPED)


@dataclass(frozen=True)
class Shape:
    """A model's weights, in elements."""

    layers: tuple[int, ...]
    """Of each layer."""
    table: int
    """Of the token embeddings."""
    head: int
    """Of the head; 0 where it is the table."""
    rest: int
    """What is in none of these: the last norm."""
    small: int
    """Of all these, in weights of at most ``few`` elements each."""
    width: int
    vocabulary: int
    keys_values: int
    """Elements of keys and values that a token leaves in all layers."""
    heads: int
    """Of keys and values: what tensor parallelism divides."""
    experts: int
    """Elements of the layers that are in experts."""
    chosen: float
    """Part of a layer's experts that a token is sent to; 1 without experts."""

    @classmethod
    def of(cls, config: PreTrainedConfig, few: int = 10_000) -> Self:
        """``few``: at most so many elements make a weight small (``stage3_param_persistence_threshold``).

        Raises:
            SoftCoTError: its decoder has no list of layers, or no attention.
        """
        model = meta_model(config, torch.bfloat16)
        layers = getattr(model.get_decoder(), "layers", None)
        if not isinstance(layers, nn.ModuleList):
            raise SoftCoTError(f"{type(model).__name__} cannot be planned: its decoder has no list of layers")
        sizes = tuple(_elements(layer) for layer in layers)
        table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
        head_size = 0 if head is None or head.weight is table else _elements(head)
        text = config.get_text_config()
        experts, chosen = _experts(text)
        kept = [_kept(layer) for layer in layer_configs(text, len(sizes))]
        if None in kept:
            raise SoftCoTError(f"{type(model).__name__} cannot be planned: its configuration tells no attention heads")
        return cls(
            layers=sizes,
            table=table.numel(),
            head=head_size,
            rest=_elements(model) - sum(sizes) - table.numel() - head_size,
            small=sum(p.numel() for p in model.parameters() if p.numel() <= few),
            width=table.shape[1],
            vocabulary=table.shape[0],
            keys_values=sum(2 * heads * width for heads, width in kept),
            heads=math.gcd(*(heads for heads, _ in kept)),
            experts=sum(p.numel() for name, p in layers.named_parameters() if ".experts." in f".{name}"),
            chosen=chosen / experts,
        )

    def met(self, tokens: int) -> float:
        """Elements of the layers that some tokens meet: of experts, those that one of them is sent to, on average."""
        return sum(self.layers) - self.experts * (1 - self.chosen) ** tokens

    @property
    def total(self) -> int:
        return sum(self.layers) + self.table + self.head + self.rest


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _experts(config: PreTrainedConfig) -> tuple[int, int]:
    """How many experts a layer has, and how many of them a token is sent to; 1 and 1 where there are none."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((number for name in names if (number := getattr(config, name, None))), 1)
    return experts, getattr(config, "num_experts_per_tok", None) or experts


def _kept(layer: PreTrainedConfig) -> tuple[int, int] | None:
    """Heads of keys and values of a layer, and the width of one; None where it tells none."""
    queries = getattr(layer, "num_attention_heads", None)
    heads = getattr(layer, "num_key_value_heads", None) or queries
    width = getattr(layer, "head_dim", None) or (queries and layer.hidden_size // queries)
    return (heads, width) if heads and width else None


def meta_model(config: PreTrainedConfig, dtype: torch.dtype, attention: str = "sdpa") -> PreTrainedModel:
    """The frozen model without values. Raises SoftCoTError where it is no causal language model."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it would warn of settings that are made for another depth
    try:
        try:
            model = empty_model(config, dtype=dtype, attn_implementation=attention)
        except SoftCoTError:  # some families have no other attention, or none at all
            model = empty_model(config, dtype=dtype, attn_implementation="eager")
        return model.eval().requires_grad_(False)
    finally:
        transformers_logging.set_verbosity(verbosity)


def shallow(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The configuration of the model's first ``layers`` layers."""
    return type(config).from_dict(_cut(config.to_dict(), layers))


def _cut(values: dict[str, Any], layers: int) -> dict[str, Any]:
    depth = next((values[name] for name in DEPTHS if values.get(name)), None)
    cut = {}
    for key, value in values.items():
        if key in DEPTHS:
            value = min(layers, value)
        elif isinstance(value, list) and len(value) == depth:
            value = value[:layers]
        elif key == "per_layer_config" and value:
            value = {layer: own for layer, own in value.items() if int(layer) < layers} or None
        elif isinstance(value, dict) and "model_type" in value:
            value = _cut(value, layers)
        cut[key] = value
    return cut


_SLICED = {"colwise": 0, "colwise_gather_output": 0, "embedding_rowwise": 0, "rowwise": 1, "packed_colwise": 0}
"""The dimension that transformers' plans slice a matrix along, by what they call it; of experts, one behind it."""


def sliced_elements(model: PreTrainedModel, ranks: int) -> int:
    """Elements that each of ``ranks`` holds of a model under tensor parallelism; 0 where they cannot hold it so."""
    dimensions = _sliced_dimensions(model, ranks)
    if dimensions is None:
        return 0
    return sum(weight.numel() // (ranks if weight in dimensions else 1) for weight in model.parameters())


def slice_weights(model: PreTrainedModel, ranks: int) -> None:
    """Leave of each weight what a rank holds under tensor parallelism; ``sliced_elements`` says whether it can."""
    slices = {
        weight: nn.Parameter(weight.narrow(dimension, 0, weight.shape[dimension] // ranks).clone(), requires_grad=False)
        for weight, dimension in (_sliced_dimensions(model, ranks) or {}).items()
    }
    for module in model.modules():  # a table that is the head too has two places
        weights = module.named_parameters(recurse=False)
        module._parameters.update({leaf: slices[weight] for leaf, weight in weights if weight in slices})


def _sliced_dimensions(model: PreTrainedModel, ranks: int) -> dict[nn.Parameter, int] | None:
    """Along which dimension each weight is sliced, by the family's own plan in transformers; others are held whole.

    Returns:
        None where there is no plan, or the weights do not fall apart into so many equal parts.
    """
    found: dict[nn.Parameter, int] = {}
    plan = getattr(model, "_tp_plan", None) or {}
    if ranks == 1:
        return found
    for name, weight in model.named_parameters():
        style = next((s for pattern, s in plan.items() if fnmatch(name, pattern) or fnmatch(name, f"{pattern}.*")), "")
        dimension = _SLICED.get(style, weight.ndim) + max(0, weight.ndim - 2)
        if dimension >= weight.ndim:
            continue
        if weight.shape[dimension] % ranks:
            return None
        found[weight] = dimension
    return found if plan else None
