"""All weights of the base, trained: for what that makes a model forget, at small sizes."""

from pathlib import Path
from typing import Self

from safetensors.torch import save
from torch import nn
from transformers import PreTrainedModel

from softcot_ds.errors import SoftCoTError
from softcot_ds.methods.base import Given
from softcot_ds.methods.conditioning import Weights
from softcot_ds.methods.trained_base import TrainedBase
from softcot_ds.models.backbone import load_tokenizer
from softcot_ds.models.operations import Decoder
from softcot_ds.models.partition import set_whole
from softcot_ds.recipe import Recipe

FOLDER = "model"
"""In an adapter directory, the model as ``from_pretrained`` reads it."""


class Full(TrainedBase):
    """The base, all of whose weights are trained."""

    weights_file = f"{FOLDER}/model.safetensors"

    def __init__(self, base: PreTrainedModel, recipe: Recipe, checkpointing: bool) -> None:
        super().__init__(base.requires_grad_(True), Decoder.of(base), checkpointing)
        self._recipe = recipe

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        super().check(recipe)
        if recipe.backbone.partition == "node":
            raise SoftCoTError(
                f"backbone.partition=node sums no gradients over nodes, and method={recipe.method} trains what it "
                "splits; set it to zero3, or to none where a rank holds all weights with their moments"
            )

    @classmethod
    def build(cls, given: Given) -> Self:
        return cls(given.base, given.recipe, given.recipe.training.activation_checkpointing)

    @classmethod
    def num_trained(cls, recipe: Recipe, widths: tuple[int, int], base: PreTrainedModel) -> int:
        return sum(parameter.numel() for parameter in base.parameters())

    @classmethod
    def apply_adapter(cls, base: PreTrainedModel, folder: Path, weights: Weights) -> None:
        parameters = dict(base.named_parameters())
        cls.check_fits(weights, parameters, folder)
        for name, parameter in parameters.items():
            set_whole(parameter, weights[name])

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(self.base.named_parameters())

    def write_adapter(self, folder: Path, weights: Weights) -> None:
        model = folder / FOLDER
        model.mkdir()
        self.base.config.save_pretrained(model)
        if self.base.can_generate():
            self.base.generation_config.save_pretrained(model)
        load_tokenizer(self._recipe.base).save_pretrained(model)
        (model / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))

    def operations_of_trained(self) -> int:
        """The product that a matrix's gradient is."""
        return 2 * (self._decoder.weights + self._decoder.head)
