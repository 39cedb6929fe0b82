"""What DeepSpeed is told."""

import json

import pytest
from launch import ROOT

from softcot_ds.errors import SoftCoTError
from softcot_ds.experiment import Experiment
from softcot_ds.models.partition import engine_config
from softcot_ds.planning.fit import spare_to_train
from softcot_ds.recipe import load_recipe
from softcot_ds.training import engine

RECIPE = ROOT / "recipes/word_problems.yaml"


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_configuration_is_one_of_deepspeeds(path):
    partition = "none" if path.stem == "replicated" else "zero3"
    config = engine_config(load_recipe(RECIPE, [f"backbone.deepspeed={path}", f"backbone.partition={partition}"]))
    told = json.loads(path.read_text())["zero_optimization"]
    assert config["zero_optimization"] == told | {"memory_efficient_linear": False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduce_buckets_size": 5}, "zero_optimization.reduce_buckets_size: Extra inputs are not permitted"),
        ({"overlap_comm": "often"}, "zero_optimization.overlap_comm: Input should be a valid boolean"),
        ({"reduce_bucket_size": -5}, "zero_optimization.reduce_bucket_size: Input should be greater than"),
        (
            {"offload_param": {"device": "tape"}},
            "zero_optimization.offload_param.device: Input should be 'none', 'cpu'",
        ),
        ({"offload_param": 3}, "zero_optimization.offload_param: "),
    ],
)
def test_what_deepspeed_does_not_know_is_said_before_a_model_is_loaded(tmp_path, change, message):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3} | change}))
    recipe = load_recipe(RECIPE, [f"backbone.deepspeed={path}", "backbone.partition=zero3"])
    with pytest.raises(SoftCoTError) as caught:
        engine_config(recipe)
    assert str(caught.value).startswith(f"{path}: {message}")


@pytest.mark.slow
def test_layers_that_stay_are_those_that_the_plan_leaves_room_for(monkeypatch):
    asked = []
    monkeypatch.setattr(engine, "keep_layers", lambda _base, gib, spare_of: asked.append((gib, spare_of)))
    experiment = Experiment(load_recipe(RECIPE, ["backbone.partition=none"]))
    engine.build_model(experiment.recipe, experiment, None)
    ((gib, spare_of),) = asked
    assert gib is None
    assert (spare_of.func, *spare_of.args) == (spare_to_train, experiment.recipe, experiment.splits)
