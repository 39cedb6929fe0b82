"""A real model, from cache to report and to an answer: nothing here is made to fit."""

import json
import os
from pathlib import Path

import pytest
from forked import kill_forked, run_forked
from launch import BIN, ROOT, run
from runs import losses

from softcot_ds.recipe import load_recipe
from softcot_ds.tasks import make_task

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(1800)]

DATA = {
    "gsm8k": "task.train={0}/gsm8k/train.jsonl task.test={0}/gsm8k/test.jsonl",
    "aqua": "task.train={0}/aqua/dev.json task.test={0}/aqua/test.json",
    "strategy_qa": "task.train={0}/strategyqa/eladsegal_train.json task.test={0}/strategyqa/eladsegal_dev.json",
}
DATES = "task.name=date_understanding task.test={0}/date_understanding/task.json task.test_problems=4"
FEW = "task.train_problems=16 task.validation_problems=4 task.test_problems=4 training.steps=2 training.warmup_steps=0"
SHORT = ["evaluation.batch_size=4", "evaluation.max_new_tokens=64", "evaluation.conditions=[learned,none]"]


@pytest.fixture
def model() -> Path:
    """A folder of a small instruct model."""
    named = os.environ.get("SOFTCOT_REAL_MODELS")
    if not named:
        pytest.skip("SOFTCOT_REAL_MODELS names no folder with a real model in it, such as SmolLM2-135M-Instruct")
    folders = sorted(path.parent for path in Path(named).glob("**/config.json"))
    assert folders, f"there is no model in SOFTCOT_REAL_MODELS={named}"
    return folders[0]


def read_records(folder: Path, condition: str) -> list[dict]:
    (path,) = folder.glob(f"evaluation/*/{condition}.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_four_data_sets_go_from_cache_to_report(model, shared_data, tmp_path):
    for name, data in DATA.items():
        places = f"base.model={model} assistant.model={model} output_dir={tmp_path} cache.path={tmp_path}/cache"
        overrides = f"name={name} task.name={name} {data} {places} {FEW}".format(shared_data).split() + SHORT
        for command in ("cache", "train", "evaluate"):
            run([str(BIN / "softcot-ds"), command, "recipes/smollm2.yaml", *overrides], timeout=600)
        check(tmp_path / name, load_recipe(ROOT / "recipes/smollm2.yaml", overrides))
    dates = [*DATES.format(shared_data).split(), *SHORT, f"output_dir={tmp_path}", "name=dates"]
    run([str(BIN / "softcot-ds"), "evaluate", f"{tmp_path}/aqua/checkpoints/step-2", *dates], timeout=600)
    check(tmp_path / "dates", load_recipe(tmp_path / "aqua/recipe.yaml", dates, without="task"))


def test_two_ranks_are_killed_go_on_as_if_never_stopped_and_answer(model, shared_data, tmp_path):
    """The base of bfloat16 weights lies in halves on both ranks."""
    places = f"base.model={model} assistant.model={model} output_dir={tmp_path} cache.path={tmp_path}/cache"
    few = f"{DATA['gsm8k']} {FEW} training.steps=6 training.save_every=2 training.log_every=1".format(shared_data)
    settings = f"backbone.partition=zero3 task.name=gsm8k {places} {few}".split() + SHORT
    run([str(BIN / "softcot-ds"), "cache", "recipes/smollm2.yaml", *settings], timeout=600)
    for name in ("undisturbed", "killed"):
        if name == "killed":
            saved = tmp_path / name / "checkpoints/step-2/COMPLETE"
            kill_forked(saved, 2, "softcot_ds.train", "recipes/smollm2.yaml", f"name={name}", *settings)
        run_forked(2, "softcot_ds.train", "recipes/smollm2.yaml", f"name={name}", *settings)
    assert losses(tmp_path / "killed") == losses(tmp_path / "undisturbed")
    assert len(losses(tmp_path / "killed")) == 6
    adapters = [tmp_path / name / "checkpoints/step-6/projection.safetensors" for name in ("killed", "undisturbed")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()

    evaluated = ["recipes/smollm2.yaml", "name=killed", *settings, "evaluation.partition=none"]
    run_forked(2, "softcot_ds.evaluate", *evaluated)
    report = json.loads((tmp_path / "killed/report.json").read_text())
    assert report["train"]["world_size"] == 2
    problem = make_task(load_recipe(ROOT / "recipes/smollm2.yaml", settings).task).read("test")[0]
    asked = ["generate", str(tmp_path / "killed"), "--question", problem.question]
    answered = run([str(BIN / "softcot-ds"), *asked], timeout=600).stdout
    (first,) = (record for record in read_records(tmp_path / "killed", "learned") if record["id"] == problem.id)
    assert first["output"].strip()[:100] in answered


def check(run_dir: Path, recipe) -> None:
    """Each of four test problems was put to the base as it is published, and what it wrote was read by our rule."""
    task = make_task(recipe.task)
    problems = {problem.id: problem for problem in task.read("test")}
    report = json.loads(next(run_dir.glob("evaluation/*/report.json")).read_text())
    assert report["task"] == recipe.task.name
    for condition, found in report["conditions"].items():
        records = read_records(run_dir, condition)
        assert len(records) == found["loss"]["num_problems"] == 4
        for record in records:
            problem = problems[record["id"]]
            assert problem.question in record["prompt"]
            assert ("[4 thoughts]" in record["prompt"]) == (condition == "learned")
            assert record["output"].strip()
            assert record["answer"] == task.extract(record["output"], record["cut"], problem.options)
            assert record["correct"] == (record["answer"] == problem.answer)
        assert found["unparsed"] == sum(record["answer"] is None for record in records)
        assert 0 < found["loss"]["per_token"] < 5, "a model that has read English"
