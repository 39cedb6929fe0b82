"""An adapter directory without training."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from softcot_ds.checkpoint import MARKER, adapter_config
from softcot_ds.experiment import Experiment
from softcot_ds.projection import LinearProjection
from softcot_ds.recipe import Recipe


def make_adapter(folder: Path, recipe: Recipe) -> Path:
    """A projection with random weights from seed 0, in the files that training writes."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    experiment = Experiment(recipe)
    if recipe.projection.kind == "static":
        weights = {"weight": torch.randn(recipe.thoughts.count, experiment.base_config.hidden_size)}
    else:
        projection = LinearProjection(experiment.assistant_config.hidden_size, experiment.base_config.hidden_size)
        weights = {name: value.detach() for name, value in projection.named_parameters()}
    save_file(weights, folder / "projection.safetensors")
    (folder / "adapter.json").write_text(adapter_config(recipe).to_json())
    (folder / "trainer.json").write_text(json.dumps({"step": 0, "optimizer_steps": 0, "summary": {"steps": 0}}))
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    shutil.copyfile(experiment.task.prompt_file, folder / "prompts.yaml")
    (folder / MARKER).touch()
    return folder
