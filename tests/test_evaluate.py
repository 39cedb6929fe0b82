"""Evaluation: its report, the adapters that it takes, the same outputs on any number of ranks."""

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from adapters import make_adapter
from evaluations import EVERY, RECIPE, SEARCH, SMALL, WITHOUT_STATIC, edit, make_recipe, recipe_in, records
from forked import run_forked
from launch import ROOT
from safetensors.torch import load_file

from softcot_ds import agreement
from softcot_ds.data.targets import OwnTargets
from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation import jobs
from softcot_ds.evaluation.report import table
from softcot_ds.evaluation.run import _evaluation_hash, evaluate
from softcot_ds.evaluation.targets import make_targets
from softcot_ds.generate import main as generate_main
from softcot_ds.inference import Adapter
from softcot_ds.methods import trial
from softcot_ds.models import assistant as assistant_module
from softcot_ds.models import backbone
from softcot_ds.models.partition import decoding_config
from softcot_ds.planning.report import make_plan
from softcot_ds.recipe import load_recipe
from softcot_ds.run_dir import recipe_and_adapter
from softcot_ds.tasks import Problem
from softcot_ds.training.loop import train


@pytest.fixture
def recipe(tmp_path):
    return make_recipe(tmp_path, WITHOUT_STATIC)


@pytest.fixture
def adapter(tmp_path, recipe):
    return make_adapter(tmp_path / "adapter", recipe)


@pytest.mark.slow
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
    assert set(report["comparisons"]) == {f"learned-{name}" for name in recipe.evaluation.conditions[1:]}


def test_cut_and_unparsed_outputs_are_counted_and_a_cut_number_is_no_answer(tmp_path, scribe):
    recipe = make_recipe(tmp_path, "evaluation.conditions=[learned,none]")
    report = evaluate(recipe, make_adapter(tmp_path / "adapter", recipe))
    truth = {("answer 7", False): "7", ("answer 7 .", True): "7"}  # nothing is known of the others
    for condition, row in report["conditions"].items():
        rows = records(recipe, condition)
        for record in rows:
            assert record["answer"] == truth.get((record["output"].split(" ", 2)[2], record["cut"])), record
        assert row["cut"] == sum(record["cut"] for record in rows)
        assert row["unparsed"] == sum(record["answer"] is None for record in rows)
        assert len({(record["cut"], record["answer"]) for record in rows}) == 4, "all kinds are among them"
        shown = next(line for line in table(report).splitlines() if line.startswith(condition)).split()
        assert shown[7:9] == [f"{100 * row[count] / len(rows):.1f}%" for count in ("unparsed", "cut")]


def of_another_base(path):
    values = json.loads(path.read_text())
    values["base"]["fingerprint"] = "0" * 64
    path.write_text(json.dumps(values))


def forbid_models(monkeypatch):
    for module in (backbone, trial, assistant_module):
        monkeypatch.setattr(module, "load_frozen", lambda *_: pytest.fail("a model was loaded"))


@pytest.mark.parametrize(
    ("overrides", "change", "message"),
    [
        (
            ["evaluation.static_adapter=no/such/place"],
            None,
            r"evaluation.static_adapter: no such adapter directory: no/such/place",
        ),
        ([], lambda f: (f / "static/COMPLETE").unlink(), r"evaluation.static_adapter: .* no file COMPLETE"),
        (
            [],
            lambda f: shutil.copytree(f / "adapter", f / "static", dirs_exist_ok=True),
            "is of method=softcot, whose thoughts differ",
        ),
        (
            [],
            lambda f: (f / "static/projection.safetensors").write_bytes(b"x" * 99),
            "static/proj.*: damaged or no proj",
        ),
        (
            [],
            lambda f: of_another_base(f / "static/adapter.json"),
            "evaluation.static_adapter: .* base .* holds other weig",
        ),
        (
            [],
            lambda f: edit(f / "static/adapter.json", '"num_thoughts": 4', '"num_thoughts": 3'),
            "trained with 3 thoug",
        ),
        (
            [],
            lambda f: edit(f / "base/config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-03'),
            "base .* holds ot",
        ),
        ([], lambda f: (f / "adapter/trainer.json").write_text("{"), "trainer.json is damaged"),
        (
            ["thoughts.layer=1"],
            None,
            r"trained on states of the last layer .*layer=1 names layer 1; set it to -1",
        ),
        (
            ['thoughts.placeholder=["1", "2"]'],
            None,
            r"trained on states at .* tokens \['<.thought.>'\], .* names \['1', '2'\]; set it as in recipe.yaml of",
        ),
        (["evaluation.placeholder='so it'"], None, r"evaluation.placeholder 'so it' is 5 tokens for the tokenizer of"),
        (
            ["task.test_problems=1"],
            None,
            r"shuffled: not each .*: 1 of the 1 problems are the same .*; raise task",
        ),
        (
            ["method=prompt_tuning"],
            None,
            r"adapter was trained by method=softcot, and the recipe has prompt_tuning; set method=softcot",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_a_model_is_loaded(
    first_evaluation, tmp_path, monkeypatch, overrides, change, message
):
    folder = shutil.copytree(first_evaluation, tmp_path / "copy")
    shutil.rmtree(folder / "demo")
    if change is not None:
        change(folder)
    forbid_models(monkeypatch)
    with pytest.raises(SoftCoTError, match=message):
        evaluate(recipe_in(folder, *overrides), folder / "adapter")
    assert not list(folder.glob("demo/*/*.jsonl"))


def test_a_finished_evaluation_needs_no_model_and_leaves_its_results(first_evaluation, tmp_path, monkeypatch):
    folder = shutil.copytree(first_evaluation, tmp_path / "copy")
    forbid_models(monkeypatch)
    before = {path: path.read_bytes() for path in folder.glob("demo/evaluation/*/*.jsonl")}
    evaluate(recipe_in(folder), folder / "adapter")
    assert {path: path.read_bytes() for path in folder.glob("demo/evaluation/*/*.jsonl")} == before
    assert len(before) == len(EVERY)


def test_the_assistant_is_gone_before_the_base_is_loaded(tmp_path, scribe, monkeypatch):
    loads = []
    load = assistant_module.load_frozen
    monkeypatch.setattr(assistant_module, "load_frozen", lambda *rest: loads.append("assistant") or load(*rest))
    monkeypatch.setattr(jobs, "load_to_run", lambda config, *_: loads.append(config.model))
    recipe = make_recipe(tmp_path, "evaluation.conditions=[none,learned,mean]")
    evaluate(recipe, make_adapter(tmp_path / "adapter", recipe))
    assert loads == ["assistant", "package:pair/base"]


def test_a_base_that_training_does_not_partition_may_be_partitioned_for_decoding(tmp_path):
    recipe = make_recipe(tmp_path, "backbone.partition=none", "evaluation.partition=zero3")
    assert decoding_config(recipe)["zero_optimization"]["stage"] == 3
    offloading = f"backbone.deepspeed={ROOT}/ds_configs/zero3_cpu_offload.json"
    own = make_recipe(tmp_path, "backbone.partition=node", offloading)
    assert decoding_config(own)["zero_optimization"].keys() >= {"offload_param"}, "its own file where it fits"


def test_ranks_that_see_different_files_do_not_mix_their_outputs(recipe, adapter, scribe, monkeypatch):
    def with_another(mine):
        theirs = {name: "of another step" if name == "learned: thoughts" else fact for name, fact in mine.facts.items()}
        return [mine, replace(mine, rank=1, facts=theirs)]

    monkeypatch.setattr(agreement, "from_all_ranks", with_another)
    with pytest.raises(SoftCoTError, match=r"the ranks do not agree(.|\n)*- learned: thoughts: .*of another step"):
        evaluate(recipe, adapter)
    assert scribe.batches == []


def test_a_check_on_few_problems_has_a_report_of_its_own(first_evaluation, tmp_path, scribe, capsys):
    folder = shutil.copytree(first_evaluation, tmp_path / "copy")
    of_the_run = folder / "demo/report.json"
    whole = of_the_run.read_bytes()
    few = evaluate(recipe_in(folder, "task.test_problems=3"), folder / "adapter")
    assert of_the_run.read_bytes() == whole
    said = capsys.readouterr().out
    assert "report.json stays as it is: it is on 7 problems, this one on 3. Remove it to let" in said
    reports = [json.loads(path.read_text()) for path in folder.glob("demo/evaluation/*/report.json")]
    assert json.loads(json.dumps(few)) in reports
    assert json.loads(whole) in reports
    of_the_run.write_bytes(whole[:50])  # damaged: no report
    evaluate(recipe_in(folder, "task.test_problems=3"), folder / "adapter")
    assert json.loads(of_the_run.read_text())["num_problems"] == 3
    evaluate(recipe_in(folder), folder / "adapter")
    assert json.loads(of_the_run.read_text())["num_problems"] == 7


def test_the_same_outputs_judged_otherwise_are_another_evaluation():
    def hash_of(kind, *options):
        fields = (
            "task.fields={question: q, answer: a, options: o}" if options else "task.fields={question: q, answer: a}"
        )
        data = [
            "task.name=custom",
            f"task.answer={kind}",
            "task.test=some/set",
            f"task.prompts={ROOT}/softcot_ds/tasks/word_problems.yaml",
            fields,
        ]
        example = SimpleNamespace(problem=Problem("which?", "", "A", options))
        return _evaluation_hash(load_recipe(RECIPE, data), {"none": "key"}, [example])

    asked = [("text",), ("number",), ("option", "2", "3"), ("option", "3", "2")]
    assert len({hash_of(*one) for one in asked}) == 4
    assert hash_of("text") == hash_of("text")


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


def write_dates(path):
    """In BIG-bench's format; which letter is right is a matter of the seeded order of the options."""
    inputs = [f"today is may {day} . which day is tomorrow ?" for day in range(1, 9)]
    scores = [{f"may {day + 1}": 1, f"may {day + 2}": 0, f"june {day}": 0} for day in range(1, 9)]
    examples = [{"input": text, "target_scores": score} for text, score in zip(inputs, scores, strict=True)]
    path.write_text(json.dumps({"name": "dates", "examples": examples}, indent=1))


def test_an_adapter_of_one_task_is_evaluated_on_another(recipe, adapter, tmp_path, scribe):
    write_dates(tmp_path / "task.json")
    scribe.ENDINGS = (("The answer is B, as a day is over.", False), ("Answer: (C)", False), ("no idea", False))
    named = ["task.name=date_understanding", f"task.test={tmp_path}/task.json"]
    found, folder = recipe_and_adapter(str(adapter), named)
    assert found.task.train is None
    assert found.task.prompts is None, "the wording is not that of the adapter's own task"
    assert found.task.validation_problems != recipe.task.validation_problems, "nor is anything else"
    wording = f"task.prompts={ROOT}/softcot_ds/tasks/word_problems.yaml"  # short enough for the embedded pair
    found, folder = recipe_and_adapter(str(adapter), [*named, wording, "evaluation.conditions=[learned,none]"])
    report = evaluate(found, folder)
    assert (report["task"], report["trained_on"], report["num_problems"]) == ("date_understanding", "word_problems", 8)
    read = {"B": ("B", "A"), "(": ("C", "C"), "n": (None, None)}  # by our rule, and by the last letter
    for condition in ("learned", "none"):
        rows = records(found, condition)
        assert {len(row["reference"]) for row in rows} == {1}
        for row in rows:
            ours, reference = read[
                row["output"].split(" ", 2)[2].removeprefix("The answer is ").removeprefix("Answer: ")[0]
            ]
            assert (row["answer"], row["correct"]) == (ours, ours == row["reference"])
            assert row["by_rule"]["reference"] == {"answer": reference, "correct": reference == row["reference"]}
        counted = report["conditions"][condition]["by_rule"]["reference"]["correct"]
        assert counted == sum(row["by_rule"]["reference"]["correct"] for row in rows)
    lines = table(report).splitlines()
    assert "(trained on word_problems)" in lines[0]
    assert lines[6].endswith("by reference")
    assert lines[8].endswith(f"{report['conditions']['none']['by_rule']['reference']['accuracy']:.1%}")
    assert not (found.run_dir / "report.json").exists(), "the run's report is of its own task"

    by_reference = found.task.model_copy(update={"metric_rule": "reference"})
    again = evaluate(found.model_copy(update={"task": by_reference}), folder)
    assert len(scribe.batches) == 2, "the outputs are the same"
    for condition, row in again["conditions"].items():
        assert row["by_rule"] == report["conditions"][condition]["by_rule"]
        assert row["by_rule"]["reference"].items() <= row.items()
        assert row["by_rule"]["ours"].items() <= report["conditions"][condition].items()
        assert row["correct"] != row["by_rule"]["ours"]["correct"]
    assert table(again).splitlines()[6].endswith("by ours")

    (tmp_path / "own.yaml").write_text(found.to_yaml())
    for command in (train, lambda recipe: make_plan(recipe, cluster=None)):
        with pytest.raises(SoftCoTError, match="no training data for date_understanding; train on another task"):
            command(load_recipe(tmp_path / "own.yaml"))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("partition", "temperature", "conditions"),
    [("none", 0.7, ["learned", "shuffled", "mean", "zero", "none", "text"]), ("zero3", 0, ["learned", "none", "text"])],
)
def test_two_ranks_write_the_outputs_of_one(recipe, adapter, tmp_path, partition, temperature, conditions):
    """The two have the assistant draft, and the one has too where drafts decide what is sampled."""
    samples, draft = (2, 2) if temperature else (1, 0)
    chosen = {"temperature": temperature, "conditions": conditions, "samples": samples, "draft": draft}
    recipe = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update=chosen)})
    evaluate(recipe, adapter)
    name = f"two-{partition}"
    overrides = [
        f"name={name}",
        f"evaluation.partition={partition}",
        f"evaluation.temperature={temperature}",
        f"evaluation.samples={samples}",
        "evaluation.draft=2",
        f"evaluation.conditions=[{','.join(conditions)}]",
    ]
    if partition == "none":
        run_forked(2, "softcot_ds.evaluate", adapter, *overrides)
    else:
        done = run_forked(2, "evaluation_worker", adapter, tmp_path / "door", *overrides)
        check_what_ranks_are_given(recipe, adapter, tmp_path, done.stdout)
        check_their_targets(recipe, tmp_path)
        check_their_search(recipe, adapter)
    two = recipe.model_copy(update={"name": name})
    for condition in conditions:
        found, want = records(two, condition), records(recipe, condition)
        if partition == "zero3":  # in several passes
            for record in want:
                record["loss"] = pytest.approx(record["loss"], rel=1e-5, abs=1e-5)
        assert found == want, condition


def check_their_targets(recipe, folder):
    own = [f"task.targets={folder}/one.targets", "evaluation.batch_size=1", "evaluation.max_new_tokens=40"]
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    make_targets(load_recipe(folder / "recipe.yaml", [*own, "targets.samples=2", "evaluation.partition=none"]))
    assert (folder / "door.targets").read_text() == (folder / "one.targets").read_text()
    assert 0 < OwnTargets.read(folder / "one.targets").solved < 4


def check_their_search(recipe, adapter):
    """The portions of each round, drafts in them, on two ranks or on one after the other."""
    for strategy in ("tree", "graph"):
        chosen = [*SEARCH, f"output_dir={recipe.output_dir}", f"evaluation.strategy={strategy}"]
        alone = recipe_and_adapter(str(adapter), [*chosen, f"name={strategy}-alone"])[0]
        evaluate(alone, adapter)
        found, want = (records(alone.model_copy(update={"name": name}), "learned") for name in (strategy, alone.name))
        assert found == want
        assert any(record["judgements"] for record in found)  # where all beginnings are the same, there are none


def check_what_ranks_are_given(recipe, adapter, folder, printed):
    """Through the Python door, by a base that is split over both of them: what a process has that is alone."""
    outputs = [record["output"] for record in records(recipe, "learned")]
    alone = Adapter(recipe, adapter)
    questions = [example.problem.question for example in alone.experiment.splits.test]
    embedded = alone.prompt_embeddings(questions)
    for rank in (0, 1):
        assert json.loads((folder / f"door.{rank}.json").read_text()) == outputs
        given = load_file(folder / f"door.{rank}")
        torch.testing.assert_close(given.pop("thoughts"), alone.thoughts(questions))
        for number, prompt in enumerate(embedded):
            torch.testing.assert_close(given[str(number)], prompt.embeddings)
    assert printed.splitlines().count(outputs[0]) == 1, "softcot-ds generate: rank 0 prints it, for both"
