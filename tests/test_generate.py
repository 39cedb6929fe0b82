"""Answers to a user's questions: what evaluation decodes, and errors before a model is loaded."""

import io
import json
import shutil
import sys

import pytest
from adapters import make_adapter
from launch import ONLINE, ROOT

import softcot_ds
from softcot_ds import inference
from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation.run import evaluate
from softcot_ds.experiment import Experiment
from softcot_ds.generate import main
from softcot_ds.recipe import load_recipe
from softcot_ds.values import resolve_location

SMALL = ["task.train_problems=8", "task.validation_problems=4", "task.test_problems=3", *ONLINE]
DECODE = ["evaluation.batch_size=1", "evaluation.max_new_tokens=12", "evaluation.conditions=[learned,none]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    shutil.copytree(resolve_location("package:pair/assistant"), folder / "assistant")
    settings = [f"output_dir={folder}", f"assistant.model={folder}/assistant", *SMALL, *DECODE]
    recipe = load_recipe(ROOT / "recipes" / "word_problems.yaml", settings)
    make_adapter(folder / "adapter", recipe)
    static = load_recipe(ROOT / "recipes" / "word_problems_static.yaml", settings)
    make_adapter(folder / "static", static)
    return folder


@pytest.mark.parametrize(
    ("adapter", "condition", "arguments", "models"),
    [
        ("adapter", "learned", [], ["assistant", "base"]),
        ("adapter", "none", ["--no-thoughts"], ["base"]),
        ("adapter", "learned", ["evaluation.strategy=speculative"], ["assistant", "base"]),
        ("adapter", "none", ["--no-thoughts", "evaluation.draft=1"], ["base", "assistant"]),
        ("static", "learned", [], ["base"]),
    ],
)
def test_it_says_what_evaluation_decodes_and_loads_what_it_needs(
    folder, loaded, monkeypatch, capsys, adapter, condition, arguments, models
):
    recipe = load_recipe(folder / adapter / "recipe.yaml")
    evaluate(recipe, folder / adapter)
    (path,) = recipe.run_dir.glob(f"evaluation/*/{condition}.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    questions = [example.problem.question for example in Experiment(recipe).splits.test]
    loaded.clear()
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n".join(questions) + "\n"))
    assert main([str(folder / adapter), *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.out == "".join(record["output"] + "\n" for record in records)
    assert captured.err.count("(cut: evaluation.max_new_tokens=12") == sum(record["cut"] for record in records)
    assert loaded == models


def test_free_vectors_need_no_weights_of_an_assistant(folder, loaded, tmp_path, capsys):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "assistant/model.safetensors").unlink()
    assert main([str(copy / "static"), f"assistant.model={copy}/assistant", "--question", "tom has 2 coins ."]) == 0
    assert loaded == ["base"]


@pytest.mark.parametrize(
    ("question", "stdin", "message"),
    [
        ("", "", "the question is empty"),
        (" \t\n", "", "the question is empty"),
        ("how many\0 coins", "", "holds a NUL character"),
        ("how many \udcff coins", "", "is not UTF-8 text"),
        (None, "", "no question on standard input"),
        (None, "\n  \n", "no question on standard input"),
        (None, "tom\0\n", "holds a NUL character"),
        (None, b"tom \xff\n", "standard input is not UTF-8 text"),
        ("coins " * 2000, "", "tokens, which leaves no room in the base's 512"),
    ],
)
def test_a_question_that_cannot_be_answered_is_said_before_a_model_is_loaded(
    folder, loaded, monkeypatch, capsys, question, stdin, message
):
    text = stdin if isinstance(stdin, bytes) else stdin.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
    arguments = [] if question is None else ["--question", question]
    assert main([str(folder / "adapter"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert loaded == []


def test_an_answer_ends_where_the_context_does(folder, loaded, capsys):
    question = "tom has 23 coins . " * 80
    assert main([str(folder / "adapter"), "evaluation.max_new_tokens=100000", "--question", question]) == 0
    assert "the end of the context)" in capsys.readouterr().err


def test_a_prompt_that_fills_the_context_leaves_no_room(folder, monkeypatch):
    adapter = softcot_ds.load(folder / "adapter")
    prompt = adapter.experiment.base_prompts.with_thoughts("tom has 2 coins .")
    length = len(prompt.prefix_ids) + len(prompt.suffix_ids) + 4
    monkeypatch.setattr(inference, "context_length", lambda config: length + 1)
    assert adapter.question("tom has 2 coins .").prompt == prompt
    monkeypatch.setattr(inference, "context_length", lambda config: length)
    with pytest.raises(SoftCoTError, match=f"makes {length} tokens, which leaves no room"):
        adapter.question("tom has 2 coins .")


def test_sampled_answers_are_repeated_by_the_seed(folder, capsys):
    answers = []
    for seed in (7, 7, 2**64 - 1):
        arguments = [f"seed={seed}", "evaluation.temperature=2", "--question", "tom has 2 coins ."]
        assert main([str(folder / "adapter"), *arguments]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]
