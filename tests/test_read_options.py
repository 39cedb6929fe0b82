"""Answers read from the probabilities of options: against float64 passes over each option of each problem alone."""

import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from adapters import make_adapter
from scipy.stats import binomtest
from test_evaluate import write_dates
from test_losses import make_recipe, naive, records
from transformers import AutoModelForCausalLM

from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation import jobs
from softcot_ds.evaluation.conditions import Conditions
from softcot_ds.evaluation.options import _likeliest, without_common_end, written_options
from softcot_ds.evaluation.report import table, what_it_says_more
from softcot_ds.evaluation.run import evaluate
from softcot_ds.inference import Adapter
from softcot_ds.run_dir import recipe_and_adapter
from softcot_ds.task_config import TaskConfig
from softcot_ds.tasks import Problem, make_task
from softcot_ds.values import resolve_location

READ = [
    "evaluation.decode=true",
    "evaluation.loss=false",
    "evaluation.read=options",
    "evaluation.conditions=[learned,none]",
]


def dates(folder):
    write_dates(folder / "task.json")
    return ["task.name=date_understanding", f"task.test={folder}/task.json"], ["A", "B", "C"]


def yes_and_no(folder):
    lines = [{"question": f"is {n} more than 4 ?", "answer": n > 4} for n in range(1, 8)]
    (folder / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    named = ["name=custom", f"test={folder}/own.jsonl", "answer=yes_no", "fields={question: question, answer: answer}"]
    return [f"task.{setting}" for setting in named], ["yes", "no"]


def test_of_equally_likely_options_each_is_chosen_as_often():
    task = make_task(TaskConfig(name="aqua", test="some/set"))
    problems = [Problem(f"question {n}", "", "A", ("x", "y", "z")) for n in range(6000)]
    examples = [SimpleNamespace(problem=problem) for problem in problems]
    written = written_options(SimpleNamespace(task=task), examples)
    chosen = Counter(_likeliest(dict.fromkeys(one, 1.0), one).value for one in written)
    assert set(chosen) == {"A", "B", "C"}
    assert all(binomtest(times, 6000, 1 / 3).pvalue > 0.001 for times in chosen.values())


@pytest.mark.slow
@pytest.mark.parametrize("data", [dates, yes_and_no])
def test_the_likeliest_option_is_the_answer(tmp_path, monkeypatch, data):
    folder = make_adapter(tmp_path / "adapter", make_recipe(tmp_path))
    named, options = data(tmp_path)
    wording = f"task.prompts={resolve_location('package:tasks/word_problems.yaml')}"
    recipe, folder = recipe_and_adapter(str(folder), [*named, wording, *READ])
    load = jobs.load_to_run
    monkeypatch.setattr(jobs, "load_to_run", lambda *arguments: load(*arguments).double())  # but for norms
    report = evaluate(recipe, folder)

    opened = Adapter(recipe, folder)
    examples, encode = opened.experiment.splits.test, opened.experiment.base_tokenizer.encode
    conditions = Conditions(opened, examples)
    base = AutoModelForCausalLM.from_pretrained(resolve_location("package:pair/base"), dtype=torch.float64)
    texts = [encode(f"The answer is \\boxed{{{option}", add_special_tokens=False) for option in options]
    for condition in ("learned", "none"):
        posed = conditions.of(condition)
        given = posed.thoughts(list(range(len(examples)))) if posed.thoughts else [None] * len(examples)
        rows = records(recipe, condition)
        for row, prompt, thoughts in zip(rows, posed.prompts, given, strict=True):
            likely = [math.exp(-naive(base, prompt, thoughts, text)) for text in texts]
            assert row["options"] == pytest.approx(
                {option: one / sum(likely) for option, one in zip(options, likely, strict=True)}, rel=1e-5
            )
            assert row["answer"] == options[likely.index(max(likely))]
            assert row["output"] == f"The answer is \\boxed{{{row['answer']}}}."
            assert row["correct"] == (row["answer"] == row["reference"])
        assert report["conditions"][condition]["correct"] == sum(row["correct"] for row in rows)
    assert "answers read from the options" in table(report).splitlines()[0]
    text = {key: value for key, value in report.items() if key != "read"}
    assert what_it_says_more(report, text) == ["its answers are read from the options, here from the text"]


def test_a_task_without_options_is_refused_before_a_model_is_loaded(tmp_path):
    recipe = make_recipe(tmp_path, *READ)
    adapter = make_adapter(tmp_path / "adapter", recipe)
    with pytest.raises(SoftCoTError, match="the task word_problems has problems without options to choose from"):
        evaluate(recipe, adapter)


def test_options_the_tokenizer_does_not_tell_apart_are_refused(tmp_path, monkeypatch, scribe):
    folder = make_adapter(tmp_path / "adapter", make_recipe(tmp_path))
    wording = f"task.prompts={resolve_location('package:tasks/word_problems.yaml')}"
    recipe, folder = recipe_and_adapter(str(folder), [*dates(tmp_path)[0], wording, *READ])
    monkeypatch.setattr("softcot_ds.data.prompts.BasePrompts.target_ids", lambda self, text: [1, 2, 3])
    with pytest.raises(SoftCoTError, match="does not tell the options A, B, C apart"):
        evaluate(recipe, folder)


def test_what_all_options_end_in_is_not_read():
    assert without_common_end([[1, 5, 9, 8], [1, 6, 9, 8]]) == [[1, 5], [1, 6]]
    assert without_common_end([[1, 5, 6, 9], [1, 7, 9]]) == [[1, 5, 6], [1, 7]]
    assert without_common_end([[5, 9], [5, 6]]) == [[5, 9], [5, 6]]
