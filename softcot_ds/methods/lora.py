"""LoRA (arXiv:2106.09685): low-rank matrices beside frozen weights of the base, the baseline without thoughts.

PEFT's modules, in PEFT's files: an adapter directory is one for ``PeftModel.from_pretrained`` and for vLLM too.
"""

import json
from pathlib import Path
from typing import Self

from safetensors.torch import save
from torch import nn
from transformers import PreTrainedModel

from softcot_ds.methods.base import Given
from softcot_ds.methods.conditioning import Weights
from softcot_ds.methods.trained_base import TrainedBase
from softcot_ds.models.low_rank import (
    CONFIG_FILE,
    FILE,
    add_low_rank,
    low_rank_dropouts,
    low_rank_parameters,
    low_rank_size,
    peft_config,
    read_peft_config,
)
from softcot_ds.models.operations import Decoder
from softcot_ds.models.partition import whole_shape
from softcot_ds.recipe import Recipe


class Lora(TrainedBase):
    """The frozen base with matrices beside the layers that the recipe's section ``lora`` names."""

    weights_file = FILE
    other_files = (CONFIG_FILE,)

    def __init__(self, base: PreTrainedModel, recipe: Recipe, checkpointing: bool) -> None:
        """Raises SoftCoTError when the base has no such layers."""
        decoder = Decoder.of(base)
        add_low_rank(base, recipe.lora, recipe.seed)
        super().__init__(base, decoder, checkpointing)
        self._recipe = recipe
        self._dropouts = low_rank_dropouts(base)

    @classmethod
    def build(cls, given: Given) -> Self:
        return cls(given.base, given.recipe, given.recipe.training.activation_checkpointing)

    @classmethod
    def num_trained(cls, recipe: Recipe, widths: tuple[int, int], base: PreTrainedModel) -> int:
        return low_rank_size(base, recipe.lora)

    @classmethod
    def apply_adapter(cls, base: PreTrainedModel, folder: Path, weights: Weights) -> None:
        parameters = add_low_rank(base, read_peft_config(folder), seed=0)
        cls.check_fits(weights, parameters, folder)
        for name, parameter in parameters.items():
            parameter.data = weights[name].to(parameter.device, base.dtype)
            parameter.requires_grad_(False)

    def trained(self) -> dict[str, nn.Parameter]:
        return low_rank_parameters(self.base)

    def settled(self) -> Self:
        for parameter in self.trained().values():
            parameter.data = parameter.data.to(dtype=self.base.dtype)
        return self

    def train(self, mode: bool = True) -> Self:
        for dropout in self._dropouts:
            dropout.train(mode)
        return super().train(mode)

    def write_adapter(self, folder: Path, weights: Weights) -> None:
        (folder / FILE).write_bytes(save(weights, metadata={"format": "pt"}))
        settings = peft_config(self._recipe.lora, self._recipe.base.model).to_dict() | {"inference_mode": True}
        text = json.dumps(settings, indent=2, sort_keys=True, default=sorted)  # sets, of names
        (folder / CONFIG_FILE).write_text(text + "\n")

    def operations_of_trained(self) -> int:
        """Two for each pair of factors in three products: of the matrix itself, of its gradient, of its input's."""
        return 6 * sum(whole_shape(parameter).numel() for parameter in self.trained().values())
