"""An adapter directory without training."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from softcot_ds.adapter import adapter_config
from softcot_ds.experiment import Experiment
from softcot_ds.methods.base import method_class
from softcot_ds.methods.softcot import LinearProjection
from softcot_ds.models.backbone import load_frozen
from softcot_ds.recipe import Recipe
from softcot_ds.run_dir import MARKER


def make_checkpoint(recipe: Recipe, step: int) -> Path:
    """The checkpoint of a step in the recipe's run directory, with random weights and moments, to be resumed from."""
    folder = make_adapter(recipe.run_dir / f"checkpoints/step-{step}", recipe, step)
    weights = load_file(folder / method_class(recipe.method).weights_file)
    moments = {f"{moment}.{name}": value**2 for name, value in weights.items() for moment in ("exp_avg", "exp_avg_sq")}
    save_file(moments, folder / "optimizer.safetensors")
    return folder


def make_adapter(folder: Path, recipe: Recipe, step: int = 0) -> Path:
    """A projection with random weights from seed 0, in the files that evaluation reads."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    experiment = Experiment(recipe)
    kind = method_class(recipe.method)
    if kind.changes_base:
        base = load_frozen(recipe.base, "none", torch.device("cpu"))
        method = kind(base, recipe, False)
        weights = {name: p.detach() + 0.05 * torch.randn(p.shape) for name, p in method.trained().items()}
        method.write_adapter(folder, weights)
    elif recipe.method == "prompt_tuning":
        weights = {"weight": torch.randn(recipe.thoughts.count, experiment.base_config.hidden_size)}
    else:
        projection = LinearProjection(experiment.assistant_config.hidden_size, experiment.base_config.hidden_size)
        weights = {name: value.detach() for name, value in projection.named_parameters()}
    if not kind.changes_base:
        save_file(weights, folder / "projection.safetensors")
    (folder / "adapter.json").write_text(adapter_config(experiment).at_step(step).to_json())
    (folder / "trainer.json").write_text(json.dumps({"step": step, "optimizer_steps": step, "summary": {"steps": 0}}))
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    shutil.copyfile(experiment.task.prompt_file, folder / "prompts.yaml")
    (folder / MARKER).touch()
    return folder
