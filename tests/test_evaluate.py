"""Evaluation: what the conditions are, resuming, the report, the same outputs on any number of ranks."""

import json
import math

import pytest
import torch
from adapters import make_adapter
from launch import ROOT, deepspeed_command, run
from safetensors.torch import load_file

from softcot_ds import evaluate as evaluate_module
from softcot_ds.checkpoint import recipe_and_adapter
from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluate import evaluate
from softcot_ds.experiment import Experiment
from softcot_ds.generate import main as generate_main
from softcot_ds.recipe import load_recipe

RECIPE = ROOT / "recipes" / "word_problems.yaml"
SMALL = ["task.train_problems=8", "task.validation_problems=4", "task.test_problems=24", "thoughts.source=online"]
DECODE = ["evaluation.batch_size=5", "evaluation.max_new_tokens=12", "evaluation.text_max_tokens=6"]


def make_recipe(tmp_path, *overrides):
    return load_recipe(RECIPE, [f"output_dir={tmp_path}", *SMALL, *DECODE, *overrides])


@pytest.fixture
def recipe(tmp_path):
    return make_recipe(tmp_path, "evaluation.conditions=[learned,shuffled,mean,zero,none,text]")


@pytest.fixture
def adapter(tmp_path, recipe):
    return make_adapter(tmp_path / "adapter", recipe)


def records(recipe, condition):
    (path,) = recipe.run_dir.glob(f"evaluation/*/{condition}.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_report_agrees_with_the_outputs(recipe, adapter):
    report = evaluate(recipe, adapter)
    assert json.loads((recipe.run_dir / "report.json").read_text())["conditions"] == json.loads(
        json.dumps(report["conditions"])
    )
    assert report["num_problems"] == 24
    verdicts = {}
    for condition, row in report["conditions"].items():
        rows = records(recipe, condition)
        assert len({record["id"] for record in rows}) == 24
        # The verdict, from the text alone: what follows the last "answer".
        verdicts[condition] = [
            record["output"].rpartition("answer")[2].split()[:1] == [record["reference"]] for record in rows
        ]
        assert row["correct"] == sum(verdicts[condition])
        assert row["accuracy"] == row["correct"] / 24
        assert row["unparsed"] == sum("answer " not in record["output"] for record in rows)
        low, high = row["ci95"]
        # Wilson's interval solves |p - p0| = z sqrt(p0 (1 - p0) / n) for p0.
        for bound in (low, high):
            if 0 < bound < 1:
                assert abs(row["accuracy"] - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / 24))
    assert set(report["comparisons"]) == {f"learned-{c}" for c in ("shuffled", "mean", "zero", "none", "text")}


def test_conditions_are_what_they_say(recipe, adapter):
    experiment = Experiment(recipe)
    examples = experiment.splits.test
    inputs = evaluate_module._Inputs(recipe, experiment, examples, adapter)
    everything = list(range(len(examples)))
    learned = inputs.of("learned")[1](everything)

    weights = load_file(adapter / "projection.safetensors")
    truth = inputs._hidden.double() @ weights["weight"].double().T + weights["bias"].double()
    assert torch.allclose(learned.double(), truth, rtol=1e-5, atol=1e-6)

    shuffled = inputs.of("shuffled")[1](everything)
    owner = [int((learned - thoughts).abs().sum(dim=(1, 2)).argmin()) for thoughts in shuffled]
    assert sorted(owner) == everything, "each question's thoughts are used once"
    assert all(index != own for index, own in enumerate(owner)), "nobody keeps their own"

    mean = inputs.of("mean")[1](everything)
    assert torch.allclose(mean.double(), truth.mean(dim=0).expand_as(mean).double(), rtol=1e-5, atol=1e-6)
    assert not inputs.of("zero")[1](everything).any()

    prompts, thoughts = inputs.of("none")
    assert thoughts is None
    assert "plan" not in experiment.base_tokenizer.decode(prompts[0].prefix_ids + prompts[0].suffix_ids)

    inputs.words = [f"word {index}" for index in everything]
    prompts, thoughts = inputs.of("text")
    assert thoughts is None
    assert "plan :\nword 3" in experiment.base_tokenizer.decode(prompts[3].prefix_ids)


def test_interrupted_evaluation_goes_on_where_it_was(recipe, adapter, monkeypatch):
    recipe = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"conditions": ["learned"]})})
    evaluate(recipe, adapter)
    whole = records(recipe, "learned")
    (part,) = recipe.run_dir.glob("outputs/*/*.part")
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[:2]) + lines[2][:20])  # killed while it wrote its third batch
    decoded = []
    original = evaluate_module.decode
    monkeypatch.setattr(
        evaluate_module,
        "decode",
        lambda model, prompts, *rest, **kw: decoded.append(len(prompts)) or original(model, prompts, *rest, **kw),
    )
    evaluate(recipe, adapter)
    assert records(recipe, "learned") == whole
    assert sum(decoded) == 24 - 2 * 5, "finished batches are not decoded again"


def test_other_wording_is_another_evaluation(recipe, adapter, tmp_path):
    learned = {"evaluation": recipe.evaluation.model_copy(update={"conditions": ["learned"]})}
    evaluate(recipe.model_copy(update=learned), adapter)
    (first,) = recipe.run_dir.glob("evaluation/*")
    before = (first / "learned.jsonl").read_text()
    (tmp_path / "other.yaml").write_text((adapter / "prompts.yaml").read_text().replace("plan :", "plan"))
    other = {"task": recipe.task.model_copy(update={"prompts": tmp_path / "other.yaml"})}
    evaluate(recipe.model_copy(update=learned | other), adapter)
    assert len(list(recipe.run_dir.glob("evaluation/*"))) == 2
    assert (first / "learned.jsonl").read_text() == before


def test_static_prompt_is_a_condition_of_its_own(tmp_path):
    static = make_recipe(tmp_path, "projection.kind=static", "name=static")
    static_adapter = make_adapter(tmp_path / "static-adapter", static)
    recipe = make_recipe(
        tmp_path, f"evaluation.static_adapter={static_adapter}", "evaluation.conditions=[learned,static]"
    )
    adapter = make_adapter(tmp_path / "adapter", recipe)
    report = evaluate(recipe, adapter)
    assert set(report["conditions"]) == {"learned", "static"}
    # The static adapter, evaluated as itself, says the same.
    alone = make_recipe(tmp_path, "projection.kind=static", "name=static", "evaluation.conditions=[learned]")
    evaluate(alone, static_adapter)
    assert [r["output"] for r in records(alone, "learned")] == [r["output"] for r in records(recipe, "static")]

    wrong = make_recipe(tmp_path, f"evaluation.static_adapter={adapter}", "evaluation.conditions=[static]")
    with pytest.raises(SoftCoTError, match="is a linear projection, not static"):
        evaluate(wrong, adapter)


def test_adapter_of_other_models_is_refused(recipe, adapter):
    swapped = load_recipe(RECIPE, [*SMALL, "base.model=package:pair/assistant", f"output_dir={recipe.output_dir}"])
    with pytest.raises(SoftCoTError, match=r"trained with the base package:pair/base .* holds other weights"):
        evaluate(swapped, adapter)
    fewer = load_recipe(RECIPE, [*SMALL, "thoughts.count=3", f"output_dir={recipe.output_dir}"])
    with pytest.raises(SoftCoTError, match=r"trained with 4 thoughts, thoughts.count is 3; set it to 4"):
        evaluate(fewer, adapter)


def test_incomplete_or_damaged_adapter_is_refused(recipe, adapter):
    (adapter / "projection.safetensors").write_bytes((adapter / "projection.safetensors").read_bytes()[:-100])
    with pytest.raises(SoftCoTError, match="damaged or no projection"):
        evaluate(recipe, adapter)
    (adapter / "COMPLETE").unlink()
    with pytest.raises(SoftCoTError, match="no complete checkpoint: it has no file COMPLETE"):
        evaluate(recipe, adapter)
    with pytest.raises(SoftCoTError, match="no such adapter directory"):
        evaluate(recipe, adapter / "nowhere")


def test_adapter_directory_alone_is_enough(adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe, folder = recipe_and_adapter(str(adapter), ["task.test_problems=6", "evaluation.conditions=[learned]"])
    assert folder == adapter
    assert evaluate(recipe, folder)["num_problems"] == 6
    capsys.readouterr()
    assert generate_main([str(adapter), "--question", "tom has 23 coins . how many coins now ?"]) == 0
    assert generate_main([str(adapter), "--question", " "]) == 2
    assert "--question is empty" in capsys.readouterr().err


def test_a_recipe_means_its_newest_checkpoint_and_the_wording_it_was_trained_with(recipe, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    with pytest.raises(SoftCoTError, match=r"no complete checkpoint in .*; train first: softcot-ds train "):
        recipe_and_adapter(str(tmp_path / "recipe.yaml"), [])
    make_adapter(recipe.run_dir / "checkpoints/step-9", recipe)
    newest = make_adapter(recipe.run_dir / "checkpoints/step-10", recipe)
    (make_adapter(recipe.run_dir / "checkpoints/step-11", recipe) / "COMPLETE").unlink()
    found, folder = recipe_and_adapter(str(tmp_path / "recipe.yaml"), ["evaluation.batch_size=3"])
    assert folder == newest
    assert found.task.prompts == newest / "prompts.yaml"
    assert found.evaluation.batch_size == 3


@pytest.mark.distributed
@pytest.mark.parametrize("partition", ["none", "zero3"])
def test_two_ranks_write_the_outputs_of_one(recipe, adapter, partition):
    evaluate(recipe, adapter)
    name = f"two-{partition}"
    conditions = ["learned", "none", "text"] if partition == "zero3" else recipe.evaluation.conditions
    run(
        deepspeed_command(
            2,
            "softcot_ds.evaluate",
            adapter,
            f"name={name}",
            f"evaluation.partition={partition}",
            f"evaluation.conditions=[{','.join(conditions)}]",
        )
    )
    two = recipe.model_copy(update={"name": name})
    for condition in conditions:
        assert records(two, condition) == records(recipe, condition), condition
